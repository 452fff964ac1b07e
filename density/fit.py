"""`calotype anomaly fit`: what a run lacks is made by commands that a user could type, and then it is calibrated."""

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from calotype import cli
from calotype.checkpoint import publish, write_text
from calotype.config import PRESET_IMAGE_SIZE
from calotype.data import Pictures
from calotype.density.anomaly_config import AnomalyFitSettings
from calotype.density.calibration import Calibration, Scores, share_interval
from calotype.density.detector import (
    CALIBRATION,
    FACTS,
    NORMALS,
    Facts,
    ordered,
    read_facts,
    with_neighbours,
)
from calotype.density.flows import refuse_missing_zuko
from calotype.density.neighbours import Neighbours, some, thumbnails
from calotype.density.places import usual
from calotype.density.scores import SENTENCES, Networks, codes_of, hashes
from calotype.disk import sha256
from calotype.errors import UserError
from calotype.images import normalize
from calotype.latents import LatentCache, read_index
from calotype.lock import claimed
from calotype.randomness import key
from calotype.sheet import Sheet, open_sheet

VAL = "0.2"  # held out where nothing is said: half of them calibrate, half check
RATES = (0.01, 0.05, 0.1)  # of false alarms, that are checked
FEWEST = 10  # held-out pictures, below which nothing can be said
_CODE = 32  # numbers
_MOST = 10_000  # held-out pictures that are scored


def main(settings: AnomalyFitSettings) -> None:
    """Make what is missing, calibrate, and check the false alarms on pictures that had no part in it."""
    refuse_missing_zuko("`calotype anomaly fit`")  # before minutes are spent on what comes first
    sheet = _sheet(settings)
    with claimed(settings.out):
        for name in COMMANDS:
            if needed(name, settings):
                execute(command(name, settings, sheet))
        if settings.fresh or not _is_calibrated(settings, sheet):
            calibrate(settings, sheet)
    tell(settings.out, read_facts(settings.out / "anomaly"))


# The commands of a run

COMMANDS = {  # what shows that it is finished
    "train-vae": "stage1_vae/finished.json",
    "encode": "latents/index.json",
    "train-flow": "flow/finished.json",
    "train-diffusion": "stage2_diffusion/finished.json",
    "export": "pipeline/model_index.json",
}


def needed(name: str, settings: AnomalyFitSettings) -> bool:
    """Whether a command has to run; says so of what is there already."""
    if name in ("train-diffusion", "export") and not settings.diffusion:
        return False
    file = settings.out / COMMANDS[name]
    if file.is_file():
        print(f"{file.parent} is there and is used as it is.")
    return not file.is_file()


def command(name: str, settings: AnomalyFitSettings, sheet: Sheet) -> list[str]:
    """One of the commands that a run may lack."""
    out = settings.out
    words = {
        "train-vae": [str(out / "data.json"), "--beta", "1", *_warm_up(settings), *_code(settings, sheet)],
        "encode": [str(out / "data.json"), "--vae", str(out / "stage1_vae" / "vae")],
        "train-flow": ["--latents", str(out / "latents"), "--condition", "none"],
        "train-diffusion": ["--latents", str(out / "latents"), "--vae", str(out / "stage1_vae" / "vae")],
        "export": ["--run", str(out)],
    }[name]
    if name == "train-flow":
        words += ["--kind", settings.flow or _flow(out)]
    steps = {"train-vae": settings.vae_length, "train-flow": settings.flow_length}
    steps |= {"train-diffusion": settings.diffusion_steps}
    if name.startswith("train"):
        words += ["--preset", settings.preset, "--validations", "3"]
        words += ["--steps", str(steps[name])] if steps[name] else []
        words += ["--seed", str(settings.seed)] if settings.seed else []
    if name != "train-flow" and name != "export" and settings.precision != "auto":
        words += ["--precision", settings.precision]
    return [name, *words, "--out", str(out / COMMANDS[name].split("/")[0])]


