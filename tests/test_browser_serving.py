"""Several models behind a password, in a real browser."""

import pytest
from browser import CHROMIUM, FLAGS, watched
from studios import tiny_pipeline

from calotype.demo import access, app

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and sync_playwright), reason="the demo is NOT tried in a browser: Chromium or playwright is missing"
)
HOME = ("http://127.0.0.1:", "data:", "blob:")
PASSWORD = "correct horse"
PATIENCE = 20_000  # milliseconds, for a machine with other work


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    places = [tmp_path_factory.mktemp("models") / name for name in ("prints", "sea side")]
    for place, label in zip(places, ("disc", "wave"), strict=True):
        tiny_pipeline([label]).save_pretrained(place / "pipeline")
    with pytest.MonkeyPatch.context() as environment:
        for name in (*app.ENVIRONMENT, "GRADIO_TEMP_DIR"):
            environment.setenv(name, "")
        blocks = app.build(places, str(tmp_path_factory.mktemp("temporary")))
        served = app.serve(blocks, password=PASSWORD)
        yield served.url
        served.close()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def draw(page):
    """Have pictures drawn on the page that is open."""
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.get_by_role("button", name="Generate", exact=True).click()
    expect(panel.locator(".print .grid-container img")).to_have_count(9)


def test_visitors_turn_from_model_to_model_by_name(url, chromium):
    context = chromium.new_context(http_credentials={"username": access.USER, "password": PASSWORD})
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    page, complaints, strangers = watched(context, HOME)
    page.goto(url)
    expect(page.locator(".masthead h1")).to_have_text("prints")
    draw(page)
    page.get_by_role("link", name="sea side").or_(page.get_by_role("button", name="sea side")).first.click()
    expect(page.locator(".masthead h1")).to_have_text("sea side")
    assert page.url == f"{url}sea-side"
    draw(page)
    context.close()
    assert complaints == [] and strangers == []
