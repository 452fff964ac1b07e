"""Part `flows` of `benchmarks.density`: what makes a flow one, for each kind."""

import argparse
import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks.figures import Figure
from calotype.density import vectors
from calotype.density.flows import DEPTH, Flow, FlowFacts, build
from calotype.randomness import normal, uniform

_STEPS, _BATCH, _WIDTH = 600, 256, 64
_CELL, _REACH = 0.02, (-2.5, 3.5)  # of the grid over which the density is summed
_SPATIAL = (4, 8, 8)


def figures(args: argparse.Namespace) -> list[Figure]:
    """Rows for each kind, and moons.png."""
    found, pictures = [], []
    for kind in DEPTH:
        flow = trained(kind)
        total, picture = density_on_a_grid(flow)
        pictures.append((kind, picture))
        nats = -flow.log_prob(moons(1, 4000)).mean().item()
        found += [
            Figure(f"{kind}: inverse of two moons", inversion(flow, moons(1, 2000)), "", 1e-5, True),
            Figure(f"{kind}: inverse of 4x8x8", inversion(*spatial(kind)), "", 1e-5, True, how="shaken weights"),
            Figure(f"{kind}: log-determinant", determinant(flow), "", 1e-4, True, how="against slogdet of autograd"),
            Figure(f"{kind}: sum of the density - 1", abs(total - 1), "", 0.01, True, how=f"{nats:.3f} nats held out"),
        ]
    found.append(hutchinson())
    plot(pictures).save(args.out / "moons.png")
    print(f"Two moons: {args.out / 'moons.png'}")
    return found


def moons(start: int, n: int) -> Tensor:
    """Two half-circles with noise (n, 2, 1, 1)."""
    angle, upper = math.pi * uniform(0, f"moons {start}", 0, n), uniform(0, f"side {start}", 0, n) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return (torch.stack([x, y], 1) + 0.1 * normal(0, f"noise {start}", 0, n, (2,)))[:, :, None, None]


def trained(kind: str) -> Flow:
    """A flow of two moons."""
    flow = build(FlowFacts(kind, (2, 1, 1), "latents", _WIDTH, DEPTH[kind]), seed=0)
    flow.initialize(moons(0, 1024), None)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for step in range(_STEPS):
        with vectors.probes_from(step):
            loss = -flow.log_prob(moons(2 + step, _BATCH)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return flow.eval().requires_grad_(False)


def spatial(kind: str) -> tuple[Flow, Tensor]:
    """A flow of latents whose weights are moved at random, and latents."""
    z = 2 * normal(0, "latents", 0, 64, _SPATIAL)
    flow = build(FlowFacts(kind, _SPATIAL, "latents", _WIDTH, DEPTH[kind]), seed=0)
    flow.initialize(z, None)
    with torch.no_grad():
        for i, weights in enumerate(flow.parameters()):
            size = 0.1 / math.sqrt(weights[0].numel()) if weights.dim() > 1 else 0.05
            weights += size * normal(0, f"shake {i}", 0, 1, tuple(weights.shape))[0]
    return flow.eval(), z


@torch.no_grad()
def inversion(flow: Flow, z: Tensor) -> float:
    """The largest distance of z from what comes back."""
    return (flow.inverse(flow(z)[0]) - z).abs().max().item()


def determinant(flow: Flow) -> float:
    """The largest difference of log-determinants from those of autograd's Jacobian."""
    worst = 0.0
    for one in moons(1, 4):
        jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0].flatten(), one)
        exact = torch.linalg.slogdet(jacobian.view(2, 2).double()).logabsdet
        worst = max(worst, (flow(one[None])[1][0] - exact).abs().item())
    return worst


@torch.no_grad()
def density_on_a_grid(flow: Flow) -> tuple[float, Image.Image]:
    """The sum of the density over a grid times the area of a cell, and a picture of it."""
    side = torch.arange(*_REACH, _CELL) + _CELL / 2
    grid = torch.cartesian_prod(side, side)[:, :, None, None]
    density = torch.cat([flow.log_prob(part).exp() for part in grid.split(50_000)]).view(len(side), -1)
    shown = (density / density.max()).sqrt().T.flip(0)
    return density.sum().item() * _CELL**2, Image.fromarray((255 * (1 - shown)).byte().numpy())


@torch.no_grad()
def hutchinson() -> Figure:
    """How many standard errors the mean of Hutchinson's estimates is from the exact trace, over 16 examples."""
    flow = build(FlowFacts("ffjord", (8, 1, 1), "latents", _WIDTH, 1), seed=0)
    with torch.no_grad():
        for i, weights in enumerate(flow.parameters()):
            weights += 0.1 * normal(0, f"shake {i}", 0, 1, tuple(weights.shape))[0]
    flow.eval()
    z, probes = normal(0, "examples", 0, 16, (8, 1, 1)), 500
    exact, most = flow(z)[1], vectors.EXACT_TRACE
    vectors.EXACT_TRACE = 0
    try:
        drawn = flow(z.repeat(probes, 1, 1, 1))[1].view(probes, 16)  # each copy has a probe of its own
    finally:
        vectors.EXACT_TRACE = most
    together = drawn.mean(1) - exact.mean()
    errors = (together.mean() / (together.std() / math.sqrt(probes))).abs().item()
    spread = drawn.std(0).mean().item()
    return Figure("ffjord: Hutchinson against exact trace", errors, "standard errors", 3, True,
                  how=f"{probes} probes, 16 examples of 8 numbers; one probe is off by {spread:.2g} nats")  # fmt: skip


def plot(pictures: list[tuple[str, Image.Image]]) -> Image.Image:
    """The densities beside each other, with their names, and the moons themselves."""
    size = pictures[0][1].size
    points = Image.new("L", size, 255)
    draw = ImageDraw.Draw(points)
    for x, y in moons(1, 2000).flatten(1).tolist():
        draw.point(((x - _REACH[0]) / _CELL, size[1] - (y - _REACH[0]) / _CELL), fill=60)
    shown = [("samples", points), *pictures]
    sheet = Image.new("L", ((size[0] + 10) * len(shown), size[1] + 24), 255)
    for i, (name, picture) in enumerate(shown):
        sheet.paste(picture, (i * (size[0] + 10), 24))
        ImageDraw.Draw(sheet).text((i * (size[0] + 10) + 8, 6), name, fill=0)
    return sheet
