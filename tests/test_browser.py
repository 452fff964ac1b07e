"""The demo's page in a real browser: what a visitor sees, clicks, drags, brushes and types."""

import json
import re
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, FLAGS, watched
from models import pipeline, tiny_unet
from PIL import Image

from calotype.demo import app

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and sync_playwright), reason="the demo is NOT tried in a browser: Chromium or playwright is missing"
)
HOME = ("http://127.0.0.1:", "data:", "blob:")
LABELS = {"0": "disc", "1": "red <b>star</b>", "2": "square"}
NAMELESS = re.compile(r"- (button|textbox|slider|spinbutton|combobox|checkbox|radio|listbox|tab)(:|$)(?! \").*")
PATIENCE = 20_000  # milliseconds, for a machine with other work


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "prints"
    pipeline(tiny_unet(classes=3), id2label=LABELS).save_pretrained(folder / "pipeline")
    (folder / "stage2_diffusion/samples").mkdir(parents=True)
    add_row(folder, step=1, **{"loss[train]": 1.0})
    add_row(folder, step=2, **{"loss[train]": 0.5})
    (folder / "data.json").write_text(json.dumps({"counts": {"train": 48000, "val": 2000}}))
    return folder


def add_row(folder, **row):
    with (folder / "stage2_diffusion/metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_OFFLINE"):
            environment.setenv(name, "")
        temporary = tmp_path_factory.mktemp("temporary")
        blocks = app.build(run, str(temporary))
        served = app.serve(blocks)
        yield SimpleNamespace(url=served.url, temporary=temporary)
        served.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(server, chromium):
    """The page, which must not complain and must ask nobody else."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page, complaints, strangers = watched(context, HOME)
    page.goto(server.url)
    page.get_by_role("tab").first.wait_for()
    yield page
    context.close()
    assert complaints == [] and strangers == []


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()
    return page.get_by_role("tabpanel").filter(visible=True)


def press(panel, name):
    panel.get_by_role("button", name=name, exact=True).click()


def fill(panel, name, value):
    field = panel.get_by_role("spinbutton", name=re.compile(name)).first
    field.fill(str(value))
    field.press("Tab")


def shown(panel):
    return panel.locator(".print .grid-container img")


@pytest.fixture(scope="module")
def gradient(tmp_path_factory):
    file = tmp_path_factory.mktemp("upload") / "gradient.png"
    Image.linear_gradient("L").resize((64, 48)).save(file)
    return file


def test_pictures_develop_and_stop(page):
    panel = tab(page, "Generate")
    fill(panel, "Steps", 200)
    press(panel, "Generate")
    expect(panel.locator(".tray:not(.empty) img")).to_have_count(9)
    expect(panel.get_by_role("progressbar")).to_have_attribute("aria-valuenow", re.compile(r"\d+"))
    press(panel, "Stop")
    expect(panel.get_by_text("Stopped at step")).to_be_visible()
    expect(panel.get_by_role("button", name="Stop", exact=True)).to_be_disabled()
    fill(panel, "Steps", 2)
    press(panel, "Generate")
    expect(shown(panel)).to_have_count(9)
    expect(panel.get_by_text("· 2 steps ·")).to_be_visible()
    expect(panel.locator(".tray")).to_be_hidden()


def test_a_finished_picture_brings_its_settings_back(page, server):
    panel = tab(page, "Generate")
    fill(panel, "Seed", 41)
    panel.get_by_role("radio", name="↺ same").check()
    fill(panel, "Steps", 3)
    press(panel, "Generate")
    expect(shown(panel)).to_have_count(9)
    (file,) = server.temporary.rglob("*-42-2.png")
    label = Image.open(file).text["calotype:label"]
    fill(panel, "Seed", 7)
    fill(panel, "Steps", 5)
    panel.get_by_test_id("file-upload").set_input_files(file)
    expect(panel.get_by_text("Settings restored")).to_be_visible()
    expect(panel.get_by_role("spinbutton", name="Seed")).to_have_value("42")
    expect(panel.get_by_role("spinbutton", name=re.compile("Steps"))).to_have_value("3")
    expect(panel.get_by_role("listbox", name="Label").or_(panel.get_by_label("Label")).first).to_have_value(label)
    press(panel, "Generate")
    expect(shown(panel)).to_have_count(1)
    expect(panel.get_by_text("Seed 42")).to_be_visible()


def test_the_grid_has_titles(page):
    panel = tab(page, "Generate")
    fill(panel, "Steps", 2)
    panel.get_by_role("button", name=re.compile("^Grid")).click()
    panel.get_by_role("button", name="Draw the grid").click()
    expect(panel.get_by_text("12 pictures · 2 steps")).to_be_visible()
    expect(panel.locator(".tray.grid > img")).to_have_count(12)
    expect(panel.locator(".tray.grid > b").filter(has_text="red <b>star</b>")).to_be_visible()  # as text
    expect(shown(panel)).to_have_count(13)


def test_before_and_after_slide(page, gradient):
    panel = tab(page, "Reconstruct")
    panel.get_by_test_id("file-upload").set_input_files(gradient)
    expect(panel.get_by_text("PSNR between the two")).to_be_visible()
    expect(panel.get_by_text("256 numbers")).to_be_visible()
    expect(panel.locator(".print img:visible")).to_have_count(5)  # the upload, before, after, the error, the code
    slider = panel.get_by_role("slider").first if panel.get_by_role("slider").count() else panel.locator(".inner")
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 150, box["y"] + box["height"] / 2, steps=6)
    page.mouse.up()
    assert slider.bounding_box()["x"] < box["x"] - 100


def test_a_brushed_part_is_drawn_anew(page, gradient, server):
    panel = tab(page, "Edit")
    panel.locator("canvas").first.wait_for()
    with page.expect_response(lambda response: re.search(r"file=.*\.png$", response.url)):  # at the model's size
        panel.locator("input[type=file]").first.set_input_files(gradient)
    fill(panel, "Strength", 1)
    for _ in range(3):  # a slow browser may show the picture after the stroke, which is lost then
        brush(page, panel)
        files, note = set(server.temporary.rglob("*.png")), panel.get_by_test_id("markdown")
        before = note.inner_text()
        press(panel, "Change it")
        expect(note).not_to_have_text(before or "nothing")
        expect(note).to_have_text(re.compile(r"Seed \d+ · 3 steps"))
        new = [Image.open(file) for file in set(server.temporary.rglob("*.png")) - files]
        pictures = [image.convert("RGB") for image in new if image.info.get("calotype:edit") == "where it is brushed"]
        if pictures:
            break
    corners, middles = ({picture.getpixel(at) for picture in pictures} for at in ((0, 0), (9, 9)))
    assert len(pictures) == 4 and len(corners) == 1 and len(middles) > 1


def brush(page, panel):
    page.wait_for_timeout(500)
    panel.get_by_role("button", name="Brush", exact=True).click()
    box = panel.locator("canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 30, steps=6)
    page.mouse.up()


def test_a_way_moves(page):
    panel = tab(page, "Interpolate")
    fill(panel, "Pictures on the way", 4)
    press(panel, "Interpolate")
    expect(panel.locator(".film img")).to_have_count(4)
    moving = panel.locator(".print img[src*='.webp']")
    expect(moving).to_be_visible()
    assert moving.evaluate("async image => (await (await fetch(image.src)).text()).includes('ANIM')")


def test_a_run_is_followed_while_it_trains(page, run):
    panel = tab(page, "Run")
    expect(panel.get_by_text("· step 2")).to_be_visible()
    expect(panel.locator(".chart svg")).to_have_count(1)
    add_row(run, step=777, **{"loss[train]": 0.25})
    add_row(run, step=777, said="The latents have a deviation of 9; a sentence.")
    expect(panel.get_by_text("is running · step 777")).to_be_visible()
    expect(panel.get_by_text("The latents have a deviation of 9")).to_be_visible()
    box = panel.locator(".chart svg").bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2)
    expect(panel.locator(".chart .at")).to_have_text(re.compile("step [12]$"))
    expect(panel.locator(".chart output")).not_to_have_text("0.25")


def test_everything_is_reached_and_works_by_keyboard(page):
    button = tab(page, "Generate").get_by_role("button", name="Generate", exact=True)
    page.get_by_role("tab", name="Generate", exact=True).focus()
    for _ in range(30):  # the tab has the same name, and a page that is still being set up may begin at it again
        page.keyboard.press("Tab")
        if button.evaluate("button => button === document.activeElement"):
            break
    expect(button).to_be_focused()
    page.keyboard.press("Enter")
    expect(shown(tab(page, "Generate"))).to_have_count(9)
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="Interpolate", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Add up")).to_be_visible()
    slider = page.get_by_role("tabpanel").filter(visible=True).get_by_role("slider", name=re.compile("Times")).first
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(slider).to_have_value("0.95")


@pytest.mark.parametrize("name", ["Generate", "Edit", "Reconstruct", "Interpolate"])
def test_every_control_has_a_name(page, name):
    panel = tab(page, name)
    for fold in panel.get_by_role("button", name=re.compile("Advanced|Grid")).all():
        fold.click()
    lines = [line.strip() for line in panel.aria_snapshot().splitlines()]
    assert len(lines) > 5 and [line for line in lines if NAMELESS.fullmatch(line)] == []


def test_the_page_is_light_by_day_and_dark_by_night(server, chromium):
    def corner(scheme):
        page = chromium.new_page(color_scheme=scheme)
        page.goto(server.url)
        page.get_by_role("tab").first.wait_for()
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.close()
        return [int(level) for level in re.findall(r"\d+", colour)[:3]]

    assert min(corner("light")) > 200 and max(corner("dark")) < 60


def test_the_page_can_talk_to_nobody_else(server, chromium):
    page = chromium.new_page()
    page.goto(server.url)
    ask = "address => fetch(address, {mode: 'no-cors'}).then(() => 'answered', error => String(error))"
    assert page.evaluate(ask, server.url + "healthz") == "answered"
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    assert "Failed to fetch" in page.evaluate(ask, server.url.replace("127.0.0.1", "localhost") + "healthz")
    assert any("Content Security Policy" in text for text in refused)
    page.close()
