"""The tab Explore: a real autoencoder of two numbers behind a real server, in a real browser."""

import base64
import io
import re
import shutil
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from browser import CHROMIUM, FLAGS, Explorer, share_of_a_core, watched
from PIL import Image

from calotype.autoencoder import decode, posterior
from calotype.demo import app
from calotype.errors import UserError
from calotype.images import denormalize, normalize

try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
in_a_browser = pytest.mark.skipif(
    not (CHROMIUM and sync_playwright),
    reason="the explorer is NOT tried in a browser: Chromium or playwright is missing",
)
HOME = ("http://127.0.0.1:", "data:", "blob:")


@pytest.fixture(scope="module")
def server(two_numbers, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_OFFLINE"):
            environment.setenv(name, "")
        blocks = app.build(two_numbers, str(tmp_path_factory.mktemp("temporary")))
        served = app.serve(blocks)
        yield SimpleNamespace(url=served.url, blocks=blocks)
        served.close()


@pytest.fixture(scope="module")
def explorer(server, two_numbers):
    from calotype.demo.explore import Explorer

    return Explorer.of_run(two_numbers)


# What the server answers


def test_a_frame_is_the_decoded_picture(explorer):
    z = torch.tensor([0.5, -1.0]).reshape(1, 2, 1, 1)
    shown = np.asarray(picture_of(explorer.frame([0.5, -1.0])))
    with torch.no_grad():
        (expected,) = denormalize(decode(explorer.vae, z, (12, 12))).permute(0, 2, 3, 1).numpy()
    assert shown.shape == (12, 12, 3)
    assert np.abs(shown.astype(int) - expected).mean() < 4  # WebP loses a little


def picture_of(answer):
    return Image.open(io.BytesIO(base64.b64decode(answer["src"].partition(",")[2])))


def test_codes_and_deviations_are_the_encoders(explorer):
    x = normalize(explorer.map.pictures[2:3])
    with torch.no_grad():
        expected, back = (
            posterior(explorer.vae, x),
            posterior(explorer.vae, decode(explorer.vae, torch.zeros(1, 2, 1, 1), (12, 12)).clamp(-1, 1)),
        )
    found = explorer.encode(2)
    np.testing.assert_allclose(found["mean"], expected["mean"].flatten(), atol=1e-5)
    np.testing.assert_allclose(found["std"], expected["std"].flatten(), rtol=1e-4)
    np.testing.assert_allclose(explorer.deviation([0, 0])["std"], back["std"].flatten(), rtol=1e-4)


def test_what_is_no_place_is_refused_and_what_is_far_is_moved_nearer(explorer):
    for bad in (
        None,
        "12",
        [],
        [1],
        [1, 2, 3],
        [1, "2"],
        [1, float("nan")],
        [1, 10**400],
        [1, True],
        {"a": 1},
        [[1], [2]],
    ):
        with pytest.raises(UserError, match="a list of 2 numbers"):
            explorer.frame(bad)
    for bad in (None, -1, len(explorer.map.pictures), 1.0, "1", True, [0]):
        with pytest.raises(UserError, match="is not one of"):
            explorer.encode(bad)
    limit = explorer.map.facts.limit
    assert explorer.frame([1e8, 0]) == explorer.frame([limit, 0]) != explorer.frame([0, 0])


def test_a_busy_model_is_said_to_be_busy_and_threads_are_as_before(explorer):
    threads = torch.get_num_threads()
    with explorer.lock, pytest.raises(UserError, match="drawing for somebody"):
        explorer.frame([0, 0])
    assert explorer.frame([0, 0]) and torch.get_num_threads() == threads


def test_nonsense_is_answered_without_a_server_error(server):
    pad = next(
        block
        for block in server.blocks.blocks.values()
        if "frame" in [f.__name__ for f in getattr(block, "server_fns", [])]
    )
    for name, data, word in (
        ("frame", [0, 0], "src"),
        ("frame", ["x"], "error"),
        ("encode", 99, "error"),
        ("deviation", None, "error"),
    ):
        order = {"data": data, "fn_name": name, "component_id": pad._id, "session_hash": "x"}
        answer = httpx.post(server.url + "gradio_api/component_server/", json=order)
        assert answer.status_code == 200 and list(answer.json()) == [word]


def test_a_run_that_trains_anew_has_no_explorer_until_its_latents_are_there(two_numbers, tmp_path):
    from calotype.demo.explore import Explorer

    assert Explorer.of_run(tmp_path) is None
    for part in ("latents", "stage1_vae/vae"):
        shutil.copytree(two_numbers / part, tmp_path / part)
    assert Explorer.of_run(tmp_path) is not None
    with (tmp_path / "stage1_vae/vae/config.json").open("a") as file:
        file.write("\n")  # other weights, for all that a hash can tell
    assert Explorer.of_run(tmp_path) is None


def test_a_model_folder_has_the_tab_only_with_a_map(finished, tmp_path):
    def tabs(model):
        blocks = app.build(model, str(tmp_path))
        found = [block.label for block in blocks.blocks.values() if block.get_block_name() == "tabitem"]
        blocks.close(verbose=False)
        return found

    assert "Explore" in tabs(finished)
    shutil.copytree(finished / "pipeline", tmp_path / "model")
    assert "Explore" in tabs(tmp_path / "model")
    (tmp_path / "model/explorer.json").unlink()
    assert "Explore" not in tabs(tmp_path / "model") and "Generate" in tabs(tmp_path / "model")


# What a visitor sees


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, server):
    context = chromium.new_context(viewport={"width": 1180, "height": 900})
    page, complaints, strangers = watched(context, HOME)
    page.goto(server.url)
    page.get_by_role("tab", name="Explore").click()
    yield Explorer(page)
    assert complaints == [] and strangers == []
    context.close()


