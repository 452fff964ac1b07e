"""A detector of what is not normal: the networks of a run, and what held-out normal pictures say about their scores.

RUN/anomaly holds anomaly.json (what it is), calibration.safetensors (statistics and scores of held-out pictures, and
the usual error at each place), and normals.safetensors (codes and thumbnails of training pictures).
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calotype.density.calibration import Calibration, Scores, threshold
from calotype.density.neighbours import Neighbours
from calotype.density.places import strangeness
from calotype.density.scores import SENTENCES, Measured, Networks, codes_of, hashes
from calotype.disk import sha256
from calotype.errors import UserError
from calotype.images import fit_image, normalize, to_uint8

VERSION = 1
FACTS, CALIBRATION, NORMALS = "anomaly.json", "calibration.safetensors", "normals.safetensors"


@dataclass(frozen=True)
class Facts:
    """What anomaly.json says."""

    image_size: list[int]  # height, width
    fit: str
    channels: int
    classes: list[str]  # of the training pictures
    scores: dict[str, str]  # name -> one sentence; the combination last
    training: int  # pictures
    calibration: int  # held-out pictures by which thresholds are set
    check: int  # held-out pictures by which false alarms are counted
    false_alarms: list[dict]  # rate that was asked for, share of the check pictures above its threshold, low, high
    fingerprint: str  # of the data
    networks: dict[str, str]  # hash by folder in the run
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of those beside this one
    version: int = VERSION

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


class Examined(NamedTuple):
    """What a detector finds of pictures."""

    scores: Scores  # name -> (B,) float64 CPU, higher is stranger; the combination last
    p: Scores  # name -> (B,): share of held-out normal pictures at least as strange, never 0
    maps: Tensor  # (B, H, W) float32 CPU: how strange each place is, in units of what is usual there
    neighbours: Tensor  # (B, 3): numbers of the nearest normal pictures in `normals`, nearest first


class Detector:
    """Tells how strange pictures are, where, and which normal ones are nearest."""

    def __init__(self, facts: Facts, networks: Networks, calibration: Calibration, usual: Tensor, normal: dict):
        self.facts, self.networks, self.calibration, self.usual = facts, networks, calibration, usual
        self.normals: Tensor = normal["pictures"]
        self.neighbours = Neighbours(normal["codes"], normal["mean"], normal["matrix"])

    @classmethod
    def open(cls, folder: Path, precision: str = "fp32") -> "Detector":
        """The detector of RUN or RUN/anomaly; raises UserError where it is missing, damaged or of other networks."""
        folder = _find(folder)
        facts = read_facts(folder)
        _refuse_other_networks(folder, facts)
        files = [_read(folder / name, facts) for name in (CALIBRATION, NORMALS)]
        usual = files[0].pop("usual")
        networks = Networks.open(folder.parent, "flow" in facts.scores, "diffusion" in facts.scores, precision)
        return cls(facts, networks, Calibration.of(files[0]), usual, files[1])

    def prepare(self, image: Image.Image) -> Tensor:
        """A picture (1, C, H, W) in [-1, 1] as those of training were: in their size, grey or in colour."""
        image = image.convert("RGB" if image.mode not in ("1", "L") else image.mode)
        image = image.convert("L" if self.facts.channels == 1 else "RGB")
        return normalize(to_uint8(fit_image(image, tuple(self.facts.image_size), self.facts.fit)))[None]

    def examine(self, x: Tensor) -> Examined:
        """What it finds of pictures x (B, C, H, W) in [-1, 1]."""
        measured = self.networks.measure(x)
        raw, numbers = with_neighbours(measured, self.neighbours)
        scores = ordered(self.calibration.complete(measured.statistics, raw))
        return Examined(scores, self.calibration.p(scores), strangeness(measured.error, self.usual), numbers)

    def threshold(self, rate: float, score: str = "combination") -> float:
        """From which score on a picture raises the alarm, for this share of normal pictures; raises UserError."""
        return threshold(self.calibration.normal[score], rate)


def with_neighbours(measured: Measured, neighbours: Neighbours) -> tuple[Scores, Tensor]:
    """The scores (B,) of pictures with the distance to normal ones, and the numbers (B, 3) of these."""
    distance, numbers = neighbours.nearest(codes_of(measured.z))
    return measured.scores | {"knn": distance}, numbers


def ordered(scores: Scores) -> Scores:
    """The same in the order of their sentences."""
    return {name: scores[name] for name in SENTENCES if name in scores}


# On disk


def _find(folder: Path) -> Path:
    for place in (folder / "anomaly", folder):
        if (place / FACTS).is_file():
            return place.resolve()
    raise UserError(f"MODEL {folder} holds no detector; give a run that `calotype anomaly fit` has finished.")


def read_facts(folder: Path) -> Facts:
    """What anomaly.json says; raises UserError."""
    file = folder / FACTS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise UserError(
                f"{file} has format {content['version']}, not {VERSION}; run `calotype anomaly fit` with --fresh."
            )
        return Facts(**{one.name: content[one.name] for one in fields(Facts)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({error!r}); run `calotype anomaly fit` with --fresh.") from None


def _refuse_other_networks(folder: Path, facts: Facts) -> None:
    there = hashes(folder.parent, "flow" in facts.scores, "diffusion" in facts.scores)
    for name, value in facts.networks.items():
        if there.get(name) != value:
            raise UserError(
                f"MODEL {folder.parent / name} is not the one that {folder / FACTS} was calibrated with; run "
                "`calotype anomaly fit` again."
            )


def _read(file: Path, facts: Facts) -> dict[str, Tensor]:
    """The tensors of one of the files; raises UserError unless it is what was written."""
    try:
        if sha256(file) == facts.files.get(file.name):
            return load_file(file)
    except (OSError, SafetensorError):
        pass
    raise UserError(f"{file} is missing or damaged; run `calotype anomaly fit` with --fresh.") from None
