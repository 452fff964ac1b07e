"""`calotype evaluate-vae`: what it writes, what it says, and whether its figures are those that others compute."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import peak_signal_noise_ratio

from calotype import cli, features
from calotype.data import Pictures
from calotype.images import normalize
from calotype.sheet import read_sheet
from calotype.stage1_vae import figures, folding
from calotype.stage1_vae.config import EvaluateVaeSettings
from calotype.stage1_vae.disentanglement import SENTENCE, shape_factors
from calotype.stage1_vae.evaluate import combined, strange_latents
from calotype.stage1_vae.figures import Figure, Judge
from calotype.stage1_vae.perceptual import GradientFeatures
from calotype.stage1_vae.subject import Subject

TINY = "--width 8 --factor 2 --steps 6 --batch-size 8 --precision fp32 --validations 1".split()
FAST = ["--precision", "fp32", "--samples", "4"]


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    """An empty torch hub, whatever this machine has, and no way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse_download)
    return tmp_path / "hub/hub/checkpoints"


def refuse_download(*_, **__):
    raise OSError("no network")


@pytest.fixture(scope="module")
def root(pictures, tmp_path_factory):
    """data.json of 96 pictures of 16x16, about a fifth of them held out, and autoencoders trained on them."""
    root = tmp_path_factory.mktemp("evaluated")
    assert cli.main(["data", str(pictures), "--image-size", "16", "--val", "0.2", "--out", str(root)]) == 0
    for name, words in {
        "kl": ["--beta", "1"],
        "kl2": ["--beta", "1", "--seed", "1"],
        "vq": ["--regularizer", "vq", "--codebook", "32"],
    }.items():
        assert cli.main(["train-vae", str(root / "data.json"), *TINY, *words, "--out", str(root / name)]) == 0
    stock = AutoencoderKL(3, 3, block_out_channels=(8,), norm_num_groups=4, mid_block_add_attention=False)
    stock.save_pretrained(root / "stock")
    return root


def evaluate(root, out, *folders, more=(), source=None):
    """The JSON that the command writes."""
    words = ["evaluate-vae", str(source or root / "data.json"), "--vae", *map(str, folders), "--out", str(out)]
    assert cli.main([*words, *FAST, *more]) == 0
    return json.loads(out.read_text(), parse_constant=pytest.fail)


def held_out(root):
    pictures = Pictures(read_sheet(root / "data.json"), "val")
    return normalize(torch.stack([pictures[i] for i in range(len(pictures))]))


def refused(capsys, *argv):
    """The one line of a user's error."""
    capsys.readouterr()
    assert cli.main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1, message
    return message


PICTURES = {"psnr[val]", "ssim[val]", "perceptual[gradients]", "rfid[gradients]", "rkid[gradients]"}
LATENTS = {"latent_mean[val]", "latent_std[val]"}
BOUND = {"elbo[val]", "bits_per_dim[elbo]", "bits_per_dim[iw4]"}


def test_figures_of_a_bound_say_how_they_were_made(root, tmp_path, capsys):
    found = evaluate(root, tmp_path / "e.json", root / "kl/vae")
    kl = {"latent_std[sampled]", "active_units[val]", "rate[val]"}
    assert set(found) == PICTURES | LATENTS | BOUND | kl
    n = len(held_out(root))
    assert 10 < n < 30
    for entry in found.values():
        assert set(entry) == {"value", "sd", "n", "how"} and entry["sd"] is None and entry["n"] == n
    assert "4 samples" in found["elbo[val]"]["how"] and "gaussian p(x|z)" in found["elbo[val]"]["how"]
    assert all("float32" in found[name]["how"] for name in (*PICTURES, *BOUND))
    assert "no Inception" in found["rfid[gradients]"]["how"] and "rough" in found["rfid[gradients]"]["how"]
    assert "stand-in" in found["perceptual[gradients]"]["how"]
    bits = -found["elbo[val]"]["value"] / (3 * 16 * 16 * math.log(2))
    assert found["bits_per_dim[elbo]"]["value"] == pytest.approx(bits)
    assert found["bits_per_dim[iw4]"]["value"] < bits
    printed = capsys.readouterr().out
    assert "gradient features stand in for LPIPS" in printed and "vgg16" in printed and "No bound" not in printed
    assert all(name in printed for name in found) and str(tmp_path / "e.json") in printed


