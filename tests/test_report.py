"""The report: complete, self-contained, safe with hostile names, patient with unfinished runs."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image

from calotype import curves, report
from calotype.errors import UserError

EVIL = "<script>alert('x')</script>\"'&"


def write_rows(path, rows, torn=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)


def write_picture(path, size=(68, 34), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "prints"
    data = {"source": "shapes", "fingerprint": "9f2c61d0", "channels": 3, "image_size": [32, 48], "fit": "crop"}
    data |= {"counts": {"train": 48000, "val": 2000}, "classes": {"red star": 700, EVIL: 35}, "captions": True}
    data |= {"sizes": {"48x32": 50000}, "bad": [{"file": "a<b>.png", "reason": "truncated"}], "bad_count": 1}
    losses = [{"step": s, "seconds": s / 4, "loss[train]": 8.0 / s, "lr": 3e-4} for s in range(10, 4001, 10)]
    write_rows(folder / "stage1_vae/metrics.jsonl", [*losses, {"step": 4000, "psnr[val]": 27.25}], '{"step": 4010, "lo')
    write_rows(folder / "stage2_diffusion/metrics.jsonl", [{"step": 1, "loss[train]": 0.75}])
    (folder / "stage1_vae/config.json").write_text(json.dumps({"beta": 1e-6, "note": EVIL}))
    (folder / "data.json").write_text(json.dumps(data | {"val": "0.04"}))
    metric = {"value": 27.1132, "n": 10000, "how": "posterior mean, all of the test split"}
    (folder / "metrics.json").write_text(json.dumps({"psnr[test]": metric}))
    command = {"command": "calotype train-vae shapes", "seconds": 3725.0, "finished": True}
    (folder / "run.json").write_text(json.dumps({"commands": [command], "version": "0.1.0"}))
    for step in range(100, 1100, 100):
        write_picture(folder / f"stage2_diffusion/samples/step-{step:08d}.png")
    write_picture(folder / "stage1_vae/samples/step-00000500.png")
    write_picture(folder / "pipeline/samples.png", colour="blue")
    return folder


class Page(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += " " + " ".join(data.split())

    def all(self, tag, **wanted):
        return [have for name, have in self.tags if name == tag and wanted.items() <= have.items()]


def page_of(run):
    return Page(report.write_report(run).read_text())


def test_page_holds_every_figure_of_the_run(run):
    text = page_of(run).text
    for fact in ("27.11 dB", "10,000 images", "posterior mean", "50,000", "2,000", "1 h 2 min", "48×32", "9f2c61d0"):
        assert fact in text
    for fact in ("calotype train-vae shapes", "red star", "val 27.25", "4,000 steps", "Diffusion loss 0.75", "1e-06"):
        assert fact in text


def test_page_loads_nothing(run):
    page = report.render(run)
    assert "http://" not in page and "https://" not in page
    for _, attributes in Page(page).tags:
        assert all(value.startswith("data:image/") for name, value in attributes.items() if name in ("src", "href"))
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_hostile_names_stay_text(run):
    page = page_of(run)
    assert len(page.all("script")) == 1
    assert EVIL in page.text and "a<b>.png" in page.text


def test_the_evaluation_of_stage_1_has_a_table_of_its_own(run):
    assert not page_of(run).all("section", id="evaluation")
    how = f"Fréchet distance, {EVIL}; mean over 2 autoencoders"
    found = {"rfid[gradients]": {"value": 0.54386, "sd": 0.0213, "n": 244, "how": how}}
    found["bits_per_dim[iw64]"] = {"value": 3.25, "sd": None, "n": 1024, "how": "64 samples"}
    (run / "stage1_vae/evaluation.json").write_text(json.dumps(found))
    whole = report.render(run)
    (section,) = re.findall(r'<section id="evaluation">.*?</section>', whole, re.DOTALL)
    text = Page(section).text
    for fact in ("Stage 1 evaluation", "0.5439 ± 0.0213", "244", how, "bits per dim", "iw64", "1,024", "64 samples"):
        assert fact in text, fact
    assert text.count("±") == 1 and "None" not in text
    rows = [re.findall(r"<t[dh]\b", row) for row in re.findall(r"<tr>.*?</tr>", section, re.DOTALL)]
    assert [len(row) for row in rows] == [5, 5, 5]
    assert whole.count("<th>Metric</th>") == 2 and "27.11 dB" in Page(whole).text  # the other table is there still
    assert len(Page(whole).all("script")) == 1


def test_what_a_stage_said_stands_in_its_section_with_the_step(run):
    file = run / "stage1_vae/metrics.jsonl"
    said = [(1500, f"Dead codes: {EVIL}"), (3000, "The run goes back."), (1500, f"Dead codes: {EVIL}"), (3000, 7)]
    rows = [{"step": step, "seconds": 1.0, "said": sentence} for step, sentence in said]
    charts = len(page_of(run).all("polyline"))
    write_rows(file, [json.loads(line) for line in file.read_text().splitlines()[:-1]] + rows)
    whole = report.render(run)
    first, second = (re.search(rf'<section id="stage{i}">.*?</section>', whole, re.DOTALL)[0] for i in (1, 2))
    text = " ".join(Page(first).text.split())
    assert "Diagnoses 2" in text and "Diagnoses" not in second
    assert f"step 1,500 Dead codes: {EVIL} step 3,000 The run goes back." in text
    page = Page(whole)
    assert len(page.all("script")) == 1 and len(page.all("polyline")) == charts and "4,000 steps" in page.text


def test_film_strip_has_first_and_last_sheet(run):
    names = [image["alt"] for image in page_of(run).all("img")]
    strip = [name for name in names if name.startswith("Samples at step")]
    assert len(strip) == report.FRAMES
    assert (strip[0], strip[-1]) == ("Samples at step 100", "Samples at step 1000")
    assert len(names) == report.FRAMES + 2  # with the reconstructions and the final sheet


def test_no_part_is_needed_but_one(run, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "data.json").write_text((run / "data.json").read_text())
    text = page_of(bare).text
    assert text.count("Not yet") == 3 and "48,000" in text


def test_broken_pictures_are_left_out(run):
    sheets = sorted(run.glob("stage2_diffusion/samples/*.png"))
    sheets[0].write_bytes(sheets[0].read_bytes()[:60])
    sheets[-1].write_bytes(b"not a picture")
    assert len(page_of(run).all("img")) == report.FRAMES


def test_large_pictures_are_made_smaller(run):
    write_picture(run / "pipeline/samples.png", size=(3200, 1600))
    final = page_of(run).all("img")[0]
    assert (final["width"], final["height"]) == ("1600", "800")
    assert final["src"].startswith("data:image/webp")


def test_not_a_run_and_broken_json_are_user_errors(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run here"):
        report.write_report(tmp_path / "empty")
    (run / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json: not valid JSON"):
        report.write_report(run)
    assert not list(run.glob("*.html"))


def test_command_replaces_the_page_and_needs_no_torch(run):
    (run / "report.html").write_text("old")
    code = "import sys; from pathlib import Path; from types import SimpleNamespace; from calotype import report;"
    code += "report.main(SimpleNamespace(run=Path(sys.argv[1]))); assert not {'torch', 'diffusers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "report.html")
    assert {p.name for p in run.iterdir() if p.is_file()} == {"data.json", "metrics.json", "run.json", "report.html"}
    assert "27.11 dB" in (run / "report.html").read_text()


def test_main_prints_where_the_page_lies(run, capsys):
    report.main(SimpleNamespace(run=run))
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_curves_reach_both_ends_of_the_canvas():
    chart = curves.draw("loss", {"train": [(0, 4.0), (5, 3.0), (10, 2.0)], "val": [(10, 3.5)]})
    train, val = chart.curves
    assert [point[2:] for point in train.points] == [(0, 4.0), (5, 3.0), (10, 2.0)]
    assert [point[0] for point in train.points] == [curves.LEFT, (curves.LEFT + 468) / 2, 468]
    assert curves.TOP < train.points[0][1] < val.points[0][1] < train.points[2][1] < curves.BOTTOM
    assert not chart.y.log and chart.last_step == 10 and val.last == 3.5


def test_long_curves_are_thinned_and_keep_their_mean():
    points = [(step, float(step % 7)) for step in range(10_001)]
    thinned = curves.thin(points)
    assert len(thinned) == curves.MOST_POINTS
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert [step for step, _ in thinned] == sorted({step for step, _ in thinned})
    assert sum(value for _, value in thinned) / len(thinned) == pytest.approx(3, abs=0.05)


def test_smoothing_keeps_lines_and_ends():
    line = [0.5 * i for i in range(200)]
    assert curves.smooth(line) == pytest.approx(line)
    zigzag = curves.smooth([float(i % 2) for i in range(200)])
    assert max(abs(value - 0.5) for value in zigzag[20:-20]) < 0.1


@pytest.mark.parametrize("low, high", [(1e-5, 3.0), (0.02, 0.9), (-3.0, 5.0), (0.1, 0.1), (0.0, 0.0), (1e6, 1e9)])
def test_axes_have_ticks_inside(low, high):
    chart = curves.draw("x", {"": [(1, low), (2, high)]})
    ticks = chart.y.ticks()
    assert 1 <= len(ticks) <= 10
    assert all(curves.TOP <= pixel <= curves.BOTTOM for pixel, _ in ticks)
    assert all(curves.TOP <= y <= curves.BOTTOM for _, y, *_ in chart.curves[0].points)


def test_rows_of_a_resumed_run_count_once_and_nan_never(tmp_path):
    rows = [{"step": 1, "loss[train]": 9.0}, {"step": 2, "loss[train]": 8.0}, {"step": 1, "loss[train]": 7.0}]
    write_rows(tmp_path / "metrics.jsonl", [*rows, {"step": 3, "loss[train]": float("nan")}], '{"step": 4, "loss[tr')
    (chart,), folded = report.draw_charts(report.read_rows(tmp_path / "metrics.jsonl"))
    assert [point[2:] for point in chart.curves[0].points] == [(1, 7.0), (2, 8.0)] and not folded


def test_an_odd_chart_takes_a_whole_row():
    rows = [{"step": s, "loss[train]": s, "kl[train]": s, "psnr[val]": s, "lr": s, "speed": s} for s in (1, 2)]
    charts, folded = report.draw_charts(rows)
    assert [chart.width for chart in charts] == [curves.WIDE, curves.WIDTH, curves.WIDTH]
    assert [chart.width for chart in folded] == [curves.WIDTH, curves.WIDTH]


def test_the_kernel_distance_of_a_training_has_a_curve_on_the_page(run):
    rows = [{"step": s, "loss[val]": 0.5, "kid[encoder]": v} for s, v in ((100, 3.5), (200, 0.4), (300, -0.01))]
    write_rows(run / "stage2_diffusion/metrics.jsonl", rows)
    (chart,) = [chart for chart in report.read_stage(run / "stage2_diffusion").charts if chart.title == "kid"]
    assert [point[2:] for point in chart.curves[0].points] == [(100, 3.5), (200, 0.4), (300, -0.01)]
    page = page_of(run)
    assert "KID" in page.text and "encoder" in page.text


def test_intervals_contracts_and_classes_are_shown_once(run):
    entry = {"n": 512, "how": "unbiased", "contract": "512 samples, guidance 1.5"}
    found = {"kid[own]": {"value": 0.25, "low": -0.125, "high": 0.5} | entry, "fid[own]": {"value": 2.5} | entry}
    found["accuracy[own]"] = {"value": 0.75, "classes": {"red": 1.0, "blue": 0.5}} | entry
    (run / "metrics.json").write_text(json.dumps(found))
    text = " ".join(page_of(run).text.split())
    assert text.count("Measured: 512 samples, guidance 1.5.") == 1
    assert "-0.125 to 0.5" in text and "blue 50.0 %" in text and "None" not in text


def test_polylines_on_the_page_have_the_points_of_the_run(run):
    page = page_of(run)
    lines = [line["points"].split() for line in page.all("polyline")]
    assert len(lines) == 6  # loss and learning rate with a raw line behind the trend, PSNR and stage 2's loss without
    assert len(lines[0]) == len(lines[1]) == curves.MOST_POINTS
    data = [json.loads(figure["data-curves"]) for figure in page.all("figure") if "data-curves" in figure]
    assert data[0][0][0][2:] == [10, 0.8] and data[0][0][-1][2:] == [4000, 0.002]


@pytest.mark.parametrize(
    "seconds, text",
    [(0.5, "0.5 s"), (59.0, "59 s"), (61, "1 min 1 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h")],
)
def test_durations(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize("value, text", [(60000, "60,000"), (27.1132, "27.11"), (1e-6, "1e-6"), (12345.6, "12,346")])
def test_numbers(value, text):
    assert report.number(value) == text


def test_template_names_only_what_exists():
    text = report.TEMPLATE.read_text() + report.TEMPLATE.with_name("stages.css").read_text()
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))
