"""fit(): one loop for every stage. It knows steps, time, checkpoints and signals, and nothing of the mathematics."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from calotype import checkpoint
from calotype.changes import Changed
from calotype.config import TrainSettings
from calotype.device import device as best_device
from calotype.errors import UserError
from calotype.faults import locate
from calotype.lock import claimed
from calotype.muon import Muon
from calotype.pace import Interruption, Pace, learning_rate_factor
from calotype.resume import prepare, take_over, write_settings
from calotype.stage import Stage
from calotype.tracking import Journal, ProgressLine

_AGREE_EVERY = 10  # steps after which several processes ask each other whether one was told to stop
_MOST_SKIPPED = 2  # steps in a row that may be left out before the run goes back
_MOST_HALVINGS = 4  # of the learning rate, before the run gives up


def fit(stage: Stage, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Train a stage to its end, from where it was; the same command again is always safe. Raises UserError."""
    out = settings.out
    with claimed(out) if accelerator.is_main_process else nullcontext():
        changes = prepare(out, settings, stage.exports, accelerator)
        if (out / "finished.json").exists():
            accelerator.print(f"{stage.name}: {out} is finished.")
            return
        if settings.trackers:
            accelerator.init_trackers("calotype")
        run = Run(stage, settings, accelerator)
        run.accept(changes)
        run.train()


