"""`calotype generate --reproducible` and `calotype regenerate`: the same picture again, and a word where it is not."""

import shutil

import numpy as np
import pytest
import torch
from models import variants
from PIL import Image

from calotype import cli
from calotype.pipeline import hashes
from calotype.pipeline.png import read_facts, write_png
from calotype.pipeline.samplers import SAMPLERS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, pipe in variants().items():
        pipe.save_pretrained(root / name)
        hashes.write(root / name)
    Image.new("RGB", (16, 16), (40, 90, 200)).save(root / "photo.png")
    return root


def generate(model, out, *words):
    assert cli.main(["generate", str(model), *map(str, words), "--out", str(out), "--precision", "fp32"]) == 0
    return sorted(out.rglob("*.png"))


def regenerate(file, *words):
    return cli.main(["regenerate", str(file), *map(str, words)])


def pixels(file):
    return np.asarray(Image.open(file), dtype=int)


def changed(file, out, **facts):
    """A copy of a picture that says something else of itself; None takes a fact away."""
    told = read_facts(file) | {name.replace("_", "-"): value for name, value in facts.items()}
    write_png(Image.open(file), out, {name: value for name, value in told.items() if value is not None})
    return out


@pytest.mark.parametrize(
    "name, words",
    [
        ("class", ["red", "--sampler", "heun", "--guidance", "2.5", "--guidance-interval", "0.1", "0.8"]),
        ("class", ["--size", "20x16", "--guidance-rescale", "0.3"]),
        ("text", ["a blue disc", "--steps", "5"]),
        ("fast", ["blue", "--fast"]),
        ("guide", []),
        ("none", []),
    ],
)
def test_a_reproducible_picture_comes_back_bit_by_bit(models, tmp_path, capsys, name, words):
    files = generate(models / name, tmp_path, *words, "-n", 3, "--seed", 7, "--reproducible")
    out = tmp_path / "again.png"
    assert regenerate(files[1], "--model", models / name, "--out", out) == 0
    assert "is the same picture, bit by bit" in capsys.readouterr().out
    assert np.array_equal(pixels(files[1]), pixels(out)) and read_facts(files[1]) == read_facts(out)


def test_a_picture_of_a_batch_comes_back_up_to_rounding(models, tmp_path, capsys):
    files = generate(models / "class", tmp_path / "out", "-n", 6)
    assert regenerate(files[3], "--model", models / "class") == 0
    assert "is the same picture" in capsys.readouterr().out
    again = files[3].with_name(f"{files[3].stem}-again.png")
    assert np.abs(pixels(files[3]) - pixels(again)).max() <= 1


def test_the_model_is_found_above_the_picture(models, tmp_path, capsys):
    shutil.copytree(models / "class", tmp_path / "run/pipeline")
    (file,) = generate(tmp_path / "run", tmp_path / "run/samples", "red", "-n", 1, "--reproducible")
    assert regenerate(file) == 0
    assert not any(str(tmp_path) in text for text in read_facts(file).values())  # no path of this machine
    moved = shutil.copy(file, tmp_path / "elsewhere.png")
    assert regenerate(moved) == 2
    assert "give it by that flag" in capsys.readouterr().err


def test_other_weights_are_refused(models, tmp_path, capsys):
    (file,) = generate(models / "class", tmp_path / "out", "red", "-n", 1)
    for other, what in ((models / "fast", "another part, such as"), (models / "none", "the diffusion model")):
        assert regenerate(file, "--model", other) == 2
        message = capsys.readouterr().err
        assert f"--model {other}: {what}" in message and message.count("\n") == 1
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(
    "facts, reason",
    [
        ({"parts": None, "size": None}, "does not carry size, parts,"),
        ({"given": "image and mask"}, "was made from a picture that it does not hold"),
        ({"edit": "brushed"}, "was made from a picture that it does not hold"),
        ({"amount": "1.0"}, "is the sum of codes"),
        ({"from": "3"}, "lies on a way between two ends"),
        ({"sheet": "label by seed"}, "is a sheet of many"),
        ({"model": ""}, "never saved"),
        ({"seed": "-1"}, "--seed -1 must be a whole number"),
        ({"steps": "many\nof them"}, "steps 'many\\nof them' cannot be read"),
        ({"steps": "1000000"}, "--steps 1000000 must be a whole number from 1 to 1000"),
        ({"guidance": "nan"}, "--guidance nan must be a number"),
        ({"guidance_interval": "0.5"}, "guidance-interval '0.5' cannot be read"),
        ({"size": "99999x16"}, "--size, height 99999 must be"),
        ({"size": "17x16"}, "--size, height 17 must be"),
        ({"precision": "fp8"}, "precision 'fp8' must be fp32 or bf16"),
        ({"label": "purple"}, "LABEL 'purple' is not known"),
    ],
)
def test_pictures_that_cannot_be_drawn_again(models, tmp_path, capsys, facts, reason):
    (file,) = generate(models / "class", tmp_path / "out", "red", "-n", 1)
    assert regenerate(changed(file, tmp_path / "x.png", **facts), "--model", models / "class") == 2
    message = capsys.readouterr().err
    assert reason in message and message.count("\n") == 1, message
    assert not (tmp_path / "x-again.png").exists()


