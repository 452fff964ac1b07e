"""How exact are the densities, and do they find what does not belong?

    python -m benchmarks.density --mnist MNIST --cifar10 CIFAR10 --out DIR
    python -m benchmarks.density --parts flows likelihoods

MNIST and CIFAR10 are folders with train/CLASS/* and test/CLASS/*; without them the parts that need them are left out,
and said so. Everything is trained by the commands that a user would type, from --preset tiny, in --jobs processes of
one thread. DIR keeps the runs, so that the same command again goes on, with the plots.

flows         inverse and log-determinant of each kind, two moons, Hutchinson's estimate against the exact trace
likelihoods   the ODE likelihood of a Gaussian with its exact score; bounds of an autoencoder
digits        MNIST, one digit is normal and the others are not, ten times: ROC-AUC of each score
left-out      nine digits are normal and the tenth is not, ten times
simple        CIFAR-10 is normal; MNIST, noise and flat grey are not, though a likelihood may prefer them
samples       Fréchet distance of what an autoencoder draws with a flow, and with N(0, I)
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import density_anomalies, density_flows, density_likelihoods, density_samples
from benchmarks.figures import Figure, conclude, show

PARTS = {
    "flows": density_flows.figures,
    "likelihoods": density_likelihoods.figures,
    "digits": density_anomalies.digits,
    "left-out": density_anomalies.left_out,
    "simple": density_anomalies.simple,
    "samples": density_samples.figures,
}
NEEDS = {"likelihoods": ("mnist",), "digits": ("mnist",), "left-out": ("mnist",), "samples": ("mnist",)}
NEEDS |= {"simple": ("mnist", "cifar10")}


def main() -> int:
    """Run the parts; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mnist", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the runs and plots (default: a temporary one)")
    parser.add_argument("--runs", type=int, default=10, help="digits that take a turn")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    args.out = (args.out or Path(tempfile.mkdtemp(prefix="density-"))).resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found: list[Figure] = []
    for part in args.parts:
        if missing := [name for name in NEEDS.get(part, ()) if getattr(args, name) is None]:
            print(f"{part} is left out: it needs {' and '.join(f'--{name}' for name in missing)}.")
            continue
        began = time.monotonic()
        figures = PARTS[part](args)
        show(f"{part} ({time.monotonic() - began:.0f} s)", figures)
        found += figures
    return conclude("density", found, vars(args))


if __name__ == "__main__":
    raise SystemExit(main())
