"""The demo: a tiny real pipeline behind a real server, asked by a real client and shown in a real browser."""

import io
import itertools
import os
import sys
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image
from studios import LABELS, tiny_pipeline

from calotype.demo import app
from calotype.errors import UserError
from calotype.pipeline.generate import find

gradio_client = pytest.importorskip("gradio_client", reason="the demo's server is NOT tested: gradio_client is missing")

ORDER = {"label": "disc", "count": 3, "seed": 7, "roll": False, "steps": 4, "guidance": 2.0}


@pytest.fixture(scope="module")
def strangers():
    """Addresses outside this machine that were looked up or connected to."""
    seen, local = [], ("127.0.0.1", "::1", "localhost", "0.0.0.0", None, "")

    def watch(event, args):
        if event == "socket.getaddrinfo" and args[0] not in local:
            seen.append(args[0])
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in local:
            seen.append(args[1][0])

    sys.addaudithook(watch)
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "prints"
    tiny_pipeline(LABELS).save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def server(run, strangers, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_OFFLINE"):
            environment.setenv(name, "")  # so that what build() sets is undone
        blocks = app.build(find(run), str(temporary))
        served = app.serve(blocks)
        assert strangers == []
        downloads = str(tmp_path_factory.mktemp("downloads"))
        client = gradio_client.Client(served.url, verbose=False, analytics_enabled=False, download_files=downloads)
        strangers.clear()  # the client may have looked for its registry; the server has not
        yield SimpleNamespace(url=served.url, client=client, temporary=temporary)
        client.close()
        served.close()


def generate(server, **order):
    _, gallery, note, seed = server.client.predict(**ORDER | order, api_name="/generate")
    return [Image.open(item["image"]).convert("RGB") for item in gallery["value"]], note, seed


def test_generates_what_was_ordered(server):
    images, note, seed = generate(server)
    assert [image.size for image in images] == [(16, 16)] * 3
    assert seed == 7 and note.startswith("Seed 7 · 4 steps")
    again, *_ = generate(server)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    others, *_ = generate(server, seed=8)
    assert others[0].tobytes() == images[1].tobytes() and others[2].tobytes() != images[2].tobytes()


def test_finished_pictures_are_those_of_the_pipeline(server):
    images, *_ = generate(server)
    expected = tiny_pipeline(LABELS)("disc", 3, seed=7, num_inference_steps=4, guidance_scale=2.0).images
    for image, wanted in zip(images, expected):
        assert max(high for _, high in difference(image, wanted)) <= 1


def difference(a, b):
    from PIL import ImageChops

    return ImageChops.difference(a, b).getextrema()


def test_new_seeds_are_rolled_and_any_label_is_drawn(server):
    _, _, first = generate(server, roll=True, count=1, label="")
    _, _, second = generate(server, roll=True, count=1, label="")
    assert first != second and 7 not in (first, second)


def test_bad_pictures_are_refused_in_clear_words(server, tmp_path):
    (tmp_path / "junk.png").write_bytes(b"hello")
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    for name, reason in (("junk.png", "damaged, or not one of"), ("bomb.png", "more than the limit of 16,000,000")):
        with pytest.raises(gradio_client.exceptions.AppError, match=reason) as refusal:
            reconstruct(server, tmp_path / name)
        assert str(tmp_path) not in str(refusal.value) and str(server.temporary) not in str(refusal.value)


def reconstruct(server, path):
    return server.client.predict(file=gradio_client.handle_file(str(path)), api_name="/reconstruct")


def test_reconstructs_an_upload(server, tmp_path):
    Image.linear_gradient("L").resize((64, 40)).save(tmp_path / "gradient.png")
    pair, error, code, note, _ = reconstruct(server, tmp_path / "gradient.png")
    original, copy = (Image.open(file) for file in pair["value"])
    assert original.size == copy.size == Image.open(error["value"]).size == (16, 16)
    assert Image.open(code["value"]).size == (17, 17)  # four channels of 8x8 with a gap between
    expected = tiny_pipeline(LABELS).reconstruct([original])[0]
    assert max(high for _, high in difference(copy.convert("RGB"), expected)) <= 1
    found = float(note.split()[0].strip("*"))
    assert found == pytest.approx(psnr_of(original, copy), abs=0.06) and "256 numbers (4×8×8) for 768" in note


def psnr_of(a, b):
    """By scikit-image's definition, which needs nothing but numpy."""
    error = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return 10 * np.log10(255**2 / error)


def test_numbers_out_of_range_and_strange_labels(server):
    for order, reason in (
        ({"label": "cat"}, "cat"),
        ({"count": 99}, "99"),
        ({"guidance": None}, "raised an exception"),
    ):
        with pytest.raises(gradio_client.exceptions.AppError, match=reason):
            generate(server, **order)


def test_previews_arrive_and_cancelling_frees_the_model(server, monkeypatch):
    from calotype.demo import parts

    monkeypatch.setattr(parts, "PREVIEW_SECONDS", 0.0)
    before = files_of(server)
    job = server.client.submit(**ORDER | {"steps": 200}, api_name="/generate")
    starting, first = itertools.islice(job, 2)
    assert starting[2] == "Starting …" and first[2].startswith("Step ")
    assert first[0]["value"].count("data:image/webp") == 3
    assert files_of(server) == before  # previews leave none behind
    job.cancel()
    began = time.monotonic()
    generate(server, steps=1)
    assert time.monotonic() - began < 5
    assert job.cancelled() or len(job.outputs()) < 199


def files_of(server):
    return {path for path in server.temporary.rglob("*") if path.is_file()}


def test_only_the_queue_leads_to_the_model(server):
    api = server.url + "gradio_api/"
    assert httpx.post(api + "run/generate", json={"data": list(ORDER.values())}).status_code == 404
    assert httpx.get(api + "monitoring/summary").status_code in (403, 404)
    large = httpx.post(api + "upload", files={"files": ("large.png", io.BytesIO(bytes(9_000_000)))})
    assert large.status_code == 413


def test_a_finished_picture_restores_its_settings(server):
    _, gallery, *_ = server.client.predict(**ORDER | {"sampler": "heun", "high": 0.5}, api_name="/generate")
    file = gallery["value"][2]["image"]
    assert "disc-9" in file
    *values, word = server.client.predict(gradio_client.handle_file(file), api_name="/restore")
    assert [value["value"] if isinstance(value, dict) else value for value in values] == [
        *("disc", 1, 9, False, 4, 2.0, "heun", 0, 0.5, 0, False)
    ]
    assert word.startswith("Settings restored: press Generate")


def test_the_grid_is_a_sheet_and_its_pictures(server):
    order = ORDER | {"rows": "labels", "columns": "seeds", "labels": ["disc", "square"], "seeds": 3}
    table, gallery, note, seed = server.client.predict(**order, api_name="/grid")
    sheet, *cells = [Image.open(item["image"]) for item in gallery["value"]]
    assert len(cells) == 6 and sheet.width > sheet.height > 100 and note.startswith("6 pictures · 4 steps")
    assert [cell.text["calotype:seed"] for cell in cells] == ["7", "8", "9"] * 2
    assert table["value"].count("<img") == 6 and "seed 8" in table["value"] and seed == 7
    images, *_ = generate(server)
    assert max(high for _, high in difference(cells[1].convert("RGB"), images[1])) <= 1


def test_edits_an_upload(server, tmp_path):
    Image.linear_gradient("L").resize((48, 48)).save(tmp_path / "gradient.png")
    file = gradio_client.handle_file(str(tmp_path / "gradient.png"))
    order = {"sketch": {"background": file, "layers": [], "composite": None}, "label": "square", "count": 2, "steps": 4}
    _, gallery, note, _ = server.client.predict(**order, region="in the left half", strength=1, api_name="/edit")
    first, second = (np.asarray(Image.open(item["image"]).convert("RGB")) for item in gallery["value"])
    assert (first[:, 8:] == second[:, 8:]).all() and (first[:, :8] != second[:, :8]).any()
    with pytest.raises(gradio_client.exceptions.AppError, match="no picture yet"):
        server.client.predict(sketch=None, api_name="/edit")


def test_interpolates_and_adds_up(server, tmp_path):
    order = {"seed_a": 1, "label_a": "disc", "seed_b": 2, "label_b": "square", "count": 4, "steps": 4}
    _, motion, note, film = server.client.predict(**order, picture_a=None, picture_b=None, api_name="/interpolate")
    with Image.open(motion["value"]) as image:
        assert image.n_frames == 6 and image.size == (384, 384)
    assert film.count("<img") == 4 and note.startswith("4 pictures")
    Image.linear_gradient("L").resize((16, 16)).save(tmp_path / "gradient.png")
    pictures = [{"image": gradio_client.handle_file(str(tmp_path / "gradient.png")), "caption": None}]
    sums, note = server.client.predict(pictures, pictures, pictures, 2, api_name="/arithmetic")
    pipe = tiny_pipeline(LABELS)
    (expected,) = pipe.reconstruct([Image.open(tmp_path / "gradient.png").convert("RGB")])  # plus and minus the same
    assert max(high for _, high in difference(Image.open(sums["value"][0]["image"]), expected)) <= 1
    with pytest.raises(gradio_client.exceptions.AppError, match="plus the mean of"):
        server.client.predict(pictures, [], pictures, 1, api_name="/arithmetic")


def test_nothing_was_asked_outside_this_machine(server, strangers):
    page = httpx.get(server.url).text
    assert httpx.get(server.url + "config").json()["title"] == "prints · Calotype"
    for tag in ("<script", "<link"):
        for part in page.split(tag)[1:]:
            assert "https://" not in part.split(">")[0]
    assert strangers == []


def test_model_is_found_in_a_run_or_by_itself(run, tmp_path):
    assert find(run) == find(run / "pipeline") == run / "pipeline"
    assert app.title_of(run / "pipeline") == "prints"
    with pytest.raises(UserError, match="holds no model"):
        find(tmp_path)


def test_port_in_use_is_a_user_error(server):
    from calotype.demo import page

    port = int(server.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(UserError, match=f"--port {port}"):
        app.serve(page.build(None, "second"), port=port)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
