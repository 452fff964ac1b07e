"""Draw pictures with a trained autoencoder and latent diffusion model.

This file travels inside every saved model as `pipeline.py`, so it imports nothing but torch, diffusers, numpy and PIL.
"""

import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils import numpy_to_pil
from PIL import Image
from torch import Tensor

Label = str | int | None
Labels = Label | list[Label]
Images = Image.Image | list[Image.Image] | None
Vae = AutoencoderKL | VQModel
UNet = UNet2DModel | diffusers.UNet2DConditionModel
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SAMPLERS = ("ddim", "dpm++2m", "unipc", "heun", "euler")
CONDITION = re.compile(r"none|class|text|inpaint|edges|superres:[2-9]|superres:1[0-6]")
_TIMES = 1000
_LAST_SIGMA = 50.0  # of a chain that ends in pure noise: above it a solver would only waste its steps
_STOCK_TEXT = "StableDiffusionPipeline"
_NULLS = ("safety_checker", "feature_extractor", "image_encoder")  # parts of the stock text pipeline that we never have
_STOCK_PARTS = ("vae", "unet", "scheduler", "text_encoder", "tokenizer")


class Event(NamedTuple):
    """One step of a drawing: `step` of `steps` is done, and this is what the pictures look like."""

    step: int
    steps: int
    images: Any


class Conditions(NamedTuple):
    """What a network is told beside z and t: class ids (B,), text (B, n, d), channels beside z (B, c', h, w)."""

    labels: Tensor | None = None
    text: Tensor | None = None
    given: Tensor | None = None


Told = tuple[Conditions, Conditions | None]  # and the same without labels or prompts; None where that is no different
Kept = tuple[Tensor, Tensor]


class Order(NamedTuple):
    """How to draw: the keyword arguments of `stream`; None means as the model has it.

    `seed`: picture i is drawn from seed + i. `guidance_scale` w: weak + w (strong - weak), 1 for none; weak is the
    network without label or prompt (Ho & Salimans 2022), or with `autoguidance` the guide (Karras et al. 2024; by
    default wherever there is one). `guidance_interval`: only for times from low to high, 0 the picture and 1 noise
    (Kynkäänniemi et al. 2024); outside a step is one evaluation. `guidance_rescale`: phi from 0 to 1 (Lin et al. 2023).
    `sampler`: one of `SAMPLERS`. `fast`: the student in its few steps, guidance built in, and the tiny decoder.
    `decoder`: "full", or "tiny", which previews use wherever there is one.
    `image`, `mask` (white: new): PIL pictures of `given_size`, or lists of them; `paste` puts the known pixels back.
    `output_type`: "pil", "np" (B, H, W, C) or "pt" (B, C, H, W) in [0, 1], or "latent" (B, c, h, w).
    """

    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    autoguidance: bool | None = None
    sampler: str | None = None
    fast: bool = False
    decoder: str | None = None
    image: Images = None
    mask: Images = None
    paste: bool = True
    output_type: str = "pil"
    preview: bool = True

    def guides(self, t: Tensor) -> bool:
        """Whether guidance acts at time t, from 0 to 1000."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low <= float(t) / _TIMES <= high


def evaluate(unet: UNet, z: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """The network's output (B, c, h, w) for noisy latents of that shape."""
    x = z if conditions.given is None else torch.cat([z, conditions.given], dim=1)
    if conditions.text is not None:
        return unet(x, t, encoder_hidden_states=conditions.text).sample
    return unet(x, t, class_labels=conditions.labels).sample


