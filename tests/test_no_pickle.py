"""No pickle is written, none is read but in the converter's child, and nothing in a file is ever run."""

import ast
import json
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import hostile_cases
import hostile_weights as hostile
import numpy as np
import pytest
from models import variants

from calotype import cli
from calotype.pipeline import hashes

ROOT = Path(__file__).parents[1]
ROOMS = ("calotype", "stage1_vae", "stage2_diffusion", "density", "pipeline", "demo")
OPENER = ROOT / "calotype/unpickle.py"
FILES = [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = ("torch.load", "torch.hub.load", "torch.jit.load", "torch.hub.load_state_dict_from_url", "exec", "eval")
CANARY_WORDS = "calotype-canary"


# What the code says


def faults(file):
    """Calls and imports by which a file of ours could unpickle or run what it reads."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module
        elif isinstance(node, ast.Call):
            yield from called(node)


def called(node):
    name, words = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
    if name in CALLS or (
        name.endswith(".load") and "allow_pickle" in words and not is_constant(words["allow_pickle"], False)
    ):
        yield name
    if any(word in words and not is_constant(words[word], False) for word in ("trust_remote_code", "custom_pipeline")):
        yield f"{name}(trust_remote_code)"
    if name.endswith("from_pretrained") and name != "nn.Embedding.from_pretrained" and "local_files_only" not in words:
        yield f"{name} without local_files_only"


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_file_of_ours_unpickles_or_runs_what_it_reads(file):
    found = list(faults(file))
    assert found == (["torch.load"] if file == OPENER else [])


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(f)", "np.load(f, allow_pickle=True)", "exec(text)",
     "torch.hub.load('a', 'b')", "AutoModel.from_pretrained(p, local_files_only=True, trust_remote_code=True)",
     "AutoModel.from_pretrained(p)"],
)  # fmt: skip
def test_the_gate_would_see_it(tmp_path, line):
    (tmp_path / "wrong.py").write_text(f"def f(p):\n    {line}\n")
    assert len(list(faults(tmp_path / "wrong.py"))) == 1


# What a run leaves


def pickles(file):
    """Whether a file is a pickle, or an archive with one in it."""
    content = file.read_bytes()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return any(
                is_pickle(archive.read(name)) or is_object_array(archive.read(name)) for name in archive.namelist()
            )
    return is_pickle(content) or is_object_array(content)


def is_pickle(content):
    if content[:1] != b"\x80":
        return False
    try:
        return any(opcode.name == "STOP" for opcode, *_ in pickletools.genops(content))
    except Exception:
        return False


def is_object_array(content):
    return content[:6] == b"\x93NUMPY" and b"'|O'" in content[:200]


@pytest.mark.reliability
def test_a_finished_run_holds_no_pickle(finished, tmp_path):
    vae, sheet = str(finished / "stage1_vae/vae"), str(finished / "data.json")
    assert cli.main(["embed", sheet, "--vae", vae, "--out", str(tmp_path / "codes.npz")]) == 0
    assert cli.main(["export", "--run", str(finished), "--out", str(tmp_path / "stock"), "--stock"]) == 0
    files = [file for root in (finished, tmp_path) for file in root.rglob("*") if file.is_file()]
    assert len(files) > 40 and {".safetensors", ".json", ".npz"} <= {file.suffix for file in files}
    assert [file for file in files if pickles(file)] == []
    assert not {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy"} & {file.suffix for file in files}
    hostile.zipped(tmp_path / "x.pt", tmp_path / "trace")
    hostile.object_array(tmp_path / "x.npz", tmp_path / "trace")
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object))
    assert all(pickles(tmp_path / f"x.{suffix}") for suffix in ("pt", "npz", "npy"))


# What comes from elsewhere


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """root: what is hostile; canary: a file that nothing may open; trace: what is there if anything was run."""
    base = tmp_path_factory.mktemp("hostile")
    (base / "root").mkdir()
    (base / "canary.txt").write_text(CANARY_WORDS)
    for name, pipe in variants().items():
        if name in ("class", "text", "fast"):
            pipe.save_pretrained(base / "models" / name)
    return base


@pytest.mark.reliability
def test_nothing_hostile_is_run_and_each_is_refused_in_one_line(place, finished, sized, tmp_path):
    cases = dict(hostile_cases.converts(place, sized(3, 100)))
    folders = list(hostile_cases.model_folders(place))
    out = str(place / "out")
    cases |= {f"model, {folder.name}": ["generate", str(folder), "-n", "1", "--out", out] for folder in folders}
    cases |= hostile_cases.flags(place, finished)
    assert len(cases) >= 25
    warm_up = ["generate", str(place / "models/text"), "a blue disc", "-n", "1", "--out", str(tmp_path / "warm")]
    given = {"root": str(place / "root"), "canary": str(place / "canary.txt"), "warm-up": warm_up, "cases": cases}
    (tmp_path / "cases.json").write_text(json.dumps(given))
    command = [
        sys.executable,
        str(Path(__file__).with_name("watched.py")),
        *(str(tmp_path / f"{n}.json") for n in ("cases", "found")),
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdin=subprocess.DEVNULL, timeout=1200)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found.pop("the watch")["done"]) >= 4
    assert {name: entry["done"] for name, entry in found.items() if entry["done"]} == {}
    assert not (place / "trace").exists() and not list(tmp_path.glob("**/evil*")) and not (place / "out").exists()
    refused = {
        name: (e["code"], e["said"]) for name, e in found.items() if e["code"] != 2 or e["said"].count("\n") != 1
    }
    assert refused == {} and set(found) == set(cases)
    assert not any(CANARY_WORDS in entry["said"] for entry in found.values())
    print(f"{len(cases)} hostile artefacts: 0 run, {len(found)} refused in one line.")


@pytest.mark.reliability
def test_code_beside_a_good_model_is_not_run(place, tmp_path):
    """The folder's own pipeline.py is for those who have no Calotype."""
    folder = hostile.copied(place / "models/class", tmp_path / "model")
    for file in folder.glob("*.py"):
        file.write_text(hostile.CODE.format(str(place / "trace")))
    hashes.write(folder)
    assert cli.main(["generate", str(folder), "red", "-n", "1", "--out", str(tmp_path / "out")]) == 0
    assert not (place / "trace").exists() and len(list((tmp_path / "out").iterdir())) == 1