def test_pictures_of_others(models, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    (file,) = generate(models / "class", tmp_path / "out", "red", "-n", 1)
    (tmp_path / "half.png").write_bytes(file.read_bytes()[:-60])
    for path, reason in (
        (models / "photo.png", "does not carry how it was drawn"),
        (tmp_path / "text.png", "is no PNG that can be read"),
        (tmp_path / "half.png", "is damaged"),
        (tmp_path / "nothing.png", "is not there"),
        (tmp_path, "is not there"),
    ):
        assert regenerate(path, "--model", models / "class") == 2
        message = capsys.readouterr().err
        assert f"FILE {path} {reason}" in message and message.count("\n") == 1
    assert regenerate(file, "--model", models / "class", "--out", file) == 2
    assert "is FILE itself" in capsys.readouterr().err


def test_a_picture_that_was_painted_over_is_told_from_its_model_s(models, tmp_path, capsys):
    (file,) = generate(models / "class", tmp_path / "out", "red", "-n", 1)
    painted, small = Image.open(file), Image.open(file).resize((8, 8))
    facts = read_facts(file)
    painted.putpixel((3, 3), (255, 0, 255))
    for image, word in ((painted, "FILE was changed after it was drawn"), (small, "has another size or mode")):
        write_png(image, tmp_path / "x.png", facts)
        assert regenerate(tmp_path / "x.png", "--model", models / "class") == 1
        assert word in capsys.readouterr().out


def test_pictures_made_of_others_say_so(models, tmp_path, capsys):
    words = ["edit", str(models / "class"), "--image", str(models / "photo.png"), "--out", str(tmp_path / "edited")]
    assert cli.main([*words, "--precision", "fp32"]) == 0
    words = ["interpolate", str(models / "none"), "1", "2", "-n", "2", "--out", str(tmp_path / "way")]
    assert cli.main([*words, "--precision", "fp32"]) == 0
    for file in ("edited/photo.png", "way/000.png"):
        assert regenerate(tmp_path / file, "--model", models / "class") == 2
    message = capsys.readouterr().err
    assert "a picture that it does not hold" in message and "a way between two ends" in message


@pytest.mark.reliability
def test_every_reproducible_picture_comes_back_bit_by_bit(models, tmp_path, capsys, sized):
    """Drawn in batches of any size, with every sampler, by a label or a prompt, fast or not."""
    count, files, left = sized(10, 100), [], sized(10, 100)
    ways = [("class", ["red"]), ("text", ["a blue disc"]), ("fast", ["blue", "--fast"]), ("guide", []), ("vq", [])]
    for i in range(count):
        name, words = ways[i % len(ways)]
        sampler = [] if "--fast" in words else ["--sampler", SAMPLERS[i % len(SAMPLERS)]]
        n = min(1 + i % 7, left)
        words = [*words, *sampler, "--seed", 100 * i, "--steps", 1 + i % 5, "-n", n, "--batch-size", 1 + i % 4]
        files += [(models / name, f) for f in generate(models / name, tmp_path / f"{i}", *words, "--reproducible")]
        left -= n
        if not left:
            break
    for model, file in files:
        assert regenerate(file, "--model", model, "--out", tmp_path / "again.png") == 0
        assert np.array_equal(pixels(file), pixels(tmp_path / "again.png"))
    assert len(files) == count and capsys.readouterr().out.count("bit by bit") == count
    print(f"{count} of {count} pictures came back bit by bit.")


def test_one_thread_or_two_one_picture_or_sixteen():
    pipe = variants()["class"]
    before = torch.get_num_threads()
    try:
        found = []
        for threads, count in ((1, 16), (2, 16), (2, 3), (1, 1)):
            torch.set_num_threads(threads)
            found.append(pipe("red", count, seed=5, reproducible=True, output_type="latent").images)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(some, found[0][: len(some)]) for some in found)
    alone = pipe("red", 1, seed=12, reproducible=True, output_type="latent").images
    assert torch.equal(alone[0], found[0][7])


def test_reproducible_pictures_develop_together_and_can_be_left():
    pipe = variants()["fast"]
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    events = pipe.stream(["red", "blue", None], seed=3, reproducible=True, guidance_scale=1.0)
    first = next(events)
    assert len(first.images) == 3 and (first.step, first.steps) == (1, 3) and len(calls) == 3
    events.close()
    assert len(calls) == 3
    for output_type in ("np", "pt", "pil"):
        apart = pipe(["red", "blue", None], seed=3, reproducible=True, output_type=output_type).images
        together = pipe(["red", "blue", None], seed=3, output_type=output_type).images
        assert len(apart) == 3 and type(apart) is type(together)
    assert np.abs(np.stack(list(map(np.asarray, apart))).astype(int) - np.stack(together)).max() <= 1


@pytest.mark.parametrize("name, more", [("class", {"sampler": "heun", "low": 0.2}), ("fast", {"fast": True})])
def test_pictures_of_the_demo_carry_the_same(models, tmp_path, capsys, name, more):
    from calotype.demo.studio import Studio
    from calotype.pipeline.model_folder import load

    studio = Studio(load(models / name), folder=models / name)
    request = studio.request("", 3, 11, 2, 1.75, **more)
    images = list(studio.develop(request))[-1].images
    for i, image in enumerate(images):
        write_png(image, tmp_path / f"{i}.png", studio.facts(request.alone(i)))
        assert regenerate(tmp_path / f"{i}.png", "--model", models / name) == 0
    assert capsys.readouterr().out.count("is the same picture") == 3