def guide(strong: Tensor, weak: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """weak + w (strong - weak), its deviation brought back by the share phi to that of `strong`, picture by picture.

    Rescaling is Lin et al. 2023 (eq. 15 and 16), which works on the output of the network as it is: v, eps or x0.
    """
    guided = weak + scale * (strong - weak)
    ratio = strong.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return guided * (rescale * ratio + 1 - rescale)


def make_scheduler(config: Mapping[str, Any], name: str) -> SchedulerMixin:
    """The sampler `name` for a network that was trained as the config of its saved scheduler says.

    One of `SAMPLERS`; "flow-" may stand before it and insists on a flow. Raises ValueError.
    """
    method = name.removeprefix("flow-") if isinstance(name, str) else ""
    if method not in SAMPLERS:
        raise ValueError(f"sampler={name!r} must be one of {', '.join(SAMPLERS)}.")
    if _is_flow(config):
        return _flow_sampler(config, method)
    if method != name:
        raise ValueError(f"sampler={name!r}: this model was not trained by flow matching; give {method!r}.")
    return _diffusion_sampler(config, method)


def _is_flow(config: Mapping[str, Any]) -> bool:
    """Schedulers that are made for flows alone name neither a prediction nor betas."""
    unnamed = "epsilon" if "beta_schedule" in config else "flow_prediction"
    return config.get("prediction_type", unnamed) == "flow_prediction"


def _flow_sampler(config: Mapping[str, Any], method: str) -> SchedulerMixin:
    """For z_s = (1 - s) z + s eps and v = eps - z. DDIM's step is Euler's: both keep the straight line's two ends."""
    if method == "heun":
        return diffusers.FlowMatchHeunDiscreteScheduler()
    # The stock Euler for flows walks to s = 0.001 and wastes its last step on the rest; order 1 here is the same step.
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config.get("flow_shift", 1.0)}
    if method == "unipc":
        return diffusers.UniPCMultistepScheduler(solver_order=3, **flow)
    return diffusers.DPMSolverMultistepScheduler(solver_order=2 if method == "dpm++2m" else 1, **flow)


