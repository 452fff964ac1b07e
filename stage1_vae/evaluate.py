"""`calotype evaluate-vae`: figures of one autoencoder, or of several seeds of one, on held-out pictures."""

import json
import math
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from calotype import device, features
from calotype.checkpoint import write_text
from calotype.errors import UserError
from calotype.sheet import VARIATIONS, Sheet, open_sheet, summary
from calotype.stage1_vae import perceptual
from calotype.stage1_vae.columns import refuse_out
from calotype.stage1_vae.config import EvaluateVaeSettings
from calotype.stage1_vae.disentanglement import SENTENCE, mean_sd
from calotype.stage1_vae.figures import Figures, Judge, evaluate, obstacle
from calotype.stage1_vae.models import check_fits
from calotype.stage1_vae.subject import Subject, refuse_strangers

_LEAST_SIDE = 16  # that VGG16 halves four times
_STD_RANGE = (0.5, 2.0)
_TABLE_WIDTH = 110  # where the output is no terminal


def main(settings: EvaluateVaeSettings) -> None:
    """Measure, print a table and write the figures as JSON."""
    out = settings.out or settings.vae[0].resolve().parent / "evaluation.json"
    refuse_out(out, True, (".json",))
    subjects = [Subject.open(folder, settings.precision) for folder in settings.vae]
    refuse_strangers(subjects)
    sheet = _open_pictures(settings, subjects[0], out)
    network = features.build(settings.features, settings.allow_download, device.device())
    judge = Judge(settings, network, _perceptual(tuple(sheet.image_size)))
    print(summary(sheet))
    runs = [evaluate(subject, sheet, judge) for subject in subjects]
    _refuse_other_figures(subjects, runs)
    found = combined(runs)
    Console(width=_width(), markup=False, highlight=False).print(table(found))
    for sentence in _remarks(subjects, runs, sheet):
        print(sentence)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1, ensure_ascii=False))
    print(f"Wrote {len(found)} figures to {out}.")


def combined(runs: list[Figures]) -> dict[str, dict]:
    """For each figure its mean over runs and their standard deviation (None for a single one), n and how."""
    spread = mean_sd([{name: figure.value for name, figure in run.items()} for run in runs])
    over = f"; mean over {len(runs)} autoencoders" if len(runs) > 1 else ""
    return {
        name: {
            "value": mean,
            "sd": None if math.isnan(sd) else sd,
            "n": runs[0][name].n,
            "how": runs[0][name].how + over,
        }
        for name, (mean, sd) in spread.items()
    }


def _refuse_other_figures(subjects: list[Subject], runs: list[Figures]) -> None:
    """Raise UserError where one was trained with noise and another without, which no configuration tells."""
    for subject, run in zip(subjects, runs, strict=True):
        if missing := run.keys() ^ runs[0].keys():
            raise UserError(
                f"--vae {subject.folder} is not another seed of {subjects[0].folder}: {min(missing)} is a figure of "
                "one alone; evaluate them one by one."
            )


def table(found: dict[str, dict]) -> Table:
    """A row for each figure."""
    rows = Table(box=None, pad_edge=False)
    for title in ("figure", "value", "n"):
        rows.add_column(title, justify="left" if title == "figure" else "right", no_wrap=True)
    rows.add_column("how")
    for name, entry in found.items():
        sd = "" if entry["sd"] is None else f" ± {entry['sd']:.2g}"
        rows.add_row(name, f"{entry['value']:.4g}{sd}", f"{entry['n']:,}", entry["how"])
    return rows


def _open_pictures(settings: EvaluateVaeSettings, subject: Subject, out: Path) -> Sheet:
    """The data sheet of the pictures; raises UserError where the autoencoder cannot take them."""
    # --out is a file, so no sheet lies in it: SOURCE is a data.json or is read now.
    sheet = open_sheet(settings.source, settings, settings.seed, out, str(subject.vae.config.sample_size))
    check_fits(subject.vae, sheet.channels, tuple(sheet.image_size))
    return sheet


def _perceptual(size: tuple[int, int]) -> perceptual.GradientFeatures | perceptual.Lpips:
    """LPIPS where its weights are on disk and the pictures large enough; otherwise a stand-in, announced in a line."""
    try:
        if min(size) < _LEAST_SIDE:
            raise UserError(f"LPIPS needs sides of {_LEAST_SIDE} pixels or more.")
        return perceptual.load_lpips(perceptual.backbone_file(allow_download=False)).to(device.device())
    except UserError as error:
        reason = str(error).removeprefix("--perceptual lpips ").partition(";")[0].rstrip(".")
        print(f"Perceptual distance: gradient features stand in for LPIPS ({reason}).")
        return perceptual.GradientFeatures()


def _width() -> int:
    return shutil.get_terminal_size((_TABLE_WIDTH, 0)).columns


def _remarks(subjects: list[Subject], runs: list[Figures], sheet: Sheet) -> list[str]:
    """What a reader of the figures should know, a sentence each."""
    first = subjects[0]
    said = [text for subject, run in zip(subjects, runs, strict=True) if (text := strange_latents(subject, run))]
    if not first.facts.likelihood:
        said.append(_no_bound(first))
    if sheet.source in VARIATIONS:
        fault = obstacle(first, sheet)
        said.append(f"Disentanglement scores are left out: {fault}" if fault else SENTENCE)
    return said


def strange_latents(subject: Subject, run: Figures) -> str | None:
    """One sentence if the latents of these pictures are far from the unit variance that training gave them."""
    figure = run.get("latent_std[sampled]", run["latent_std[val]"])
    std = figure.value * subject.vae.config.scaling_factor
    if _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        return None
    return (
        f"The latents of {subject.folder} have a standard deviation of {std:.2g} in place of 1: these are another kind "
        f"of pictures than it was trained on; give those, or train on with --init {subject.folder}."
    )


def _no_bound(subject: Subject) -> str:
    if subject.quantised:
        return "No bound on log p(x): a codebook has no density of z; train with --regularizer kl --beta 1 for one."
    return f"No bound on log p(x): {subject.folder} names no likelihood p(x|z); train with --beta 1 for one."
