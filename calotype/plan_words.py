"""What `calotype plan` prints: one table, the command to copy, and what to expect."""

import os
import shlex

import psutil
from rich.console import Console
from rich.table import Table

from calotype import planning

_PLENTY = 2000  # epochs, beyond which a small set of pictures is likely to be learnt by heart


def show(console: Console, settings, plan, seconds: float) -> None:
    """The table, the command and the sentences."""
    console.print(heading(plan), soft_wrap=True)
    console.print(table(plan.prediction))
    console.print()
    console.print(shlex.join(plan.command), soft_wrap=True, markup=False)
    console.print()
    for sentence in sentences(settings, plan):
        console.print(sentence, soft_wrap=True, markup=False)
    console.print(f"Measured in {seconds:.0f} s. {plan.load}", soft_wrap=True)


def load_now() -> str:
    """What else this machine does, in a sentence: several threads that wait for a core wait for each other too."""
    cores, load = os.cpu_count() or 1, psutil.getloadavg()[0]
    if load < 0.5 * cores:
        return "Other work on this machine makes a run slower."
    return (
        f"This machine is busy (a load of {load:.1f} on {cores} cores), and the plan is for one as busy, which may be "
        "many times as slow; ask again when it is quiet."
    )


def heading(plan) -> str:
    """What is planned, in one line."""
    setup, source = plan.measured.setup, plan.measured.source
    one, two = plan.measured.costs.one, plan.measured.costs.two
    height, width = setup.size
    latent = "x".join(str(side // setup.factor) for side in setup.size)
    return (
        f"{source.train:,} pictures to train on, {source.val:,} held out, at {height}x{width}; preset {setup.preset}, "
        f"factor {setup.factor} (latents of {latent}), batches of {one.batch} and {two.batch}."
    )


def table(prediction) -> Table:
    """A row a command, and their sum."""
    rows = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("part", "steps", "time", "memory", "disk"):
        rows.add_column(name, justify="left" if name == "part" else "right")
    for part in prediction.parts:
        steps = "" if part.steps is None else f"{part.steps:,}"
        memory = in_bytes(part.memory) if part.memory else ""
        rows.add_row(part.name, steps, duration(part.seconds), memory, in_bytes(part.disk))
    total = (duration(prediction.seconds), in_bytes(prediction.memory), in_bytes(prediction.disk))
    rows.add_row("all of it", "", *total, style="bold")
    return rows


def sentences(settings, plan) -> list[str]:
    """What to expect, and what was not possible, in plain words."""
    return [
        s
        for s in (_length(settings, plan), _epochs(plan), _larger(settings, plan), _smaller_batch(settings, plan))
        if s
    ]


def _length(settings, plan) -> str:
    share = planning.completeness(plan.measured.costs, plan.prediction)
    preset = plan.measured.setup.preset
    if share >= 1:
        return f"That is {share:.1f} times the usual length of {preset}: expect it to come as far as it can."
    least = planning.least_hours(plan.measured.source, plan.measured.costs, 1.0)
    usual = f"the usual length of {preset}, which takes about {duration(3600 * least)} here"
    if share >= planning.ENOUGH:
        return f"That is {share:.0%} of {usual}: expect recognisable pictures that longer training sharpens."
    return f"--hours {settings.hours:g} is too short for more than a try: that is {share:.1%} of {usual}. Expect blobs."


def _epochs(plan) -> str:
    epochs = plan.prediction.steps("stage 2") * plan.measured.costs.two.batch / plan.measured.source.train
    seen = (
        f"Stage 2 sees each picture about {max(1, round(epochs)):,} times"
        if epochs >= 1
        else (f"Stage 2 sees {epochs:.0%} of the pictures")
    )
    if epochs > _PLENTY:
        return f"{seen}: it may learn some by heart; look with `calotype evaluate RUN --audit`."
    return f"{seen}."


def _larger(settings, plan) -> str:
    """From when on a larger preset would be chosen, where one was tried and left."""
    names = list(plan.others)
    after = names[names.index(plan.measured.setup.preset) + 1 :]
    if not after:
        return ""
    other = plan.others[after[0]]
    hours = planning.least_hours(other.source, other.costs, planning.ENOUGH)
    side = "x".join(map(str, other.setup.size))
    return f"Preset {after[0]} (at {side}) would be worth it from about --hours {hours:.2g} on."


def _smaller_batch(settings, plan) -> str:
    setup = plan.measured.setup
    if settings.batch_size or not setup.batch_size:
        return ""
    return (
        f"The preset's batches do not fit into {in_bytes(plan.measured.free)} of memory; they are {setup.batch_size}."
    )


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.2 h`, `4.1 days`."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * length:
            value = seconds / length
            return f"{value:.1f} {unit}" if value < 10 and unit != "s" else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def in_bytes(count: float) -> str:
    """`12 MB`, `3.4 GB`."""
    if count < 1e9:
        return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB"
