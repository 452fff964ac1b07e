"""`calotype anomaly score`: what it writes of pictures, against numbers computed elsewhere; and what the page shows."""

import base64
import csv
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.metrics import average_precision_score, roc_auc_score
from spots import bump, fitted, save, stranger

from calotype import cli
from calotype.density import heat, histogram, rows
from calotype.density.detector import Detector, Examined
from calotype.density.found import Best, Found, Seen
from calotype.folder import Entry

SHOWN = 9


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures to be judged: 30 good ones, 20 strange ones of two kinds, deeper in a folder, and a broken file."""
    rng, root = np.random.default_rng(1), tmp_path_factory.mktemp("judged") / "parts"
    for i in range(30):
        save(bump(rng), root / "good" / f"{i:02d}.png")
    for i in range(20):
        kind = ("flat", "noise")[i % 2]
        save(stranger(rng, kind), root / kind / "deep" / f"{i:02d}.png")
    (root / "good" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


def score(run, folder, out, *more):
    return cli.main(["anomaly", "score", str(run), str(folder), "--out", str(out), *more])


@pytest.fixture(scope="module")
def scored(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "out"
    assert score(run, folder, out, "--show", str(SHOWN)) == 0
    return out


@pytest.fixture(scope="module")
def table(scored):
    with (scored / "scores.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def detector(run):
    return Detector.open(run)


# The table


def test_every_picture_has_a_line_and_a_broken_one_no_score(table, folder):
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    assert [row["file"] for row in table] == files and len(files) == 51
    broken = [row for row in table if row["combination"] == ""]
    assert [row["file"] for row in broken] == ["good/torn.png"] and set(broken[0].values()) == {
        "good/torn.png",
        "good",
        "",
    }
    assert {row["label"] for row in table} == {"good", "flat", "noise"}


def test_the_scores_are_those_of_the_detector_one_by_one(table, folder, detector):
    for row in table[::7]:
        if row["combination"]:
            with Image.open(folder / row["file"]) as image:
                examined = detector.examine(detector.prepare(image.convert("L")))
            for name, values in examined.scores.items():
                assert float(row[name]) == pytest.approx(float(values[0]), rel=1e-3, abs=1e-3), name
            assert float(row["p"]) == pytest.approx(float(examined.p["combination"][0]), abs=0.02)


def test_the_alarm_is_raised_from_the_threshold_on(table, detector):
    limit = detector.threshold(0.05)
    for row in filter(lambda row: row["alarm"], table):
        assert (row["alarm"] == "1") == (float(row["combination"]) >= limit)
    assert sum(row["alarm"] == "1" for row in table if row["label"] == "noise") == 10
    assert sum(row["alarm"] == "1" for row in table if row["label"] == "good") <= 8  # 30 at 5 %: P < 1e-4


def test_the_ranking_is_that_of_another_library(run, folder, table, tmp_path, capsys):
    assert score(run, folder, tmp_path / "again", "--batch-size", "7") == 0
    said = capsys.readouterr().out
    whole = [row for row in table if row["combination"]]
    strange = [row["label"] != "good" for row in whole]
    for name in ("combination", "flow", "reconstruction", "knn", "typicality", "elbo"):
        values = [float(row[name]) for row in whole]
        line = next(line for line in said.splitlines() if line.startswith(f"{name} "))
        auc, precision = (float(found) for found in re.findall(r"([\d.]+) \[", line))
        assert auc == pytest.approx(roc_auc_score(strange, values), abs=0.006)
        assert precision == pytest.approx(average_precision_score(strange, values), abs=0.006)
    assert "Not read: " in said and "torn.png" in said and "raise the alarm" in said
    assert said.count("  combination ") == 5


def test_a_raw_likelihood_that_prefers_simple_pictures_is_shown(scored, table, detector, capsys):
    p = np.array([float(row["p"]) for row in table if row["combination"]])
    assert p.min() > 0
    page = (scored / "index.html").read_text()
    assert "A raw likelihood can prefer simple pictures" in page
    likely = 0
    for name in {"elbo", "flow"} & set(table[0]):
        normal = detector.calibration.normal[name].numpy()
        values = np.array([float(row[name]) for row in table if row["combination"]])
        at_least = (normal[None] >= values[:, None]).sum(1)
        untypical = np.array([float(row["typicality"]) for row in table if row["combination"]])
        alarm = np.array([row["alarm"] == "1" for row in table if row["combination"]])
        alarm |= untypical >= detector.threshold(0.05, "typicality")
        likely += ((1 + at_least) / (1 + len(normal)) > 0.95) @ alarm
    assert (likely > 0) == ('id="likely"' in page)


# The page


class Reader(HTMLParser):
    """What is on a page: its images with their alt texts, addresses, ids, and file names in the order of rows."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.images, self.addresses, self.section, self.rows = [], [], [], "", {}
        self._names = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "section":
            self.section = attributes["id"]
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href", "action", "data")]
        self._names = (tag == "b" and self._names) or (tag == "p" and attributes.get("class") == "of")

    def handle_data(self, data):
        if self._names and data.strip():
            self.rows.setdefault(self.section, []).append(data)
            self._names = False


