"""`calotype anomaly fit` and its detector, on soft spots: what is strange, where, and who looks most like it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from spots import SIDE, bump, fitted, stranger
from torch.testing import assert_close

from calotype import cli
from calotype.data import Pictures
from calotype.density import fit
from calotype.density.detector import Detector
from calotype.density.neighbours import Neighbours, thumbnails
from calotype.density.places import smooth, strangeness, usual
from calotype.density.scores import Networks, codes_of, complexity
from calotype.images import normalize
from calotype.sheet import read_sheet


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("fitted"))


@pytest.fixture(scope="module")
def detector(run):
    return Detector.open(run)


@pytest.fixture(scope="module")
def held_out(run):
    """Normal pictures that check, uint8 (N, 1, H, W)."""
    sheet = read_sheet(run / "data.json")
    pictures = Pictures(sheet, "val")
    return torch.stack([pictures[i] for i in fit.halves(sheet)[1]])


def many(draw, n=60, seed=5):
    """n pictures (n, 1, H, W) in [-1, 1] as a function draws them."""
    rng = np.random.default_rng(seed)
    return normalize(torch.from_numpy(np.stack([draw(rng) for _ in range(n)]).astype(np.uint8))[:, None])


# What it finds


@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_what_is_strange_is_found_be_it_simple_or_not(detector, kind):
    normal = detector.examine(many(bump))
    strange = detector.examine(many(lambda rng: stranger(rng, kind)))
    truth = np.repeat([0, 1], 60)
    for name in ("typicality", "combination"):
        assert roc_auc_score(truth, torch.cat([normal.scores[name], strange.scores[name]])) > 0.98, name
    limit = detector.threshold(0.1)
    assert (strange.scores["combination"] >= limit).float().mean() > 0.9
    assert (normal.scores["combination"] >= limit).float().mean() < 0.3


def test_scores_have_their_names_and_do_not_depend_on_the_batch(detector):
    x = many(bump, 7)
    together, alone = detector.examine(x), [detector.examine(x[i : i + 1]) for i in range(7)]
    assert list(together.scores) == list(together.p) == list(detector.facts.scores)
    assert list(together.scores) == ["reconstruction", "elbo", "flow", "typicality", "knn", "combination"]
    for name, score in together.scores.items():
        assert score.dtype == torch.float64 and score.shape == (7,)
        assert_close(torch.cat([one.scores[name] for one in alone]), score, rtol=1e-4, atol=1e-4)
        assert ((together.p[name] > 0) & (together.p[name] <= 1)).all()


def test_alarms_are_raised_exactly_where_p_says_so(detector, held_out):
    found = detector.examine(normalize(held_out))
    for name in found.scores:
        assert torch.equal(found.scores[name] >= detector.threshold(0.1, name), found.p[name] <= 0.1)


def test_false_alarms_on_file_are_those_of_the_pictures_that_check(detector, held_out):
    assert detector.facts.check == len(held_out)
    kept = next(one for one in detector.facts.false_alarms if one["rate"] == 0.1)
    p = detector.examine(normalize(held_out)).p["combination"]
    assert kept["share"] == pytest.approx(float((p <= 0.1).double().mean()))
    assert kept["low"] <= kept["share"] <= kept["high"]


def test_the_halves_are_all_of_the_held_out_pictures_and_part_by_name(run):
    sheet = read_sheet(run / "data.json")
    first, second = fit.halves(sheet)
    assert sorted(first + second) == list(range(sheet.counts["val"])) and abs(len(first) - len(second)) <= 1
    sheet.records = sheet.records[::-1]
    names = [record.file for record in sheet.records if record.val]
    turned = {names[i] for i in fit.halves(sheet)[0]}
    assert turned == {names[::-1][i] for i in first}


def test_pictures_of_another_kind_are_prepared_as_those_of_training(detector):
    colour = Image.new("RGB", (50, 40), (200, 30, 30))
    x = detector.prepare(colour)
    assert x.shape == (1, 1, SIDE, SIDE) and x.abs().max() <= 1
    assert_close(x, normalize(torch.tensor(np.array(colour.convert("L"))[0, 0])).expand_as(x))


# Where


def test_a_defect_is_found_where_it_was_pasted(detector, held_out):
    """A bright patch of 3 x 3: the map is highest in it, and ranks its pixels above the others."""
    x, truth = normalize(held_out), torch.zeros(len(held_out), SIDE, SIDE, dtype=torch.bool)
    rng = np.random.default_rng(0)
    for i in range(len(x)):
        top, left = rng.integers(0, SIDE - 3, 2)
        truth[i, top : top + 3, left : left + 3] = True
        x[i, 0, top : top + 3, left : left + 3] *= -1
    maps = detector.examine(x).maps
    hits = truth.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None])
    assert hits.float().mean() > 0.8
    assert roc_auc_score(truth.flatten(), maps.flatten()) > 0.9


def test_maps_are_about_1_on_normal_pictures(detector, held_out):
    maps = detector.examine(normalize(held_out)).maps
    assert maps.dtype == torch.float32 and maps.shape == (len(held_out), SIDE, SIDE)
    assert 0.7 < float(maps.mean()) < 1.4


def test_smoothing_spreads_an_error_and_loses_none_of_it():
    error = torch.zeros(1, 25, 31)
    error[0, 12, 15] = 1
    smoothed = smooth(error)
    assert smoothed.sum() == pytest.approx(1, abs=1e-5) and smoothed[0].argmax() == 12 * 31 + 15
    assert_close(smoothed, smoothed.flip(-1))
    assert_close(smooth(torch.ones(2, 9, 5)), torch.ones(2, 9, 5))


def test_a_place_without_any_usual_error_does_not_divide_by_nought():
    error = torch.zeros(4, 8, 8)
    error[:, :, 4:] = 1
    assert_close(strangeness(error, usual([error])).amax(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert torch.isfinite(strangeness(torch.rand(2, 8, 8), usual([torch.zeros(3, 8, 8)]))).all()


# Who


def test_a_training_picture_is_its_own_nearest_neighbour(detector):
    found = detector.examine(normalize(detector.normals[:20]))
    assert found.neighbours.shape == (20, 3)
    assert found.neighbours[:, 0].tolist() == list(range(20))


def test_distances_are_those_of_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    torch.manual_seed(0)
    codes = torch.randn(300, 5) @ (torch.eye(5) + 0.2 * torch.randn(5, 5)) + 3
    neighbours = Neighbours.of(codes)
    metric = NearestNeighbors(n_neighbors=3, metric="mahalanobis", metric_params={"VI": np.linalg.inv(np.cov(codes.T))})
    new = torch.randn(20, 5) * 3
    distance, numbers = metric.fit(codes.double().numpy()).kneighbors(new.double().numpy())
    found = neighbours.nearest(new)
    assert_close(found[0], torch.from_numpy(distance[:, -1]), rtol=1e-3, atol=1e-3)
    assert torch.equal(found[1], torch.from_numpy(numbers))


def test_fewer_pictures_than_neighbours_are_named_again():
    distance, numbers = Neighbours.of(torch.eye(2)).nearest(torch.zeros(4, 2))
    assert numbers.shape == (4, 3) and torch.isfinite(distance).all()


def test_large_latents_become_codes_of_bounded_length_and_thumbnails_fit_into_memory(monkeypatch, run):
    z = torch.randn(2, 4, 32, 64)
    assert codes_of(z).shape[1] <= 512
    assert_close(codes_of(z).view(2, 4, -1).mean(2), z.flatten(2).mean(2), atol=1e-5, rtol=0)
    assert torch.equal(codes_of(z[:, :, :4, :4]), z[:, :, :4, :4].flatten(1))
    monkeypatch.setattr("calotype.density.neighbours._BYTES", 20 * SIDE * SIDE // 2)
    small = thumbnails(Pictures(read_sheet(run / "data.json"), "train"), list(range(20)))
    assert small.dtype == torch.uint8 and small.numel() <= 20 * SIDE * SIDE // 2


# Statistics and the diffusion model


def test_complexity_is_low_for_what_is_simple_and_above_8_bits_for_noise():
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    flat, random = complexity(torch.cat([torch.zeros_like(noise), noise]))
    assert flat < 0.5 and 8 < random < 9


def test_a_run_of_any_kind_gives_the_scores_that_its_networks_can(finished):
    """A latent grid, no bound, and a diffusion model: no ELBO, and no flow; the likelihood by the ODE instead."""
    measured = Networks.open(finished, flow=False, diffusion=True).measure(torch.rand(3, 3, 16, 16) * 2 - 1)
    assert list(measured.scores) == ["reconstruction", "diffusion"]
    assert all(torch.isfinite(x).all() for x in (measured.scores | measured.statistics).values())
    assert measured.error.shape == (3, 16, 16) and measured.z.shape == (3, 4, 8, 8)


# The command


def again(run, *more):
    source = read_sheet(run / "data.json").source
    argv = ["anomaly", "fit", source, "--steps", "60", "--flow-steps", "40", "--latent-dim", "4", "--precision", "fp32"]
    return cli.main([*argv, *more, "--out", str(run)])


def stamps(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file() and file.name[0] != "."}


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_same_command_again_makes_nothing_anew(run, capsys):
    before = stamps(run)
    assert again(run) == 0
    assert stamps(run) == before
    said = capsys.readouterr().out
    assert "stage1_vae is there and is used as it is." in said and "False alarms at 10%" in said


def test_an_interrupted_fit_goes_on_with_what_is_missing(copy, capsys):
    false_alarms = Detector.open(copy).facts.false_alarms
    shutil.rmtree(copy / "anomaly")
    shutil.rmtree(copy / "flow")
    kept = stamps(copy / "stage1_vae")
    assert again(copy) == 0 and stamps(copy / "stage1_vae") == kept
    said = capsys.readouterr().out
    assert "$ calotype train-flow" in said and "$ calotype train-vae" not in said
    assert Detector.open(copy).facts.false_alarms == false_alarms


def test_a_killed_calibration_leaves_no_half_of_a_detector(copy, monkeypatch):
    shutil.rmtree(copy / "anomaly")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert again(copy) == 130
    assert not (copy / "anomaly").exists()
    with pytest.raises(ValueError, match="holds no detector; give a run that `calotype anomaly fit` has finished"):
        Detector.open(copy)
    assert again(copy) == 0 and Detector.open(copy)


def refusal(capsys, argv):
    assert cli.main([str(word) for word in argv]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.mark.parametrize("name", ["calibration.safetensors", "normals.safetensors", "anomaly.json"])
def test_a_damaged_file_is_named(copy, name):
    content = (copy / "anomaly" / name).read_bytes()
    (copy / "anomaly" / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is .*damaged.*; run `calotype anomaly fit` with --fresh"):
        Detector.open(copy)
    assert again(copy) == 0 and Detector.open(copy)  # and the command mends it


def test_other_networks_than_those_of_the_calibration_are_refused(copy):
    facts = json.loads((copy / "flow/prior/config.json").read_text())
    (copy / "flow/prior/config.json").write_text(json.dumps(facts, indent=2))
    with pytest.raises(ValueError, match="flow/prior is not the one that .*anomaly.json was calibrated with"):
        Detector.open(copy / "anomaly")
    shutil.rmtree(copy / "stage1_vae")
    with pytest.raises(ValueError, match="has no stage1_vae/vae, which its detector needs"):
        Detector.open(copy)


def test_too_few_pictures_for_a_rate_are_said(detector):
    with pytest.raises(ValueError, match=r"^--false-alarms 0.001 needs 999 held-out normal pictures"):
        detector.threshold(0.001)


def test_too_few_held_out_pictures_are_refused_before_anything_is_trained(pictures, tmp_path, capsys):
    line = refusal(capsys, ["anomaly", "fit", pictures, "--val", "0.03", "--image-size", 16, "--out", tmp_path / "run"])
    assert "--val 0.03" in line and "at least 10 are needed" in line
    assert not (tmp_path / "run" / "stage1_vae").exists()


def test_a_run_of_other_pictures_is_refused(run, pictures, capsys):
    assert "holds the data sheet of" in refusal(capsys, ["anomaly", "fit", pictures, "--out", run])


def test_a_missing_extra_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zuko", None)
    assert cli.main(["anomaly", "fit", "shapes", "--out", str(tmp_path / "run")]) == 2
    assert "needs the package zuko; pip install 'calotype[flows]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
