"""Draw pictures with a trained autoencoder and latent diffusion model.

This file travels inside every saved model as `pipeline.py`, so it imports nothing but torch and diffusers.
"""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel, VQModel
from diffusers.utils import numpy_to_pil
from PIL import Image

Label = str | int | None
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Event(NamedTuple):
    """One step of a drawing: `step` of `steps` is done, and this is what the pictures look like."""

    step: int
    steps: int
    images: Any


class LatentDiffusionPipeline(DiffusionPipeline):
    """Latent diffusion (Rombach et al. 2022) with stock components: noise to latents to pictures."""

    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | VQModel,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        default_steps: int = 18,
        default_guidance: float = 1.5,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(id2label=id2label or {}, default_steps=default_steps, default_guidance=default_guidance)
        vae.eval()
        unet.eval()

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids; empty for an unconditional model."""
        names = self.config.id2label
        return [names[str(i)] for i in range(len(names))]

    @property
    def default_steps(self) -> int:
        """Evaluations of the network that a drawing takes if nothing else is said."""
        return self.config.default_steps

    @property
    def default_guidance(self) -> float:
        """Guidance scale of a drawing if nothing else is said."""
        return self.config.default_guidance

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of one latent."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = self.latent_shape[1] * factor, self.latent_shape[2] * factor
        if height == width == factor:  # a whole picture in a latent of 1x1 may have been padded to a power of two
            height = width = min(factor, self.vae.config.sample_size)
        return height, width

    @property
    def image_channels(self) -> int:
        """1 for grey pictures, 3 for colour."""
        return self.vae.config.in_channels

    @torch.no_grad()
    def __call__(
        self,
        label: Label | list[Label] = None,
        num_images: int = 1,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw `num_images` pictures; picture i depends on seed + i and its label alone. Arguments as in `stream`."""
        events = self.stream(
            label,
            num_images,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type=output_type,
            preview=False,
        )
        with self.progress_bar(total=num_inference_steps or self.default_steps) as bar:
            for event in events:
                bar.update()
                images = event.images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def stream(
        self,
        label: Label | list[Label] = None,
        num_images: int = 1,
        *,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        preview: bool = True,
    ) -> Iterator[Event]:
        """Draw step by step; close the generator to stop.

        `label`: a class name, an id, None (no class), or a list of these, one a picture. `guidance_scale` w: eps =
        eps_null + w (eps_label - eps_null), 1 for none (Ho & Salimans 2022). `output_type`: "pil", "np" (B, H, W, C) in
        [0, 1], "pt" (B, C, H, W) in [0, 1] or "latent" (B, c, h, w). Events before the last carry the prediction of
        the clean pictures, or None without `preview`. Raises ValueError naming the argument.
        """
        steps = self.default_steps if num_inference_steps is None else num_inference_steps
        guidance = self.default_guidance if guidance_scale is None else guidance_scale
        self.check_inputs(label, num_images, seed, steps, guidance, output_type)
        y = self.class_labels(label, num_images)
        # A scheduler keeps its place: one of its own for each drawing lets threads share the models.
        scheduler = self.scheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self._execution_device)
        z = self.prepare_latents(num_images, seed) * scheduler.init_noise_sigma
        count = len(scheduler.timesteps)  # two-stage solvers evaluate more than once a step
        for i, t in enumerate(scheduler.timesteps):
            prediction = self.predict(scheduler.scale_model_input(z, t), t, y, guidance)
            result = scheduler.step(prediction, t, z)
            z = result.prev_sample
            if i + 1 < count:
                clean = self._predicted_clean(scheduler, result, z) if preview else None
                yield Event(i + 1, count, self.decode_latents(clean, output_type) if preview else None)
        yield Event(count, count, self.decode_latents(z, output_type))

    @torch.no_grad()
    def reconstruct(self, images: list[Image.Image]) -> list[Image.Image]:
        """Pictures of the model's size through encoder and decoder (the posterior's mean, no noise)."""
        return self.decode_latents(self.encode_images(images), "pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Latents (B, c, h, w) of pictures of the model's size."""
        mode = "L" if self.image_channels == 1 else "RGB"
        height, width = self.image_size
        for image in images:
            if image.size != (width, height):
                raise ValueError(f"images: {image.size[0]}x{image.size[1]} pixels; resize to {width}x{height} first.")
        pixels = np.stack([np.asarray(image.convert(mode), dtype=np.float32) for image in images])
        x = torch.from_numpy(pixels.reshape(len(images), height, width, -1)).permute(0, 3, 1, 2) / 127.5 - 1
        encoded = self.vae.encode(self._pad(x).to(self._execution_device, self.vae.dtype))
        return encoded.latents if isinstance(self.vae, VQModel) else encoded.latent_dist.mean

    def check_inputs(
        self, label: Label | list[Label], num_images: int, seed: int, steps: int, guidance: float, output_type: str
    ) -> None:
        """Raise ValueError naming the argument, its value and the way out."""
        if not isinstance(num_images, int) or num_images < 1:
            raise ValueError(f"num_images={num_images} must be a whole number from 1 on.")
        if not isinstance(steps, int) or not 1 <= steps <= 1000:
            raise ValueError(f"num_inference_steps={steps} must be a whole number from 1 to 1000.")
        if not isinstance(seed, int) or not 0 <= seed <= 2**63 - 1 - num_images:
            raise ValueError(f"seed={seed} must be a whole number from 0 to 2**63 - 1 - num_images.")
        if not isinstance(guidance, (int, float)) or not (math.isfinite(guidance) and 0 <= guidance <= 100):
            raise ValueError(f"guidance_scale={guidance} must be a number from 0 to 100; 1 means no guidance.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
        if isinstance(label, list) and len(label) != num_images:
            raise ValueError(f"label holds {len(label)} labels for num_images={num_images}; give one a picture.")

    def class_labels(self, label: Label | list[Label], num_images: int) -> torch.Tensor | None:
        """Class ids (B,), the null class for None; None for an unconditional model."""
        wanted = label if isinstance(label, list) else [label] * num_images
        if not self.labels:
            if any(item is not None for item in wanted):
                raise ValueError(f"label={label!r}: this model was trained without labels; leave it out.")
            return None
        return torch.tensor([self._class_id(item) for item in wanted], device=self._execution_device)

    def prepare_latents(self, num_images: int, seed: int) -> torch.Tensor:
        """Noise (B, c, h, w); picture i has a generator of its own, seeded with seed + i."""
        noise = [
            torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(num_images)
        ]
        return torch.stack(noise).to(self._execution_device, self.unet.dtype)

    def predict(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, guidance: float) -> torch.Tensor:
        """The network's output (B, c, h, w) under classifier-free guidance."""
        if y is None:
            return self.unet(z, t).sample
        null = torch.full_like(y, len(self.labels))
        if guidance == 1 or bool((y == null).all()):
            return self.unet(z, t, class_labels=y).sample
        both = self.unet(torch.cat([z, z]), t, class_labels=torch.cat([y, null])).sample
        labelled, unlabelled = both.chunk(2)
        return unlabelled + guidance * (labelled - unlabelled)

    def decode_latents(self, z: torch.Tensor, output_type: str) -> Any:
        """Pictures of latents (B, c, h, w); raises ValueError rather than return a black one."""
        if not torch.isfinite(z).all():
            raise ValueError(
                "the model gave numbers that are not finite; its weights are damaged or of too low precision."
            )
        if output_type == "latent":
            return z
        x = self._crop(self.vae.decode(z.to(self.vae.dtype)).sample.float())
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        array = x.permute(0, 2, 3, 1).cpu().numpy()
        return numpy_to_pil(array) if output_type == "pil" else array

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write model_index.json and this file beside it, so that stock diffusers finds the class."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        target = Path(save_directory) / "pipeline.py"
        if Path(__file__).resolve() != target.resolve():
            shutil.copyfile(__file__, target)
        index = Path(save_directory) / self.config_name
        config = json.loads(index.read_text()) | {"_class_name": ["pipeline", "LatentDiffusionPipeline"]}
        index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict[str, Any]:
        """Our own class needs no trust in the file beside the model: it is that file."""
        config = super()._dict_from_json_file(json_file)
        if config.get("_class_name") == ["pipeline", "LatentDiffusionPipeline"]:
            config["_class_name"] = "LatentDiffusionPipeline"
        return config

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures smaller than the patch of a 1x1 latent, grown to it by repeating their edges."""
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        margin = max(factor - min(x.shape[2:]), 0)
        before, after = margin // 2, margin - margin // 2
        return torch.nn.functional.pad(x, (before, after, before, after), mode="replicate") if margin else x

    def _crop(self, x: torch.Tensor) -> torch.Tensor:
        """The middle of decoded pictures, as large as `image_size` says."""
        height, width = self.image_size
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        return x[:, :, top : top + height, left : left + width]

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

    def _predicted_clean(self, scheduler: SchedulerMixin, result: Any, z: torch.Tensor) -> torch.Tensor:
        """What the solver takes the clean latents to be after a step; multistep solvers keep it in a list."""
        clean = getattr(result, "pred_original_sample", None)
        if clean is None:
            history = [x for x in getattr(scheduler, "model_outputs", []) if x is not None]
            clean = history[-1] if history else z
        return clean