def test_the_page_holds_all_it_needs_and_says_what_is_on_its_pictures(scored):
    page = Reader((scored / "index.html").read_text())
    assert page.addresses and all(address.startswith("data:image/webp;base64,") for address in page.addresses)
    assert all(len(image["alt"]) > 5 and image["class"] == "crisp" for image in page.images)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in (scored / "index.html").read_text()


def test_the_strangest_come_first(scored, table):
    shown = Reader((scored / "index.html").read_text()).rows
    ranked = sorted((row for row in table if row["combination"]), key=lambda row: -float(row["combination"]))
    values = {row["file"]: float(row["combination"]) for row in table if row["combination"]}
    found = [values[name] for name in shown["strangest"]]
    assert len(found) == SHOWN and found == sorted(found, reverse=True)
    assert found[-1] >= float(ranked[SHOWN - 1]["combination"])
    assert 0 < len(shown["others"]) <= 12 and not set(shown["others"]) & set(shown["strangest"])
    assert all(row["alarm"] == "0" for row in table if row["file"] in shown["others"])


def test_the_shown_pictures_are_the_right_ones(scored, folder, detector):
    page = (scored / "index.html").read_text()
    row = page[page.index('id="strangest"') :]
    name = re.search(r'class="of"><b>([^<]+)</b>', row)[1]
    sources = re.findall(r'src="data:image/webp;base64,([^"]+)"', row)[:5]
    picture, _, *near = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("L")) for one in sources]
    with Image.open(folder / name) as image:
        assert (picture == np.asarray(image)).all()
        expected = detector.normals[detector.examine(detector.prepare(image)).neighbours[0]]
    assert all((found == one[0].numpy()).all() for found, one in zip(near, expected, strict=True))


# Refusals