def test_lpips_is_taken_and_named_where_its_weights_are_on_disk(root, tmp_path, monkeypatch, capsys):
    stub = GradientFeatures()
    stub.name = "lpips"
    asked = []
    monkeypatch.setattr("calotype.stage1_vae.perceptual._lpips_package", lambda: None)
    monkeypatch.setattr("calotype.stage1_vae.perceptual.load_lpips", lambda file: asked.append(file) or stub)
    file = tmp_path / "hub/hub/checkpoints/vgg16-397923af.pth"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    found = evaluate(root, tmp_path / "e.json", root / "kl/vae")
    assert asked == [file] and "VGG16" in found["perceptual[lpips]"]["how"] and "perceptual[gradients]" not in found
    assert "stand in" not in capsys.readouterr().out


def test_figures_agree_with_stock_diffusers_and_torch(root, tmp_path):
    found = evaluate(root, tmp_path / "e.json", root / "kl/vae", more=["--batch-size", "7"])
    vae, x = AutoencoderKL.from_pretrained(root / "kl/vae").eval(), held_out(root)
    facts = json.loads((root / "kl/vae/calotype.json").read_text())
    with torch.no_grad():
        q = vae.encode(x).latent_dist
        x_hat = vae.decode(q.mean).sample.clamp(-1, 1)
    psnr = peak_signal_noise_ratio(x_hat, x, data_range=(-1, 1), reduction="elementwise_mean", dim=(1, 2, 3))
    prior = Normal(*(torch.tensor(facts[name])[:, None, None] for name in ("prior_mean", "prior_std")))
    active = (q.mean / prior.stddev).var(0, correction=0) > 0.01
    expected = {
        "psnr[val]": psnr,
        "latent_mean[val]": q.mean.mean(),
        "latent_std[val]": q.mean.std(correction=0),
        "latent_std[sampled]": (q.mean.var(correction=0) + q.var.mean()).sqrt(),
        "rate[val]": kl_divergence(Normal(q.mean, q.std), prior).flatten(1).sum(1).mean(),
        "active_units[val]": active.float().mean(),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_noise_does_not_depend_on_the_batch_size_and_more_samples_go_on(root):
    subject, pictures = Subject.open(root / "kl/vae", "fp32"), Pictures(read_sheet(root / "data.json"), "val")
    values = []
    for size, samples in ((128, 2), (5, 2), (128, 16)):
        settings = EvaluateVaeSettings(source="", vae=("x",), batch_size=size, samples=samples)
        judge = Judge(settings, features.gradients(), GradientFeatures())
        values.append([figure.value for figure in figures.bound(subject, pictures, judge).values()])
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0][0] != values[2][0] and values[2][2] < values[0][2]


def test_several_folders_are_seeds_of_one_model(root, tmp_path, capsys):
    one, two = (evaluate(root, tmp_path / f"{name}.json", root / name / "vae") for name in ("kl", "kl2"))
    both = evaluate(root, tmp_path / "both.json", root / "kl/vae", root / "kl2/vae")
    for name, entry in both.items():
        pair = [one[name]["value"], two[name]["value"]]
        assert entry["value"] == pytest.approx(np.mean(pair)) and entry["sd"] == pytest.approx(np.std(pair, ddof=1))
        assert "2 autoencoders" in entry["how"]
    assert both["psnr[val]"]["sd"] > 0 and " ± " in capsys.readouterr().out


def test_a_codebook_has_use_and_perplexity_but_no_bound(root, tmp_path, capsys):
    found = evaluate(root, tmp_path / "e.json", root / "vq/vae")
    assert set(found) == PICTURES | LATENTS | {"code_usage[val]", "perplexity[val]"}
    vae, x = VQModel.from_pretrained(root / "vq/vae").eval(), held_out(root)
    with torch.no_grad():
        z, _, (_, _, numbers) = vae.quantize(vae.encode(x).latents)
        psnr = peak_signal_noise_ratio(
            vae.decode(z).sample.clamp(-1, 1), x, data_range=(-1, 1), reduction="elementwise_mean", dim=(1, 2, 3)
        )
    share = torch.bincount(numbers, minlength=32) / len(numbers)
    assert found["code_usage[val]"]["value"] == pytest.approx((share > 0).float().mean().item())
    assert found["perplexity[val]"]["value"] == pytest.approx(torch.special.entr(share).sum().exp().item(), rel=1e-5)
    assert found["psnr[val]"]["value"] == pytest.approx(psnr.item(), rel=1e-4)
    printed = capsys.readouterr().out
    assert printed.count("No bound on log p(x)") == 1 and "--regularizer kl --beta 1" in printed


