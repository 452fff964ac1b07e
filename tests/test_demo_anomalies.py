"""The tab Anomalies: a tiny real detector behind a real server, asked by a real client and in a real browser."""

import re
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from browser import CHROMIUM, FLAGS, watched
from spots import bump, fitted, save, stranger

from calotype.demo import anomalies, app, page
from calotype.demo.anomalies import Guard

gr = pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client", reason="the tab is NOT tested: gradio_client is missing")
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None

EVIL = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def guard(run):
    return Guard.of_model(run).load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Uploads: a normal picture, noise, and an empty one with a name that is no text for a page."""
    rng, root = np.random.default_rng(5), tmp_path_factory.mktemp("uploads")
    pictures = {"normal.png": bump(rng), "noise.png": stranger(rng, "noise"), EVIL: stranger(rng, "flat")}
    return [str(save(x, root / name)) for name, x in pictures.items()]


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as environment:
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_OFFLINE"):
            environment.setenv(name, "")  # so that what build() sets is undone
        served = app.serve(app.build(run, str(tmp_path_factory.mktemp("temporary"))))
        downloads = str(tmp_path_factory.mktemp("downloads"))
        client = gradio_client.Client(served.url, verbose=False, analytics_enabled=False, download_files=downloads)
        yield SimpleNamespace(url=served.url, client=client)
        client.close()
        served.close()


def items(files):
    return [(file, None) for file in files]


def names(shown):
    return re.findall(r'class="of"><b>([^<]*)</b>', shown)


def test_the_strangest_comes_first_and_raises_the_alarm(guard, files):
    shown, note, findings = anomalies.examine(guard, items(files), 0.05)
    assert names(shown)[-1] == "normal.png" and "noise.png" in names(shown)[:2]
    assert shown.count('class="tag alarm"') == 2 and note.startswith("**2 of 3 pictures raise the alarm**")
    limit = guard.detector.threshold(0.05)
    assert [one.scores["combination"] >= limit for one in findings] == [False, True, True]
    assert "&lt;img src=x onerror=alert(1)&gt;" in shown and "<img src=x" not in shown
    assert shown.count("<img ") == 3 * 5 and shown.count('src="data:image/webp;base64,') == 3 * 5


def test_the_slider_judges_the_same_findings_anew(guard, tmp_path):
    rng, most = np.random.default_rng(9), anomalies.MOST_PICTURES
    files = [str(save(bump(rng), tmp_path / f"{i}.png")) for i in range(5 * most)]
    found = [
        one for i in range(0, len(files), most) for one in anomalies.examine(guard, items(files[i : i + most]), 0.25)[2]
    ]
    findings = sorted((one for one in found if one.p["combination"] > 0.05), key=lambda one: one.p["combination"])[
        :most
    ]
    p = [one.p["combination"] for one in findings]
    assert len(p) == most and min(p) < 0.25
    for rate in (min(p) - 0.001, min(p) + 0.001, 0.25):
        shown, note = anomalies.judge(guard, findings, rate)
        alarms = sum(one <= rate for one in p)
        assert shown.count('class="tag alarm"') == alarms
        assert note.startswith(f"**{alarms or 'None'} of 8 pictures raise{'s' if alarms < 2 else ''} the alarm**")
    assert anomalies.judge(guard, [], 0.1) == (gr.skip(), gr.skip())


@pytest.mark.parametrize(
    "given, rate, words",
    [
        (None, 0.05, "no picture yet"),
        ([], 0.05, "no picture yet"),
        ("many", 0.05, "9 pictures are more than 8"),
        ("torn", 0.05, "damaged, or not one of"),
        ("one", "much", "share of false alarms 'much' is not a number"),
        ("one", 0.0, "--false-alarms|held-out normal pictures"),  # the least that the slider allows
    ],
)
def test_what_cannot_be_is_said(guard, files, tmp_path, given, rate, words):
    (tmp_path / "torn.png").write_bytes(b"junk")
    dropped = {"many": items(files[:1] * 9), "torn": items([tmp_path / "torn.png"]), "one": items(files[:1])}
    given = dropped[given] if isinstance(given, str) else given
    with pytest.raises(gr.Error, match=words) as refusal:
        anomalies.examine(guard, given, rate)
    assert str(tmp_path) not in str(refusal.value)


def test_it_stands_alone_or_beside_a_model(run, tmp_path):
    assert Guard.of_model(run / "pipeline").folder == run.resolve() and Guard.of_model(run).folder == run.resolve()
    assert Guard.of_model(tmp_path) is None
    served = app.open_model(run)
    assert served.studio is None and served.guard.detector is not None
    assert "A detector of anomalies" in page.masthead(served.studio, "x", served.guard)
    shutil.copytree(run / "anomaly", tmp_path / "anomaly")
    assert Guard.of_model(tmp_path).folder == tmp_path.resolve()


def test_visitors_wait_for_the_detector(run):
    guard, told = Guard.of_model(run), []
    guard.tell = told.append
    load = guard.load_later()
    assert guard.detector is None
    threading.Timer(0.2, load).start()
    with guard.working() as detector:
        assert detector.facts.channels == 1
    assert len(told) == 1 and "still being loaded" in told[0]
    with guard.working():
        assert len(told) == 1


def test_a_client_is_answered(server, files):
    pictures = [{"image": gradio_client.handle_file(file), "caption": None} for file in files[:2]]
    shown, note = server.client.predict(pictures, 0.05, api_name="/anomalies")
    assert names(shown) == ["noise.png", "normal.png"] and "1 of 2 pictures raises the alarm" in note
    with pytest.raises(Exception, match="no picture yet"):
        server.client.predict([], 0.05, api_name="/anomalies")


@pytest.mark.skipif(not (CHROMIUM and sync_playwright), reason="NOT tried in a browser: Chromium or playwright missing")
def test_a_visitor_drops_pictures_and_moves_the_slider(server, files):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1200, "height": 900})
        context.set_default_timeout(20_000)
        expect.set_options(timeout=20_000)
        tab, complaints, strangers = watched(context, ("http://127.0.0.1:", "data:", "blob:"))
        tab.goto(server.url)
        tab.get_by_role("tab", name="Anomalies", exact=True).click()
        panel = tab.get_by_role("tabpanel").filter(visible=True)
        panel.locator("input[type=file]").first.set_input_files(files[:2])
        expect(panel.locator(".strange > li")).to_have_count(2)
        expect(panel.get_by_text("1 of 2 pictures raises the alarm")).to_be_visible()
        expect(panel.get_by_alt_text(re.compile("Nearest normal picture"))).to_have_count(6)
        slider = panel.get_by_role("slider", name=re.compile("Share of false alarms")).first
        slider.focus()
        slider.press("End")
        expect(panel.get_by_text("at a share of 0.25 false alarms")).to_be_visible()
        browser.close()
    assert complaints == [] and strangers == []
