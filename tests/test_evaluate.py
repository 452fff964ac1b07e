"""`calotype evaluate`: the figures of samples, against torch-fidelity, and what is said, kept and refused."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_features import write_onnx

from calotype import cli
from calotype.data import Pictures
from calotype.images import normalize, to_pil
from calotype.pipeline import measured
from calotype.randomness import normal, uniform
from calotype.sheet import read_sheet

MANIFOLD = ("precision", "recall", "density", "coverage")
OLD = {"psnr[val]", "latent_std[val]"}


@pytest.fixture(scope="module")
def run(pictures, finished, tmp_path_factory):
    """The finished model with a data sheet that holds out more of the same pictures."""
    out = tmp_path_factory.mktemp("evaluated")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--val", "0.3", "--out", str(out)]) == 0
    shutil.copytree(finished / "pipeline", out / "pipeline")
    return out


def evaluate(run, *words):
    assert cli.main(["evaluate", str(run), "--precision", "fp32", *map(str, words)]) == 0
    return json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)


def refused(capsys, *argv):
    """The one line of a user's error."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1, message
    return message


def split(run, name):
    """The pictures uint8 (n, C, H, W) of a split and their class names."""
    sheet = read_sheet(run / "data.json")
    found = Pictures(sheet, name)
    return torch.stack([found[i] for i in range(len(found))]), [sheet.class_names[i] for i in found.labels]


def write(folder, pictures, labels=None):
    for i, pixels in enumerate(pictures):
        file = folder / (labels[i] if labels else "") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        to_pil(pixels).save(file)
    return folder


def test_figures_of_samples_come_with_their_contract(run, capsys):
    found = evaluate(run, "-n", "40", "--guidance", "2", "--batch-size", "16")
    new = {f"{name}[own]" for name in ("fid", "kid", *MANIFOLD, "accuracy")}
    assert set(found) == OLD | new
    val, _ = split(run, "val")
    for name in new:
        entry = found[name]
        assert {"value", "n", "how", "contract"} <= set(entry) and entry["n"] == 40
        for part in (
            "40 samples",
            "averaged weights",
            "4 steps, 8 network evaluations",
            "guidance 2",
            "seeds from 1000",
        ):
            assert part in entry["contract"], part
        for part in ("float32", f"{len(val)} held-out", "16x16 colour", "fit crop", "features own"):
            assert part in entry["contract"], part
    kid = found["kid[own]"]
    assert kid["low"] < kid["value"] < kid["high"]
    assert set(found["accuracy[own]"]["classes"]) <= set(read_sheet(run / "data.json").class_names)
    printed = capsys.readouterr().out
    assert printed.count("Measured: 40 samples") == 1 and f"({kid['low']:.4g} to {kid['high']:.4g})" in printed
    assert "| kid[own] |" in (run / "pipeline/README.md").read_text()


def test_the_same_command_gives_the_same_figures_out_of_kept_features(run, monkeypatch):
    once = evaluate(run, "-n", "16", "--features", "gradients")
    file = run / "evaluation/reference-val-gradients.safetensors"
    written = file.stat().st_mtime_ns
    again = evaluate(run, "-n", "16", "--features", "gradients", "--batch-size", "5")
    assert file.stat().st_mtime_ns == written
    for name, entry in once.items():
        assert again[name]["value"] == pytest.approx(entry["value"], rel=1e-3, abs=1e-6), name
    other = evaluate(run, "-n", "16", "--features", "gradients", "--seed", "5")
    assert other["fid[gradients]"]["value"] != pytest.approx(once["fid[gradients]"]["value"], rel=1e-5)


@pytest.mark.parametrize("what", ["fingerprint", "identity", "damaged"])
def test_kept_features_of_something_else_are_made_anew(run, what):
    evaluate(run, "-n", "8", "--features", "gradients")
    file = run / "evaluation/reference-val-gradients.safetensors"
    good = load_file(file)["features"].clone()  # not the mapped file
    facts = {"n": str(len(good)), "network": "gradients", "identity": "gradients/1"}
    facts |= {"fingerprint": read_sheet(run / "data.json").fingerprint}
    if what == "damaged":
        file.write_bytes(file.read_bytes()[:50])
    else:
        save_file({"features": torch.zeros_like(good)}, file, metadata=facts | {what: "another"})
    evaluate(run, "-n", "8", "--features", "gradients")
    assert torch.equal(load_file(file)["features"], good)
    save_file({"features": good + 1}, file, metadata=facts)  # and what is said to be the same is taken
    assert evaluate(run, "-n", "8", "--features", "gradients")["fid[gradients]"]["value"] > 1
    file.unlink()


