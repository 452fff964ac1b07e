"""What does it take from the start of a process to its help, its first picture, and the demo's page?

    python -m benchmarks.coldstart
    python -m benchmarks.coldstart --model runs/first/pipeline --label "red star" --rounds 9

Fresh processes take turns, each with one thread; what counts is the CPU time of the whole process, user and system, as
the system tells it at its end. Against `calotype generate` stand the few lines that anybody would write: stock
diffusers with the same model folder, and with the same model in the layout of `calotype export --stock`. The files have
been read before, so that no disk is measured. Without --model it is one of random weights.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.figures import Figure, conclude, of_ratio
from benchmarks.subjects import diffusion_stage, write_autoencoder, write_latents
from benchmarks.timing import median, one_thread, times_as_fast
from calotype.autoencoder import downsampling, load_autoencoder
from calotype.config import PRESET_IMAGE_SIZE
from calotype.pipeline import hashes
from calotype.pipeline.stock import stock
from calotype.stage2_diffusion.config import DiffusionSettings

MOST_HELP = 0.3  # CPU seconds
FASTER = 2.0  # to the first picture
HELPS = ("--help", "generate --help", "train-vae --help")
PATIENCE = 120.0  # seconds of waiting for the demo
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
USUAL = """
import sys
import torch
from diffusers import DiffusionPipeline
model, out, label, arguments = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
given = eval(arguments, {"pipe": pipe, "label": label})
pipe(**given).images[0].save(out)
"""
OURS = "dict(label=label, num_images=1)"
STOCK = "dict(class_labels=pipe.get_label_ids([label]), guidance_scale={}, num_inference_steps={})"


class Spent(NamedTuple):
    """What a process took: CPU seconds, and seconds by the clock."""

    cpu: float
    wall: float


def main() -> int:
    """Print a table; 1 if a figure misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder with classes (default: one of random weights)")
    parser.add_argument("--label", default="3", help="what to draw")
    parser.add_argument("--preset", default="small", choices=DiffusionSettings.PRESETS, help="of the random model")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as folder:
        figures = of_help(args.rounds)
        figures += of_first_picture(args, Path(folder))
        figures += of_demo(args.model or Path(folder) / "model")
    return conclude("coldstart", figures, vars(args))


def take(words: list[str]) -> Spent:
    """Run a process to its end; it has to end well."""
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{' '.join(words)} failed"
    return Spent(used.ru_utime + used.ru_stime, time.monotonic() - began)


def in_turn(ways: dict[str, Callable[[], list[str]]], rounds: int) -> dict[str, list[Spent]]:
    """What the processes of each way took; the first round brings the files into memory and is not counted."""
    found: dict[str, list[Spent]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, words in ways.items():
            taken = take(words())
            if number:
                found[name].append(taken)
    return found


def seconds_of(name: str, spent: list[Spent], goal: float | None = None) -> Figure:
    """CPU seconds, with the shortest time by the clock beside them."""
    cpu = sorted(taken.cpu for taken in spent)
    how = f"{min(taken.wall for taken in spent):.2f} s by the clock at best"
    return Figure(name, median(cpu), "CPU-s", goal, True, cpu[0], cpu[-1], how)


def of_help(rounds: int) -> list[Figure]:
    """The help of the whole and of two commands."""
    ways = {f"calotype {words}": lambda words=words: [*calotype(), *words.split()] for words in HELPS}
    spent = in_turn(ways, rounds)
    goals = {"calotype --help": MOST_HELP}
    return [seconds_of(name, taken, goals.get(name)) for name, taken in spent.items()]


def calotype() -> list[str]:
    """The script that a user calls, of this interpreter's environment."""
    script = Path(sys.executable).with_name("calotype")
    return [str(script)] if script.exists() else [sys.executable, "-m", "calotype"]


# The first picture


def of_first_picture(args: argparse.Namespace, folder: Path) -> list[Figure]:
    """How many times as fast as stock diffusers, from start to end of a process that draws one picture."""
    model = args.model or random_model(args.preset, folder)
    ways = ways_to_draw(model, args.label, folder)
    spent = in_turn(ways, args.rounds)
    cpu = {name: [taken.cpu for taken in values] for name, values in spent.items()}
    usual = [name for name in cpu if name != "ours"]
    ratios = [
        of_ratio(f"first picture against {name}", times_as_fast(cpu[name], cpu["ours"]), FASTER) for name in usual
    ]
    return [*ratios, *(seconds_of(f"{name}: one picture", values) for name, values in spent.items())]


def ways_to_draw(model: Path, label: str, folder: Path) -> dict[str, Callable[[], list[str]]]:
    """The words of each process: stock diffusers with both layouts, and ours into a new folder each time."""
    from calotype.pipeline.model_folder import load

    pipe = load(model)
    stock(pipe).save_pretrained(folder / "stock")
    arguments = STOCK.format(pipe.default_guidance, pipe.default_steps)
    out = folder / "out"

    def ours() -> list[str]:
        shutil.rmtree(out, ignore_errors=True)
        return [*calotype(), "generate", str(model), label, "-n", "1", "--precision", "fp32", "--out", str(out)]

    usual = [sys.executable, "-c", USUAL]
    return {
        "stock diffusers": lambda: [*usual, str(model), str(folder / "a.png"), label, OURS],
        "DiTPipeline": lambda: [*usual, str(folder / "stock"), str(folder / "b.png"), label, arguments],
        "ours": ours,
    }


def random_model(preset: str, folder: Path) -> Path:
    """A model folder as `calotype export` writes it, of random weights and ten classes."""
    size = int(PRESET_IMAGE_SIZE[preset])

    vae = load_autoencoder(write_autoencoder(folder / "vae", preset, size), "--vae")
    side = size // downsampling(vae)
    stage = diffusion_stage(write_latents(folder / "latents", (vae.config.latent_channels, side, side)), preset, 8)
    stage.pipeline().save_pretrained(folder / "model")
    hashes.write(folder / "model")
    return folder / "model"


# The demo


def of_demo(model: Path) -> list[Figure]:
    """From the start of `calotype demo` to its page, and until it is ready to draw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*calotype(), "demo", str(model), "--port", str(port)]
    began = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        found = []
        for name, path in (("its page", ""), ("ready to draw", "readyz")):
            wait_for(f"http://127.0.0.1:{port}/{path}", process)
            how = f"{time.monotonic() - began:.2f} s by the clock"
            found.append(Figure(f"calotype demo: {name}", cpu_of(process.pid), "CPU-s", how=how))
    finally:
        process.terminate()
        process.wait(60)
    return found


def wait_for(address: str, process: subprocess.Popen) -> None:
    """Ask until the answer is 200."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, "the demo has ended"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=PATIENCE):
            return  # others than 200 raise
        time.sleep(0.02)
    raise AssertionError(f"no answer from {address}")


def cpu_of(pid: int) -> float:
    """CPU seconds of a running process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:13]) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
