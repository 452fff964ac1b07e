"""What visitors send to the demo, and what they are given: files with their settings."""

import os

import numpy as np
import pytest
from PIL import Image
from studios import coloured, file_of, photograph, png

from calotype.demo import generate, prints, uploads
from calotype.errors import UserError
from calotype.images import load_image
from calotype.pipeline.generate import write_png


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


def test_strokes_are_what_is_opaque_whatever_its_colour():
    rng = np.random.default_rng(0)
    layers = [Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)) for _ in range(2)]
    found = uploads.strokes([png(layer) for layer in layers])
    expected = np.maximum(*(np.asarray(layer.getchannel("A")) for layer in layers)).astype(int)
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1  # two roundings
    assert uploads.strokes([png(Image.new("RGBA", (8, 8)))]) is None and uploads.strokes([]) is None


def test_a_sketch_keeps_few_layers_and_few_sketches():
    from gradio.components.image_editor import EditorData
    from gradio.data_classes import DataWithFiles

    canvas = uploads.Canvas()

    def send(name, kind, index, content=b"1"):
        data = {"type": kind, "index": index, "id": name}
        canvas.accept_blobs(DataWithFiles(data=data, files=[("blob", content)]))

    for index in ("0", "3", "4", "1000000000", "x"):
        send("a", "layer", index)
    send("a", "background", "null", bytes(uploads.MOST_BYTES + 1))
    assert canvas.blob_storage["a"].layers == [b"1", None, None, b"1"] and canvas.blob_storage["a"].background is None
    sketch = canvas.preprocess(EditorData(id="a"))
    assert sketch == {"background": None, "layers": [b"1", b"1"]} and "a" not in canvas.blob_storage
    for junk in (None, "text", {"type": "layer"}, [1], DataWithFiles(data={"type": "layer", "index": "0"}, files=[])):
        canvas.accept_blobs(junk)
    for i in range(50):
        send(str(i), "background", "null")
    assert len(canvas.blob_storage) == uploads.MOST_SKETCHES and "49" in canvas.blob_storage
    assert canvas.preprocess(EditorData(id="gone")) is None


def test_no_interface_files_are_written_beside_the_components():
    assert list(os.scandir(os.path.dirname(uploads.__file__))) and not [
        entry for entry in os.scandir(os.path.dirname(uploads.__file__)) if entry.name.endswith(".pyi")
    ]


def test_small_but_huge_pictures_are_refused(tmp_path):
    file = file_of(Image.new("1", (5000, 5000)), tmp_path / "bomb.png")
    with pytest.raises(UserError, match="more than the limit") as refusal:
        uploads.open_picture(file, 3)
    assert str(tmp_path) not in str(refusal.value)
    with pytest.raises(UserError, match="no picture yet"):
        uploads.open_picture(None, 3)


def test_avif_is_read_from_the_owner_but_not_from_visitors(tmp_path):
    file = tmp_path / "x.avif"
    Image.new("RGB", (8, 8)).save(file)
    assert load_image(file, channels=3).size == (8, 8)
    with pytest.raises(UserError, match="not one of JPEG, PNG, WEBP, TIFF, BMP, GIF, PPM$"):
        uploads.open_picture(str(file), 3)


# Prints


def test_prints_carry_their_settings_and_bring_them_back(studio, cache):
    request = studio.request("", 3, 5, 7, 2.5, "heun", 0.75, 0.25, 0.5)
    facts = [studio.facts(request.alone(i)) for i in range(3)]
    files = prints.file_prints([photograph()] * 3, facts)
    with Image.open(files[1]) as image:
        assert image.text["calotype:seed"] == "6" and image.text["calotype:label"] == request.label[1]
    assert all(os.path.dirname(file).startswith(str(cache)) for file in files)
    assert "<" not in os.path.basename("".join(files))
    *values, word = generate.restore(studio, files[1])
    assert values == [request.label[1], 1, 6, False, 7, 2.5, "heun", 0.25, 0.75, 0.5, False]
    assert word.startswith("Settings restored: press")
    again = studio.request(*values[:2], values[2], *values[4:])
    assert again == request.alone(1)


def test_settings_out_of_range_are_moved_and_others_left_out(studio, tmp_path):
    facts = {"seed": "1e99", "steps": "nan", "guidance": "built in", "sampler": "magic", "label": "cat"}
    write_png(photograph(), tmp_path / "a.png", facts | {"guidance-interval": "-3", "fast": "yes", "model": "other"})
    *values, word = generate.restore(studio, str(tmp_path / "a.png"))
    assert values == ["", 1, 2**32 - 1, False, 3, 1.5, "", 0, 1, 0, False]
    studio.__dict__["model"] = "mine"
    assert "another model" in generate.restore(studio, str(tmp_path / "a.png"))[-1]
    del studio.__dict__["model"]


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\n", png(Image.new("RGB", (4, 4)))])
def test_pictures_without_settings_are_refused(studio, content, tmp_path):
    import gradio as gr

    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(gr.Error, match="holds no settings|no PNG that can be read"):
        generate.restore(studio, str(tmp_path / "x.png"))


def test_the_animation_goes_forth_and_back(cache):
    frames = [Image.new("RGB", (16, 16), (60 * i, 0, 0)) for i in range(4)]
    with Image.open(prints.file_animation(frames, "way")) as film:
        reds = []
        for i in range(film.n_frames):
            film.seek(i)
            reds.append(film.convert("RGB").getpixel((5, 5))[0])
    assert film.size == (384, 384) and reds == [0, 60, 120, 180, 120, 60]
