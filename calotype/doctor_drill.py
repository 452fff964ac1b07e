"""`calotype doctor`: a tiny run that is killed, damaged, resumed, exported and drawn with, by commands anyone can type.

Two lanes run at the same time: one run that nobody disturbs, from pictures to a model, and one that is killed.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from calotype.doctor_processes import Processes
from calotype.finding import Finding, examine, in_one_line

_STEPS, _EVERY = 120, 10  # optimiser steps, steps between checkpoints
_KILL_AFTER = 3  # checkpoints
_SIDE, _PICTURES = 16, 48
_TRAIN = f"--image-size {_SIDE} --batch-size 8 --precision fp32 --validations 1 --log-every 1".split()
_VAE = "--width 8 --factor 2 --latent-channels 2".split()
_UNET = "--width 16 --depth 2 --sampler-steps 4 --batch-size 8 --precision fp32 --validations 1 --steps 20".split()
_ALIKE = 1 / 255  # pictures in [0, 1]
_NEARLY = 1e-3  # of the largest weight: sums that a GPU adds up in another order
_CLOCK = ("seconds", "images_per_second")
_AGAIN = "Give `calotype doctor` again; if it stays so, no run here can be trusted: try another disk or device."
_REPORT = "If that does not tell you what to do, please report it with this table."
_LONGEST = 900.0  # seconds for a lane


class Drill:
    """The tiny run in a folder of its own; `findings` begins it and waits for both lanes."""

    def __init__(self, place: Path, processes: Processes):
        self.place, self.processes = place, processes
        self.results: dict[str, dict[str, Any]] = {}
        self.broken: list[str] = []
        self.killed_at, self.while_saving = 0, False
        self.lanes = [threading.Thread(target=self._guarded, args=(lane,)) for lane in (self._calm, self._killed)]

    def findings(self, on_cpu: bool) -> list[Finding]:
        """The rows of the table, when all has ended; only on a CPU are equal bits insisted on."""
        _draw_pictures(self.place / "pictures")
        for lane in self.lanes:
            lane.start()
        self.join()
        if failure := self._failure("A tiny run", "train-vae"):
            return [failure, self._connections()]
        examinations = {
            "Kill and resume": lambda: self._compared("Kill and resume", "resumed", on_cpu),
            "Damaged checkpoint": lambda: self._compared("Damaged checkpoint", "mended", on_cpu),
            "Export and reload": self._reloaded,
            "Connections": self._connections,
        }
        return [finding for what, of in examinations.items() for finding in examine(what, of)]

    def join(self) -> None:
        """Wait for the lanes, as far as they have begun."""
        for lane in self.lanes:
            if lane.ident:
                lane.join()

    # The lanes

    def _guarded(self, lane) -> None:
        try:
            lane()
        except Exception as error:  # of a thread nobody would hear
            self.broken.append(f"{type(error).__name__}: {error}")

    def _calm(self) -> None:
        run = self.place / "run"
        sheet, vae = str(run / "data.json"), str(run / "stage1_vae" / "vae")
        latents, unet, model = str(run / "latents"), str(run / "stage2_diffusion"), str(self.place / "model")
        draw = ["--seed", "1", "-n", "2", "--steps", "4", "--out", str(self.place / "drawn")]
        orders = {
            "data": ["data", str(self.place / "pictures"), "--image-size", str(_SIDE), "--out", str(run)],
            "train-vae": self._train(run / "stage1_vae"),
            "encode": ["encode", sheet, "--vae", vae, "--precision", "fp32", "--out", latents],
            "train-diffusion": ["train-diffusion", "--latents", latents, "--vae", vae, *_UNET, "--out", unet],
            "export": ["export", "--run", str(run), "--out", model, "--verify"],
            "generate": ["generate", model, *draw],
        }
        self._order("calm", orders)

    def _killed(self) -> None:
        """Train, kill, damage a copy, and go on with both."""
        killed, damaged = self.place / "killed", self.place / "damaged"
        self._kill_on_the_way(killed)
        shutil.copytree(killed, damaged)
        _flip_a_byte(_checkpoints(damaged)[-1])
        self._order("again", {"resumed": self._train(killed), "mended": self._train(damaged)})

    def _kill_on_the_way(self, out: Path) -> None:
        process = self._begin("killed", {"killed": self._train(out)})
        deadline = time.monotonic() + _LONGEST
        while process.poll() is None and not _far_enough(out) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
        if (out / "finished.json").exists() or len(_checkpoints(out)) < 2:
            raise RuntimeError(f"the run that should be killed ended by itself: {_last_line(self._log('killed'))}")
        self.killed_at = int(_checkpoints(out)[-1].name.removeprefix("step-"))
        self.while_saving = any((out / "checkpoints").glob(".step-*"))

    def _train(self, out: Path) -> list[str]:
        length = ["--steps", str(_STEPS), "--checkpoint-every", str(_EVERY)]
        return ["train-vae", str(self.place / "pictures"), *_TRAIN, *_VAE, *length, "--out", str(out)]

    def _begin(self, lane: str, orders: dict[str, list[str]]) -> subprocess.Popen:
        listed = [{"name": name, "words": words, "log": str(self._log(name))} for name, words in orders.items()]
        (self.place / f"{lane}.json").write_text(json.dumps(listed), encoding="utf-8")
        files = [str(self.place / f"{lane}.json"), str(self.place / f"{lane}.report")]
        words = [sys.executable, "-m", "calotype.doctor_watch", *files]
        return self.processes.start(words, self.place / f"{lane}.log")

    def _order(self, lane: str, orders: dict[str, list[str]]) -> None:
        """Run commands in one process; what became of each is in `results`."""
        code = self._begin(lane, orders).wait(_LONGEST)
        report = self.place / f"{lane}.report"
        lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
        self.results |= {line["name"]: line for line in map(json.loads, lines)}
        for name, words in orders.items():
            lost = {"code": code or 1, "reached": [], "seconds": 0.0}
            self.results.setdefault(name, lost)["words"] = words

    def _log(self, name: str) -> Path:
        return self.place / f"{name}.txt"

    # What came of it

    def _compared(self, what: str, name: str, on_cpu: bool) -> Finding:
        """A run that was disturbed, against the one that was not."""
        if failure := self._failure(what, name):
            return failure
        told = self._log(name).read_text(encoding="utf-8", errors="replace")
        passed_over = name == "mended"
        step = re.search(r"goes on at step (\d+)", told)
        if step is None or ("passed over" in told) != passed_over:
            return Finding(what, "FAIL", f"it did not say where it goes on: {_last_line(self._log(name))}", _AGAIN)
        saving = ", in the middle of the next save" if self.while_saving else ""
        happened = f"killed after step {self.killed_at}{saving}; resumed at step {step[1]}"
        if passed_over:
            happened = f"a bit of the one of step {self.killed_at} flipped; passed over, resumed at step {step[1]}"
        calm, disturbed = self.place / "run" / "stage1_vae", Path(_value(self.results[name]["words"], "--out"))
        return _verdict(what, happened, differing(calm, disturbed), on_cpu)

    def _reloaded(self) -> Finding:
        what = "Export and reload"
        if failure := self._failure(what, "encode", "train-diffusion", "export", "generate"):
            return failure
        told = self._log("export").read_text(encoding="utf-8", errors="replace")
        figure = re.search(r"differ from ours by at most ([\d.e+-]+) of 1", told)
        if figure is None or not float(figure[1]) <= _ALIKE:
            found = f"diffusers alone draws other pictures: off by {figure[1] if figure else '?'} of 1"
            return Finding(what, "FAIL", found, _AGAIN)
        drawn = sorted((self.place / "drawn").rglob("*.png"))
        if len(drawn) < 2 or any(_is_flat(file) for file in drawn[:2]):
            return Finding(what, "FAIL", "the model draws nothing but one colour", _AGAIN)
        found = f"two pictures drawn by diffusers alone differ from ours by {float(figure[1]):.1g} (of 1) at most"
        return Finding(what, "pass", f"{found}; Calotype's own loader draws too")

    def _connections(self) -> Finding:
        reached = sorted({text for result in self.results.values() for text in result["reached"]})
        ran = [name for name, result in self.results.items() if not result["code"]]
        if reached:
            found = f"{', '.join(reached[:5])}{' …' if len(reached) > 5 else ''}"
            return Finding("Connections", "FAIL", found, "Set HF_HUB_OFFLINE=1, and see who asks for it.")
        if not ran:
            return Finding("Connections", "note", "nothing ran to its end, so nothing is known")
        return Finding("Connections", "pass", f"none in {len(ran)} commands: {', '.join(sorted(ran))}")

    def _failure(self, what: str, *names: str) -> Finding | None:
        """The first of these commands that did not end well, with its last line."""
        for name in names:
            result = self.results.get(name)
            if result is None:
                found = in_one_line("; ".join(self.broken) or f"{name} was never begun")
                return Finding(what, "FAIL", found, _REPORT)
            if result["code"]:
                found = f"{result['words'][0]} ended with {result['code']}: {_last_line(self._log(name))}"
                return Finding(what, "FAIL", found, _REPORT)
        return None


def _verdict(what: str, happened: str, difference: str | float | None, on_cpu: bool) -> Finding:
    if difference is None:
        return Finding(what, "pass", f"{happened}; weights, optimiser and losses end with the same bits")
    if isinstance(difference, float) and difference <= _NEARLY and not on_cpu:
        found = f"{happened}; the weights end within {difference:.1g} of an undisturbed run's"
        return Finding(what, "note", found, "This device adds up in an order of its own; bits repeat on a CPU only.")
    text = difference if isinstance(difference, str) else f"weights off by {difference:.1g}"
    return Finding(what, "FAIL", f"{happened}; but it ends otherwise than an undisturbed run: {text}", _AGAIN)


def differing(calm: Path, disturbed: Path) -> str | float | None:
    """None if two finished stages hold the same bits; else the largest relative difference of weights, or a reason."""
    ours, theirs = _tensors(calm), _tensors(disturbed)
    if ours.keys() != theirs.keys() or not ours:
        return "other files"
    if ours == theirs:
        return None if _losses(calm) == _losses(disturbed) else "other losses"
    import numpy as np
    from safetensors.numpy import load_file

    parts = [[load_file(_checkpoints(out)[-1] / "vae.safetensors") for out in (calm, disturbed)]]
    worst = [float(np.abs(a[name] - b[name]).max() / max(np.abs(a[name]).max(), 1e-12)) for a, b in parts for name in a]
    return max(worst)


def _tensors(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(_checkpoints(out)[-1].glob("*.safetensors"))}


def _losses(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if name not in _CLOCK} for line in lines]


def _checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-????????"))


def _far_enough(out: Path) -> bool:
    """Whether there are two checkpoints to go back to, and the next one is being saved, or was."""
    there = _checkpoints(out)
    newer = there and there[-1].name >= f"step-{_KILL_AFTER * _EVERY:08d}"
    return len(there) >= 2 and bool(newer or any((out / "checkpoints").glob(".step-*")))


def _flip_a_byte(checkpoint: Path) -> None:
    """The lowest bit in the middle of the largest file of weights."""
    file = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _draw_pictures(folder: Path) -> None:
    """Small pictures in two classes, all different."""
    for i, (red, green) in enumerate(_shades()):
        place = folder / ("dark" if i % 2 else "light")
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (_SIDE, _SIDE), (red, green, 128))
        picture.paste((255 - red, green, 255 * (i % 2)), (i % 8, i % 5, i % 8 + 8, i % 5 + 8))
        picture.save(place / f"{i:02d}.png")


def _shades() -> Iterator[tuple[int, int]]:
    yield from ((5 * i, 255 - 4 * i) for i in range(_PICTURES))


def _is_flat(file: Path) -> bool:
    with Image.open(file) as picture:
        return all(low == high for low, high in picture.convert("RGB").getextrema())


def _value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def _last_line(log: Path) -> str:
    """The last line of a log, which is where an error stands."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")
