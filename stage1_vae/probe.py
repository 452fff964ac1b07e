"""What stage 1 costs on this machine, found out by a few real steps: `python -m calotype.stage1_vae.probe`.

A request is {"flags": [words of `calotype train-vae`], "limit": seconds for the steps}; the source is a data sheet of a
few pictures, and --out a folder that may be filled. It leaves an autoencoder there, which is hardly trained.
"""

from pathlib import Path
from typing import Any

import torch

from calotype import device
from calotype.config import parse
from calotype.data import Pictures
from calotype.loop import Run
from calotype.planning import Cost
from calotype.probing import (
    cost,
    forget_peak,
    free_memory,
    median,
    of_run,
    of_steps,
    peak_memory,
    refused,
    serve,
    size_of,
)
from calotype.sheet import Sheet, read_sheet
from calotype.stage1_vae import encode
from calotype.stage1_vae.config import EncodeSettings, VaeSettings
from calotype.stage1_vae.train import VaeStage

_AT_ONCE = 128  # pictures, as `calotype encode` and the statistics of the latents take them
_SLOW = 5.0  # seconds that encoding a few pictures may take at most


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of everything that stage 1 does; raises UserError where it cannot."""
    settings = parse(VaeSettings, request["flags"], "calotype train-vae")
    sheet = read_sheet(Path(settings.source))
    try:
        return _measure(settings, sheet, request["limit"])
    except RuntimeError as error:
        raise refused(error) from None


def _measure(settings: VaeSettings, sheet: Sheet, limit: float) -> dict[str, Any]:
    accelerator = device.accelerator(settings.precision)
    stages: list[VaeStage] = []
    setup = cost(lambda: stages.append(VaeStage(settings, sheet, accelerator)))
    stage = stages[0]
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(stage, settings, accelerator)
    found = {"setup": setup, "shape": list(stage.latent_shape), "read": _reading(stage.held_out.pictures)}
    _reading(stage.pictures)  # kept from now on, so that steps are timed without it
    found |= of_steps(stage, limit)
    found |= of_run(run) | {"encode": _encoding(stage), "free": free_memory()}
    found |= _looking(stage) if found["whole"] else _guessed(found)
    found["export"] = cost(lambda: stage.export(settings.out))
    found["statistics"] = len(stage.pictures)  # pictures whose latents the export took in
    found |= {"model_bytes": size_of(settings.out / "vae"), "encode_peak": _encode_peak(settings)}
    return found


def _reading(pictures: Pictures) -> Cost:
    """What it takes to decode and prepare one picture."""
    taken = cost(lambda: [pictures[i] for i in range(len(pictures))])
    return taken.times(1 / len(pictures))


def _encode_peak(settings: VaeSettings) -> int:
    """The most memory in use while `calotype encode` does its work."""
    words = [settings.source, "--vae", str(settings.out / "vae"), "--out", str(settings.out / "encoded")]
    forget_peak()
    encode.main(parse(EncodeSettings, [*words, "--precision", settings.precision], "calotype encode"))
    return int(peak_memory())


@torch.no_grad()
def _encoding(stage: VaeStage) -> Cost:
    """What it takes to encode one picture, many at a time."""
    count = min(_AT_ONCE, len(stage.pictures))
    one = stage.take(stage.pictures, [0])
    if cost(lambda: stage.encode(one)).seconds * count > _SLOW:
        return cost(lambda: stage.encode(one))
    x = stage.take(stage.pictures, list(range(count)))
    return median([cost(lambda: stage.encode(x)) for _ in range(3)]).times(1 / count)


def _looking(stage: VaeStage) -> dict[str, Any]:
    """What a validation takes for each of its pictures, and its sample sheet."""
    counts = len(stage.held_out.pictures) + min(len(stage.pictures), 128)
    stage.validate()
    return {"look": cost(stage.validate).times(1 / counts), "preview": cost(stage.preview)}


def _guessed(found: dict[str, Any]) -> dict[str, Any]:
    """The same from a step, for what is too slow to be tried: forwards, a third of a step each."""
    each = found["step"].times(1 / found["examples"] / 3)
    return {"look": each, "preview": each.times(16)}


if __name__ == "__main__":
    serve(measure)
