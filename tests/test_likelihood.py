"""`calotype likelihood`: its figures against stock diffusers and torch.distributions, its order, and its refusals."""

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from torch.distributions import Normal

from calotype import cli
from calotype.autoencoder import read_facts
from calotype.data import Pictures
from calotype.density import measurement
from calotype.density.config import LikelihoodSettings
from calotype.density.flows import load_flow
from calotype.density.likelihood import COMPARE, measure, pictures_of
from calotype.density.run_models import RunModels
from calotype.images import normalize
from calotype.likelihoods import KINDS
from calotype.randomness import normal
from calotype.sheet import read_sheet

QUICK = ["--ode-steps", "2"]
FLOW = "--kind realnvp --width 16 --depth 2 --steps 20 --batch-size 16 --validations 1".split()


@pytest.fixture(scope="module")
def numbers(two_numbers, tmp_path_factory):
    """A run with an autoencoder of two numbers that has a likelihood, and a flow of them."""
    run = tmp_path_factory.mktemp("likelihood") / "numbers"
    shutil.copytree(two_numbers, run)
    assert cli.main(["train-flow", "--latents", str(run / "latents"), *FLOW, "--out", str(run / "flow")]) == 0
    return run


def likelihood(run, out, *more):
    """The JSON that the command writes."""
    assert cli.main(["likelihood", str(run), "--out", str(out), *map(str, more)]) == 0
    return json.loads(out.read_text(), parse_constant=pytest.fail)


def refused(capsys, *argv):
    """The one line of a user's error."""
    capsys.readouterr()
    assert cli.main(["likelihood", *map(str, argv)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("calotype: ") and message.count("\n") == 1, message
    return message


def held_out(run):
    pictures = Pictures(read_sheet(run / "data.json"), "val")
    return normalize(torch.stack([pictures[i] for i in range(len(pictures))])), pictures


def by_hand(run, x):
    """q(z|x), one sample of it and log p(x|z) at that sample, by stock diffusers."""
    vae, facts = AutoencoderKL.from_pretrained(run / "stage1_vae/vae").eval(), read_facts(run / "stage1_vae/vae")
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="replicate") if x.shape[2] == 12 else x
    with torch.no_grad():
        latent = vae.encode(wide).latent_dist
        q = Normal(latent.mean, latent.std)
        z = q.mean + q.stddev * normal(0, "importance 0", 0, len(x), tuple(q.mean.shape[1:]))
        x_hat = vae.decode(z).sample
        x_hat = x_hat[:, :, 2:14, 2:14] if x.shape[2] == 12 else x_hat
    nats = (
        KINDS[facts.likelihood](x_hat.clamp(-1, 1), x, torch.tensor(math.log(facts.scale))) if facts.likelihood else 0
    )
    return q, z, -nats


def bits(nats, size):
    return (-nats / (size * math.log(2))).mean().item()


def test_bounds_and_flow_are_what_others_compute(numbers, tmp_path, capsys):
    found = likelihood(numbers, tmp_path / "l.json", "--samples", 4)
    assert list(found) == ["elbo", "iw4", "elbo[flow]", "normal", "flow"]
    x, _ = held_out(numbers)
    q, z, given_z = by_hand(numbers, x)
    prior = load_flow(numbers / "flow/prior", "--flow").log_prob(z)
    log_q = q.log_prob(z).flatten(1).sum(1)
    expected = {
        "normal": bits(Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1), 2),
        "flow": bits(prior, 2),
        "elbo[flow]": bits(given_z + prior - log_q, 3 * 12 * 12),
    }
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    for name, row in found.items():
        assert set(row) == {"value", "se", "n", "of", "dimensions", "nats", "exact"} and row["n"] == len(x)
        assert row["of"] == ("pictures" if name in ("elbo", "iw4", "elbo[flow]") else "latents")
        assert row["value"] == pytest.approx(-row["nats"] / (row["dimensions"] * math.log(2))) and row["se"] > 0
    assert "lower bound on log p(x) of 8-bit pictures" in found["elbo"]["exact"]
    assert "exact density of the latent" in found["flow"]["exact"] and "not of the picture" in found["flow"]["exact"]
    printed = capsys.readouterr().out
    assert COMPARE in printed and "No diffusion model" in printed and "No bound" not in printed


def test_bounds_are_those_of_evaluate_vae(numbers, tmp_path):
    found = likelihood(numbers, tmp_path / "l.json", "--samples", 4, "--batch-size", 3)
    words = ["evaluate-vae", str(numbers / "data.json"), "--vae", str(numbers / "stage1_vae/vae"), "--samples", "4"]
    assert cli.main([*words, "--out", str(tmp_path / "e.json"), "--precision", "fp32"]) == 0
    other = json.loads((tmp_path / "e.json").read_text())
    assert found["elbo"]["value"] == pytest.approx(other["bits_per_dim[elbo]"]["value"], rel=1e-4)
    assert found["iw4"]["value"] == pytest.approx(other["bits_per_dim[iw4]"]["value"], rel=1e-4)


def test_the_importance_weighted_bound_is_above_the_elbo_and_rises_with_samples(numbers):
    models, means = RunModels.open(numbers), []
    for k in (2, 16, 256):
        settings = LikelihoodSettings(run=numbers, samples=k, source=str(numbers / "data.json"))
        rows = measure(models, pictures_of(settings), settings)
        elbo, tighter = rows["elbo"].log_prob, rows[f"iw{k}"].log_prob
        assert tighter.shape == (len(held_out(numbers)[0]),)
        assert (tighter >= elbo - 1e-6).all() and (tighter > elbo).any()  # Jensen, for each picture
        means.append(tighter.mean().item())
    assert means[0] < means[1] < means[2]


