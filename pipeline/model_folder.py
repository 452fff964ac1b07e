"""A model folder: found, held against its list of hashes, and loaded strictly; no code in it is ever run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.utils import logging

from calotype import device
from calotype.errors import UserError
from calotype.pipeline import hashes
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.order import Order
from calotype.weights import first_line, load_network, outline_network, read_json, refuse_code_and_bombs

_UNETS = ("UNet2DModel", "UNet2DConditionModel")
_NETWORKS = {
    "vae": ("AutoencoderKL", "VQModel"),
    "unet": _UNETS,
    "guide": _UNETS,
    "student": _UNETS,
    "tiny_decoder": ("AutoencoderTiny",),
}
_SCHEDULERS = ("scheduler", "student_scheduler")
_WORDS = {"text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")}
_FACTS = (
    "id2label", "default_steps", "default_guidance", "condition", "sampler", "student_steps", "latent_rgb",
)  # fmt: skip
_OURS = ("LatentDiffusionPipeline", ["pipeline", "LatentDiffusionPipeline"], "StableDiffusionPipeline")


def find(model: Path) -> Path:
    """The model folder that `model` names: itself, or RUN/pipeline; raises UserError."""
    for folder in (model, model / "pipeline"):
        if (folder / "model_index.json").is_file():
            return folder
    if model.is_file():
        raise UserError(f"MODEL {model} is a file; give a model folder or a run that reached `calotype export`.")
    raise UserError(f"MODEL {model} holds no model; give a model folder or a run that reached `calotype export`.")


def load(model: Path, precision: str = "fp32", *, compiled: bool = False) -> LatentDiffusionPipeline:
    """A saved pipeline on the best device here, ready to draw; raises UserError where it is not whole.

    Where it is to be used under `autocast` alone, `precision` spares the casting; with `compiled` the UNet is compiled
    at its first call.
    """
    folder, name = find(model), f"MODEL {model}"
    hashes.verify(folder, name)
    return _ready(opened(folder, name), precision, compiled)


def outlined(model: Path) -> LatentDiffusionPipeline:
    """The same without the networks' weights: it can say what the model does, and `fill` makes it draw."""
    folder, name = find(model), f"MODEL {model}"
    hashes.verify(folder, name)
    return opened(folder, name, outline_network)


def fill(pipe: LatentDiffusionPipeline, model: Path) -> None:
    """Give an outlined pipeline its weights; its networks stay the objects that they are. Raises UserError."""
    folder = find(model)
    for part in _NETWORKS:
        network = getattr(pipe, part)
        if network is not None:  # of the same class, so it becomes the one that is read
            network.__dict__ = load_network(type(network), folder / part, f"MODEL {model}").__dict__
    _ready(pipe)


def _ready(pipe: LatentDiffusionPipeline, precision: str = "fp32", compiled: bool = False) -> LatentDiffusionPipeline:
    """The pipeline with its networks in the form in which they draw fastest here."""
    for part in _NETWORKS:
        if getattr(pipe, part) is not None:
            device.for_drawing(getattr(pipe, part), precision, compiled=compiled and part in ("unet", "student"))
    if pipe.tiny_decoder is not None:
        pipe.tiny_decoder.to(memory_format=torch.channels_last)  # a third less time on a CPU
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device.device())


def opened(folder: Path, name: str, read: Callable = load_network) -> LatentDiffusionPipeline:
    """The pipeline in a folder; raises UserError that begins with `name`. `read` reads a network."""
    logging.disable_progress_bar()
    index = _index(folder, name)
    parts = {part: load_part(folder, part, entry, name, read) for part, entry in _parts(index, name).items()}
    try:
        pipe = LatentDiffusionPipeline(**parts, **{fact: index[fact] for fact in _FACTS if fact in index})
        _refuse_contradictions(pipe)
        default = {"num_inference_steps": pipe.default_steps, "guidance_scale": pipe.default_guidance}
        Order(**default, sampler=pipe.config.sampler).check(None, 1)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: its parts do not make a model ({first_line(error)}); export it again.") from None
    return pipe


