"""fit(): one loop for every stage. It knows steps, time, checkpoints and signals, and nothing of the mathematics."""

import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from calotype import checkpoint
from calotype.changes import Changed
from calotype.config import TrainSettings
from calotype.disk import lines_as_room_allows, unless_full
from calotype.errors import UserError
from calotype.guards import Back, Guard, Window, read
from calotype.lock import claimed
from calotype.pace import Interruption, Pace, learning_rate_factor
from calotype.ranks import refuse_drift
from calotype.resume import prepare, refuse_other_identity, take_over, write_settings
from calotype.stage import Stage
from calotype.tracking import Journal, ProgressLine
from calotype.updates import make_optimizer as make_optimizer
from calotype.updates import update as update

_AGREE_EVERY = 10  # steps after which several processes ask each other whether one was told to stop


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
        self.guard, self.good_step = Guard(stage, self.out / "checkpoints"), None
        self.at_step, spent = self._restore()
        self.pace = Pace(settings, self.at_step, spent, accelerator)
        self.journal = Journal(self.out / "metrics.jsonl", self.at_step, accelerator)
        self.line = ProgressLine(stage.name, accelerator.is_main_process)
        self.validation: dict[str, float] = {}
        self.window: list[dict[str, Tensor]] = []  # figures of the steps since the last line of metrics.jsonl

    def train(self) -> None:
        """Step until the end is reached or a signal comes; then save, and at the end export."""
        with lines_as_room_allows(), Interruption() as interruption:
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
                stop, asked = self._told(interruption)
                if stop or asked or self.at_step % self.settings.checkpoint_every == 0:
                    self._save(last=stop)
                if stop:
                    self.line.close()
                    raise SystemExit(interruption.exit_code)
            self._finish()
            if interruption.received:  # what was almost done is done; who asked hears what was asked for
                raise SystemExit(interruption.exit_code)

    def _restore(self) -> tuple[int, float]:
        """Load the newest good checkpoint; returns its step and the seconds already spent."""
        found = checkpoint.load(self.out / "checkpoints")
        if found is None:
            if self.settings.resume:
                raise UserError(f"--resume: {self.out} holds no checkpoint; leave the flag out to begin.")
            return 0, 0.0
        parts, state = found
        refuse_other_identity(self.out, state["identity"], self.stage.identity, self.settings.allow_data_change)
        self._put_back(parts)
        self.good_step = state["good_step"]
        self.guard.restore(state["guard"])
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

    def _go_back(self, back: Back) -> None:
        """Weights and optimisers as they were at a checkpoint; the steps count on, so other batches follow."""
        found = checkpoint.load(self.out / "checkpoints", up_to=back.up_to)
        if found is None and back.needed:
            raise UserError(
                f"{self.stage.name}: {back.reason} at step {self.at_step}, and there is no checkpoint to go back to; "
                "try a lower --lr, or --precision fp32."
            )
        if found is None:
            return self._say(f"{back.reason}, and there is no checkpoint from before; the run goes on{back.besides}.")
        parts, state = found
        self._put_back(parts)
        return self._say(f"{back.reason}: the run goes back to the weights of step {state['step']}{back.besides}.")

    def _say(self, sentence: str) -> None:
        """Tell the person, and the report."""
        self.accelerator.print(f"{self.stage.name}, step {self.at_step}: {sentence}")
        self.journal.say(self.at_step, self.pace.seconds, sentence)

    def _modules(self) -> dict[str, nn.Module]:
        averages = {f"{name}_ema": ema.model for name, ema in self.stage.averages.items()}
        return self.stage.models | averages

    def _save(self, last: bool = False) -> None:
        self._log()
        if self.accelerator.is_main_process:
            parts = {name: module.state_dict() for name, module in self._modules().items()}
            for name, optimizer in self.stage.optimizers.items():
                parts[f"{name}_optimizer"] = checkpoint.optimizer_tensors(optimizer)
            state = {"seconds": self.pace.seconds, "identity": self.stage.identity, "stage": self.stage.state}
            state |= {"guard": self.guard.state, "good_step": self.good_step}
            folder, keep = self.out / "checkpoints", self.settings.keep_checkpoints
            save = partial(checkpoint.save, folder, self.at_step, parts, state, keep, self.good_step)
            self.journal.to_disk()
            checkpoint.insist(save, self._say, last)
        self.accelerator.wait_for_everyone()

    def _set_learning_rates(self, progress: float) -> None:
        factor = learning_rate_factor(self.settings, self.at_step, progress) * self.guard.state["lr_factor"]
        for optimizer in self.stage.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _log(self) -> None:
        """Mean over a window of steps and over the processes; the only place where a step's figures are read."""
        if not self.window:
            return
        window = read(self.window, self.at_step - len(self.window), self.accelerator)
        self.window = []
        if not window.finite:
            raise UserError(
                f"{self.stage.name}: the loss is not finite at step {self.at_step}; try a lower --lr, or "
                f"--precision fp32. The last good state is in {self.out / 'checkpoints'}."
            )
        self._watch(window)
        self._write(window)

    def _watch(self, window: Window) -> None:
        """Let the guard look at the steps; where it says so, go back."""
        sentences, back = self.guard.left_out(window)
        for sentence in [*sentences, *self.guard.jumped(window)]:
            self._say(sentence)
        if back is None and self.at_step % self.settings.log_every == 0:
            back = self.guard.stays_high(self.at_step)
        if back:
            self._go_back(back)

    def _write(self, window: Window) -> None:
        """One line of metrics.jsonl, and of the screen."""
        means, skipped = window.means, window.good.count(False)
        rate = self.pace.rate(self.at_step) * self.settings.batch_size
        lr = next(iter(self.stage.optimizers.values())).param_groups[0]["lr"]
        more = {"lr": lr, "images_per_second": round(rate, 1)} | ({"skipped": skipped} if skipped else {})
        self.journal.write(self.at_step, self.pace.seconds, means | more)
        left, progress = self.pace.left(self.at_step)
        loss = {"loss": means["loss[train]"]} if "loss[train]" in means else {}
        shown = loss | dict(list(self.validation.items())[:1])
        self.line.show(progress, self.at_step, rate, left, shown)

    def _validate(self, progress: float = 1.0) -> None:
        self._log()  # a state that is not finite must not be measured, kept or exported
        refuse_drift(self.accelerator, self.stage.models, self.at_step)
        figures = self._measure()
        if self.accelerator.is_main_process:
            sheet = self.out / "samples" / f"step-{self.at_step:08d}.png"
            with unless_full(self._say, sheet):
                sheet.parent.mkdir(exist_ok=True)
                self.stage.preview().save(sheet)
        self.accelerator.wait_for_everyone()
        review = self.stage.review(figures, self.at_step, progress)
        for sentence in review.sentences:
            self._say(sentence)
        if review.go_back:
            self._go_back(Back("The guard steps in", "", self.good_step))
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

    def _told(self, interruption: Interruption) -> tuple[bool, bool]:
        """Whether signals ask to stop, and to save; several processes agree on the step."""
        if self.accelerator.num_processes == 1:
            return interruption.look()
        if self.accelerator.device.type != "cpu" and self.at_step % _AGREE_EVERY:
            return False, False  # asking makes a GPU wait
        told = torch.tensor(interruption.look(), dtype=torch.float32, device=self.accelerator.device)
        stop, asked = (self.accelerator.reduce(told, "sum") > 0).tolist()
        return stop, asked

    def _finish(self) -> None:
        if not self.validation:
            self._validate()
        self._save(last=True)
        self.line.close()
        if self.accelerator.is_main_process:
            self.stage.export(self.out)
            done = {"steps": self.at_step, "seconds": round(self.pace.seconds, 1)} | self.guard.counts | self.validation
            checkpoint.write_text(self.out / "finished.json", json.dumps(done))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
