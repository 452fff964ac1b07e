"""What stage 2, and drawing with it, cost on this machine: `python -m calotype.stage2_diffusion.probe`.

A request is {"flags": [words of `calotype train-diffusion`, --vae among them], "latents": {"shape", "size", "classes"},
"sheet": a data sheet of a few pictures, "limit": seconds for the steps}. The latents are noise, written as
`calotype encode` writes them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calotype import device, own_features
from calotype.checkpoint import weights_hash
from calotype.config import parse
from calotype.latents import VERSION, Index, write_shard
from calotype.loop import Run
from calotype.pipeline.measured import default_count
from calotype.planning import Cost
from calotype.probing import cost, free_memory, of_run, of_steps, refused, serve, size_of
from calotype.sheet import Sheet, read_sheet
from calotype.stage2_diffusion.config import DiffusionSettings
from calotype.stage2_diffusion.train import DiffusionStage

_COUNTS = {"train": 2048, "val": 512}  # latents; a validation takes in no more of the held-out ones
_SHEET = 48  # samples on a sheet
_SLOW = 12.0  # seconds that a validation may take, to be tried out
_PICTURES = 24  # that the features of an evaluation learn from here, in ten steps


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds and bytes of what stage 2 and the commands after it do; raises UserError where they cannot."""
    settings = parse(DiffusionSettings, request["flags"], "calotype train-diffusion")
    assert settings.vae is not None
    if not (settings.latents / "index.json").exists():
        _write_latents(settings.latents, settings.vae, **request["latents"])
    try:
        return _measure(settings, request["limit"]) | _features(read_sheet(Path(request["sheet"])), settings)
    except RuntimeError as error:
        raise refused(error) from None


def _measure(settings: DiffusionSettings, limit: float) -> dict[str, Any]:
    accelerator = device.accelerator(settings.precision)
    stages: list[DiffusionStage] = []
    setup = cost(lambda: stages.append(DiffusionStage(settings, settings.vae, accelerator)))
    stage = stages[0]
    settings.out.mkdir(parents=True, exist_ok=True)
    run = Run(stage, settings, accelerator)
    found = {"setup": setup} | of_steps(stage, limit) | of_run(run)
    found |= _drawing(stage) | {"free": free_memory()}
    found |= _looking(run, found["draw"])
    found["export"] = cost(lambda: stage.export(settings.out))
    return found | {"model_bytes": size_of(settings.out / "unet"), "drawn": default_count()}


def _drawing(stage: DiffusionStage) -> dict[str, Any]:
    """What one picture takes as an evaluation draws it, many at a time, and as an export does, in the model's own type.

    Where many would take too long, a few are drawn.
    """
    pipe = stage.pipeline()
    labels = pipe.labels or None

    def draw(count: int) -> None:
        pipe([labels[i % len(labels)] for i in range(count)] if labels else None, count, output_type="pt")

    def in_precision(count: int) -> None:
        with device.autocast(stage.settings.precision):
            draw(count)

    in_precision(1)
    one = cost(lambda: in_precision(1))
    many = 1 if one.seconds * _SHEET > _SLOW else _SHEET
    drawn = one if many == 1 else cost(lambda: in_precision(many)).times(1 / many)
    some = max(1, many // 2)
    return {"draw": drawn, "draw_exact": cost(lambda: draw(some)).times(1 / some)}


def _looking(run: Run, draw: Cost) -> dict[str, Any]:
    """What a validation takes with its sample sheet and its snapshot, and how much more the first one."""
    settings = run.settings
    evaluations = settings.sampler_steps * (2 if run.stage.class_names else 1)
    share = (settings.kid_samples * 8 + _COUNTS["val"]) / evaluations  # of a picture drawn, but for the decoder
    guess = draw.times(_SHEET + share)
    if guess.seconds > _SLOW:
        run.stage.review({"loss": 1.0}, 1, 0.1)
        return {"look": guess, "first_look": guess, "snapshot_bytes": _snapshot(settings)}
    first = cost(run._validate)
    return {"look": cost(run._validate), "first_look": first, "snapshot_bytes": _snapshot(settings)}


def _snapshot(settings: DiffusionSettings) -> int:
    files = [*(settings.out / "ema").glob("*.safetensors")]
    return size_of(files[0]) if files else 0


def _features(sheet: Sheet, settings: DiffusionSettings) -> dict[str, Any]:
    """What a step of the feature network takes that `calotype evaluate` trains."""
    train = [record for record in sheet.records if not record.val][:_PICTURES]
    val = [record for record in sheet.records if record.val][:_PICTURES]
    few = replace(sheet, records=[*train, *val])
    steps = max(1, 40 * len(train) // 96)
    taken = cost(lambda: own_features.own(few, settings.out / "own", settings.precision))
    return {"features": taken.times(1 / steps)}


def _write_latents(folder: Path, vae: Path, shape: list[int], size: list[int], classes: int) -> None:
    """A cache of normal numbers, for pictures of (height, width) in that many classes, or none."""
    folder.mkdir(parents=True)
    generator, hashes = torch.Generator().manual_seed(0), {}
    for split, count in _COUNTS.items():
        mean = torch.randn(count, *shape, generator=generator)
        labels = torch.arange(count) % classes if classes else torch.full((count,), -1)
        moments = {"mean": mean, "std": torch.full_like(mean, 0.1)}
        name = f"{split}-00000.safetensors"
        hashes[name] = write_shard(folder / name, moments, labels, [""] * count)
    shards = {split: [f"{split}-00000.safetensors"] for split in _COUNTS}
    names = [f"class {i}" for i in range(classes)]
    whose = weights_hash(vae)
    Index(VERSION, "noise", whose, list(shape), False, names, list(size), _COUNTS, shards, hashes).write(folder)


if __name__ == "__main__":
    serve(measure)