def test_a_diffusion_model_has_the_density_of_latents(finished, tmp_path, capsys):
    found = likelihood(finished, tmp_path / "l.json", *QUICK)
    assert list(found) == ["normal", "diffusion"] and found["diffusion"]["dimensions"] == math.prod(latents(finished))
    x, pictures = held_out(finished)
    _, z, _ = by_hand(finished, x)
    assert found["normal"]["value"] == pytest.approx(
        bits(Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1), z[0].numel()), rel=1e-4
    )
    assert "probability-flow ODE" in found["diffusion"]["exact"] and "Hutchinson" in found["diffusion"]["exact"]
    printed = capsys.readouterr().out
    assert "train with --beta 1" in printed and "No flow" in printed
    again = likelihood(finished, tmp_path / "l.json", *QUICK, "--batch-size", 2)
    assert again["diffusion"]["value"] == pytest.approx(found["diffusion"]["value"], rel=1e-4, abs=1e-4)
    told = likelihood(finished, tmp_path / "l.json", *QUICK, "--labels")
    assert "told the label" in told["diffusion"]["exact"]
    assert told["diffusion"]["value"] != pytest.approx(found["diffusion"]["value"], rel=1e-5)


def latents(run):
    return json.loads((run / "latents/index.json").read_text())["shape"]


def test_estimates_scatter_round_the_exact_trace(finished):
    settings = LikelihoodSettings(run=finished, ode_steps=1, exact_trace=True)
    models, (x, _) = RunModels.open(finished), held_out(finished)
    row = measure(models, pictures_of(settings), settings)["diffusion"]
    assert "Hutchinson" not in row.exact
    z = models.encode(x).z
    seeds = [settings.model_copy(update={"exact_trace": False, "seed": seed}) for seed in range(12)]
    noisy = torch.stack([models.diffusion_log_prob(z, None, measurement.way_of(one), range(len(z))) for one in seeds])
    error = noisy.mean(1).std() / math.sqrt(len(noisy))
    assert error > 0 and abs(noisy.mean() - row.log_prob.mean()) < 3 * error


def test_a_folder_is_measured_whole_and_prepared_as_the_run(numbers, pictures, tmp_path):
    found = likelihood(numbers, tmp_path / "l.json", pictures, "--samples", 2, "-n", 30)
    assert found["elbo"]["n"] == 30 and found["elbo"]["dimensions"] == 3 * 12 * 12
    assert likelihood(numbers, tmp_path / "l.json", pictures, "--samples", 2)["flow"]["n"] == 96


def test_a_flow_of_pixels_bounds_pictures(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run", "data.json", "manifest.jsonl", "stage1_vae")
    words = ["train-flow", "--pixels", str(run / "data.json"), "--condition", "none", *FLOW, "--out", str(run / "flow")]
    assert cli.main(words) == 0
    found = likelihood(run, tmp_path / "l.json")["flow"]
    assert found["of"] == "pictures" and found["dimensions"] == 3 * 16 * 16 and "lower bound" in found["exact"]
    known = json.loads((run / "flow/finished.json").read_text())["loss[val]"]  # bits of the density of x / 128 - 1
    assert found["value"] == pytest.approx(known + 7, abs=0.05)


def copy_of(run, to, *names):
    to.mkdir()
    for name in names:
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, to / name)
    return to


def test_the_file_lies_in_the_run(numbers, tmp_path):
    run = copy_of(numbers, tmp_path / "run", "data.json", "manifest.jsonl", "stage1_vae")
    assert cli.main(["likelihood", str(run), "--samples", "2"]) == 0
    assert list(json.loads((run / "likelihood.json").read_text())) == ["elbo", "iw2", "normal"]


def test_refusals_are_one_line(numbers, finished, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "empty/data.json cannot be read" in refused(capsys, tmp_path / "empty")
    bare = copy_of(numbers, tmp_path / "bare", "data.json", "manifest.jsonl")
    assert "holds no autoencoder" in refused(capsys, bare)
    assert "--out figures.csv must be a file that ends in .json" in refused(capsys, numbers, "--out", "figures.csv")
    assert "SOURCE nowhere is not a folder" in refused(capsys, numbers, "nowhere")
    other = refused(capsys, numbers, finished / "data.json")
    assert "pictures of 16x16 and 3 channels are not as the run's, 12x12 and 3" in other
    assert "--exact-trace needs none" in refused(capsys, numbers, "--exact-trace", "--probes", 3)
    assert "--tolerance 0.1 does nothing without --solver dopri5" in refused(capsys, numbers, "--tolerance", 0.1)
    assert "--ode-steps 3 does nothing" in refused(capsys, numbers, "--ode-steps", 3, "--solver", "dopri5")
    mixed = copy_of(numbers, tmp_path / "mixed", "data.json", "manifest.jsonl", "flow")
    shutil.copytree(finished / "stage1_vae", mixed / "stage1_vae")
    assert "is a flow of another autoencoder's latents" in refused(capsys, mixed)
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    assert "needs the package torchdiffeq" in refused(capsys, finished, "--solver", "dopri5")


def test_labels_must_be_known(finished, pictures, tmp_path, capsys):
    strange = tmp_path / "strange"
    shutil.copytree(next(child for child in pictures.iterdir()), strange / "plaid")
    message = refused(capsys, finished, strange, "--labels", "--out", tmp_path / "l.json")
    assert "--labels: 'plaid' is no class that the diffusion model knows" in message