def _index(folder: Path, name: str) -> dict[str, Any]:
    index = read_json(folder / "model_index.json", name)
    if index.get("_class_name") not in _OURS:
        kind = str(index.get("_class_name"))[:60]
        raise UserError(f"{name} is for a {kind}, which is not drawn with here; give one that `calotype export` made.")
    if (folder / "calotype.json").is_file():
        index |= read_json(folder / "calotype.json", name)
    refuse_code_and_bombs(index, f"{name}: model_index.json")
    return index


def _parts(index: dict[str, Any], name: str) -> dict[str, list]:
    """Library and class of each part; raises UserError for a part, library or class that no model of ours has."""
    known = {**_NETWORKS, **_WORDS}
    lists = {key: value for key, value in index.items() if isinstance(value, list) and key[0] != "_"}
    found = {key: value for key, value in lists.items() if value != [None, None]}
    for part, entry in found.items():
        library = "transformers" if part in _WORDS else "diffusers"
        kinds = known.get(part) or ([entry[-1]] if part in _SCHEDULERS and _is_scheduler(entry[-1]) else ())
        if len(entry) != 2 or entry[0] != library or entry[1] not in kinds:
            raise UserError(f"{name}: {part} is a {entry}, none that a model here has; export it again.")
    for part in ("vae", "unet", "scheduler"):
        if part not in found:
            raise UserError(f"{name} has no {part}; export it again.")
    return found


def _is_scheduler(kind: Any) -> bool:
    found = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    return isinstance(found, type) and issubclass(found, SchedulerMixin)


def load_part(folder: Path, part: str, entry: list, name: str, read: Callable = load_network) -> Any:
    """One part of a model folder; networks of diffusers are read by `read`."""
    if part in _SCHEDULERS:
        return load_scheduler(folder / part, name)
    if part not in _WORDS:
        return read(getattr(diffusers, entry[1]), folder / part, name)
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise UserError(f"{name} draws from text; pip install 'calotype[text]' first.") from None
    if part == "text_encoder":
        return load_network(CLIPTextModel, folder / part, name)
    try:
        return CLIPTokenizer.from_pretrained(folder / part, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its files are read by code of many kinds
        raise UserError(f"{name}: {folder / part} holds no tokenizer ({first_line(error)}); export it again.") from None


def load_scheduler(folder: Path, name: str) -> SchedulerMixin:
    """A scheduler of whatever stock class its settings name; raises UserError that begins with `name`."""
    file = folder / "scheduler_config.json"
    config = read_json(file, name)
    refuse_code_and_bombs(config, f"{name}: {file}")
    kind, times = config.get("_class_name"), config.get("num_train_timesteps", 1000)
    if not _is_scheduler(kind):
        raise UserError(f"{name}: {file} is for a {str(kind)[:60]}, no scheduler of diffusers; export it again.")
    if not isinstance(times, int) or not 1 <= times <= 100_000:
        raise UserError(f"{name}: {file} has num_train_timesteps {times!r}, not 1 to 100,000; export it again.")
    try:
        return getattr(diffusers, kind).from_config(config)
    except Exception as error:  # settings that contradict each other make a constructor raise almost anything
        raise UserError(f"{name}: {file} makes no scheduler ({first_line(error)}); export it again.") from None


def _refuse_contradictions(pipe: LatentDiffusionPipeline) -> None:
    """Raise ValueError where the parts take other shapes or classes than the rest gives them."""
    latent, classes = pipe.vae.config.latent_channels, pipe.unet.config.get("num_class_embeds") or 0
    beside = {"inpaint": latent + 1}.get(pipe.condition, latent) if pipe.takes_image else 0
    labels = len(pipe.labels) + 1 if pipe.labels else 0
    for what, has, wanted in (
        ("unet.out_channels", pipe.unet.config.out_channels, latent),
        ("unet.in_channels", pipe.unet.config.in_channels, latent + beside),
        ("unet.num_class_embeds", classes, labels),
    ):
        if has != wanted:
            raise ValueError(f"{what} is {has} where the other parts give {wanted}")
    if (pipe.condition == "text") != (pipe.text_encoder is not None and pipe.tokenizer is not None):
        raise ValueError(f"condition {pipe.condition!r} does not go with text_encoder and tokenizer as they are")