def test_an_autoencoder_from_elsewhere_has_no_bound_and_strange_latents(root, tmp_path, capsys):
    found = evaluate(root, tmp_path / "e.json", root / "stock")
    assert "rate[val]" in found and "N(0, I)" in found["rate[val]"]["how"] and not BOUND & set(found)
    printed = capsys.readouterr().out
    assert "names no likelihood p(x|z); train with --beta 1" in printed
    assert "another kind of pictures than it was trained on" in printed


def test_latents_as_they_are_sampled_decide_whether_pictures_are_strange(root):
    """After a collapse the posterior's means hardly vary on any pictures; saved latents have unit variance still."""
    subject = Subject.open(root / "kl/vae", "fp32")
    run = {"latent_std[val]": Figure(0.05, 9, ""), "latent_std[sampled]": Figure(1.02, 9, "")}
    assert strange_latents(subject, run) is None
    for std in (0.49, 2.01):
        text = strange_latents(subject, run | {"latent_std[sampled]": Figure(std, 9, "")})
        assert f"{std:.2g}" in text and f"--init {subject.folder}" in text


def test_the_default_file_lies_beside_the_first_folder(root, tmp_path, monkeypatch):
    (tmp_path / "stage1_vae").mkdir()
    (tmp_path / "stage1_vae/vae").symlink_to(root / "kl/vae", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "stage1_vae/vae")
    assert cli.main(["evaluate-vae", str(root / "data.json"), "--vae", ".", *FAST]) == 0
    assert set(json.loads((root / "kl/evaluation.json").read_text())) >= PICTURES


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A code of two numbers of the embedded shapes; 48 pictures or so are held out."""
    out = tmp_path_factory.mktemp("shapes")
    words = ["--image-size", "16", "--val", "0.004", *TINY, "--latent-dim", "2", "--beta", "1"]
    assert cli.main(["train-vae", "shapes", *words, "--out", str(out)]) == 0
    return out


SCORES = ("mig", "factor_vae", "dci_disentanglement", "dci_completeness", "dci_informativeness")


def test_codes_of_shapes_are_scored_against_their_factors(shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FACTOR_PICTURES", 300)
    seen = {}

    def scores(codes, factors, names, seed):
        seen.update(codes=codes, factors=factors, names=names)
        return dict.fromkeys(SCORES, 0.25)

    with monkeypatch.context() as patched:
        patched.setattr(figures.disentanglement, "scores", scores)
        found = evaluate(shapes, tmp_path / "e.json", shapes / "vae")
    sheet = read_sheet(shapes / "data.json")
    n = sheet.counts["val"]
    assert all(found[f"{name}[val+train]"]["n"] == 300 for name in SCORES)
    assert f"{n} held-out and {300 - n} training pictures" in found["mig[val+train]"]["how"]
    assert SENTENCE in capsys.readouterr().out
    # the rows of codes and factors are the same pictures, the held-out ones first
    with torch.no_grad():
        mean = AutoencoderKL.from_pretrained(shapes / "vae").eval().encode(held_out(shapes)).latent_dist.mean
    np.testing.assert_allclose(seen["codes"][:n], mean.flatten(1), atol=1e-5)
    from calotype.shapes import PLAIN

    indices = [int(record.file) for record in sheet.records if record.val]
    factors, names = shape_factors(sheet.seed, indices, PLAIN)
    assert seen["names"] == names and len(seen["factors"]) == len(seen["codes"]) == 300
    shape = names.index("shape")
    np.testing.assert_array_equal(seen["factors"][:n, shape], factors[:, shape])


def test_scores_are_between_nothing_and_one(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FACTOR_PICTURES", 40)
    found = evaluate(shapes, tmp_path / "e.json", shapes / "vae")
    assert all(-1e-9 <= found[f"{name}[val]"]["value"] <= 1 and found[f"{name}[val]"]["n"] == 40 for name in SCORES)


@pytest.mark.parametrize("why, expected", [("sklearn", "calotype[eval]"), ("units", "--latent-dim")])
def test_scores_that_cannot_be_had_are_left_out_in_one_line(shapes, tmp_path, monkeypatch, capsys, why, expected):
    if why == "sklearn":
        monkeypatch.setitem(sys.modules, "sklearn", None)
    else:
        monkeypatch.setattr(figures, "_MOST_UNITS", 1)
    found = evaluate(shapes, tmp_path / "e.json", shapes / "vae")
    assert not any(name.startswith("mig") for name in found)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Disentanglement")]
    assert "left out" in line and expected in line


def test_small_pictures_of_a_single_code_are_measured_in_their_own_size(tmp_path, capsys):
    words = ["--image-size", "12", "--channels", "1", "--val", "0.004"]
    assert cli.main(["train-vae", "shapes", *words, *TINY, "--latent-dim", "2", "--out", str(tmp_path / "s")]) == 0
    capsys.readouterr()
    found = evaluate(tmp_path / "s", tmp_path / "e.json", tmp_path / "s/vae", more=["--features", "gradients"])
    assert "sides of 16 pixels" in capsys.readouterr().out and found["ssim[val]"]["value"] <= 1


def test_a_network_gives_its_name_to_the_figures(root):
    network = features.FeatureNetwork("colour", lambda x: x.mean((2, 3)), "mean colour")
    judge = Judge(EvaluateVaeSettings(source="", vae=("x",), precision="fp32"), network, GradientFeatures())
    found = figures.evaluate(Subject.open(root / "kl/vae", "fp32"), read_sheet(root / "data.json"), judge)
    assert "mean colour" in found["rfid[colour]"].how and "d = 3" in found["rkid[colour]"].how


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--vae", "nowhere"], ["--vae nowhere"]),
        (["--vae", "{root}/kl/vae", "--samples", "0"], ["--samples 0"]),
        (["--vae", "{root}/kl/vae", "--out", "figures.txt"], ["--out figures.txt", ".json"]),
        (["--vae", "{root}/kl/vae", "--out", "{root}"], ["--out {root}", ".json"]),
        (["--vae", "{root}/kl/vae", "{root}/vq/vae"], ["{root}/vq/vae", "another seed"]),
        (["--vae", "{root}/kl/vae", "{root}/stock"], ["{root}/stock", "another seed"]),
        (["--vae", "{root}/kl/vae", "--image-size", "17"], ["--image-size 17"]),
        (["--vae"], ["--vae"]),
    ],
)
def test_wrong_flags_get_one_line(root, capsys, words, expected):
    words = [word.format(root=root) for word in words]
    message = refused(capsys, "evaluate-vae", root / "data.json", *words)
    assert all(part.format(root=root) in message for part in expected), message


def test_an_autoencoder_without_noise_is_not_another_seed(root, tmp_path, capsys):
    quiet = AutoencoderKL.from_pretrained(root / "stock")
    folding.fix_variance(quiet, -30.0)
    quiet.save_pretrained(tmp_path / "quiet")
    found = evaluate(root, tmp_path / "e.json", tmp_path / "quiet")
    assert "rate[val]" not in found and "latent_std[sampled]" not in found
    words = ["evaluate-vae", root / "data.json", "--vae", root / "stock", tmp_path / "quiet", *FAST]
    assert "_std[sampled] is a figure of one alone" in refused(capsys, *words)


def test_facts_of_another_autoencoder_and_a_diverged_one_are_named(root, tmp_path, capsys):
    vae = AutoencoderKL.from_pretrained(root / "stock")
    vae.save_pretrained(tmp_path / "odd")
    (tmp_path / "odd/calotype.json").write_text((root / "kl/vae/calotype.json").read_text().replace("gaussian", "x"))
    words = ["evaluate-vae", root / "data.json", *FAST, "--vae"]
    assert "likelihood x" in refused(capsys, *words, tmp_path / "odd")
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(math.nan)
    vae.save_pretrained(tmp_path / "nan")
    assert "decoder.conv_out.bias: not all numbers there are finite" in refused(capsys, *words, tmp_path / "nan")


def test_the_deviation_of_a_single_run_is_null():
    runs = [{"a": Figure(1.0, 5, "h")}, {"a": Figure(2.0, 5, "h")}, {"a": Figure(6.0, 5, "h")}]
    assert combined(runs[:1]) == {"a": {"value": 1.0, "sd": None, "n": 5, "how": "h"}}
    found = combined(runs)["a"]
    assert found["value"] == 3.0 and found["sd"] == pytest.approx(math.sqrt(7)) and "3 autoencoders" in found["how"]
    assert [combined(list(pair))["a"]["value"] for pair in pairwise(runs)] == [1.5, 4.0]


def test_a_settings_file_may_name_one_folder(tmp_path):
    from calotype.config import parse

    file = tmp_path / "config.json"
    file.write_text(json.dumps({"vae": "a", "samples": 3}))
    settings = parse(EvaluateVaeSettings, ["shapes", "--config", str(file)], "x")
    assert settings.vae == (Path("a"),) and settings.samples == 3
    file.write_text(json.dumps({"samples": 5}))
    assert parse(EvaluateVaeSettings, ["shapes", "--vae", "a", "b", "--config", str(file)], "x").samples == 5
