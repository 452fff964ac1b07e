"""`calotype export --onnx`: each network of a model as an ONNX file, checked against torch as soon as it is written."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel, VQModel
from torch import Tensor, nn

from calotype.autoencoder import Vae, crop, downsampling, pad
from calotype.errors import UserError
from calotype.pipeline.latent_diffusion import Conditions, LatentDiffusionPipeline, UNet, evaluate

TOLERANCE = 1e-3  # largest difference, where outputs are about 1
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ONE_FILE = 1_500_000_000  # bytes of weights that one file may hold; its format ends at 2 GiB


class Part(NamedTuple):
    """One network: its file's name, what it takes by name (a random batch of 3), and the names of what it gives."""

    name: str
    network: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]


class Decoder(nn.Module):
    """Latents (B, c, h, w) to pictures (B, C, *size), not clamped; a VQ model quantises first."""

    def __init__(self, vae: Vae, size: tuple[int, int]):
        super().__init__()
        self.vae, self.size = vae, size

    def forward(self, z: Tensor) -> Tensor:
        """Pictures of z."""
        return crop(self.vae.decode(z).sample, self.size)


class Encoder(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] to mean and deviation (B, c, h, w); for VQ the latents before quantising."""

    def __init__(self, vae: Vae):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The posterior of x."""
        encoded = self.vae.encode(pad(x, downsampling(self.vae)))
        if isinstance(self.vae, VQModel):
            return (encoded.latents,)
        return encoded.latent_dist.mean, encoded.latent_dist.std


class Denoiser(nn.Module):
    """A UNet with what it is told beside z (B, c + c', h, w) and t (B,), from 0 to 1000: class ids or text."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet, self.reads = unet, not isinstance(unet, UNet2DModel)

    def forward(self, z: Tensor, t: Tensor, told: Tensor | None = None) -> Tensor:
        """The network's output (B, c, h, w)."""
        return evaluate(self.unet, z, t, Conditions(text=told) if self.reads else Conditions(labels=told))


def export_onnx(pipe: LatentDiffusionPipeline, folder: Path) -> None:
    """Write decoder.onnx, encoder.onnx and unet.onnx, any batch size; raises UserError where one is not as torch is."""
    export_parts([*autoencoder_parts(pipe.vae, pipe.latent_shape, pipe.image_size), unet_part(pipe)], folder)


def export_parts(parts: list[Part], folder: Path) -> None:
    """Write the parts, each with a line on how far it is from torch; raises UserError."""
    refuse_missing_extra("--onnx")
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        file = folder / f"{part.name}.onnx"
        part.network.cpu().float().eval()
        _write(part, file)
        error = difference(part, file)
        print(f"{file.name}: at most {error:.1e} from torch")
        if not error <= TOLERANCE:
            raise UserError(
                f"--onnx: {file.name} differs from torch by {error:.1e}, more than {TOLERANCE}; "
                "try another version of onnxruntime or torch."
            )


def refuse_missing_extra(flag: str) -> None:
    """Raise UserError where a package is missing that ONNX files are made with."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{flag} needs {' and '.join(missing)}; pip install 'calotype[export]' first.")


def autoencoder_parts(vae: Vae, shape: tuple[int, int, int], size: tuple[int, int]) -> list[Part]:
    """The decoder and the encoder for latents of shape (c, h, w) and pictures of (height, width)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, vae.config.in_channels, *size, generator=generator) * 2 - 1
    z = _codes(vae, shape, generator) if isinstance(vae, VQModel) else torch.randn(3, *shape, generator=generator)
    moments = ["mean"] if isinstance(vae, VQModel) else ["mean", "std"]
    return [Part("decoder", Decoder(vae, size), {"z": z}, ["x"]), Part("encoder", Encoder(vae), {"x": x}, moments)]


def _codes(vae: VQModel, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Latents (3, c, h, w) near code vectors: half-way between two of them rounding alone would decide."""
    book = vae.quantize.embedding.weight.detach().float().cpu()
    numbers = torch.randint(len(book), (3, *shape[1:]), generator=generator)
    nearest = torch.cdist(book, book).fill_diagonal_(torch.inf).amin()
    noise = torch.randn(3, *shape, generator=generator)
    return book[numbers].permute(0, 3, 1, 2) + nearest / 4 * noise / noise.norm(dim=1, keepdim=True)


def unet_part(pipe: LatentDiffusionPipeline) -> Part:
    """The UNet of a model, with whatever it is told."""
    unet, generator = pipe.unet, torch.Generator().manual_seed(1)
    inputs = {
        "z": torch.randn(3, unet.config.in_channels, *pipe.latent_shape[1:], generator=generator),
        "t": torch.tensor([999.0, 400.0, 1.0]),
    }
    if pipe.condition == "text":
        length, width = pipe.tokenizer.model_max_length, unet.config.cross_attention_dim
        inputs["text"] = torch.randn(3, length, width, generator=generator)
    elif pipe.labels:
        inputs["labels"] = torch.tensor([0, len(pipe.labels) - 1, len(pipe.labels)])
    return Part("unet", Denoiser(unet), inputs, ["prediction"])


def _write(part: Part, file: Path) -> None:
    """One ONNX file without the paths of this machine, which the exporter notes at every node."""
    names = list(part.inputs)
    shapes = tuple({0: "batch"} for _ in names)  # by name alone: it may be used where it is compared with something
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            part.network, tuple(part.inputs.values()), input_names=names, output_names=part.outputs,
            dynamic_shapes=shapes, dynamo=True, verbose=False,
        )  # fmt: skip
    _forget_origins(program.model)
    weights = sum(p.numel() * p.element_size() for p in part.network.parameters())
    program.save(file, external_data=weights > _ONE_FILE)


def _forget_origins(model: Any) -> None:
    for owner in (model, model.graph, *model.graph.all_nodes()):
        owner.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()


@torch.no_grad()
def difference(part: Part, file: Path) -> float:
    """The largest absolute difference between onnxruntime and torch, with batches of 1 and 3."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    errors = []
    for count in (1, 3):
        inputs = {name: value[:count] for name, value in part.inputs.items()}
        theirs = session.run(part.outputs, {name: value.numpy() for name, value in inputs.items()})
        ours = part.network(*inputs.values())
        for a, b in zip(theirs, ours if isinstance(ours, tuple) else (ours,), strict=True):
            errors.append((torch.from_numpy(a) - b).abs().max())
    return float(torch.stack(errors).max())