class Run:
    """One stage on its way from the last checkpoint to the end."""

    def __init__(self, stage: Stage, settings: TrainSettings, accelerator: Accelerator):
        self.stage, self.settings, self.accelerator = stage, settings, accelerator
        self.out: Path = settings.out
        self.lr_factor, self.good_step, self.skipped = 1.0, None, 0
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
                    self._validate(progress)
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
        self._put_back(parts)
        self.lr_factor, self.good_step, self.skipped = (state[name] for name in ("lr_factor", "good_step", "skipped"))
        for name, entries in state["stage"].items():
            self.stage.state[name].update(entries)  # in place: the parts of a stage hold on to their own
        self.accelerator.print(f"{self.stage.name}: goes on at step {state['step']}.")
        return state["step"], state["seconds"]

    def accept(self, changes: dict[str, Changed]) -> None:
        """Say what is different from here on, and write it down."""
        for change in changes.values():
            self._say(f"{change} from here on.")
        take_over(changes, self.settings, self.stage.state)
        if changes and self.accelerator.is_main_process:
            write_settings(self.settings)

    def _put_back(self, parts: dict[str, checkpoint.Tensors]) -> None:
        for name, module in self._modules().items():
            checkpoint.load_module(module, parts[name])
        for name, optimizer in self.stage.optimizers.items():
            checkpoint.load_optimizer(optimizer, parts[f"{name}_optimizer"])

    def _go_back(self, step: int | None, reason: str, besides: str = "") -> None:
        """Weights and optimisers as they were at a checkpoint; the steps count on, so other batches follow."""
        found = checkpoint.load(self.out / "checkpoints", up_to=step)
        if found is None:
            raise UserError(
                f"{self.stage.name}: {reason} at step {self.at_step}, and there is no checkpoint to go back to; try a "
                "lower --lr, or --precision fp32."
            )
        parts, state = found
        self._put_back(parts)
        self._say(f"{reason}: the run goes back to the weights of step {state['step']}{besides}.")

    def _say(self, sentence: str) -> None:
        """Tell the person, and the report."""
        self.accelerator.print(f"{self.stage.name}, step {self.at_step}: {sentence}")
        self.journal.say(self.at_step, self.pace.seconds, sentence)

    def _modules(self) -> dict[str, nn.Module]:
        averages = {f"{name}_ema": ema.model for name, ema in self.stage.averages.items()}
        return self.stage.models | averages

    def _save(self) -> None:
        self._log()
        if self.accelerator.is_main_process:
            parts = {name: module.state_dict() for name, module in self._modules().items()}
            for name, optimizer in self.stage.optimizers.items():
                parts[f"{name}_optimizer"] = checkpoint.optimizer_tensors(optimizer)
            state = {"seconds": self.pace.seconds, "identity": self.stage.identity, "stage": self.stage.state}
            state |= {"lr_factor": self.lr_factor, "good_step": self.good_step, "skipped": self.skipped}
            keep = self.settings.keep_checkpoints
            checkpoint.save(self.out / "checkpoints", self.at_step, parts, state, keep, self.good_step)
        self.accelerator.wait_for_everyone()

    def _set_learning_rates(self, progress: float) -> None:
        factor = learning_rate_factor(self.settings, self.at_step, progress) * self.lr_factor
        for optimizer in self.stage.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _log(self) -> None:
        """Mean over a window of steps and over the processes; the only place where a step's figures are read."""
        if not self.window:
            return
        means, good = self._means()
        first = self.at_step - len(good)
        self.window = []
        if not all(map(math.isfinite, means.values())):
            raise UserError(
                f"{self.stage.name}: the loss is not finite at step {self.at_step}; try a lower --lr, or "
                f"--precision fp32. The last good state is in {self.out / 'checkpoints'}."
            )
        if all(good):
            self.skipped = 0
        else:
            self._left_out(first, good)
        if not means:
            return
        rate = self.pace.rate(self.at_step) * self.settings.batch_size
        lr = next(iter(self.stage.optimizers.values())).param_groups[0]["lr"]
        self.journal.write(self.at_step, self.pace.seconds, means | {"lr": lr, "images_per_second": round(rate, 1)})
        left, progress = self.pace.left(self.at_step)
        loss = {"loss": means["loss[train]"]} if "loss[train]" in means else {}
        shown = loss | dict(list(self.validation.items())[:1])
        self.line.show(progress, self.at_step, rate, left, shown)

    def _means(self) -> tuple[dict[str, float], list[bool]]:
        """Figures over the steps of the window that were taken, and over the processes; and which steps those were."""
        good = torch.stack([values["gradient_norm"] for values in self.window]).isfinite().tolist()
        taken = [values for values, was in zip(self.window, good) if was]
        names = dict.fromkeys(name for values in taken for name in values)
        means = {f"{name}[train]": torch.stack([v[name] for v in taken if name in v]).mean() for name in names}
        return {name: value.item() for name, value in self.accelerator.reduce(means, "mean").items()}, good

    def _left_out(self, first: int, good: list[bool]) -> None:
        """Say which steps were left out and why; after three in a row go back, with half the learning rate."""
        bad = [first + i for i, taken in enumerate(good) if not taken]
        if not self.skipped:
            self._say(f"{locate(self.stage, bad[0])}; the step was left out.")
        for taken in good:
            self.skipped = 0 if taken else self.skipped + 1
            if self.skipped > _MOST_SKIPPED:
                return self._slow_down()
        return None

    def _slow_down(self) -> None:
        self.skipped = 0
        self.lr_factor /= 2
        if self.lr_factor < 0.5**_MOST_HALVINGS:
            raise UserError(
                f"{self.stage.name}: the gradient is not finite at step {self.at_step}, again and again; try a lower "
                f"--lr, or --precision fp32. The last good state is in {self.out / 'checkpoints'}."
            )
        self._go_back(None, "The gradient was not finite three times in a row", ", with half the learning rate")

    def _validate(self, progress: float = 1.0) -> None:
        self._log()  # a state that is not finite must not be measured, kept or exported
        figures = self._measure()
        if self.accelerator.is_main_process:
            samples = self.out / "samples"
            samples.mkdir(exist_ok=True)
            self.stage.preview().save(samples / f"step-{self.at_step:08d}.png")
        self.accelerator.wait_for_everyone()
        review = self.stage.review(figures, self.at_step, progress)
        for sentence in review.sentences:
            self._say(sentence)
        if review.go_back:
            self._go_back(self.good_step, "The guard steps in")
            self._measure()
        if review.good:
            self.good_step = self.at_step
            self._save()

    def _measure(self) -> dict[str, float]:
        """Validate, and write it down."""
        figures = self.stage.validate()
        self.validation = {name if "[" in name else f"{name}[val]": value for name, value in figures.items()}
        self.journal.write(self.at_step, self.pace.seconds, self.validation)
        return figures

    def _told_to_stop(self, interruption: Interruption) -> bool:
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


def make_optimizer(
    model: nn.Module, settings: TrainSettings, lr: float, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.Optimizer:
    """AdamW in its fused form (3.3 times the default's speed on a CPU), Muon or plain SGD; `lr` is its rate's peak."""
    if settings.optimizer == "muon":
        return Muon(model, lr, betas, settings.weight_decay)
    trained = [{"params": [p for p in model.parameters() if p.requires_grad], "initial_lr": lr}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=lr)
    fused = best_device().type != "mps"
    return torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=settings.weight_decay, fused=fused)


def update(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Clip, step and clear the gradients; returns the gradient norm before clipping.

    Where the norm is not finite the weights and the optimiser stay as they are, without waiting for the device (but for
    an AdamW that is not fused).
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    _leave_out_unless(norm.isfinite(), getattr(optimizer, "optimizer", optimizer))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _leave_out_unless(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Make the next step do nothing where `good` is false: a fused optimiser is told, plain descent gets zeros."""
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()
        return
    if not isinstance(optimizer, torch.optim.SGD):
        if not good:  # moments would fade with zeros; without gradients they stay
            optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = torch.where(good, parameter.grad, 0.0)