def _diffusion_sampler(config: Mapping[str, Any], method: str) -> SchedulerMixin:
    """For z_t = alpha_t z + sigma_t eps, whether eps, v or z is predicted."""
    kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    trained = {name: config[name] for name in kept if name in config}
    zero_snr = bool(config.get("rescale_betas_zero_snr"))
    if method in ("ddim", "euler"):
        # DPM-Solver++ of order 1 is DDIM (Lu et al. 2022); the stock DDIM needs steps that divide 1000.
        whole = trained | {"rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
        solver = diffusers.EulerDiscreteScheduler if method == "euler" else diffusers.DPMSolverMultistepScheduler
        return solver(**whole, **({"solver_order": 1} if method == "ddim" else {}))
    trained = _shortened(trained) if zero_snr else trained
    if method == "heun":
        return diffusers.HeunDiscreteScheduler(**trained)
    if method == "unipc":  # both grids are even in log signal-to-noise
        return diffusers.UniPCMultistepScheduler(**trained, solver_order=3, use_exponential_sigmas=True)
    return diffusers.DPMSolverMultistepScheduler(**trained, use_lu_lambdas=True)


def _shortened(trained: dict[str, Any]) -> dict[str, Any]:
    """A chain that ends in pure noise without its last part, so that a grid by noise level spends no steps there."""
    whole = diffusers.DPMSolverMultistepScheduler(**trained, rescale_betas_zero_snr=True)
    length = int((whole.alphas_cumprod > 1 / (1 + _LAST_SIGMA**2)).sum())
    return trained | {"num_train_timesteps": length, "trained_betas": whole.betas[:length].tolist()}


def degrade(kind: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What a model conditioned on pictures is given in place of x: both (B, C, H, W) in [-1, 1].

    "superres:N": the means over NxN pixels, enlarged again; "edges": Sobel's gradient, the strongest edge of each
    picture white on black; "inpaint": mid grey where `mask` (B, 1, H, W) is 1.
    """
    if kind == "edges":
        return _edges(x)
    if kind == "inpaint":
        return x * (mask < 0.5)
    factor = int(kind.partition(":")[2])
    return _enlarge(shrink(x, factor), tuple(x.shape[2:]))


def shrink(x: Tensor, factor: int) -> Tensor:
    """Means (B, C, H // factor, W // factor) of pictures (B, C, H, W)."""
    return F.interpolate(x, (x.shape[2] // factor, x.shape[3] // factor), mode="area")


def given_latents(vae: Vae, kind: str, x_given: Tensor, mask: Tensor | None = None) -> Tensor:
    """The channels (B, c, h, w) beside z that stand for given pictures (B, C, H, W) in [-1, 1]: their posterior's mean.

    For "inpaint" the mask (B, 1, H, W), 1 where something new is to be, follows as the last channel (c + 1); an element
    of the latents counts as new if any of its pixels does.
    """
    if kind != "inpaint":
        return encode(vae, x_given)
    z = encode(vae, degrade(kind, x_given, mask))
    return torch.cat([z, F.adaptive_max_pool2d(mask.to(z), z.shape[2:])], dim=1)


def encode(vae: Vae, x: Tensor) -> Tensor:
    """Latents (B, c, h, w) of pictures (B, C, H, W) in [-1, 1]: the posterior's mean, or the code before quantising."""
    encoded = vae.encode(_pad(x, 2 ** (len(vae.config.block_out_channels) - 1)).to(vae.device, vae.dtype))
    return encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mean


def edges_of(image: Image.Image) -> Image.Image:
    """The edge picture of a photograph, as a model with the condition "edges" is given it; same size and mode."""
    image = image if image.mode == "L" else image.convert("RGB")
    x = degrade("edges", _to_tensor([image])) / 2 + 0.5
    return numpy_to_pil(x.permute(0, 2, 3, 1).numpy())[0]


def _edges(x: Tensor) -> Tensor:
    """Sobel's gradient of the mean over channels, each picture scaled by its largest one; flat pictures stay black."""
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    sobel = grey.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    dx, dy = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).chunk(2, dim=1)
    size = (dx**2 + dy**2).sqrt()
    return (size / size.amax((2, 3), keepdim=True).clamp_min(0.05) * 2 - 1).expand_as(x)


def _enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bicubic", align_corners=False).clamp(-1, 1)


def _pad(x: Tensor, factor: int) -> Tensor:
    """Pictures smaller than the patch of a 1x1 latent, grown to it by repeating their edges."""
    margin = max(factor - min(x.shape[2:]), 0)
    before, after = margin // 2, margin - margin // 2
    return F.pad(x, (before, after, before, after), mode="replicate") if margin else x


def _to_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1]."""
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    x = torch.from_numpy(pixels.reshape(len(images), images[0].height, images[0].width, -1))
    return x.permute(0, 3, 1, 2) / 127.5 - 1


class LatentDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion (Rombach et al. 2022) with stock components: noise to latents to pictures.

    `condition`: "none", "class", "text" (with `text_encoder` and `tokenizer`), or a picture beside z: "inpaint",
    "superres:N", "edges"; with `id2label` these take a class too. `guide`: a weaker network with the same inputs
    (Karras et al. 2024). `student`, `student_scheduler`, `tiny_decoder`: for `fast`. `sampler`: the name of the default
    one; None for the saved scheduler.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "guide", "student", "student_scheduler", "tiny_decoder"]

    def __init__(
        self,
        vae: Vae,
        unet: UNet,
        scheduler: SchedulerMixin,
        text_encoder=None,  # no types: this file has to do without transformers
        tokenizer=None,
        guide: UNet | None = None,
        student: UNet | None = None,
        student_scheduler: SchedulerMixin | None = None,
        tiny_decoder: diffusers.AutoencoderTiny | None = None,
        id2label: dict[str, str] | None = None,
        default_steps: int = 15,
        default_guidance: float = 1.5,
        condition: str | None = None,
        sampler: str | None = None,
        student_steps: int = 4,
    ):
        super().__init__()
        condition = condition or ("text" if text_encoder is not None else "class" if id2label else "none")
        if not CONDITION.fullmatch(condition):
            raise ValueError(f"condition={condition!r} must be none, class, text, inpaint, edges or superres:N.")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_modules(guide=guide, student=student, student_scheduler=student_scheduler)
        self.register_modules(tiny_decoder=tiny_decoder)
        self.register_to_config(id2label=id2label or {}, condition=condition, sampler=sampler)
        self.register_to_config(default_steps=default_steps, default_guidance=default_guidance)
        self.register_to_config(student_steps=student_steps)
        if text_encoder is not None:
            scheduler.register_to_config(steps_offset=1)  # StableDiffusionPipeline would do so with a warning
        for network in (vae, unet, text_encoder, guide, student, tiny_decoder):
            if network is not None:
                network.eval()

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids; empty for a model without classes."""
        names = self.config.id2label
        return [names[str(i)] for i in range(len(names))]

    @property
    def condition(self) -> str:
        """What a drawing is told: "none", "class", "text", "inpaint", "superres:N" or "edges"."""
        return self.config.condition

    @property
    def takes_image(self) -> bool:
        """Whether the model needs a picture to begin with."""
        return self.condition not in ("none", "class", "text")

    @property
    def default_steps(self) -> int:
        """Steps that a drawing takes if nothing else is said."""
        return self.config.default_steps

    @property
    def default_guidance(self) -> float:
        """Guidance scale of a drawing if nothing else is said."""
        return self.config.default_guidance

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one latent z, without the channels of a given picture."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.out_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = self.latent_shape[1] * factor, self.latent_shape[2] * factor
        if height == width == factor:  # a whole picture in a latent of 1x1 may have been padded to a power of two
            height = width = min(factor, self.vae.config.sample_size)
        return height, width

    @property
    def given_size(self) -> tuple[int, int]:
        """(height, width) of the picture that `image` has to be; smaller than the result for "superres:N"."""
        factor = int(self.condition.partition(":")[2] or 1)
        return self.image_size[0] // factor, self.image_size[1] // factor

    @property
    def image_channels(self) -> int:
        """1 for grey pictures, 3 for colour."""
        return self.vae.config.in_channels

    @torch.no_grad()
    def __call__(
        self, label: Labels = None, num_images: int | None = None, *, return_dict: bool = True, **order
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures; picture i depends on seed + i and what it is told alone. Arguments as in `stream`."""
        with self.progress_bar(total=0) as bar:
            for event in self.stream(label, num_images, **{"preview": False} | order):
                bar.total = event.steps
                bar.update()
        return ImagePipelineOutput(images=event.images) if return_dict else (event.images,)

    @torch.no_grad()
    def stream(self, label: Labels = None, num_images: int | None = None, **order) -> Iterator[Event]:
        """Draw step by step; close the generator to stop. Events before the last carry previews, or None without.

        `label`: a class name or id, for a text model a prompt, None for neither, or a list of these, one a picture.
        `num_images`: by default as many as the lists hold, else 1. `order`: the fields of `Order`. Raises ValueError
        naming the argument.
        """
        order = Order(**order)
        if num_images is None:
            num_images = next((len(value) for value in (label, order.image) if isinstance(value, list)), 1)
        self.check_inputs(label, num_images, order)
        order = self._with_defaults(order)
        scheduler = self._scheduler(order)
        known, new = self._given(order, num_images)
        told = self._conditions(label, num_images, known, new)
        keep = (known, new) if order.paste and new is not None else None
        count = len(scheduler.timesteps)  # two-stage solvers evaluate more than once a step
        for i, z in enumerate(self._walk(scheduler, num_images, order, told), start=1):
            tiny = order.decoder == "tiny" or (i < count and order.decoder is None and self.tiny_decoder is not None)
            shown = order.preview or i == count
            yield Event(i, count, self.decode_latents(z, order.output_type, tiny, keep) if shown else None)

    @torch.no_grad()
    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """Pictures of the model's size through encoder and decoder (the posterior's mean, no noise)."""
        return self.decode_latents(self.encode_images(images), "pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Latents (B, c, h, w) of pictures of the model's size."""
        return encode(self.vae, self._pictures("images", images, len(images), self.image_size))

    def check_inputs(self, label: Labels, num_images: int, order: Order) -> None:
        """Raise ValueError naming the argument, its value and the way out."""
        steps, seed = order.num_inference_steps, order.seed
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images={num_images} must be a whole number from 1 on.")
        if steps is not None and (not isinstance(steps, int) or not 1 <= steps <= _TIMES):
            raise ValueError(f"num_inference_steps={steps} must be a whole number from 1 to {_TIMES}.")
        if not isinstance(seed, int) or not 0 <= seed <= 2**63 - 1 - num_images:
            raise ValueError(f"seed={seed} must be a whole number from 0 to 2**63 - 1 - num_images.")
        if order.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={order.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
        if isinstance(label, list) and len(label) != num_images:
            raise ValueError(f"label holds {len(label)} labels for num_images={num_images}; give one a picture.")
        self._check_guidance(order)
        self._check_parts(order)

    def _check_guidance(self, order: Order) -> None:
        interval = order.guidance_interval
        if order.guidance_scale is not None and not _is_number(order.guidance_scale, 0, 100):
            raise ValueError(f"guidance_scale={order.guidance_scale} must be a number from 0 to 100; 1 means none.")
        if len(interval) != 2 or not all(_is_number(s, 0, 1) for s in interval) or interval[0] > interval[1]:
            raise ValueError(f"guidance_interval={interval} must be two times, low and high, from 0 to 1.")
        if not _is_number(order.guidance_rescale, 0, 1):
            raise ValueError(f"guidance_rescale={order.guidance_rescale} must be a number from 0 to 1.")
        if order.autoguidance and self.guide is None:
            raise ValueError("autoguidance=True: this model has no guide; export it with --guide, or leave it out.")

    def _check_parts(self, order: Order) -> None:
        if order.decoder not in (None, "full", "tiny"):
            raise ValueError(f"decoder={order.decoder!r} must be 'full' or 'tiny'.")
        if order.decoder == "tiny" and self.tiny_decoder is None:
            raise ValueError("decoder='tiny': this model has no tiny decoder; run `calotype distill` first.")
        if order.fast and (self.student is None or self.student_scheduler is None):
            raise ValueError("fast=True: this model has no student; run `calotype distill` first.")
        for name in ("sampler", "guidance_scale", "autoguidance") if order.fast else ():
            if getattr(order, name) is not None:
                raise ValueError(f"{name}={getattr(order, name)} does not go with fast=True; the student has its own.")

    def _with_defaults(self, order: Order) -> Order:
        """The order with everything filled in that the model decides."""
        steps = self.config.student_steps if order.fast else self.default_steps
        return order._replace(
            num_inference_steps=order.num_inference_steps or steps,
            guidance_scale=self.default_guidance if order.guidance_scale is None else order.guidance_scale,
            autoguidance=self.guide is not None if order.autoguidance is None else order.autoguidance,
            sampler=None if order.fast else order.sampler or self.config.sampler,
            decoder=order.decoder or ("tiny" if order.fast and self.tiny_decoder is not None else None),
        )

    def _scheduler(self, order: Order) -> SchedulerMixin:
        """A scheduler for one drawing; it keeps its place, so threads may share the models but not this."""
        saved = self.student_scheduler if order.fast else self.scheduler
        scheduler = make_scheduler(saved.config, order.sampler) if order.sampler else saved.from_config(saved.config)
        scheduler.set_timesteps(order.num_inference_steps, device=self._execution_device)
        return scheduler

    def _given(self, order: Order, num_images: int) -> tuple[Tensor | None, Tensor | None]:
        """Given pictures (B, C, H, W) in [-1, 1] of the result's size, and where they are to be new (B, 1, H, W)."""
        for name, wanted in (("image", self.takes_image), ("mask", self.condition == "inpaint")):
            if (getattr(order, name) is not None) != wanted:
                way = "give a picture of {1}x{0}".format(*self.given_size) if wanted else "leave it out"
                raise ValueError(f"{name}: this model's condition is {self.condition!r}; {way}.")
        if not self.takes_image:
            return None, None
        x = self._pictures("image", order.image, num_images, self.given_size)
        x = x if self.given_size == self.image_size else _enlarge(x, self.image_size)
        mask = None if order.mask is None else self._pictures("mask", order.mask, num_images, self.image_size, "L")
        return x, None if mask is None else (mask >= 0).float()

    def _conditions(self, label: Labels, num_images: int, known: Tensor | None, new: Tensor | None) -> Told:
        given = None if known is None else given_latents(self.vae, self.condition, known, new).to(self.unet.dtype)
        if self.condition == "text":
            prompts = label if isinstance(label, list) else [label] * num_images
            asked = Conditions(text=self.encode_prompts(prompts), given=given)
            return asked, asked._replace(text=self.encode_prompts([None] * num_images)) if any(prompts) else None
        y = self.class_labels(label, num_images)
        asked = Conditions(labels=y, given=given)
        if y is None or bool((y == len(self.labels)).all()):
            return asked, None
        return asked, asked._replace(labels=torch.full_like(y, len(self.labels)))

    def encode_prompts(self, prompts: list[str | None]) -> Tensor:
        """Hidden states (B, n, d) of prompts, as StableDiffusionPipeline makes them; None is the empty prompt."""
        most = self.tokenizer.model_max_length
        words = [prompt or "" for prompt in prompts]
        for prompt in words:
            if not isinstance(prompt, str):
                raise ValueError(f"label={prompt!r}: this model draws from text; give a prompt.")
            count = len(self.tokenizer(prompt, verbose=False).input_ids)
            if count > most:
                raise ValueError(f"prompt {prompt[:40]!r}… has {count} tokens, the model reads {most}; shorten it.")
        tokens = self.tokenizer(words, padding="max_length", max_length=most, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self._execution_device))[0].to(self.unet.dtype)

    def class_labels(self, label: Labels, num_images: int) -> Tensor | None:
        """Class ids (B,), the null class for None; None for a model without classes."""
        wanted = label if isinstance(label, list) else [label] * num_images
        if not self.labels:
            if any(item is not None for item in wanted):
                raise ValueError(f"label={label!r}: this model was trained without labels; leave it out.")
            return None
        return torch.tensor([self._class_id(item) for item in wanted], device=self._execution_device)

    def _walk(self, scheduler: SchedulerMixin, num_images: int, order: Order, told: Told) -> Iterator[Tensor]:
        """After each evaluation what the solver takes the clean latents (B, c, h, w) to be; at the end, they."""
        generators = [torch.Generator().manual_seed(order.seed + i) for i in range(num_images)]
        # Some schedulers draw noise on the way: every picture from its own generator.
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        z = self.prepare_latents(generators) * getattr(scheduler, "init_noise_sigma", 1.0)
        for i, t in enumerate(scheduler.timesteps, start=1):
            x = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            prediction = evaluate(self.student, x, t, told[0]) if order.fast else self.predict(x, t, *told, order)
            before, result = z, scheduler.step(prediction, t, z, **extra)
            z = result.prev_sample
            yield z if i == len(scheduler.timesteps) else _clean(scheduler, result, before, t, prediction)

    def prepare_latents(self, generators: list[torch.Generator]) -> Tensor:
        """Noise (B, c, h, w), each picture's from a generator of its own."""
        noise = [torch.randn(self.latent_shape, generator=generator) for generator in generators]
        return torch.stack(noise).to(self._execution_device, self.unet.dtype)

    def predict(self, z: Tensor, t: Tensor, asked: Conditions, null: Conditions | None, order: Order) -> Tensor:
        """The network's output (B, c, h, w) under the order's guidance; `null` is what its weaker branch is told."""
        weak = self.guide if order.autoguidance else None
        if not order.guides(t) or (weak is None and null is None):
            return evaluate(self.unet, z, t, asked)
        if weak is None:  # both at once
            pairs = [None if a is None else torch.cat([a, b]) for a, b in zip(asked, null, strict=True)]
            outputs = evaluate(self.unet, torch.cat([z, z]), t, Conditions(*pairs)).chunk(2)
        else:
            outputs = evaluate(self.unet, z, t, asked), evaluate(weak, z, t, asked)
        return guide(*outputs, order.guidance_scale, order.guidance_rescale)

    def decode_latents(self, z: Tensor, output_type: str, tiny: bool = False, keep: Kept | None = None) -> Any:
        """Pictures of latents (B, c, h, w); raises ValueError rather than return a black one.

        `keep`: pictures (B, C, H, W) in [-1, 1] and a mask (B, 1, H, W); where it is 0 the result is the picture.
        """
        if not torch.isfinite(z).all():
            raise ValueError("the model gave numbers that are not finite; its weights or its precision are at fault.")
        if output_type == "latent":
            return z
        decoder = self.tiny_decoder if tiny else self.vae
        x = decoder.decode(z.to(decoder.dtype)).sample.float()
        (height, width), (_, _, tall, wide) = self.image_size, x.shape
        x = x[:, :, (tall - height) // 2 :, (wide - width) // 2 :][:, :, :height, :width]
        if keep is not None:
            x = torch.where(keep[1] > 0.5, x, keep[0])
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = x.permute(0, 2, 3, 1).cpu().numpy()
        return numpy_to_pil(array) if output_type == "pil" else array

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write this file and model_index.json, for text a StableDiffusionPipeline's with calotype.json beside it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        if Path(__file__).resolve() != (folder / "pipeline.py").resolve():
            shutil.copyfile(__file__, folder / "pipeline.py")
        config = json.loads((folder / self.config_name).read_text())
        absent = [name for name in self._optional_components if getattr(self, name) is None]
        config = {name: value for name, value in config.items() if name not in absent}
        # The stock text pipeline knows no other autoencoder.
        if self.condition == "text" and isinstance(self.vae, AutoencoderKL):
            ours = {name: config.pop(name) for name in list(config) if name not in _STOCK_PARTS and name[0] != "_"}
            (folder / "calotype.json").write_text(json.dumps(ours, indent=2) + "\n")
            config |= {name: [None, None] for name in _NULLS}
            config |= {"_class_name": _STOCK_TEXT, "requires_safety_checker": False}
        else:
            config["_class_name"] = ["pipeline", "LatentDiffusionPipeline"]
        (folder / self.config_name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """Our own class needs no trust in the file beside the model: it is that file."""
        config = super()._dict_from_json_file(json_file)
        if config.get("_class_name") == _STOCK_TEXT and (side := Path(json_file).with_name("calotype.json")).is_file():
            config = {name: value for name, value in config.items() if name in _STOCK_PARTS or name.startswith("_")}
            config |= json.loads(side.read_text()) | {"_class_name": "LatentDiffusionPipeline"}
        if config.get("_class_name") == ["pipeline", "LatentDiffusionPipeline"]:
            config["_class_name"] = "LatentDiffusionPipeline"
        return config

    def _pictures(self, name: str, images: Images, count: int, size: tuple[int, int], mode: str = "") -> Tensor:
        """Pictures (count, C, H, W) in [-1, 1]; raises ValueError where they are not as many or of another `size`."""
        images = images if isinstance(images, list) else [images] * count
        if len(images) != count:
            raise ValueError(f"{name} holds {len(images)} pictures for num_images={count}; give one a picture.")
        for width, height in (image.size for image in images):
            if (height, width) != size:
                raise ValueError(f"{name}: {width}x{height} pixels; resize to {size[1]}x{size[0]} first.")
        mode = mode or ("L" if self.image_channels == 1 else "RGB")
        return _to_tensor([image.convert(mode) for image in images]).to(self._execution_device)

    def _class_id(self, label: Label) -> int:
        if label is None:
            return len(self.labels)
        if isinstance(label, str):
            if label not in self.labels:
                raise ValueError(f"label={label!r} is not known; this model knows {', '.join(self.labels[:60])}.")
            return self.labels.index(label)
        if not 0 <= label < len(self.labels):
            raise ValueError(f"label={label} must be from 0 to {len(self.labels) - 1}.")
        return label


def _clean(scheduler: SchedulerMixin, result: Any, z: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """What a solver takes the clean latents to be after a step from z: some say it, multistep solvers keep a list."""
    said = [getattr(result, name, None) for name in ("pred_original_sample", "denoised")]
    clean = [x for x in (*getattr(scheduler, "model_outputs", []), *said) if x is not None]
    if clean:
        return clean[-1]
    return z - t / _TIMES * prediction if _is_flow(scheduler.config) else result.prev_sample


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high
