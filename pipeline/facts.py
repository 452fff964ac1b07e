"""What a picture carries of how it was drawn: all that `calotype regenerate` needs, and no path of this machine."""

import hashlib
import json
from pathlib import Path

import torch

from calotype import __version__
from calotype.checkpoint import sha256, weights_hash
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.order import Order

DIGITS = 16  # of a hash


def drawn(pipe: LatentDiffusionPipeline, order: Order, precision: str) -> dict[str, str]:
    """What every picture of an order carries beside its label, its seed and where the model comes from."""
    steps = pipe.config.student_steps if order.fast else pipe.default_steps
    scheduler = pipe.student_scheduler if order.fast else pipe.scheduler
    guidance = pipe.default_guidance if order.guidance_scale is None else order.guidance_scale
    height, width = order.height or pipe.image_size[0], order.width or pipe.image_size[1]
    return {
        "steps": order.num_inference_steps or steps,
        "guidance": "built in" if order.fast else guidance,
        "guidance-interval": "{} {}".format(*order.guidance_interval),
        "guidance-rescale": order.guidance_rescale,
        "sampler": (not order.fast and (order.sampler or pipe.config.sampler)) or type(scheduler).__name__,
        "fast": _yes(order.fast),
        "size": f"{height}x{width}",
        "precision": precision,
        "reproducible": _yes(order.reproducible),
        "device": f"{pipe.device.type}, torch {torch.__version__}",
    }


def about(folder: Path | None, network: str = "unet") -> dict[str, str]:
    """What a picture carries of the model folder that it comes from: `model` the network, `parts` all of it.

    Both are empty where nothing was saved.
    """
    model = "" if folder is None else weights_hash(folder / network)[:DIGITS]
    parts = "" if folder is None else parts_hash(folder)[:DIGITS]
    return {"model": model, "parts": parts, "software": f"calotype {__version__}"}


def parts_hash(folder: Path) -> str:
    """One hash for all that a model folder draws with: weights, settings, schedulers and tokenizer.

    The card, the samples and whatever else lies beside them may change.
    """
    index = json.loads((folder / "model_index.json").read_text())
    names = sorted(name for name in index if (folder / name).is_dir())
    files = [file for name in names for file in sorted((folder / name).rglob("*")) if file.is_file()]
    lines = [f"{file.relative_to(folder).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _yes(value: bool) -> str:
    return "yes" if value else "no"
