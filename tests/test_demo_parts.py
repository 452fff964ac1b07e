"""The demo's parts without a server: uploads, prints, codes as pictures, grids, edits, walks, run folders."""

import io
import json
import os

import numpy as np
import pytest
import torch
from diffusers import VQModel
from models import pipeline, tiny_unet, variants
from PIL import Image, ImageChops

from calotype.demo import codes, edit, generate, grid, prints, uploads
from calotype.demo import interpolate as interpolation
from calotype.demo import reconstruct as reconstruction
from calotype.demo.run_folder import RunFolder, find_run
from calotype.demo.studio import Progress, Studio
from calotype.demo.walks import Walk, walking
from calotype.errors import UserError
from calotype.pipeline import latent_space
from calotype.pipeline.generate import write_png
from calotype.pipeline.pictures import edges_of
from calotype.stage1_vae.tokens import token_numbers

EVIL = "<img src=x onerror=alert(1)>"
COLOURS = {"0": "red", "1": "blue", "2": EVIL}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where Gradio keeps its files."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def studio():
    return Studio(pipeline(tiny_unet(classes=3, width=16), id2label=COLOURS))


@pytest.fixture(scope="module")
def models():
    return {name: Studio(pipe) for name, pipe in variants().items()}


def photograph(size=(16, 16), mode="RGB"):
    x = np.random.default_rng(3).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(x).resize(size, Image.Resampling.BICUBIC).convert(mode)


def file_of(picture, path):
    picture.save(path)
    return str(path)


def furthest(a, b):
    return max(high for _, high in ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema())


# Uploads


def test_strokes_are_what_is_opaque_whatever_its_colour():
    rng = np.random.default_rng(0)
    layers = [Image.fromarray(rng.integers(0, 256, (8, 8, 4), np.uint8)) for _ in range(2)]
    found = uploads.strokes([png(layer) for layer in layers])
    expected = np.maximum(*(np.asarray(layer.getchannel("A")) for layer in layers)).astype(int)
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1  # two roundings
    assert uploads.strokes([png(Image.new("RGBA", (8, 8)))]) is None and uploads.strokes([]) is None


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


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


# Codes as pictures