def test_what_cannot_be_is_said_in_one_line(run, folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/a.png").write_bytes(b"junk")
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat/a.png")
    out = tmp_path / "out"
    for words, args in (
        ("anomaly fit", (tmp_path / "empty", folder, out)),
        ("holds no pictures", (run, tmp_path / "empty", out)),
        ("none of its 1 files can be read", (run, tmp_path / "torn", out)),
        ("lies inside DIR", (run, folder, folder / "out")),
        ("--normal bad: .* it has flat, good, noise", (run, folder, out, "--normal", "good", "bad")),
        ("--normal good: .* has none", (run, tmp_path / "flat", out, "--normal", "good")),
        ("--false-alarms 0.001 needs 999", (run, folder, out, "--false-alarms", "0.001")),
    ):  # fmt: skip
        assert score(*args) == 2, words
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(words, said), said
    assert not out.exists()


def test_without_labels_there_is_no_ranking(run, tmp_path, capsys):
    rng = np.random.default_rng(2)
    save(bump(rng), tmp_path / "some/a.png")
    save(stranger(rng, "noise"), tmp_path / "some/=b<i>.png")
    assert score(run, tmp_path / "some", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "AUC" not in said and "of 2 pictures raise the alarm." in said
    page = (tmp_path / "out/index.html").read_text()
    assert "ROC-AUC" not in page and "=b&lt;i&gt;.png" in page and "<i>.png" not in page


# Parts


def test_best_keeps_the_largest_in_the_memory_of_a_few():
    values = np.random.default_rng(0).integers(0, 50, 500).tolist()
    best = Best(20)
    for i, value in enumerate(values):
        best.offer(value, Seen(i, None, None, []))
        assert len(best._heap) <= 20
    expected = sorted(range(500), key=lambda i: (-values[i], i))[:20]
    assert [seen.number for seen in best.ranked()] == expected
    none = Best(0)
    none.offer(1.0, Seen(0, None, None, []))
    assert none.ranked() == []


def test_too_likely_is_likelier_than_nearly_all_and_yet_strange():
    limits = {"flow": 1.0, "typicality": 5.0, "combination": 2.0}
    found = Found(limits, 3)
    p = torch.tensor([0.99, 0.99, 0.99, 0.5, 0.951, 0.95])
    typical, combined = torch.tensor([6.0, 1, 1, 6, 5, 6]), torch.tensor([0.0, 3, 1, 3, 0, 3])
    scores = {"flow": torch.zeros(6), "typicality": typical, "combination": combined}
    examined = Examined(scores, dict.fromkeys(limits, p), torch.ones(6, 4, 4), torch.zeros(6, 3, dtype=torch.long))
    found.add([Entry(f"{i}.png", "", "") for i in range(6)], torch.zeros(6, 1, 4, 4), examined)
    assert found.too_likely(found.scores, found.p).tolist() == [[True, True, False, False, True, False]]
    assert sorted(seen.number for seen in found.likely()) == [0, 1, 4]
    assert [seen.number for seen in found.strangest.ranked()] == [1, 3, 5]
    assert sorted(seen.number for seen in found.others(found.strangest.ranked())) == [0, 2, 4]


def test_colours_of_the_heat_map_are_even_to_the_eye():
    shades = Image.fromarray(heat.ramp().round().astype(np.uint8)[None])
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(shades, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    light = np.asarray(lab)[0, :, 0] / 2.55
    steps = np.diff(light[::32])
    assert steps.min() > 0.85 * steps.mean() and steps.max() < 1.15 * steps.mean() and light[-1] - light[0] > 50


def test_the_heat_map_is_clear_where_nothing_is_strange():
    pixels = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    calm = np.asarray(heat.overlay(pixels, torch.full((8, 8), 0.7)))
    assert (calm == calm[..., :1]).all()
    where = torch.ones(8, 8)
    where[2:4, 5] = 40.0
    hot = np.asarray(heat.overlay(pixels, where)).astype(int)
    changed = (hot != calm).any(-1)
    assert changed.sum() == 2 and changed[2:4, 5].all()
    assert np.diff(heat.share(np.array([1, 2, 4, 8, 16, 99]))) == pytest.approx([0.25] * 4 + [0])


def test_histograms_keep_order_and_count():
    rng = np.random.default_rng(0)
    usual, strange = rng.normal(0, 1, 300), np.concatenate([rng.normal(5, 1, 50), [1e9, np.inf, np.nan]])
    drawn = histogram.draw("x", usual, {"held out": usual, "other": strange}, 2.0)
    scale = histogram.Scale.of(usual, np.array([1e9, 2.0]))
    places = scale.share(np.sort(usual))
    assert (np.diff(places) > 0).all() and places.min() == 0 and scale.share(1e9) == 1
    assert drawn.threshold == pytest.approx(scale.pixel(2.0))
    points = np.array([[float(n) for n in point.split(",")] for point in drawn.outlines["held out"].split()])
    heights = histogram.BOTTOM - points[1:-1:2, 1]
    expected, _ = np.histogram(scale.share(usual), histogram.BINS, (0, 1))
    assert heights / heights.max() == pytest.approx(expected / expected.max(), abs=0.002)
    assert drawn.ticks[0][1] == pytest.approx(usual.min()) and drawn.ticks[-1][1] == pytest.approx(1e9)


def test_p_in_words_and_as_a_bar():
    n = 240
    assert rows.as_strange(1 / (n + 1), n) == "none of 240 held-out normal pictures is as strange"
    assert rows.as_strange(2 / (n + 1), n) == "1 of 240 held-out normal pictures is as strange"
    assert rows.as_strange(1.0, n) == "240 of 240 held-out normal pictures are as strange"
    assert [rows.fullness(p, n) for p in (1.0, 1 / 241, 241**-0.5)] == pytest.approx([0, 100, 50])
