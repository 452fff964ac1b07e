"""Who may import whom, and what a house of small rooms looks like."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "calotype": {"calotype"},
    "stage1_vae": {"calotype", "stage1_vae"},
    "stage2_diffusion": {"calotype", "stage2_diffusion", "pipeline"},
    "density": {"calotype", "density", "pipeline"},
    "pipeline": {"calotype", "pipeline"},
    "demo": {"calotype", "density", "pipeline", "demo"},
}
CONVERTER = ROOT / "calotype/unpickle.py"
BESIDE = {
    "labels",
    "order",
    "pictures",
    "prediction",
    "samplers",
}  # lie with the pipeline's own file in every saved model
TRAVELLERS = [ROOT / "pipeline" / f"{name}.py" for name in ("latent_diffusion", *sorted(BESIDE))]
FILES = [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]


def imported_rooms(file):
    """The rooms of ours that a file imports."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    ours = [name.split(".") for name in names if name.split(".")[0] == "calotype"]
    return {parts[1] if len(parts) > 1 and parts[1] in ROOMS else "calotype" for parts in ours}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_imports_point_downwards(file):
    allowed = set() if file in TRAVELLERS else ROOMS[file.parent.name]
    assert imported_rooms(file) <= allowed


def test_what_travels_imports_only_what_travels_with_it():
    """diffusers fetches what the pipeline's own file imports from beside it, but not what those import."""
    relative = {file.stem: relative_imports(file) for file in TRAVELLERS}
    assert relative == {"latent_diffusion": BESIDE} | {name: set() for name in BESIDE}


def relative_imports(file):
    nodes = ast.walk(ast.parse(file.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


def test_the_check_would_see_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from calotype.stage1_vae import models\nfrom calotype import data, demo\nimport calotype.pipeline\n"
    )
    assert imported_rooms(wrong) == {"stage1_vae", "calotype", "demo", "pipeline"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_rooms_stay_small_and_pickle_stays_out(file):
    text = file.read_text()
    assert text.count("\n") <= (540 if file.name == "latent_diffusion.py" else 330)
    assert not any(word in text for word in ("import pickle", "allow_pickle=True", str(ROOT)))
    if file != CONVERTER:
        assert "torch.load" not in text


def test_the_only_pickle_is_opened_for_weights_alone():
    loads = [node for node in ast.walk(ast.parse(CONVERTER.read_text())) if is_call_of_load(node)]
    assert len(loads) == 1
    assert ast.literal_eval({word.arg: word.value for word in loads[0].keywords}["weights_only"]) is True


def is_call_of_load(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"


def test_folders_are_flat():
    assert [p for room in ROOMS for p in (ROOT / room).iterdir() if p.is_dir() and p.name != "__pycache__"] == []
