"""fit(): one loop for every stage. It knows steps, time, checkpoints and signals, and nothing of the mathematics."""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn

from calotype import checkpoint
from calotype.config import TrainSettings, refuse_other_settings
from calotype.data import Batch
from calotype.device import device as best_device
from calotype.ema import PowerEma
from calotype.errors import UserError
from calotype.lock import claimed
from calotype.tracking import Journal, ProgressLine

_OWN_FILES = ("config.json", "metrics.jsonl", "finished.json", "samples", "checkpoints")
_AGREE_EVERY = 10  # steps after which several processes ask each other whether one was told to stop


class Stage(Protocol):
    """What a stage must offer; `fit` drives any."""

    name: str
    models: dict[str, nn.Module]  # as they are saved, without wrappers
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, PowerEma]
    identity: dict[str, str]  # hashes of what the stage reads; a resumed run must find the same
    exports: tuple[str, ...]  # names of what export writes into the folder

    def batches(self, step: int) -> Iterator[Batch]:
        """Batches of this process from `step` on."""

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns detached means over this process's examples."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out examples, over all processes."""

    def preview(self) -> Image.Image:
        """A sample sheet; called in the first process only."""

    def export(self, folder: Path) -> None:
        """Write what the next stage reads; called in the first process only."""


def fit(stage: Stage, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Train a stage to its end, from where it was; the same command again is always safe. Raises UserError."""
    out = settings.out
    with claimed(out) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            _prepare(out, settings, stage.exports)
        accelerator.wait_for_everyone()
        if (out / "finished.json").exists():
            accelerator.print(f"{stage.name}: {out} is finished.")
            return
        if settings.trackers:
            accelerator.init_trackers("calotype")
        Run(stage, settings, accelerator).train()


class Run:
    """One stage on its way from the last checkpoint to the end."""

    def __init__(self, stage: Stage, settings: TrainSettings, accelerator: Accelerator):
        self.stage, self.settings, self.accelerator = stage, settings, accelerator
        self.out: Path = settings.out
        self.at_step, spent = self._restore()
        self.pace = Pace(settings, self.at_step, spent, accelerator)
        self.journal = Journal(self.out / "metrics.jsonl", self.at_step, accelerator)
        self.line = ProgressLine(stage.name, accelerator.is_main_process)
        self.validation: dict[str, float] = {}
        self.window: list[dict[str, Tensor]] = []  # figures of the steps since the last line of metrics.jsonl

    def train(self) -> None:
        """Step until the end is reached or a signal comes; then save, and at the end export."""
        with Interruption() as interruption:
            batches = self.stage.batches(self.at_step)
            progress = self.pace.progress(self.at_step)
            while progress < 1:
                self._set_learning_rates(progress)
                self.window.append(self.stage.step(next(batches), self.at_step))
                self.at_step += 1
                before, progress = progress, self.pace.progress(self.at_step)
                if self.at_step % self.settings.log_every == 0:
                    self._log()
                if math.floor(progress * self.settings.validations) > math.floor(before * self.settings.validations):
                    self._validate()
                stop = self._told_to_stop(interruption)
                if stop or self.at_step % self.settings.checkpoint_every == 0:
                    self._save()
                if stop:
                    self.line.close()
                    raise SystemExit(interruption.exit_code)
        self._finish()

    def _restore(self) -> tuple[int, float]:
        """Load the newest good checkpoint; returns its step and the seconds already spent."""
        found = checkpoint.load(self.out / "checkpoints")
        if found is None:
            if self.settings.resume:
                raise UserError(f"--resume: {self.out} holds no checkpoint; leave the flag out to begin.")
            return 0, 0.0
        parts, state = found
        if state["identity"] != self.stage.identity:
            changed = next(k for k, v in self.stage.identity.items() if state["identity"].get(k) != v)
            raise UserError(f"--out {self.out}: {changed} changed since this run began; restore it, or give --fresh.")
        for name, module in self._modules().items():
            checkpoint.load_module(module, parts[name])
        for name, optimizer in self.stage.optimizers.items():
            checkpoint.load_optimizer(optimizer, parts[f"{name}_optimizer"])
        self.accelerator.print(f"{self.stage.name}: goes on at step {state['step']}.")
        return state["step"], state["seconds"]

    def _modules(self) -> dict[str, nn.Module]:
        averages = {f"{name}_ema": ema.model for name, ema in self.stage.averages.items()}
        return self.stage.models | averages

    def _save(self) -> None:
        self._log()
        if self.accelerator.is_main_process:
            parts = {name: module.state_dict() for name, module in self._modules().items()}
            for name, optimizer in self.stage.optimizers.items():
                parts[f"{name}_optimizer"] = checkpoint.optimizer_tensors(optimizer)
            state = {"seconds": self.pace.seconds, "identity": self.stage.identity}
            keep = self.settings.keep_checkpoints
            checkpoint.save(self.out / "checkpoints", self.at_step, parts, state, keep)
        self.accelerator.wait_for_everyone()

    def _set_learning_rates(self, progress: float) -> None:
        factor = learning_rate_factor(self.settings, self.at_step, progress)
        for optimizer in self.stage.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.settings.lr * factor

    def _log(self) -> None:
        """Mean over a window of steps and over the processes; the only place where a step's figures are read."""
        if not self.window:
            return
        means = {name: torch.stack([values[name] for values in self.window]).mean() for name in self.window[0]}
        means = {f"{name}[train]": value.item() for name, value in self.accelerator.reduce(means, "mean").items()}
        self.window = []
        if not all(map(math.isfinite, means.values())):
            raise UserError(
                f"{self.stage.name}: the loss is not finite at step {self.at_step}; try a lower --lr, or "
                f"--precision fp32. The last good state is in {self.out / 'checkpoints'}."
            )
        rate = self.pace.rate(self.at_step) * self.settings.batch_size
        lr = next(iter(self.stage.optimizers.values())).param_groups[0]["lr"]
        self.journal.write(self.at_step, self.pace.seconds, means | {"lr": lr, "images_per_second": round(rate, 1)})
        left, progress = self.pace.left(self.at_step)
        shown = {"loss": means["loss[train]"]} | dict(list(self.validation.items())[:1])
        self.line.show(progress, self.at_step, rate, left, shown)

    def _validate(self) -> None:
        self._log()  # a state that is not finite must not be measured, kept or exported
        self.validation = {f"{name}[val]": value for name, value in self.stage.validate().items()}
        self.journal.write(self.at_step, self.pace.seconds, self.validation)
        if self.accelerator.is_main_process:
            samples = self.out / "samples"
            samples.mkdir(exist_ok=True)
            self.stage.preview().save(samples / f"step-{self.at_step:08d}.png")
        self.accelerator.wait_for_everyone()

    def _told_to_stop(self, interruption: "Interruption") -> bool:
        """Whether a signal came; several processes agree on the step at which they stop."""
        if self.accelerator.num_processes == 1:
            return interruption.received is not None
        if self.accelerator.device.type != "cpu" and self.at_step % _AGREE_EVERY:
            return False  # asking makes a GPU wait
        told = torch.tensor(float(interruption.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told, "sum").item())

    def _finish(self) -> None:
        if not self.validation:
            self._validate()
        self._save()
        self.line.close()
        if self.accelerator.is_main_process:
            self.stage.export(self.out)
            done = {"steps": self.at_step, "seconds": round(self.pace.seconds, 1), **self.validation}
            checkpoint.write_text(self.out / "finished.json", json.dumps(done))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


class Pace:
    """How far a run is: by its steps, by the clock, or by whichever is further."""

    def __init__(self, settings: TrainSettings, step: int, spent: float, accelerator: Accelerator):
        self.steps, self.minutes, self.spent = settings.length, settings.max_minutes, spent
        self.accelerator = accelerator
        self.began = time.monotonic()
        self.marks = [(step, self.began)]  # the last readings

    @property
    def seconds(self) -> float:
        """Seconds of training so far, earlier sessions included."""
        return self.spent + time.monotonic() - self.began

    def progress(self, step: int) -> float:
        """The share of the run that lies behind, 1 at its end; the same in every process."""
        by_steps = 1.0 if self.steps == 0 else step / self.steps if self.steps else 0.0
        if self.minutes is None:
            return by_steps
        shared = [max(by_steps, self.seconds / (60 * self.minutes))]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        return min(shared[0], 1.0)

    def rate(self, step: int) -> float:
        """Steps a second over the last few readings."""
        self.marks = [*self.marks[-20:], (step, time.monotonic())]
        (first, then), (last, now) = self.marks[0], self.marks[-1]
        return (last - first) / (now - then) if now > then else 0.0

    def left(self, step: int) -> tuple[float, float]:
        """Seconds to the end, and the share that lies behind, by this process's own clock."""
        by_clock = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        progress = max(by_clock, step / self.steps if self.steps else 0.0)
        return self.seconds * (1 - progress) / max(progress, 1e-6), min(progress, 1.0)


class Interruption:
    """Notes the first SIGINT or SIGTERM, so that a step can end and be saved; a second Ctrl-C stops at once."""

    def __init__(self):
        self.received: int | None = None
        self.since = 0.0
        self.earlier: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM (where another process was told, 143 too)."""
        return 128 + (self.received or signal.SIGTERM)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM"):
                if number := getattr(signal, name, None):
                    self.earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        """A launcher may repeat SIGTERM, and hand on what we got already; only a later Ctrl-C means at once."""
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            print("\nStopping after this step; Ctrl-C once more stops at once.", flush=True)
        elif number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt


def learning_rate_factor(settings: TrainSettings, step: int, progress: float) -> float:
    """Linear warm-up over the first steps times a half cosine over the run, or 1; in (0, 1]."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    return warmup * (0.5 * (1 + math.cos(math.pi * progress)) if settings.lr_schedule == "cosine" else 1.0)


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW in its fused form (3.3 times the default's speed on a CPU), or plain SGD."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=settings.lr)
    decay = settings.weight_decay
    fused = best_device().type != "mps"
    return torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.99), weight_decay=decay, fused=fused)


def update(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Clip, step and clear the gradients; returns the gradient norm before clipping."""
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _prepare(out: Path, settings: TrainSettings, exports: tuple[str, ...]) -> None:
    """Check that the folder holds this run or nothing, and write its config.json."""
    config = out / "config.json"
    if settings.fresh and config.exists():
        for name in (*_OWN_FILES, *exports):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif not config.exists() and (strange := [name for name in (*_OWN_FILES, *exports) if (out / name).exists()]):
        raise UserError(f"--out {out} holds {strange[0]} but no run; give another --out.")
    if config.exists():
        refuse_other_settings(settings, config)
    else:
        checkpoint.write_text(config, json.dumps(settings.to_json(), indent=1))