@in_a_browser
def test_the_picture_follows_the_dot(visit):
    visit.drag((0.5, 0.5), (0.2, 0.3))
    visit.settle()
    first, place = visit.picture(), visit.place()
    visit.drag((0.2, 0.3), (0.5, 0.9), (0.8, 0.7))
    visit.settle()
    assert visit.picture() != first
    assert visit.place()[0] > 0 > place[0] and visit.place()[1] < 0 < place[1]
    visit.drag((0.5, 0.5), (3, 0.5))  # beyond the edge
    assert visit.place()[0] == pytest.approx(float(visit.pad.get_attribute("aria-valuemax")), abs=0.01)


@in_a_browser
def test_arrow_keys_and_sliders_move_it_too(visit):
    page = visit.page
    visit.pad.focus()
    page.keyboard.press("Home")
    visit.settle()
    first = visit.picture()
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowUp", 1, 1), ("ArrowDown", 1, -1)):
        before = visit.place()
        page.keyboard.press(f"Shift+{key}")
        page.wait_for_timeout(100)
        moved = np.subtract(visit.place(), before)
        assert sign * moved[axis] > 0 and moved[1 - axis] == pytest.approx(0, abs=0.02)
    page.get_by_role("slider", name="Number 2 of the code").press("End")
    visit.settle()
    assert visit.place()[1] == pytest.approx(float(visit.pad.get_attribute("aria-valuemax")), abs=0.01)
    assert visit.picture() != first


@in_a_browser
def test_a_click_encodes_a_picture(visit, explorer):
    for number in (0, 3):
        visit.page.get_by_role("button", name=f"Encode picture {number + 1}").click()
        visit.settle()
        assert visit.place() == pytest.approx(explorer.encode(number)["mean"], abs=0.02)
        assert visit.page.locator(".lx-preset[aria-pressed=true]").count() == 1
    visit.pad.press("ArrowLeft")
    assert visit.page.locator(".lx-preset[aria-pressed=true]").count() == 0


@in_a_browser
def test_in_vae_mode_samples_jitter_round_the_dot(visit):
    visit.page.get_by_role("button", name="Encode picture 1").click()
    visit.settle()
    still, place = visit.picture(), visit.place()
    switch = visit.page.get_by_role("switch", name=re.compile("VAE mode"))
    switch.check()
    visit.page.wait_for_timeout(600)
    seen = set()
    for _ in range(5):
        seen.add(visit.picture())
        visit.page.wait_for_timeout(300)
    assert len(seen) >= 3 and visit.place() == place
    switch.uncheck()
    visit.settle()
    assert visit.picture() == still


@in_a_browser
@pytest.mark.slow
def test_thirty_frames_a_second_where_the_cores_are_free(visit, capsys):
    """Only where nothing else runs: `pytest -m slow tests/test_explore.py`."""
    share = share_of_a_core()
    found = max(visit.frames_per_second() for _ in range(3))
    with capsys.disabled():
        print(f"\nexplorer: {found:.0f} frames/s while dragging; a busy loop gets {100 * share:.0f} % of a core")
    assert found >= 30


@in_a_browser
def test_every_control_has_a_name_and_a_class_can_be_seen_alone(visit):
    tree = visit.page.locator(".lx").aria_snapshot()
    controls = re.findall(r"- (?:button|slider|switch|spinbutton|checkbox)\b.*", tree)
    assert len(controls) > 10 and all(re.match(r'- \w+ "[^"]+', line) for line in controls), tree
    pixels = "canvas => canvas.toDataURL()"
    ground = visit.page.locator(".lx-pad canvas").first
    whole = ground.evaluate(pixels)
    chip = visit.page.locator(".lx-legend button").first
    chip.click()
    alone = ground.evaluate(pixels)
    chip.click()
    assert alone != whole == ground.evaluate(pixels)
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_timeout(300)
    assert ground.evaluate(pixels) != whole
