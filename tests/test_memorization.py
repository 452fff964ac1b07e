"""The audit for copies: flags copies, passes what is new, and keeps its error rate where nothing is copied."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_evaluate import evaluate, run, split, write  # noqa: F401

from calotype.manifold import nearest
from calotype.pipeline import memorization
from calotype.pipeline.memorization import Neighbours, permutation_test
from calotype.randomness import normal
from calotype.report import render


def neighbours(samples, train, val):
    return Neighbours(*nearest(samples, train), *nearest(samples, val))


def cloud(name, n, d=4):
    return normal(0, name, 0, n, (d,)).double()


def judged(samples, train, val):
    return permutation_test(neighbours(samples, train, val), len(train), len(val))


def test_copies_are_flagged_whatever_the_sizes():
    for train, val in ((64, 640), (300, 300), (2000, 60)):
        t, v = cloud("train", train), cloud("val", val)
        copies = t.repeat(1 + 256 // train, 1)[:256] + 0.02 * cloud("noise", 256)
        found = judged(copies, t, v)
        assert found.verdict.startswith("memorises") and found.copied > 0.9 and found.p <= 0.001, (train, val, found)
        assert f"{found.nearer:.1%} of samples" in found.verdict and found.chance == pytest.approx(
            train / (train + val)
        )


def test_a_share_of_copies_is_estimated():
    t, v, new = cloud("train", 400), cloud("val", 400), cloud("new", 600)
    found = judged(torch.cat([t[:200] + 0.01 * cloud("noise", 200), new]), t, v)
    assert found.copied == pytest.approx(0.25, abs=4 * found.error) and found.verdict.startswith("memorises")


@pytest.mark.parametrize("train, val", [(64, 640), (300, 300), (1500, 100)])
def test_where_nothing_is_copied_it_is_wrong_as_seldom_as_it_says(monkeypatch, train, val):
    """One distribution for all three; neighbours are unevenly popular in 4 dimensions, samples share them."""
    monkeypatch.setattr(memorization, "_PERMUTATIONS", 199)
    found = [judged(cloud(f"s{i}", 150), cloud(f"t{i}", train), cloud(f"v{i}", val)) for i in range(150)]
    small = np.mean([f.p <= 0.1 for f in found])
    assert small <= 0.1 + 4 * (0.1 * 0.9 / 150) ** 0.5
    assert small >= 0.02  # else it would see nothing
    assert np.mean([f.copied for f in found]) == pytest.approx(0, abs=0.1)
    spread = np.std([f.copied for f in found]) / np.mean([f.error for f in found])
    assert spread == pytest.approx(1, abs=0.25)


def test_poor_samples_are_not_taken_for_copies():
    """All alike and in the middle, so that few pictures are their neighbours."""
    found = judged(0.1 * cloud("collapsed", 300), cloud("train", 300), cloud("val", 200))
    assert not found.verdict.startswith("memorises")


def test_held_out_pictures_pass_and_too_few_of_them_say_nothing():
    t, v = cloud("train", 300), cloud("val", 200)
    assert judged(v, t, v).verdict.startswith("no sign") and judged(v, t, v).copied < -0.5
    found = judged(cloud("samples", 40), t, v[:2])
    assert found.verdict.startswith("cannot tell") and "--val" in found.verdict


def test_the_ratio_is_one_for_held_out_pictures_and_authenticity_is_that_of_the_paper():
    t, v, s = cloud("train", 300), cloud("val", 50), cloud("samples", 80)
    others = torch.cdist(v, v).fill_diagonal_(torch.inf).min(1).values
    alone = (torch.cdist(v, t).min(1).values / others).median()
    made = (torch.cdist(s, t).min(1).values / torch.cdist(s, v).min(1).values).median()
    assert memorization._ratio(neighbours(s, t, v), memorization.held_out(t, v))["value"] == pytest.approx(
        (made / alone).item()
    )
    assert memorization._ratio(neighbours(t[:80] + 0.01 * s, t, v), memorization.held_out(t, v))["value"] < 0.2
    own = torch.cdist(t, t).fill_diagonal_(torch.inf).min(1).values
    distance, item = torch.cdist(s, t).min(1)
    found = memorization._authenticity(neighbours(s, t, v), memorization.held_out(t, v), t)
    assert found["value"] == pytest.approx((distance > own[item]).double().mean().item())
    assert 0.2 < found["value"] < 0.9


@pytest.fixture
def audited(run, tmp_path, monkeypatch):  # noqa: F811
    """Audit some pictures, passed off as samples of a copy of the run."""
    shutil.copytree(run, tmp_path / "run")

    def audit(pictures):
        folder = write(tmp_path / f"samples{len(list(tmp_path.iterdir()))}", pictures)
        found = evaluate(tmp_path / "run", "--samples", folder, "--features", "gradients", "--audit")
        return found, json.loads((tmp_path / "run/evaluation/memorisation.json").read_text())

    audit.run = tmp_path / "run"
    return audit


def test_copied_training_pictures_are_flagged_and_shown(audited, capsys):
    train, _ = split(audited.run, "train")
    noisy = (train.float() + 6 * normal(0, "noise", 0, len(train), train.shape[1:])).clamp(0, 255).byte()
    found, said = audited(noisy)
    assert said["verdict"].startswith("memorises: 100.0%")
    assert found["copied[layout]"]["value"] == 1 and found["distance_ratio[layout]"]["value"] < 0.5
    assert found["authenticity[layout]"]["value"] < 0.1 and "held-out pictures" in found["copied[layout]"]["contract"]
    printed = capsys.readouterr().out
    assert "Memorisation: memorises" in printed and str(audited.run / "evaluation/memorisation.png") in printed
    page = render(audited.run)
    assert "The audit: memorises" in page and "Samples above their nearest training" in page


def test_held_out_pictures_passed_off_as_samples_pass(audited):
    found, said = audited(split(audited.run, "val")[0])
    assert said["verdict"].startswith("no sign of memorisation")
    assert found["copied[layout]"]["value"] <= 0 and found["authenticity[layout]"]["value"] > 0.3
