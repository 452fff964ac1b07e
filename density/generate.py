"""`calotype generate --prior flow`: what a flow draws, decoded; one evaluation of it a picture."""

from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from calotype import __version__, device
from calotype.autoencoder import Vae, decode, load_autoencoder
from calotype.checkpoint import weights_hash
from calotype.density.flows import Flow, load_flow
from calotype.errors import UserError
from calotype.images import denormalize, to_pil
from calotype.pipeline.generate import file_of
from calotype.pipeline.png import write_png
from calotype.randomness import normal

_DIGITS = 16  # of a hash


def main(settings) -> None:
    """Draw n pictures; with classes and no label they take turns and go into a folder each."""
    folder = find_flow(settings.model, settings.flow)
    flow = load_flow(folder, "--flow").to(device.device())
    vae = find_vae(settings.model, flow) if flow.facts.of == "latents" else None
    labels = _labels(settings, flow)
    carried = {"prior": "flow", "kind": flow.kind, "temperature": settings.temperature}
    carried |= {"model": weights_hash(folder)[:_DIGITS], "software": f"calotype {__version__}"}
    for start in track(range(0, len(labels), settings.batch_size), "Drawing", transient=True):
        told = labels[start : start + settings.batch_size]
        x = draw(flow, vae, told, settings.seed + start, settings.temperature)
        for i, (label, picture) in enumerate(zip(told, denormalize(x), strict=True), start):
            own = {"label": label or "", "seed": settings.seed + i}
            write_png(to_pil(picture), file_of(settings, label, i), own | carried)
    print(f"{len(labels)} pictures in {settings.out}")


@torch.no_grad()
def draw(flow: Flow, vae: Vae | None, labels: list[str | None], seed: int, temperature: float = 1.0) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] on the CPU; the noise of picture i follows from seed + i."""
    where = flow.mean.device
    eps = torch.cat([normal(seed + i, "flow/prior", 0, 1, flow.shape) for i in range(len(labels))])
    known = {name: k for k, name in enumerate(flow.facts.classes)}
    y = torch.tensor([known[label] for label in labels], device=where) if known else None
    z = flow.inverse(temperature * eps.to(where), y)
    x = z if vae is None else decode(vae, z, flow.facts.image_size)
    return x.clamp(-1, 1).cpu()


def find_flow(model: Path, flow: Path | None) -> Path:
    """The folder of a saved flow: what --flow names, or that of a run; raises UserError."""
    places = [flow] if flow else [model / "flow", model.resolve().parent / "flow"]
    for place in places:
        for folder in (place, place / "prior"):
            if (folder / "model.safetensors").is_file():
                return folder
    if flow:
        raise UserError(f"--flow {flow} holds no flow; give a folder that `calotype train-flow` made.")
    raise UserError(f"--prior flow: {model} holds no flow/; run `calotype train-flow`, or name its --out with --flow.")


def find_vae(model: Path, flow: Flow) -> Vae:
    """The autoencoder of a flow's latents, in a run or a model folder; raises UserError where it is not there."""
    for folder in (model / "pipeline" / "vae", model / "stage1_vae" / "vae", model / "vae"):
        if (folder / "config.json").is_file() and weights_hash(folder) == flow.facts.vae:
            vae = load_autoencoder(folder, "MODEL").to(device.device())
            device.for_drawing(vae)
            return vae
    raise UserError(f"MODEL {model} does not hold the autoencoder whose latents the flow knows; give its run folder.")


def _labels(settings, flow: Flow) -> list[str | None]:
    """The label of each picture, or None."""
    names, n = flow.facts.classes, 16 if settings.n is None else settings.n
    if settings.label is not None and settings.label not in names:
        known = f"it knows {', '.join(names[:60])}" if names else "it was trained without labels"
        raise UserError(f"LABEL {settings.label!r} is not known to the flow; {known}.")
    if settings.label is not None or not names:
        return [settings.label] * n
    return [names[i % len(names)] for i in range(n)]
