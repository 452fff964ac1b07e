"""`calotype edit` and `calotype interpolate` against the pipeline and the functions that they stand for."""

import numpy as np
import pytest
from models import pipeline, tiny_unet
from PIL import Image
from test_editing import NAMES, picture

from calotype import cli
from calotype.pipeline import LatentDiffusionPipeline, latent_space


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("edit")
    pipeline(tiny_unet(classes=3), id2label=NAMES).save_pretrained(root / "model")
    for name, count in (("photographs", 2), ("plus", 3), ("minus", 2)):
        (root / name).mkdir()
        for i in range(count):
            picture(10 * len(name) + i).save(root / name / f"photo {i}.png")
    Image.fromarray(np.tri(16, dtype=np.uint8) * 255).save(root / "mask.png")
    return root


@pytest.fixture(scope="module")
def pipe(model):
    pipe = LatentDiffusionPipeline.from_pretrained(model / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(command, model, out, *words):
    return cli.main([command, str(model / "model"), *map(str, words), "--out", str(out), "--precision", "fp32"])


def same(file, image):
    assert np.abs(np.asarray(Image.open(file), dtype=int) - np.asarray(image, dtype=int)).max() <= 1


def test_every_picture_is_changed_and_keeps_its_name(model, pipe, tmp_path):
    words = ["red", "--image", model / "photographs", "--strength", 0.5, "--seed", 4]
    assert call("edit", model, tmp_path, *words) == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == ["photo 0.png", "photo 1.png"]
    given = Image.open(model / "photographs/photo 1.png")
    same(tmp_path / "photo 1.png", pipe("red", image=given, strength=0.5, seed=5).images[0])
    facts = Image.open(tmp_path / "photo 1.png").text
    assert (facts["calotype:seed"], facts["calotype:strength"], facts["calotype:label"]) == ("5", "0.5", "red")


def test_a_part_is_repainted_several_times(model, pipe, tmp_path):
    given = model / "photographs/photo 0.png"
    assert call("edit", model, tmp_path, "--image", given, "--mask", model / "mask.png", "-n", 2) == 0
    expected = pipe(image=Image.open(given), mask=Image.open(model / "mask.png"), seed=1).images[0]
    same(tmp_path / "photo 0-00000001.png", expected)
    kept = np.asarray(Image.open(model / "mask.png")) == 0
    assert (
        np.asarray(Image.open(tmp_path / "photo 0-00000000.png"))[kept] == np.asarray(Image.open(given))[kept]
    ).all()


def test_codes_are_moved_from_one_mean_to_another(model, pipe, tmp_path):
    words = ["--plus", model / "plus", "--minus", model / "minus", "--amount", 0.7, "--batch-size", 2]
    assert call("edit", model, tmp_path, "--image", model / "photographs", *words) == 0
    images = {
        name: [Image.open(f) for f in sorted((model / name).iterdir())] for name in ("photographs", "plus", "minus")
    }
    expected = latent_space.arithmetic(pipe, images["photographs"], [images["plus"]], [images["minus"]], 0.7)
    for i in range(2):
        same(tmp_path / f"photo {i}.png", expected[i])


def test_the_way_between_seeds_and_pictures(model, pipe, tmp_path, capsys):
    words = [1, 2, "-n", 3, "--label", "red", "--to-label", "blue"]
    assert call("interpolate", model, tmp_path / "seeds", *words) == 0
    for file, image in zip(
        sorted((tmp_path / "seeds").glob("*.png")), latent_space.interpolate(pipe, 1, 2, 3, ("red", "blue"))
    ):
        same(file, image)
    film = Image.open(tmp_path / "seeds/animation.webp")
    assert film.n_frames == 4 and film.size == (256, 256)
    assert "dB" not in capsys.readouterr().out
    photo = model / "photographs/photo 0.png"
    assert call("interpolate", model, tmp_path / "pictures", photo, 2, "-n", 2) == 0
    assert "FROM comes back from its noise with" in capsys.readouterr().out
    text = Image.open(tmp_path / "pictures/000.png").text
    assert text["calotype:from"] == "photo 0.png" and str(model) not in str(text)


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("edit", ["--image", "nowhere.png"], "--image nowhere.png"),
        ("edit", ["--image", "photo", "--strength", "2"], "--strength 2"),
        ("edit", ["--image", "photo", "--plus", "."], "--plus and --minus go together"),
        ("edit", ["--image", "photo", "--plus", "x", "--minus", "y", "-n", "2"], "move codes and draw nothing"),
        ("edit", ["--image", "photo", "--plus", "nowhere", "--minus", "y"], "--plus nowhere is not a folder"),
        ("edit", ["purple", "--image", "photo"], "LABEL 'purple' is not known"),
        ("interpolate", ["1", "nowhere.png"], "TO nowhere.png"),
        ("interpolate", ["1", "2", "-n", "1"], "-n 1"),
        ("generate", ["--size", "15"], "--size, height 15 must be 16 or more"),
        ("generate", ["--image", "photo"], "change pictures with `calotype edit`"),
    ],
)
def test_errors_name_the_flag(model, tmp_path, capsys, command, words, message):
    photo = str(model / "photographs/photo 0.png")
    assert call(command, model, tmp_path / "out", *(photo if word == "photo" else word for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_larger_pictures_from_the_command_line(model, tmp_path):
    assert call("generate", model, tmp_path, "red", "-n", 1, "--size", "24x32") == 0
    assert Image.open(next(tmp_path.glob("*.png"))).size == (32, 24)
