"""`calotype likelihood`: how likely held-out pictures are under each model of a run, in bits per dimension."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calotype.checkpoint import write_text
from calotype.config import DataSettings
from calotype.data import Pictures, evenly_spaced
from calotype.density.config import LikelihoodSettings
from calotype.density.measurement import Batch, Measurement, Row
from calotype.density.run_models import RunModels
from calotype.errors import UserError
from calotype.sheet import Sheet, make_sheet, read_sheet, summary

COMPARE = (
    "Bits per dimension of latents and of pictures must not be compared: they are densities of different things, and "
    "those of latents even depend on the autoencoder's scale."
)
_WIDTH = 120  # where the output is no terminal


def main(settings: LikelihoodSettings) -> None:
    """Measure, print a table and write the figures as JSON."""
    out = settings.out or settings.run / "likelihood.json"
    if out.suffix != ".json" or out.is_dir():
        raise UserError(f"--out {out} must be a file that ends in .json; try {out.with_suffix('.json')}.")
    sheet = pictures_of(settings)
    models = RunModels.open(settings.run, settings.precision)
    refuse_strangers(models, sheet)
    print(summary(sheet))
    rows = measure(models, sheet, settings)
    found = {name: row.figures() for name, row in rows.items()}
    console = Console(markup=False, highlight=False)
    (console if console.is_terminal else Console(width=_WIDTH, markup=False, highlight=False)).print(table(found))
    for sentence in [COMPARE, *left_out(models)]:
        print(sentence)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1, ensure_ascii=False))
    print(f"Wrote {len(found)} likelihoods to {out}.")


# Pictures


def pictures_of(settings: LikelihoodSettings) -> Sheet:
    """The sheet whose held-out pictures are measured; of a folder that is all of them. Raises UserError."""
    own = read_sheet(settings.run / "data.json")
    if settings.source is None:
        return own
    if Path(settings.source).name == "data.json":
        return read_sheet(Path(settings.source))
    size = "x".join(map(str, own.image_size))
    asked = DataSettings(image_size=size, fit=own.fit, channels=own.channels)
    sheet = make_sheet(settings.source, asked, settings.seed, size)
    sheet.records = [record._replace(val=True) for record in sheet.records]
    sheet.counts = {"train": 0, "val": len(sheet.records)}
    return sheet


def refuse_strangers(models: RunModels, sheet: Sheet) -> None:
    """Raise UserError where pictures are not as those of the run."""
    own = read_sheet(models.run / "data.json")
    if (sheet.image_size, sheet.channels) != (own.image_size, own.channels):
        size, wanted = ("x".join(map(str, one.image_size)) for one in (sheet, own))
        raise UserError(
            f"SOURCE {sheet.source}: pictures of {size} and {sheet.channels} channels are not as the run's, {wanted} "
            f"and {own.channels}; give a folder, whose pictures are prepared like those."
        )


def batches(sheet: Sheet, settings: LikelihoodSettings) -> Iterator[Batch]:
    """The chosen pictures, evenly over all that are held out."""
    pictures = Pictures(sheet, "val")
    chosen = evenly_spaced(len(pictures), settings.n)
    if len(chosen) < 2:
        raise UserError(f"SOURCE {sheet.source}: {len(chosen)} picture is no sample; hold out more with --val.")
    for first in track(range(0, len(chosen), settings.batch_size), "Measuring", transient=True):
        part = chosen[first : first + settings.batch_size]
        x = torch.stack([pictures[i] for i in part])
        pictures.refuse_gone()
        records = [pictures.records[i] for i in part]
        names = [sheet.class_names[record.label] if record.label >= 0 else "" for record in records]
        yield Batch(x, first, names, [record.text for record in records])


# What the models say


@torch.no_grad()
def measure(models: RunModels, sheet: Sheet, settings: LikelihoodSettings) -> dict[str, Row]:
    """Every likelihood that the models know of the pictures, by name; each keeps log p of the single pictures."""
    parts = [Measurement(models, batch, settings).rows() for batch in batches(sheet, settings)]
    whole = {name: torch.cat([part[name].log_prob for part in parts]) for name in parts[0]}
    rows = {name: row._replace(log_prob=whole[name]) for name, row in parts[0].items()}
    for name, row in rows.items():
        if not torch.isfinite(row.log_prob).all():
            raise UserError(f"RUN {models.run}: {name} is not finite for some pictures; the model diverged.")
    return rows


# What is said


def table(found: dict[str, dict]) -> Table:
    """A row for each likelihood."""
    rows = Table(box=None, pad_edge=False)
    rows.add_column("likelihood", no_wrap=True)
    for title in ("bits/dim", "± s.e.", "n"):
        rows.add_column(title, justify="right", no_wrap=True)
    rows.add_column("of", no_wrap=True)
    rows.add_column("what it is exact about")
    for name, entry in found.items():
        dimensions = f"{entry['of']} ({entry['dimensions']:,})"
        rows.add_row(name, f"{entry['value']:.4f}", f"{entry['se']:.4f}", f"{entry['n']:,}", dimensions, entry["exact"])
    return rows


def left_out(models: RunModels) -> list[str]:
    """Why a likelihood is missing, and what would make it, a sentence each."""
    said = []
    if not models.facts.likelihood:
        said.append("No bound on log p(x): the autoencoder names no likelihood p(x|z); train with --beta 1 for one.")
    if models.flow is None:
        said.append(f"No flow: calotype train-flow --latents {models.run / 'latents'} --out {models.run / 'flow'}")
    if models.pipe is None:
        said.append("No diffusion model: it comes with `calotype train-diffusion` and `calotype export`.")
    elif models.pipe.takes_image:
        said.append(f"No likelihood of the diffusion model: its condition is {models.pipe.condition!r}, a picture.")
    return said