def test_figures_are_those_of_torch_fidelity(run, tmp_path):
    """The same fixed network as an ONNX file here, and registered there; both read PNG files."""
    fidelity = pytest.importorskip("torch_fidelity", reason="NOT compared: torch-fidelity is missing")
    pytest.importorskip("onnxruntime", reason="NOT compared: onnxruntime is missing")
    network = write_onnx(tmp_path / "fixed.onnx")
    val, train = split(run, "val")[0], split(run, "train")[0]
    damage = 12 * normal(0, "damage", 0, len(val), val.shape[1:])
    made = (train[: len(val)].float() * 0.9 + 10 + damage).clamp(0, 255).byte()
    made[::2] = 255 - made[::2]
    real_folder, made_folder = write(tmp_path / "real", val), write(tmp_path / "made", made)
    found = evaluate(run, "--samples", made_folder, "--features", tmp_path / "fixed.onnx")

    class Fixed(fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list():
            return ("f",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "f"

        @staticmethod
        def can_be_compiled():
            return False

        def forward(self, x):
            return (network(normalize(x)),)

    fidelity.register_feature_extractor("calotype-fixed", Fixed)
    expected = fidelity.calculate_metrics(
        input1=str(made_folder), input2=str(real_folder), fid=True, kid=True, prc=True, cuda=False, verbose=False,
        cache=False, feature_extractor="calotype-fixed", kid_subsets=1, kid_subset_size=len(val),
    )  # fmt: skip
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for ours, theirs in names.items():
        assert found[f"{ours}[fixed.onnx]"]["value"] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-6), ours
    assert expected["frechet_inception_distance"] > 0.01 and 0 < expected["precision"] < 1 > expected["recall"] > 0


def test_samples_in_folders_of_classes_are_judged_by_class(run, tmp_path):
    val, labels = split(run, "val")
    right = evaluate(run, "--samples", write(tmp_path / "right", val, labels))
    assert right["accuracy[own]"]["value"] > 0.8 and right["precision[own]"]["value"] == 1
    assert right["fid[own]"]["value"] == pytest.approx(0, abs=1e-3)
    wrong = [{"red": "blue"}.get(label, label) for label in labels]
    found = evaluate(run, "--samples", write(tmp_path / "wrong", val, wrong))["accuracy[own]"]
    blue = sum(label == "blue" for label in labels) / sum(label == "blue" for label in wrong)
    assert found["classes"]["blue"] <= blue < 1 and "blue" in found["how"] and "red" not in found["classes"]
    for odd in (write(tmp_path / "flat", val), write(tmp_path / "odd", val, ["someone's"] * len(val))):
        assert "accuracy[own]" not in evaluate(run, "--samples", odd, "-n", "9")


def test_without_samples_or_held_out_pictures_the_old_figures_remain(run, finished, tmp_path, capsys):
    assert set(evaluate(run, "-n", "0")) == OLD
    few = tmp_path / "few"
    shutil.copytree(finished, few)
    assert read_sheet(few / "data.json").counts["val"] < 6
    capsys.readouterr()
    assert set(evaluate(few)) == OLD | {"diffusion_loss[val]"}
    assert "Figures of samples are left out" in capsys.readouterr().out
    assert "kid[gradients]" in evaluate(few, "-n", "8", "--reference", "train", "--features", "gradients")


def test_the_encoder_of_the_run_judges_too(run):
    found = evaluate(run, "-n", "12", "--features", "encoder", "--reference", "train")
    assert "training pictures" in found["kid[encoder]"]["contract"] and found["fid[encoder]"]["value"] > 0


def test_wrong_flags_get_one_line(run, tmp_path, capsys):
    words = ["evaluate", run]
    assert "--samples" in (text := refused(capsys, *words, "--samples", tmp_path / "nowhere")) and "SOURCE" not in text
    assert "-n 3" in refused(capsys, *words, "-n", 3)
    assert "--features nonsense" in refused(capsys, *words, "-n", 8, "--features", "nonsense")
    assert "guidance" in refused(capsys, *words, "-n", 8, "--guidance", 200)


def stub(condition, labels=()):
    takes_image = condition not in ("none", "class", "text")
    return SimpleNamespace(condition=condition, labels=list(labels), takes_image=takes_image)


def test_samples_are_told_what_the_pictures_show(run):
    sheet = read_sheet(run / "data.json")
    splits = {name: Pictures(sheet, name) for name in ("train", "val")}
    told, labels = measured._told(stub("class", sheet.class_names), splits, 4000, 0)
    assert told["label"] == [sheet.class_names[i] for i in labels]
    shares = torch.bincount(labels, minlength=len(sheet.classes)) / 4000
    expected = torch.bincount(splits["train"].labels, minlength=len(sheet.classes)) / len(splits["train"])
    assert (shares - expected).abs().max() < 4 * 0.5 / 4000**0.5
    assert measured._told(stub("none"), splits, 5, 0) == ({}, None)
    splits["val"].records = [record._replace(text=f"picture {i}") for i, record in enumerate(splits["val"].records)]
    told, labels = measured._told(stub("text"), splits, 30, 0)
    prompts = told["label"]
    assert len(set(prompts)) > 5 and labels.tolist() == [splits["val"].labels[int(p.split()[1])] for p in prompts]
    for condition, names in (("edges", {"image"}), ("inpaint", {"image", "mask"}), ("superres:2", {"image"})):
        told, labels = measured._told(stub(condition), splits, 5, 0)
        side = sheet.image_size[0] // (2 if condition == "superres:2" else 1)
        assert told.keys() == names and [picture.size for picture in told["image"]] == [(side, side)] * 5
        assert labels.tolist() == [splits["val"].labels[i] for i in _items(5, len(splits["val"]))]


def _items(n, size):
    return (uniform(0, "evaluation/told", 0, n) * size).long().tolist()