def _warm_up(settings: AnomalyFitSettings) -> list[str]:
    """The bound's price grows over half of the run: paid at once, codes can collapse and tell nothing."""
    return ["--beta-warmup", str(settings.vae_length // 2)]


def _code(settings: AnomalyFitSettings, sheet: Sheet) -> list[str]:
    """One code for a whole picture, which knows it as a whole; of oblong pictures there is none."""
    height, width = sheet.image_size
    dim = settings.latent_dim or (_CODE if height == width else None)
    return [] if dim is None else ["--latent-dim", str(dim)]


def _flow(out: Path) -> str:
    """A flow that suits the latents: one that convolves where they have height and width."""
    return "glow" if max(read_index(out / "latents").shape[1:]) > 1 else "realnvp"


def execute(argv: list[str]) -> None:
    """Print a command and run it."""
    print(f"\n$ {shlex.join(['calotype', *argv])}", flush=True)
    cli.run(argv[0], argv[1:])


def _sheet(settings: AnomalyFitSettings) -> Sheet:
    """The data sheet of the run, made if it is not there; raises UserError where too few pictures are held out."""
    file = settings.out / "data.json"
    if not file.exists():
        execute(_data_command(settings))
    sheet = open_sheet(settings.source, settings, settings.seed, settings.out, PRESET_IMAGE_SIZE[settings.preset])
    if sheet.counts["val"] < FEWEST:
        raise UserError(
            f"--val {sheet.val}: {sheet.counts['val']} of the pictures of {sheet.source} are held out, and at least "
            f"{FEWEST} are needed, 39 for false alarms of 5 %; give more pictures or a larger --val."
        )
    return sheet


def _data_command(settings: AnomalyFitSettings) -> list[str]:
    words = ["data", settings.source, "--val", settings.val or VAL, "--preset", settings.preset]
    for name in ("image_size", "fit", "channels"):
        value = getattr(settings, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    words += ["--seed", str(settings.seed)] if settings.seed else []
    return words + (["--allow-bad"] if settings.allow_bad else []) + ["--out", str(settings.out)]


# Calibration


def _is_calibrated(settings: AnomalyFitSettings, sheet: Sheet) -> bool:
    """Whether RUN/anomaly is there, whole, and of these networks and pictures."""
    folder = settings.out / "anomaly"
    if not (folder / FACTS).is_file():
        return False
    try:
        facts = read_facts(folder)
    except UserError:
        return False
    whole = all((folder / name).is_file() and sha256(folder / name) == of for name, of in facts.files.items())
    networks = hashes(settings.out, True, settings.diffusion)
    return whole and (facts.networks, facts.fingerprint) == (networks, sheet.fingerprint)


def calibrate(settings: AnomalyFitSettings, sheet: Sheet) -> None:
    """Score the held-out pictures and write RUN/anomaly."""
    networks = Networks.open(settings.out, True, settings.diffusion)
    normals, count = _normals(settings, sheet)
    neighbours = Neighbours(normals["codes"], normals["mean"], normals["matrix"])
    pictures = Pictures(sheet, "val")
    first, second = halves(sheet)
    statistics, scores, error = _scored(networks, neighbours, pictures, first, settings.batch_size, "Calibrating")
    calibration = Calibration(statistics, scores)
    found = _scored(networks, neighbours, pictures, second, settings.batch_size, "Checking")
    pictures.refuse_gone()
    combined = calibration.complete(*found[:2])
    facts = Facts(
        image_size=list(sheet.image_size),
        fit=sheet.fit,
        channels=sheet.channels,
        classes=sheet.class_names,
        scores={name: SENTENCES[name] for name in ordered(combined)},
        training=count,
        calibration=len(first),
        check=len(second),
        false_alarms=checked(calibration, combined),
        fingerprint=sheet.fingerprint,
        networks=hashes(settings.out, True, settings.diffusion),
    )
    _write(settings.out / "anomaly", facts, calibration.tensors() | {"usual": error}, normals)


def halves(sheet: Sheet) -> tuple[list[int], list[int]]:
    """The numbers of the held-out pictures that calibrate, and of those that check, by a hash of their names."""
    names = [record.file for record in sheet.records if record.val]
    order = sorted(range(len(names)), key=lambda i: key(0, f"anomaly/half/{names[i]}"))[:_MOST]
    return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])


def checked(calibration: Calibration, scores: Scores) -> list[dict]:
    """For each rate that the calibration can tell, the share of checked pictures (n,) that raise the alarm."""
    found = []
    for rate in RATES:
        if len(calibration.normal["combination"]) + 1 < 1 / rate:
            continue
        alarms = calibration.p(scores)["combination"] <= rate
        low, high = share_interval(int(alarms.sum()), len(alarms))
        found.append({"rate": rate, "share": float(alarms.double().mean()), "low": low, "high": high})
    return found


def _normals(settings: AnomalyFitSettings, sheet: Sheet) -> tuple[dict[str, Tensor], int]:
    """Codes and thumbnails of training pictures, what whitens codes, and how many pictures there are to train on."""
    cache, pictures = LatentCache(settings.out / "latents", "train"), Pictures(sheet, "train")
    items = some(len(cache))
    codes = torch.cat([codes_of(cache.gather(torch.tensor(part).numpy(), "mean")) for part in _parts(items)])
    neighbours = Neighbours.of(codes)._asdict()
    return neighbours | {"pictures": thumbnails(pictures, items)}, len(cache)


def _parts(items: list[int], size: int = 1024) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _scored(
    networks: Networks, neighbours: Neighbours, pictures: Pictures, items: list[int], batch: int, words: str
) -> tuple[Scores, Scores, Tensor]:
    """Statistics and scores (n,) of pictures, and the usual error (H, W)."""
    statistics, scores, errors = [], [], []
    for part in track(list(_parts(items, batch)), words, transient=True):
        measured = networks.measure(normalize(torch.stack([pictures[i] for i in part])))
        statistics.append(measured.statistics)
        scores.append(with_neighbours(measured, neighbours)[0])
        errors.append(measured.error)
    return _joined(statistics), _joined(scores), usual(errors)


def _joined(parts: list[Scores]) -> Scores:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _write(folder: Path, facts: Facts, calibration: dict[str, Tensor], normals: dict[str, Tensor]) -> None:
    """Write beside the place, and give it its name when it is whole."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in {CALIBRATION: calibration, NORMALS: normals}.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
    files = {name: sha256(temporary / name) for name in (CALIBRATION, NORMALS)}
    write_text(temporary / FACTS, replace(facts, files=files).text())
    publish(temporary, folder)


# What is said


def tell(out: Path, facts: Facts) -> None:
    """What the detector is, and how many false alarms it raised."""
    rows = Table("score", "what it is", box=None, pad_edge=False)
    for name, sentence in facts.scores.items():
        rows.add_row(name, sentence)
    console = Console(markup=False, highlight=False)
    print()
    (console if console.is_terminal else Console(width=120, markup=False, highlight=False)).print(rows)
    print(
        f"\n{facts.training:,} normal pictures were learnt, {facts.calibration:,} held-out ones calibrate and "
        f"{facts.check:,} others check."
    )
    for one in facts.false_alarms:
        print(
            f"False alarms at {one['rate']:.0%}: {one['share']:.1%} of the {facts.check:,} "
            f"(95 % interval {one['low']:.1%} to {one['high']:.1%})."
        )
    for rate in sorted(set(RATES) - {one["rate"] for one in facts.false_alarms}):
        print(f"A rate of {rate:.0%} needs {round(1 / rate) - 1} pictures to calibrate, twice as many held out.")
    print(f"\nNext:    calotype anomaly score {out} DIR --out strange")