def test_the_error_map_is_black_for_none_and_white_for_much():
    a = Image.new("RGB", (3, 1), (100, 100, 100))
    b = a.copy()
    b.putpixel((1, 0), (100 + codes.ERROR_RANGE,) * 3)
    b.putpixel((2, 0), (100 + 3 * codes.ERROR_RANGE // 2, 100, 100))
    none, much, some = (codes.error_map(a, b).getpixel((i, 0)) for i in range(3))
    assert max(none) < 30 and min(much) > 240 and 30 < max(some) < 250


def test_tiles_of_a_code_are_blue_below_zero_and_brown_above():
    z = torch.tensor([-9.0, -3, 0, 3]).reshape(4, 1, 1).expand(4, 8, 8)
    tiles = codes.code_tiles(z)
    assert tiles.size == (17, 17) and tiles.getpixel((8, 8))[3] == 0
    low, lower, zero, high = (tiles.getpixel(at)[:3] for at in ((2, 2), (12, 2), (2, 12), (12, 12)))
    assert low == lower and low[2] > low[0] and high[0] > high[2] and min(zero) > 230
    assert codes.code_tiles(torch.zeros(5, 1, 1)).size == (5, 1)


def test_the_token_map_has_a_colour_a_token(models):
    studio = models["vq"]
    z = studio.encode(photograph())
    found, count = codes.token_map(studio.pipe.vae, z)
    x = torch.from_numpy(np.asarray(photograph(), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        numbers = token_numbers(studio.pipe.vae, x)[0].numpy()
    colours = np.asarray(found).astype(int) @ [1, 256, 65536]
    assert count == len(np.unique(numbers)) == len(np.unique(colours))
    assert all(len(np.unique(colours[numbers == number])) == 1 for number in np.unique(numbers))
    result = reconstruction.reconstruct(studio, photograph())
    assert "64 tokens" in result.note and result.code.size == (8, 8)
    assert reconstruction.code_title(studio.pipe) == "Its tokens"
    assert furthest(result.pair[1], studio.pipe.reconstruct([photograph()])[0]) <= 1


def test_a_codebook_of_one_dimension_has_colours_too():
    torch.manual_seed(0)
    vae = VQModel(latent_channels=1, vq_embed_dim=1, num_vq_embeddings=9, sample_size=8)
    found, count = codes.token_map(vae, torch.randn(1, 4, 4))
    assert found.size == (4, 4) and 1 <= count <= 9


# The grid


def test_cells_of_a_grid_are_the_pictures_drawn_alone(studio):
    base = studio.request("red", 1, 5, 3, 2)
    values = {"labels": ["red", "blue"], "seeds": 3, "steps": "2, 3", "guidance": "1; 2"}
    sides = [grid.axis(studio, base, name, values) for name in ("labels", "seeds")]
    cells = grid.cells_of(base, *sides)
    *_, last = studio.develop_cells(cells)
    assert last.done == last.total == 3  # one batch
    for i, label in enumerate(["red", "blue"]):
        for j in range(3):
            alone = studio.pipe(label, seed=5 + j, num_inference_steps=3, guidance_scale=2.0).images[0]
            assert furthest(last.images[3 * i + j], alone) <= 1
    sides = [grid.axis(studio, base, name, values) for name in ("steps", "guidance")]
    seen = list(studio.develop_cells(grid.cells_of(base, *sides)))
    assert [progress.done for progress in seen][-1] == seen[0].total == 2 + 2 + 3 + 3
    assert seen[0].images[1:] == [None] * 3
    alone = studio.pipe("red", seed=5, num_inference_steps=2, guidance_scale=2.0).images[0]
    assert furthest(seen[-1].images[1], alone) <= 1


def test_grids_too_large_or_of_nothing_are_refused(studio):
    base = studio.request("red", 1, 0, 3, 2)
    for name, value, reason in (
        ("labels", [], "from 1 to 12"),
        ("labels", ["cat"], "cat"),
        ("labels", "red", "from 1 to 12"),
        ("steps", "1,2,x", "must be numbers"),
        ("steps", "", "from 1 to 12"),
        ("steps", "1," * 13, "from 1 to 12"),
        ("guidance", "nan", "not a number"),
        ("seeds", None, "not a number"),
        ("colours", [], "nothing that varies"),
    ):
        with pytest.raises(UserError, match=reason):
            grid.axis(studio, base, name, {name: value})
    long = grid.axis(studio, base, "steps", {"steps": "200,201,199,198,197,196,195,194,193,192,191,190"})
    with pytest.raises(UserError, match="2,145 steps"):
        list(studio.develop_cells(grid.cells_of(base, long, grid.Axis("seed", [1], ["seed 1"]))))
    many = grid.axis(studio, base, "steps", {"steps": "1," * 12})
    with pytest.raises(UserError, match="48 pictures"):
        list(studio.develop_cells(grid.cells_of(base, many, grid.Axis("seed", [1, 2, 3, 4], list("1234")))))


def test_titles_of_a_grid_stay_text(studio):
    base = studio.request("red", 1, 0, 3, 2)
    down = grid.axis(studio, base, "labels", {"labels": [EVIL]})
    page = grid.table(down, grid.axis(studio, base, "seeds", {"seeds": 1}), Progress(1, 2, [None]))
    assert EVIL not in page and "&lt;img" in page and 'aria-valuenow="50"' in page


def test_what_can_vary_follows_the_model(models):
    assert grid.axes_of(models["class"]) == ["labels", "seeds", "steps", "guidance"]
    assert grid.axes_of(models["none"]) == ["seeds", "steps"]
    assert grid.axes_of(models["guide"]) == ["seeds", "steps", "guidance"]
    prompts = grid.axis(models["text"], models["text"].any_request(), "labels", {"labels": " a red star \n\na disc"})
    assert prompts.values == ["a red star", "a disc"]


# Edits


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
    from calotype.demo import parts

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


# Run folders


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "prints"
    for stage in ("stage1_vae", "stage2_diffusion"):
        (folder / stage / "samples").mkdir(parents=True)
        add_rows(folder / stage, *({"step": step, "loss[train]": 1 / step} for step in range(1, 9)))
    (folder / "run.json").write_text(json.dumps({"commands": [{"name": "train-vae", "seconds": 3.0}]}))
    return folder


def add_rows(stage, *rows):
    with (stage / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_run_is_read_again_only_when_it_changed(run):
    folder = find_run(run)
    stamp, contents = folder.contents()
    assert folder.contents()[1] is contents and folder.stamp() == stamp
    assert "train-vae is running" in contents.heading and "step 8" in contents.heading
    assert "No complaints" in contents.heading and contents.charts.count("<svg") == 2
    add_rows(run / "stage2_diffusion", {"step": 9, "loss[train]": 0.1}, {"step": 9, "said": f"Latents are off {EVIL}"})
    assert folder.stamp() != stamp
    heading = folder.contents()[1].heading
    assert "step 9" in heading and "Latents are off &lt;img" in heading and "No complaints" not in heading
    old = os.stat(run / "run.json").st_mtime - 1000
    for stage in ("stage1_vae", "stage2_diffusion"):
        os.utime(run / stage / "metrics.jsonl", (old, old))
    assert "At rest in train-vae" in folder.contents()[1].heading


def test_the_films_show_whole_pictures_and_pass_over_torn_files(run):
    from calotype.images import image_grid

    pixels = torch.zeros(40, 3, 16, 16, dtype=torch.uint8)
    sheet = image_grid(pixels, 20, row_labels=["input", "output"])
    for step in range(1, 10):
        sheet.save(run / f"stage1_vae/samples/step-{step:08d}.png")
    (run / "stage1_vae/samples/step-00000005.png").write_bytes(png(sheet)[:300])
    films = RunFolder(run).contents()[1].films
    assert films.count("<figure") == 4 and ">9</figcaption>" in films and "Diffusion model" not in films
    from calotype.demo.run_folder import _frame

    frame = _frame(run / "stage1_vae/samples/step-00000001.png")
    assert frame.width < frame.height * 8 / 5 and frame.step == 1


def test_what_is_no_run_has_no_tab(run, tmp_path):
    (tmp_path / "model/pipeline").mkdir(parents=True)
    assert find_run(tmp_path / "model") is None and find_run(tmp_path / "nowhere") is None
    (run / "pipeline").mkdir()
    assert find_run(run / "pipeline").folder == run


def test_pages_have_the_tabs_that_their_models_can_serve(models, run):
    from calotype.demo import page

    def tabs(*built):
        return [block.label for block in page.build(*built).blocks.values() if block.get_block_name() == "tabitem"]

    assert tabs(models["class"], "x") == ["Generate", "Edit", "Reconstruct", "Interpolate"]
    assert tabs(models["edges"], "x", find_run(run)) == ["Edit", "Reconstruct", "Run"]
    assert tabs(None, "x", find_run(run)) == ["Run"]
    for name, fact in (("superres", "from others 4 times smaller"), ("text", "by prompt"), ("class", "by 2 labels")):
        assert fact in page.masthead(models[name], "x")
    assert "no model to draw with yet" in page.masthead(None, "x")


def test_every_control_has_a_name(models):
    from calotype.demo import page

    for name in ("text", "edges", "fast"):
        for block in page.build(models[name], "x").blocks.values():
            if block.get_block_name() in ("slider", "number", "dropdown", "textbox", "radio", "checkbox", "image"):
                assert block.label and getattr(block, "show_label", True) is not False
