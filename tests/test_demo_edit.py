"""What the tabs Edit and Interpolate draw, and how a drawing is stopped."""

import pytest
from PIL import Image
from studios import coloured, file_of, furthest, of_each_kind, photograph, png

from calotype.demo import edit, generate, parts
from calotype.demo import interpolate as interpolation
from calotype.demo.walks import Walk, walking
from calotype.errors import UserError
from calotype.pipeline import latent_space
from calotype.pipeline.pictures import edges_of


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where Gradio keeps its files."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def studio():
    return coloured()


@pytest.fixture(scope="module")
def models():
    return of_each_kind()


def test_what_is_not_brushed_stays_and_what_is_becomes_new(studio, tmp_path):
    large = photograph().resize((512, 512), Image.Resampling.NEAREST)
    layer = Image.new("RGBA", (512, 512))
    layer.paste((226, 145, 79, 255), (0, 0, 512, 256))
    sketch = {"background": file_of(large, tmp_path / "a.png"), "layers": [png(layer)]}
    order = edit.order_of(studio, sketch, edit.BRUSHED, 1, True)
    assert order["image"].tobytes() == photograph().tobytes()  # as it was before it was enlarged
    upper = edit.order_of(studio, sketch | {"layers": []}, "in the upper half", 1, True)
    assert order["mask"].tobytes() == upper["mask"].tobytes()
    files = finished(edit.editing(studio, sketch, edit.BRUSHED, 1, True, "red", 2, 3, False, 3, 1.5))
    for i, file in enumerate(files):
        image = Image.open(file)
        lower = (0, 8, 16, 16)
        assert image.crop(lower).tobytes() == photograph().crop(lower).tobytes()
        assert furthest(image.crop((0, 0, 16, 8)), photograph().crop((0, 0, 16, 8))) > 20
        wanted = {"edit": edit.BRUSHED, "strength": "1", "label": "red", "seed": str(3 + i), "guidance": "1.5"}
        assert wanted.items() <= {name[9:]: text for name, text in image.text.items()}.items()


def finished(events):
    *_, (_, gallery, note, *_) = events
    assert note.startswith("Seed ")
    return gallery["value"]


def test_strength_0_is_the_picture_and_1_is_a_drawing(studio, tmp_path):
    file = file_of(photograph(), tmp_path / "a.png")
    (same,) = finished(
        edit.editing(studio, {"background": file, "layers": []}, edit.ALL, 0, True, "", 1, 3, False, 3, 1)
    )
    assert furthest(Image.open(same), studio.pipe.reconstruct([photograph()])[0]) <= 1
    (new,) = finished(
        edit.editing(studio, {"background": file, "layers": []}, edit.ALL, 1, True, "", 1, 3, False, 3, 1)
    )
    assert (
        furthest(Image.open(new), studio.pipe(None, seed=3, num_inference_steps=3, guidance_scale=1.0).images[0]) <= 1
    )


def test_models_of_given_pictures_are_given_them(models, tmp_path):
    file = file_of(photograph((40, 60)), tmp_path / "a.png")
    sketch = {"background": file, "layers": []}
    given = photograph((40, 60)).crop((0, 10, 40, 50)).resize((16, 16), Image.Resampling.BICUBIC)
    order = edit.order_of(models["inpaint"], sketch, "in the middle", 0.5, True)
    assert order.keys() == {"image", "mask"} and order["mask"].getbbox() == (4, 4, 12, 12)
    assert furthest(order["image"], given) < 8  # torchvision's bicubic and Pillow's
    with pytest.raises(UserError, match="nothing is brushed"):
        edit.order_of(models["inpaint"], sketch, edit.BRUSHED, 0.5, True)
    assert edit.order_of(models["superres"], file, None, None, None)["image"].size == (4, 4)
    edges = edit.order_of(models["edges"], sketch, None, None, True)["image"]
    assert furthest(edges, edges_of(order["image"])) <= 1
    assert edit.order_of(models["edges"], sketch, None, None, False)["image"].tobytes() == order["image"].tobytes()
    line = Image.new("RGBA", (512, 512))
    line.paste((255, 255, 255, 255), (0, 0, 512, 32))
    drawn = edit.order_of(models["edges"], {"background": None, "layers": [png(line)]}, None, None, True)["image"]
    assert drawn.crop((0, 0, 16, 1)).getcolors() == [(16, (255, 255, 255))]
    assert drawn.crop((0, 1, 16, 16)).getcolors() == [(240, (0, 0, 0))]
    for name, sent in (("inpaint", sketch), ("superres", file), ("edges", sketch)):
        files = finished(edit.editing(models[name], sent, "in the left half", 0.5, True, "", 1, 0, False, 2, 1))
        assert Image.open(files[0]).size == (16, 16)


def test_edits_of_nothing_are_refused(studio, models):
    nothing = {"background": None, "layers": []}
    for name in ("inpaint", "superres", "edges", "class"):
        with pytest.raises(UserError, match="no picture yet"):
            edit.order_of(models[name], nothing, edit.ALL, 0.5, True)
        with pytest.raises(UserError, match="no picture yet"):
            edit.order_of(models[name], None, edit.ALL, 0.5, True)
    for region in ("nowhere", None, [1]):
        with pytest.raises(UserError, match="is no region"):
            edit.mask_of(studio, region, None)


# Walks


def test_ends_of_a_walk_between_seeds_are_their_drawings(studio):
    walk = Walk(4, 9, ("red", "blue"), studio.request("", 3, 0, 3, 1.5))
    *_, last = walking(studio, walk)
    ends = [studio.pipe(label, seed=seed, num_inference_steps=3).images[0] for seed, label in ((4, "red"), (9, "blue"))]
    assert furthest(last.images[0], ends[0]) <= 1 and furthest(last.images[-1], ends[1]) <= 1


def test_a_walk_from_a_picture_is_that_of_the_pipeline(models):
    studio = models["class"]
    walk = Walk(photograph(), 9, ("red", None), studio.request("", 5, 0, 3, 1.5))
    seen = list(walking(studio, walk))
    assert [progress.done for progress in seen] == [4, 5] and seen[0].images[4] is None
    expected = latent_space.interpolate(studio.pipe, photograph(), 9, 5, ("red", None))
    assert max(furthest(a, b) for a, b in zip(seen[-1].images, expected, strict=True)) <= 1


def test_the_film_strip_numbers_its_pictures():
    film = interpolation.film_of([photograph()] * 3)
    assert film.count("<img") == 3 and "<figcaption>3</figcaption>" in film


# Stop


def test_a_halted_drawing_ends_at_its_step_and_frees_the_model(studio, monkeypatch):
    monkeypatch.setattr(parts, "PREVIEW_SECONDS", 0.0)
    halt = parts.Halt()
    events = generate.developing(studio, "red", 1, 0, False, 50, 1, halt=halt)
    starting, first = next(events), next(events)
    assert starting[2] == "Starting …" and first[2] == "Step 1 of 50" and studio._lock.locked()
    halt.wanted = True
    (*_, note, seed, stop), *more = events
    assert note == "Stopped at step 1 of 50." and stop["interactive"] is False and not more
    assert not studio._lock.locked()
    *_, last = generate.developing(studio, "red", 1, 0, False, 2, 1, halt=halt)
    assert last[2].startswith("Seed 0 · 2 steps")
