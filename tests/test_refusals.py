"""Every refusal that the command line knows, word for word: refusals.txt holds the line that is typed and the answer.

A new one is a line `$ calotype …` in that file; REWRITE_REFUSALS=1 has the answers written anew, to be read before they
are committed.
"""

import json
import os
import re
import shlex
import shutil
import signal
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calotype import checkpoint, cli, shapes

pytestmark = pytest.mark.reliability

FILE = Path(__file__).with_name("refusals.txt")
CASES = re.findall(r"^\$ calotype ?(.*)\n(.*)\n", FILE.read_text(encoding="utf-8"), re.MULTILINE)
# A sentence that says what to do has one of these.
WAYS_OUT = (
    "give try leave add run did name make remove rename restore free finish choose install put lists fetch train "
    "fill mend move needs write export encode turn evaluate type copy move must unpack it knows start shorten "
    "without wait label"
).split()


@pytest.fixture(scope="module")
def house(pictures, finished, two_numbers, tmp_path_factory):
    """A folder with what the lines speak of: pictures good and bad, runs whole, unfinished and damaged."""
    house = tmp_path_factory.mktemp("refusals") / "house"
    house.mkdir()
    os.symlink(pictures, house / "pictures")
    shutil.copytree(finished, house / "run")
    shutil.copytree(two_numbers, house / "numbers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        _sources()
        _files()
        _runs()
    return house


def _sources():
    for name, count in (("flat", 6), ("beside", 2), ("mixed", 4), ("bombs", 1), ("bad", 3), ("labelled", 2)):
        Path(name).mkdir()
        for i in range(count):
            shapes.render(shapes.draw_factors(0, i, shapes.PLAIN), (16, 16)).save(f"{name}/{i}.png")
    for folder in ("empty", "texts", "beside/class", "mixed/class"):
        Path(folder).mkdir()
    Path("texts/a.txt").write_text("no picture")
    shutil.copy("flat/0.png", "mixed/class/0.png")
    for i in range(3):
        Path(f"bad/no{i}.jpg").write_text("<html>")
    Path("bombs/bomb.png").write_bytes(_png_header(60_000, 60_000))
    for name, lines in (("metadata.jsonl", '{"label": "red"}'), ("twice.jsonl", "")):
        Path("labelled", name).write_text(lines)
    for name, line in {
        "lines": "not JSON",
        "outside": '{"file_name": "../flat/0.png"}',
        "partly": '{"file_name": "0.png", "label": "red"}\n{"file_name": "1.png"}',
        "none": "",
    }.items():
        shutil.copytree("beside", f"metadata-{name}", ignore=shutil.ignore_patterns("class"))
        Path(f"metadata-{name}/metadata.jsonl").write_text(line)


def _png_header(width, height):
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\x00\x00\x00\x00IEND\xaeB`\x82"


def _files():
    for name, text in {
        "typo.json": '{"batch_sze": 3}',
        "strange.json": '{"zzz": 3}',
        "word.json": '{"steps": "many"}',
        "true.json": '{"steps": true}',
        "nan.json": '{"lr": NaN}',
        "list.json": "[1]",
        "torn.json": '{"steps":',
        "two.json": '{"batch_size": 10, "micro_batches": 3}',
    }.items():
        Path(name).write_text(text)
    Path("weights.ckpt").write_bytes(b"no checkpoint")
    Path("notes.txt").write_text("mine")
    Image.linear_gradient("L").resize((16, 16)).save("plain.png")
    Path("short.txt").write_text("abc\n")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("years of work")


def _runs():
    for name in ("damaged", "newer", "stray"):
        shutil.copytree("run/stage1_vae", name)
    Path("damaged/finished.json").unlink()
    for state in checkpoint.steps(Path("damaged/checkpoints")):
        file = state / "vae.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    Path("newer/config.json").write_text("{")
    Path("stray/config.json").unlink()
    shutil.copytree(
        "run/data.json".rpartition("/")[0], "sheet", ignore=shutil.ignore_patterns("*_*", "latents", "pipe*")
    )
    Path("sheet/manifest.jsonl").write_text(Path("sheet/manifest.jsonl").read_text() + " ")
    shutil.copytree("run/stage1_vae/vae", "other-vae")
    config = json.loads(Path("other-vae/config.json").read_text())
    Path("other-vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    shutil.copytree("run/stage1_vae/vae", "nan-vae")
    shutil.copytree("run/stage1_vae/vae", "poor-vae")
    for name, change in (("nan-vae", lambda t: t * torch.nan), ("poor-vae", None)):
        file = next(Path(name).glob("*.safetensors"))
        tensors = load_file(file)
        first = sorted(tensors)[0]
        tensors |= {first: change(tensors[first])} if change else {}
        save_file({k: v for k, v in tensors.items() if change or k != first}, file)
    shutil.copytree("run/stage2_diffusion", "half", ignore=shutil.ignore_patterns("finished.json"))
    shutil.copytree("run/latents", "torn")
    assert cli.main(["data", "flat", "--image-size", "16", "--out", "flatrun"]) == 0
    Path("torn/index.json").write_text("{}")


@pytest.fixture
def as_it_was(monkeypatch):
    """The demo furnishes its process for good; here others come after it."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir())
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)


def answer(line, house, capsys):
    """What the command line says to a line, without the places that differ between machines."""
    capsys.readouterr()
    code = cli.main(shlex.split(line))
    said = capsys.readouterr().err.splitlines()
    for name in ("x", "y"):
        shutil.rmtree(house / name, ignore_errors=True)
    assert code == 2, (line, code, said)
    message = said[-1]
    for folder in {house, house.resolve(), (house / "pictures").resolve()}:
        message = message.replace(str(folder), "PICTURES" if "pictures" in folder.name else "HOUSE")
    return message.replace(str(Path.home()), "~")


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_what_is_refused_is_told_in_these_words(line, expected, house, as_it_was, monkeypatch, capsys):
    monkeypatch.chdir(house)
    found = answer(line, house, capsys)
    if os.environ.get("REWRITE_REFUSALS"):
        text = FILE.read_text(encoding="utf-8")
        FILE.write_text(
            text.replace(f"$ calotype {line}\n{expected}\n", f"$ calotype {line}\n{found}\n"), encoding="utf-8"
        )
        return
    assert found == expected


@pytest.mark.parametrize("message", [message for _, message in CASES])
def test_it_says_what_where_and_the_way_out(message):
    assert message.startswith("calotype: ") and message.isprintable()
    text = message.removeprefix("calotype: ")
    assert re.search(
        r"--[a-z]|\b(SOURCE|MODEL|RUN|FILE|LABEL|FROM|TO)\b|[\w-]+\.(json|jsonl|png|ckpt|txt)\b|-n |'|[\w-]+/", text
    ), "names no place"
    end = re.split(r"; |, or |\(|: ", text, maxsplit=1)[-1]
    assert any(re.search(rf"\b{word}\b", end) for word in WAYS_OUT), "has no way out"
    assert len(text) < 420 and "Traceback" not in text


def test_there_are_enough_and_none_twice():
    lines = [line for line, _ in CASES]
    assert len(lines) >= 60 and len(set(lines)) == len(lines)
    commands = set(cli.COMMANDS) - {"report", "doctor"}
    assert [name for name in commands if not any(line.startswith(f"{name} ") for line in lines)] == []
