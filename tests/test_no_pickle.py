"""No pickle is written, none is read but in the converter's child, and nothing in a file is ever run."""

import ast
import json
import os
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import hostile_weights as hostile
import numpy as np
import pytest
from models import variants

from calotype import cli
from calotype.pipeline import hashes

ROOT = Path(__file__).parents[1]
ROOMS = ("calotype", "stage1_vae", "stage2_diffusion", "pipeline", "demo")
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


def converts(place, few):
    """Pickles of every opcode by which something can be called, for the converter."""
    trace, root = place / "trace", place / "root"
    payloads = list(hostile.payloads(trace).items())
    for i, (name, content) in enumerate(payloads[:few]):
        file = root / f"pickle {i}{('.ckpt', '.pt', '.pth', '.bin')[i % 4]}"
        file.write_bytes(content)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]
    for name, make in list(hostile.ARCHIVES.items())[:few]:
        file = make(root / f"{name}.ckpt", trace)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]
    for name, content in hostile.HEADERS.items():
        file = root / f"{name}.safetensors"
        file.write_bytes(content)
        yield f"convert, {name}", ["convert", str(file), "--out", str(place / "out")]


def model_folders(place):
    """Model folders that are hostile in one place each: name, folder."""
    root, plain = place / "root", place / "models/class"
    evil = hostile.CODE.format(str(place / "trace"))

    def model(name, source=plain):
        return hostile.copied(source, root / "models" / name)

    for part in ("vae", "unet"):
        folder = model(f"pickled {part}")
        (folder / part / "diffusion_pytorch_model.safetensors").unlink()
        hostile.zipped(folder / part / "diffusion_pytorch_model.bin", place / "trace")
        yield folder
    folder = model("pickled words", place / "models/text")
    (folder / "text_encoder/model.safetensors").unlink()
    hostile.zipped(folder / "text_encoder/pytorch_model.bin", place / "trace")
    yield folder
    for name, entry in {
        "a module beside it": ["evil", "Evil"], "the system": ["os", "system"], "a process": ["subprocess", "Popen"],
        "another part": ["diffusers", "DiffusionPipeline"], "no class": ["diffusers", {"a": 1}],
    }.items():  # fmt: skip
        folder = model(f"unet is {name}")
        (folder / "evil.py").write_text(evil)
        (folder / "unet/evil.py").write_text(evil)
        hostile.altered(folder / "model_index.json", unet=entry)
        yield folder
    for name, entry in {"its own": ["evil", "Evil"], "text": "evil.Evil", "stock": "StableDiffusionXLPipeline"}.items():
        folder = model(f"class is {name}")
        (folder / "evil.py").write_text(evil)
        hostile.altered(folder / "model_index.json", _class_name=entry)
        yield folder
    for name, more in {
        "code of its own": {"auto_map": {"AutoModel": "evil.Evil"}}, "quantised": {"quantization_config": {"a": 1}},
        "endless": {"layers_per_block": 10**6}, "vast": {"block_out_channels": [10**12, 10**12]},
        "wide": {"block_out_channels": [2**20, 2**20]},
    }.items():  # fmt: skip
        folder = model(f"unet {name}")
        (folder / "unet/evil.py").write_text(evil)
        hostile.altered(folder / "unet/config.json", **more)
        yield folder
    for name, more in {"foreign": {"_class_name": "os.system"}, "endless": {"num_train_timesteps": 10**7}}.items():
        folder = model(f"scheduler {name}")
        hostile.altered(folder / "scheduler/scheduler_config.json", **more)
        yield folder
    for name, text in {
        "deep": "[" * 10**5,
        "endless": f'{{"a": {"9" * 5000}}}',
        "large": " " * 17_000_000,
        "list": "[]",
    }.items():
        folder = model(f"index {name}")
        (folder / "model_index.json").write_text(text)
        yield folder
    for name, content in {"tokenizer.json": "{", "tokenizer_config.json": '{"added_tokens_decoder": 3}'}.items():
        folder = model(f"broken {name}", place / "models/text")
        (folder / "tokenizer" / name).write_text(content)
        yield folder
    folder = model("steps without end")
    hostile.altered(folder / "model_index.json", default_steps=10**6)
    yield folder
    folder = model("hashes that climb")
    climbing = {"format": 1, "files": {"../../../canary.txt": "0"}}
    (folder / "sha256.json").write_text(json.dumps(climbing))
    yield folder
    for name, content in list(hostile.HEADERS.items()):
        folder = model(f"weights with {name}")
        (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(content)
        yield folder


def flags(place, finished):
    """Every other flag by which a user names a file or folder: name, words."""
    root, trace, canary = place / "root", place / "trace", place / "canary.txt"
    bin_model = root / "models/pickled unet"
    pickled = hostile.zipped(root / "weights.ckpt", trace)
    data, latents, out = str(finished / "data.json"), str(finished / "latents"), str(place / "out")
    words = {
        "MODEL is a pickle": ["generate", str(pickled), "--out", out],
        "--vae is a pickle": ["encode", data, "--vae", str(pickled), "--out", out],
        "--vae holds a pickle": ["encode", data, "--vae", str(root / "models/pickled vae/vae"), "--out", out],
        "embed --vae": ["embed", data, "--vae", str(root / "models/pickled vae/vae"), "--out", f"{out}.npz"],
        "train-vae --init": ["train-vae", data, "--init", str(root / "models/pickled vae/vae"), "--out", out],
        "--init holds a pickle": ["train-diffusion", "--latents", latents, "--init", str(bin_model), "--out", out],
        "--guide holds a pickle": ["export", "--run", str(finished), "--guide", str(bin_model / "unet"), "--out", out],
        "--run is hostile": ["export", "--run", str(bin_model), "--out", out],
        "--config is a pickle": ["generate", str(place / "models/class"), "--config", str(pickled), "--out", out],
        "regenerate a pickle": ["regenerate", str(pickled), "--model", str(place / "models/class")],
        "demo": ["demo", str(bin_model)],
        "edit a pickle": ["edit", str(place / "models/class"), "--image", str(pickled), "--out", out],
    }  # fmt: skip
    features, evaluate = root / "features", ["evaluate", str(finished), "-n", "8", "--reference", "train", "--features"]
    for name, config in {
        "code": {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"},
        "pickle": {"_class_name": "AutoencoderKL"},
        "words": {"model_type": "vit"},
    }.items():
        (features / name).mkdir(parents=True)
        (features / name / "config.json").write_text(json.dumps(config))
        (features / name / "evil.py").write_text(hostile.CODE.format(str(trace)))
        for file in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            hostile.zipped(features / name / file, trace)
        words[f"--features with {name}"] = [*evaluate, str(features / name)]
    for name, elsewhere in {"climbing": os.path.relpath(canary, features), "absolute": canary}.items():
        file = hostile.external_onnx(features / f"{name}.onnx", elsewhere)
        words[f"--features {name} ONNX"] = [*evaluate, str(file)]
    words |= hostile_latents(place, finished) | hostile_text(place, finished) | hostile_checkpoint(place, finished)
    return words


def hostile_latents(place, finished):
    found = {}
    for name, shard in {
        "a pickle": "shard.pt",
        "elsewhere": "../../canary.txt",
        "absolute": str(place / "canary.txt"),
    }.items():
        folder = place / "root" / f"latents {name}"
        folder.mkdir()
        index = json.loads((finished / "latents/index.json").read_text())
        index["shards"] = {"train": [shard], "val": [shard]}
        (folder / "index.json").write_text(json.dumps(index))
        hostile.zipped(folder / "shard.pt", place / "trace")
        words = ["train-diffusion", "--latents", str(folder), "--vae", str(finished / "stage1_vae/vae")]
        found[f"--latents names {name}"] = [*words, "--data", str(finished / "data.json"), "--out", str(place / "out")]
    return found


def hostile_text(place, finished):
    folder = place / "root/models/pickled words"
    words = ["train-diffusion", "--latents", str(finished / "latents"), "--condition", "text"]
    return {"--text-encoder": [*words, "--text-encoder", str(folder), "--out", str(place / "out")]}


def hostile_checkpoint(place, finished):
    """A run that was begun, with pickles under the names of a checkpoint."""
    run = place / "root/run"
    words = [
        "train-vae",
        str(finished / "data.json"),
        "--width",
        "8",
        "--factor",
        "2",
        "--steps",
        "2",
        "--out",
        str(run),
    ]
    words += ["--precision", "fp32", "--batch-size", "2"]
    assert cli.main(words) == 0
    for folder in (run / "checkpoints").iterdir():
        for file in [*folder.glob("*.safetensors"), folder / "optimizer.pt"]:
            hostile.zipped(file, place / "trace")
    (run / "finished.json").unlink(missing_ok=True)
    return {"a checkpoint of pickles": [*words, "--resume"]}


@pytest.mark.reliability
def test_nothing_hostile_is_run_and_each_is_refused_in_one_line(place, finished, sized, tmp_path):
    cases = dict(converts(place, sized(3, 100)))
    folders = list(model_folders(place))
    out = str(place / "out")
    cases |= {f"model, {folder.name}": ["generate", str(folder), "-n", "1", "--out", out] for folder in folders}
    cases |= flags(place, finished)
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
