"""Flows: invertible, with the log-determinant that autograd finds, normalised; trained, saved and drawn from."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Independent, Normal
from torch.testing import assert_close

from calotype import cli
from calotype.density import flows, vectors
from calotype.density.flows import DEPTH, FlowFacts, build, load_flow, save_flow
from calotype.density.glow import Linear, can_halve, squeeze, unsqueeze
from calotype.latents import LatentCache

KINDS = list(DEPTH)


def facts(kind, shape, classes=0, width=16, depth=None):
    names = tuple(str(k) for k in range(classes))
    return FlowFacts(kind, shape, "latents", width, depth or DEPTH[kind], names)


def shaken(kind, shape, classes=0, **more):
    """A flow with weights as if it had been trained, and examples for it."""
    generator = torch.Generator().manual_seed(1)
    flow = build(facts(kind, shape, classes, **more), seed=0)
    z = 2 * torch.randn(32, *shape, generator=generator) + 1
    y = torch.arange(32) % classes if classes else None
    flow.initialize(z, y, [1 / classes] * classes if classes else ())
    with torch.no_grad():
        for weights in flow.parameters():
            size = 0.1 / math.sqrt(weights[0].numel()) if weights.dim() > 1 else 0.05
            weights.add_(size * torch.randn(weights.shape, generator=generator))
    return flow.eval(), z, y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "classes"), [((4, 8, 8), 3), ((4, 7, 5), 0), ((6, 1, 1), 2)])
@torch.no_grad()
def test_the_inverse_undoes_the_flow(kind, shape, classes):
    flow, z, y = shaken(kind, shape, classes)
    eps, _ = flow(z, y)
    assert (eps - z).abs().max() > 0.1
    assert_close(flow.inverse(eps, y), z, atol=1e-5, rtol=0)
    assert_close(flow(flow.inverse(z, y), y)[0], z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "classes"), [((2, 1, 1), 0), ((1, 4, 2), 2)])
def test_the_log_determinant_is_that_of_autograd(kind, shape, classes):
    flow, z, y = shaken(kind, shape, classes, depth=2)
    _, ladj = flow(z, y)
    for i in range(1 if kind == "ffjord" else 3):  # whose ODE is solved for each row
        told = None if y is None else y[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(lambda one, told=told: flow(one[None], told)[0].flatten(), z[i])
        exact = torch.linalg.slogdet(jacobian.reshape(z[i].numel(), -1).double()).logabsdet
        assert_close(ladj[i].double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_flow_is_near_the_normal_density_of_its_examples(kind):
    """All layers begin as the identity or a rotation, which N(0, I) does not see."""
    z = 3 * torch.randn(4096, 3, 2, 2, generator=torch.Generator().manual_seed(0)) - 2
    flow = build(facts(kind, (3, 2, 2)), seed=0)
    flow.initialize(z, None)
    std, mean = torch.std_mean(z, dim=0)
    exact = Independent(Normal(mean, std), 3).log_prob(z[:64])
    tolerance = {"glow": 0.4, "realnvp": 0.2, "nsf": 0.2, "ffjord": 0.2}[kind]  # glow standardises by batch again
    assert_close(flow.eval().log_prob(z[:64]), exact, atol=tolerance, rtol=0)


@torch.no_grad()
def test_without_a_label_the_density_is_the_mixture_over_the_classes():
    flow, z, _ = shaken("realnvp", (4, 1, 1), classes=3)
    shares = torch.tensor([0.5, 0.3, 0.2])
    flow.log_shares.copy_(shares.log())
    each = torch.stack([flow.log_prob(z, torch.full((32,), k)).exp() for k in range(3)])
    assert_close(flow.log_prob(z).exp(), (shares[:, None] * each).sum(0))


def test_the_linear_layer_begins_as_a_rotation_and_knows_its_determinant():
    torch.manual_seed(0)
    layer = Linear(5, 1)
    matrix = layer()(torch.eye(5)).T
    assert_close(matrix @ matrix.T, torch.eye(5), atol=1e-5, rtol=0)
    with torch.no_grad():
        layer.lu.add_(0.1 * torch.randn(5, 5))
    _, ladj = layer().call_and_ladj(torch.zeros(1, 5))
    assert_close(ladj[0], torch.linalg.slogdet(layer()(torch.eye(5))).logabsdet)


def test_squeezing_keeps_every_number_and_its_place():
    x = torch.arange(2 * 4 * 6 * 3.0).view(2, 4, 6, 3)
    assert squeeze(x).shape == (2, 2, 3, 12)
    assert_close(unsqueeze(squeeze(x)), x)
    assert squeeze(x)[0, 1, 2].sort().values.tolist() == x[0, 2:4, 4:6].flatten().sort().values.tolist()
    assert [can_halve(*size) for size in ((8, 8), (7, 8), (2, 2), (4, 4))] == [True, False, False, True]


@torch.no_grad()
def test_hutchinsons_estimate_of_ffjord_is_the_exact_trace_on_average(monkeypatch):
    flow, z, _ = shaken("ffjord", (4, 1, 1))
    exact = flow(z[:8])[1]
    monkeypatch.setattr(vectors, "EXACT_TRACE", 0)
    drawn = flow(z[:8].repeat(250, 1, 1, 1))[1].view(250, 8)  # each copy has a probe of its own
    error = drawn.std(0) / math.sqrt(250)
    assert (error > 1e-3).all()
    assert ((drawn.mean(0) - exact).abs() <= 3 * error).all()


def test_the_density_of_two_moons_sums_to_one():
    generator = torch.Generator().manual_seed(0)

    def moons(n):
        angle, upper = math.pi * torch.rand(n, generator=generator), torch.rand(n, generator=generator) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos())
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
        return (torch.stack([x, y], 1) + 0.1 * torch.randn(n, 2, generator=generator))[:, :, None, None]

    flow = build(facts("nsf", (2, 1, 1), width=32, depth=4), seed=0)
    flow.initialize(moons(1024), None)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(250):
        loss = -flow.log_prob(moons(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flow.eval()
    step = 0.02
    side = torch.arange(-3, 4, step)
    grid = torch.cartesian_prod(side, side)[:, :, None, None]
    with torch.no_grad():
        density = torch.cat([flow.log_prob(part).exp() for part in grid.split(20_000)])
        held_out = -flow.log_prob(moons(2000)).mean()
    assert density.sum().item() * step**2 == pytest.approx(1, abs=0.01)
    z = moons(4000).flatten(1)
    normal = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    assert held_out < -normal.log_prob(z).mean() - 0.5  # nats


def test_a_saved_flow_comes_back_the_same(tmp_path):
    flow, z, y = shaken("glow", (4, 4, 4), classes=2)
    save_flow(flow, tmp_path / "prior")
    again = load_flow(tmp_path / "prior", "--flow")
    assert again.facts == flow.facts
    assert_close(again.log_prob(z, y), flow.log_prob(z, y))


@pytest.mark.parametrize("damage", ["weights", "facts", "nan", "missing"])
def test_a_damaged_flow_is_refused_in_a_line(tmp_path, damage):
    flow, *_ = shaken("realnvp", (4, 1, 1))
    if damage == "nan":
        with torch.no_grad():
            next(flow.parameters()).fill_(math.nan)
    folder = tmp_path / "prior"
    save_flow(flow, folder)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"nothing")
    elif damage == "facts":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"width": 24}))
    elif damage == "missing":
        (folder / "config.json").unlink()
    with pytest.raises(flows.UserError, match="^--flow .*prior"):
        load_flow(folder, "--flow")


# The command

WORDS = ["--width", "16", "--steps", "24", "--batch-size", "16", "--validations", "2", "--log-every", "4"]


def train(run, out, *more):
    return cli.main(["train-flow", "--latents", str(run / "latents"), *WORDS, *more, "--out", str(out)])


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """The finished run beside a flow of its latents."""
    run = tmp_path_factory.mktemp("flow") / "run"
    run.mkdir()
    for name in ("data.json", "manifest.jsonl", "stage1_vae", "latents", "pipeline"):
        (run / name).symlink_to(finished / name)
    assert train(run, run / "flow", "--kind", "glow", "--depth", "2") == 0
    return run


def test_training_brings_the_bits_down_and_leaves_what_every_stage_leaves(trained):
    rows = [json.loads(line) for line in (trained / "flow/metrics.jsonl").read_text().splitlines()]
    bits = [row["loss[train]"] for row in rows if "loss[train]" in row]
    assert bits[-1] < bits[0]
    assert all(row["inversion_error[val]"] < 1e-4 for row in rows if "inversion_error[val]" in row)
    assert {"checkpoints", "samples", "prior", "finished.json"} <= {path.name for path in (trained / "flow").iterdir()}
    flow = load_flow(trained / "flow/prior", "--flow")
    index = LatentCache(trained / "latents", "train").index
    assert (flow.facts.vae, list(flow.facts.classes)) == (index.vae, index.classes)
    assert flow.log_shares.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_cut_short_ends_at_the_same_weights(finished, tmp_path, kind):
    vae = ["--kind", kind, "--vae", str(finished / "stage1_vae/vae"), "--depth", "1", "--lr-schedule", "constant"]
    assert train(finished, tmp_path / "whole", *vae, "--steps", "8") == 0
    assert train(finished, tmp_path / "parts", *vae, "--steps", "4") == 0
    assert train(finished, tmp_path / "parts", *vae, "--steps", "8") == 0
    whole, parts = (load_file(tmp_path / name / "prior/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_micro_batches_do_not_change_a_step(finished, tmp_path):
    vae = ["--kind", "realnvp", "--vae", str(finished / "stage1_vae/vae"), "--steps", "3"]
    for parts in ("1", "4"):
        assert train(finished, tmp_path / parts, *vae, "--micro-batches", parts) == 0
    one, four = (load_file(tmp_path / parts / "prior/model.safetensors") for parts in "14")
    for name, value in one.items():
        assert_close(four[name], value, atol=1e-5, rtol=1e-4)


def test_pictures_themselves_have_a_density(finished, tmp_path):
    words = ["--pixels", str(finished / "data.json"), "--kind", "glow", "--depth", "1", *WORDS]
    assert cli.main(["train-flow", *words, "--out", str(tmp_path / "pixels")]) == 0
    flow = load_flow(tmp_path / "pixels/prior", "--flow")
    assert (flow.facts.of, flow.shape) == ("pixels", (3, 16, 16))
    out = tmp_path / "drawn"
    argv = ["generate", str(finished), "--prior", "flow", "--flow", str(tmp_path / "pixels"), "-n", "3"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    assert len(list(out.rglob("*.png"))) == 3


def test_generate_draws_from_the_flow_by_seed_and_label(trained, tmp_path, capsys):
    from PIL import Image

    for name, words in {"a": ["--batch-size", "2"], "b": [], "c": ["--seed", "2"]}.items():
        argv = ["generate", str(trained), "red", "--prior", "flow", "-n", "4", *words]
        assert cli.main([*argv, "--out", str(tmp_path / name)]) == 0
    pictures = {name: {f.name: Image.open(f) for f in (tmp_path / name).glob("*.png")} for name in "abc"}
    for name, picture in pictures["a"].items():
        assert picture.tobytes() == pictures["b"][name].tobytes()
    assert pictures["c"]["00000002.png"].tobytes() == pictures["a"]["00000002.png"].tobytes()
    assert pictures["a"]["00000001.png"].tobytes() != pictures["a"]["00000002.png"].tobytes()
    assert pictures["a"]["00000000.png"].info["calotype:prior"] == "flow"
    capsys.readouterr()
    assert cli.main(["regenerate", str(tmp_path / "a/00000000.png")]) == 2
    assert "was drawn by a flow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps 3 does nothing without --prior diffusion"),
        (["violet"], "LABEL 'violet' is not known to the flow; it knows"),
        (["--flow", "nowhere"], "--flow nowhere holds no flow"),
    ],
)
def test_generate_refuses_in_a_line(trained, tmp_path, capsys, words, message):
    assert cli.main(["generate", str(trained), *words, "--prior", "flow", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--latents and --pixels"),
        (["--latents", "a", "--pixels", "b"], "--latents and --pixels"),
        (["--pixels", "b", "--noise", "0.1"], "--noise 0.1 does nothing without --latents"),
        (["--latents", "a", "--precision", "bf16"], "--precision"),
    ],
)
def test_train_flow_refuses_in_a_line(tmp_path, capsys, words, message):
    assert cli.main(["train-flow", *words, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["realnvp", "glow"])
def test_two_processes_train_the_flow_that_one_does(finished, tmp_path, kind):
    words = ["--latents", str(finished / "latents"), "--vae", str(finished / "stage1_vae/vae"), "--kind", kind, *WORDS]
    words += ["--depth", "2", "--steps", "6"]
    launch = [sys.executable, "-m", "calotype.launch", "--standalone", "--nproc_per_node=2"]
    two = [*launch, "-m", "calotype.density.train", *words, "--out", str(tmp_path / "two")]
    done = subprocess.run(two, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert cli.main(["train-flow", *words, "--out", str(tmp_path / "one")]) == 0
    one, two = (load_file(tmp_path / name / "prior/model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        assert_close(two[name], value, atol=2e-5, rtol=1e-4)
