"""Draw pictures with a trained autoencoder and latent diffusion model.

This file travels inside every saved model as `pipeline.py`, with the five that it imports from beside it; together they
need nothing but torch, diffusers, numpy and PIL.
"""

import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.utils import numpy_to_pil
from PIL import Image
from torch import Tensor

from .labels import as_shares, blend, class_labels, mixed, token_ids
from .order import Event, Images, Label, Labels, NonFiniteLatents, Order, alone, joined
from .pictures import Vae, encode, enlarge, fill_hole, given_latents, new_latents, to_tensor
from .prediction import Conditions, Told, UNet, Windows, evaluate, guide, in_windows, windows
from .samplers import begin_at, clean, make_scheduler, noised

CONDITION = re.compile(r"none|class|text|inpaint|edges|superres:[2-9]|superres:1[0-6]")
_TRAVELS = ("labels.py", "order.py", "pictures.py", "prediction.py", "samplers.py")
_STOCK_TEXT = "StableDiffusionPipeline"
_NULLS = ("safety_checker", "feature_extractor", "image_encoder")  # parts of the stock text pipeline that we never have
_STOCK_PARTS = ("vae", "unet", "scheduler", "text_encoder", "tokenizer")
_STRENGTH = 0.6  # of a change, if nothing is said

Kept = tuple[Tensor, Tensor]


class Known(NamedTuple):
    """What is known of the pictures to be drawn.

    `x`: they, or what stands for them (B, C, H, W) in [-1, 1]; `new`: where something else is to be (B, 1, H, W).
    """

    x: Tensor | None = None
    new: Tensor | None = None


class Start(NamedTuple):
    """Where a drawing begins: latents z (B, c, h, w) at the scheduler's step `begin`.

    Where latents are to be kept: the clean ones `z_0`, their noise `eps`, and 1 where they become new (B, 1, h, w).
    """

    z: Tensor
    begin: int = 0
    z_0: Tensor | None = None
    eps: Tensor | None = None
    new: Tensor | None = None


class LatentDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion (Rombach et al. 2022) with stock components: noise to latents to pictures.

    `condition`: "none", "class", "text" (with `text_encoder` and `tokenizer`), or a picture beside z: "inpaint",
    "superres:N", "edges"; with `id2label` these take a class too. `guide`: a weaker network with the same inputs
    (Karras et al. 2024). `student`, `student_scheduler`, `tiny_decoder`: for `fast`. `sampler`: the name of the default
    one; None for the saved scheduler. `latent_rgb`: a linear map from latents to colours, {"weight": {"0": …}, "bias":
    …} with `image_channels` numbers in each.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["text_encoder", "tokenizer", "guide", "student", "student_scheduler", "tiny_decoder"]
    _callback_tensor_inputs = ["latents"]

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
        latent_rgb: dict[str, Any] | None = None,
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
        self.register_to_config(student_steps=student_steps, latent_rgb=latent_rgb)
        if text_encoder is not None:
            scheduler.register_to_config(steps_offset=1)  # StableDiffusionPipeline would do so with a warning
        for network in (vae, unet, text_encoder, guide, student, tiny_decoder):
            if network is not None:
                network.eval()

    # What the model is

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
    def factor(self) -> int:
        """Side of a picture divided by that of its latents."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pictures that the model was trained on."""
        factor = self.factor
        height, width = self.latent_shape[1] * factor, self.latent_shape[2] * factor
        if height == width == factor:  # a whole picture in a latent of 1x1 may have been padded to a power of two
            height = width = min(factor, self.vae.config.sample_size)
        return height, width

    @property
    def given_size(self) -> tuple[int, int]:
        """(height, width) of the picture that `image` has to be; smaller than the result for "superres:N"."""
        return self._given_size(self.image_size)

    @property
    def image_channels(self) -> int:
        """1 for grey pictures, 3 for colour."""
        return self.vae.config.in_channels

    @property
    def _cheapest(self) -> str:
        """The cheapest decoder that the model has."""
        has = {"tiny": self.tiny_decoder, "linear": self.config.latent_rgb}
        return next((name for name, part in has.items() if part is not None), "full")

    # Drawing

    @torch.no_grad()
    def __call__(
        self, label: Labels = None, num_images: int | None = None, *, return_dict: bool = True, **order
    ) -> ImagePipelineOutput | tuple:
        """Draw pictures; picture i depends on seed + i and what it is told alone. Arguments as in `stream`."""
        with self.progress_bar(total=0) as bar:
            for event in self.stream(label, num_images, **{"preview": False} | order):
                bar.total = event.steps
                bar.update()
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=event.images) if return_dict else (event.images,)

    @torch.no_grad()
    def stream(self, label: Labels = None, num_images: int | None = None, **order) -> Iterator[Event]:
        """Draw step by step; close the generator to stop. Events before the last carry previews, or None without.

        `label`: a class name or id, for a text model a prompt, None for neither, {label: share, …} for a blend, or a
        list of these, one a picture. `num_images`: by default as many as the lists hold, else 1. `order`: the fields of
        `Order`. Raises ValueError naming the argument, and NonFiniteLatents rather than show what is no picture.
        """
        order = Order(**order)
        if num_images is None:
            num_images = next((len(value) for value in (label, order.image) if isinstance(value, list) and value), 1)
        self.check_inputs(label, num_images, order)
        if not order.reproducible:
            yield from self._drawing(label, num_images, self._with_defaults(order))
            return
        drawings = [self._drawing(*single) for single in self._with_defaults(order).each(label, num_images)]
        while True:
            with alone():
                events = [event for drawing in drawings if (event := next(drawing, None))]
            if not events:
                return
            yield joined(events)

    def _drawing(self, label: Labels, num_images: int, order: Order) -> Iterator[Event]:
        """One drawing with everything filled in that the model decides."""
        known = self._known(order, num_images)
        told = self.conditions(label, num_images, known)
        scheduler = self._scheduler(order)
        noise, generators = self._noise(order, num_images)
        start = self._start(order, scheduler, known, noise)
        keep = known if order.paste and known.new is not None else None
        count = max(len(scheduler.timesteps) - start.begin, 1)  # two-stage solvers evaluate more than once a step
        for i, z in enumerate(self._walk(scheduler, start, order, told, generators), start=1):
            shown = order.decoder if i == count else order.preview
            yield Event(i, count, self.decode_latents(z, order.output_type, shown, keep) if shown else None)

    @torch.no_grad()
    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """Pictures of the model's size through encoder and decoder (the posterior's mean, no noise)."""
        return self.decode_latents(self.encode_images(images), "pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> Tensor:
        """Latents (B, c, h, w) of pictures of the model's size."""
        return _finite(encode(self.vae, self._pictures("images", images, len(images), self.image_size)), 0)

    # Before the first step, in order of use

    def check_inputs(self, label: Labels, num_images: int, order: Order) -> None:
        """Raise ValueError naming the argument, its value and the way out."""
        order.check(label, num_images)
        self._check_parts(order)
        self._check_size(order, num_images)
        for name, wanted in (("image", self.takes_image), ("mask", self.condition == "inpaint")):
            given = getattr(order, name) is not None
            if given != wanted and (wanted or self.takes_image):
                way = "give a picture of {1}x{0}".format(*self.given_size) if wanted else "leave it out"
                raise ValueError(f"{name}: this model's condition is {self.condition!r}; {way}.")
        if self.takes_image and order.strength is not None:
            raise ValueError(f"strength={order.strength}: this model draws beside its picture anew; leave it out.")

    def _check_parts(self, order: Order) -> None:
        if order.autoguidance and self.guide is None:
            raise ValueError("autoguidance=True: this model has no guide; export it with --guide, or leave it out.")
        for name in ("decoder", "preview"):
            if getattr(order, name) == "tiny" and self.tiny_decoder is None:
                raise ValueError(f"{name}='tiny': this model has no tiny decoder; run `calotype distill` first.")
            if getattr(order, name) == "linear" and self.config.latent_rgb is None:
                raise ValueError(f"{name}='linear': this model has no map from latents to colours; export it again.")
        if order.fast and (self.student is None or self.student_scheduler is None):
            raise ValueError("fast=True: this model has no student; run `calotype distill` first.")
        for name in ("sampler", "guidance_scale", "autoguidance") if order.fast else ():
            if getattr(order, name) is not None:
                raise ValueError(f"{name}={getattr(order, name)} does not go with fast=True; the student has its own.")

    def _check_size(self, order: Order, num_images: int) -> None:
        padded = self.image_size[0] < self.factor
        for name, trained in zip(("height", "width"), self.image_size, strict=True):
            value = getattr(order, name)
            if value in (None, trained):
                continue
            if padded or not isinstance(value, int) or value < trained or value % self.factor:
                way = f"{trained}" if padded else f"{trained} or more and a multiple of {self.factor}"
                raise ValueError(f"{name}={value} must be {way}.")
        order.check_pixels(num_images, self._size(order))
        shape = self._latent_shape(self._size(order))
        if order.latents is not None and tuple(order.latents.shape) != (num_images, *shape):
            raise ValueError(f"latents of shape {tuple(order.latents.shape)} must be {(num_images, *shape)}.")

    def _with_defaults(self, order: Order) -> Order:
        """The order with everything filled in that the model decides."""
        steps = self.config.student_steps if order.fast else self.default_steps
        changes = order.image is not None and not self.takes_image
        decoder = order.decoder or ("tiny" if order.fast and self.tiny_decoder is not None else None)
        strength = _STRENGTH if order.mask is None else 1.0
        height, width = self._size(order)
        return order._replace(
            num_inference_steps=order.num_inference_steps or steps,
            guidance_scale=self.default_guidance if order.guidance_scale is None else order.guidance_scale,
            autoguidance=self.guide is not None if order.autoguidance is None else order.autoguidance,
            sampler=None if order.fast else order.sampler or self.config.sampler,
            decoder=decoder or "full",
            preview=order.preview if isinstance(order.preview, str) else order.preview and (decoder or self._cheapest),
            strength=strength if changes and order.strength is None else order.strength,
            height=height,
            width=width,
        )

    def _known(self, order: Order, num_images: int) -> Known:
        """Given pictures and masks of the result's size."""
        if order.image is None:
            return Known()
        size = self._size(order)
        x = self._pictures("image", order.image, num_images, self._given_size(size))
        x = x if tuple(x.shape[2:]) == size else enlarge(x, size)
        mask = None if order.mask is None else self._pictures("mask", order.mask, num_images, size, "L")
        return Known(x, None if mask is None else (mask >= 0).float())

    def conditions(self, label: Labels, num_images: int, known: Known | None = None) -> Told:
        """What the network is told of so many pictures, and the same without label or prompt if that is different."""
        beside = given_latents(self.vae, self.condition, *known) if known and self.takes_image else None
        wanted = label if isinstance(label, list) else [label] * num_images
        if self.condition == "text":
            asked = Conditions(text=self.encode_prompts(wanted), given=beside)
            return asked, asked._replace(text=self.encode_prompts([None] * num_images)) if any(wanted) else None
        y, null = (class_labels(self.labels, of) for of in (wanted, [None] * num_images))
        if y is None:
            return Conditions(given=beside), None
        null = as_shares(null, len(self.labels) + 1) if y.is_floating_point() else null
        where, same = self._execution_device, torch.equal(y, null)
        asked = Conditions(labels=y.to(where), given=beside)
        return asked, None if same else asked._replace(labels=null.to(where))

    def encode_prompts(self, prompts: list[Label]) -> Tensor:
        """Hidden states (B, n, d) of prompts, as StableDiffusionPipeline makes them; None is the empty prompt."""
        words = list(dict.fromkeys(word or "" for prompt in prompts for word in blend(prompt)))
        tokens = token_ids(self.tokenizer, words).to(self._execution_device)
        states = self.text_encoder(tokens)[0].to(self.unet.dtype)
        return mixed(dict(zip(words, states, strict=True)), prompts)

    def class_labels(self, wanted: list[Label]) -> Tensor | None:
        """Class ids (B,), null for None; shares (B, classes + 1) if one is a blend; None without classes."""
        y = class_labels(self.labels, wanted)
        return None if y is None else y.to(self._execution_device)

    def _scheduler(self, order: Order) -> SchedulerMixin:
        """A scheduler for one drawing; it keeps its place, so threads may share the models but not this."""
        saved = self.student_scheduler if order.fast else self.scheduler
        scheduler = make_scheduler(saved.config, order.sampler) if order.sampler else saved.from_config(saved.config)
        scheduler.set_timesteps(order.num_inference_steps)  # on the CPU: their values are asked for at every step
        return scheduler

    def prepare_latents(self, generators: list[torch.Generator], shape: tuple[int, int, int] | None = None) -> Tensor:
        """Noise (B, c, h, w), each picture's from a generator of its own."""
        shape, where = shape or self.latent_shape, self._execution_device  # which looks through all modules each time
        return torch.stack([torch.randn(shape, generator=g, device=g.device).to(where) for g in generators])

    def _noise(self, order: Order, num_images: int) -> tuple[Tensor, list[torch.Generator]]:
        """The noise (B, c, h, w) that a drawing begins with, and where more of it comes from."""
        generators = order.generator or [torch.Generator().manual_seed(order.seed + i) for i in range(num_images)]
        generators = generators if isinstance(generators, list) else [generators] * num_images
        if order.latents is not None:
            return order.latents.to(self._execution_device, torch.float32), generators
        return self.prepare_latents(generators, self._latent_shape(self._size(order))), generators

    def _start(self, order: Order, scheduler: SchedulerMixin, known: Known, noise: Tensor) -> Start:
        """Pure noise, or where a picture is to be changed its latents with some."""
        if known.x is None or self.takes_image:
            return Start(noise * getattr(scheduler, "init_noise_sigma", 1.0))
        # Where everything may become new, what is there now must not shine through.
        hidden = known.new is not None and order.strength == 1
        z_0 = _finite(encode(self.vae, fill_hole(known.x, known.new) if hidden else known.x).float(), 0)
        begin = begin_at(scheduler, order.strength)
        z = z_0 if begin == len(scheduler.timesteps) else noised(scheduler, z_0, noise, scheduler.timesteps[begin])
        new = None if known.new is None else new_latents(known.new, tuple(z.shape[2:]))
        return Start(z, begin, z_0, noise, new)

    # The steps

    def _walk(self, scheduler, start: Start, order: Order, told: Told, generators) -> Iterator[Tensor]:
        """After each evaluation what the solver takes the clean latents (B, c, h, w) to be; at the end, they."""
        # Some schedulers draw noise on the way: every picture from its own generator.
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        times, z = scheduler.timesteps[start.begin :], start.z
        parts = windows(tuple(z.shape[2:]), self.latent_shape[1:])
        if len(times) == 0:
            yield z
        for i, t in enumerate(times):
            x = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            prediction = self.predict(x, t, *told, order, parts)
            before, result = z, scheduler.step(prediction, t, z, **extra)
            following = times[i + 1] if i + 1 < len(times) else None
            z = self._called_back(order, i, t, _kept(scheduler, start, result.prev_sample, following))
            _finite(z, i + 1)
            yield z if following is None else clean(scheduler, result, before, t, prediction)

    def predict(
        self, z: Tensor, t: Tensor, asked: Conditions, null: Conditions | None, order: Order, parts: Windows = ()
    ) -> Tensor:
        """The network's output (B, c, h, w) under the order's guidance; `null` is what its weaker branch is told."""
        if len(parts) > 1:
            return in_windows(lambda part, told: self.predict(part, t, *told, order), z, (asked, null), parts)
        if order.fast:
            return evaluate(self.student, z, t, asked)
        weak = self.guide if order.autoguidance else None
        if not order.guides(t) or (weak is None and null is None):
            return evaluate(self.unet, z, t, asked)
        if weak is None:  # both at once
            outputs = evaluate(self.unet, torch.cat([z, z]), t, asked.beside(null)).chunk(2)
        else:
            outputs = evaluate(self.unet, z, t, asked), evaluate(weak, z, t, asked)
        return guide(*outputs, order.guidance_scale, order.guidance_rescale)

    def _called_back(self, order: Order, i: int, t: Tensor, z: Tensor) -> Tensor:
        if order.callback_on_step_end is None:
            return z
        return (order.callback_on_step_end(self, i, t, {"latents": z}) or {}).get("latents", z)

    # After them

    @torch.no_grad()
    def decode_latents(self, z: Tensor, output_type: str, decoder: str = "full", keep: Known | None = None) -> Any:
        """Pictures of latents (B, c, h, w); raises NonFiniteLatents rather than return a black one.

        `keep`: where its mask is 0 the result is its picture.
        """
        _finite(z, 0)  # a codebook would find an entry for it all the same
        if output_type == "latent":
            return z
        x = _finite(self._decode(z, decoder), None)
        if keep is not None:
            x = torch.where(keep.new > 0.5, x, keep.x)
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = x.permute(0, 2, 3, 1).cpu().numpy()
        return numpy_to_pil(array) if output_type == "pil" else array

    def _decode(self, z: Tensor, decoder: str) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1]."""
        size = tuple(side * self.factor for side in z.shape[2:])
        if decoder == "linear":
            rgb = self.config.latent_rgb
            weight = torch.tensor([rgb["weight"][str(i)] for i in range(z.shape[1])]).to(z)
            x = torch.einsum("bchw,cd->bdhw", z, weight) + torch.tensor(rgb["bias"]).to(z)[:, None, None]
            x = F.interpolate(x, size, mode="bilinear")
        else:
            network = self.tiny_decoder if decoder == "tiny" else self.vae
            x = network.decode(z.to(network.dtype)).sample.float()
        height, width = self.image_size if self.image_size[0] < self.factor else size
        tall, wide = x.shape[2:]
        return x[:, :, (tall - height) // 2 :, (wide - width) // 2 :][:, :, :height, :width]

    # The folder

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write this file and model_index.json, for text a StableDiffusionPipeline's with calotype.json beside it."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder, here = Path(save_directory), Path(__file__).resolve()
        if here != (folder / "pipeline.py").resolve():
            for source, name in ((here, "pipeline.py"), *((here.with_name(name), name) for name in _TRAVELS)):
                shutil.copyfile(source, folder / name)
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

    def _size(self, order: Order) -> tuple[int, int]:
        """(height, width) of the pictures of an order."""
        return order.height or self.image_size[0], order.width or self.image_size[1]

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of pictures of a size."""
        if size == self.image_size:
            return self.latent_shape
        return self.latent_shape[0], size[0] // self.factor, size[1] // self.factor

    def _given_size(self, size: tuple[int, int]) -> tuple[int, int]:
        factor = int(self.condition.partition(":")[2] or 1)
        return size[0] // factor, size[1] // factor

    def _pictures(self, name: str, images: Images, count: int, size: tuple[int, int], mode: str = "") -> Tensor:
        """Pictures (count, C, H, W) in [-1, 1]; raises ValueError where they are not as many or of another `size`."""
        images = images if isinstance(images, list) else [images] * count
        if len(images) != count:
            raise ValueError(f"{name} holds {len(images)} pictures for num_images={count}; give one a picture.")
        for width, height in (image.size for image in images):
            if (height, width) != size:
                raise ValueError(f"{name}: {width}x{height} pixels; resize to {size[1]}x{size[0]} first.")
        mode = mode or ("L" if self.image_channels == 1 else "RGB")
        return to_tensor([image.convert(mode) for image in images]).to(self._execution_device)


def _finite(x: Tensor, step: int | None) -> Tensor:
    """The same tensor; raises NonFiniteLatents where some of it is not finite."""
    if not torch.isfinite(x).all():
        raise NonFiniteLatents(step)
    return x


def _kept(scheduler: SchedulerMixin, start: Start, z: Tensor, t: Tensor | None) -> Tensor:
    """Latents z with what is to be kept put back, noised for the time t that comes next, or clean at the end."""
    if start.new is None:
        return z
    known = start.z_0 if t is None else noised(scheduler, start.z_0, start.eps, t)
    return torch.where(start.new > 0.5, z, known)
