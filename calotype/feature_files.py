"""Feature networks from files: DINOv2, an ONNX file, or a folder of transformers or diffusers weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.autoencoder import load_autoencoder
from calotype.checkpoint import sha256, weights_hash
from calotype.errors import UserError
from calotype.features import FeatureNetwork, as_channels, encoder
from calotype.weights import (
    first_line,
    load_network,
    quiet,
    read_json,
    refuse_code_and_bombs,
    refuse_keys,
    refuse_non_finite,
)

DINOV2 = "facebook/dinov2-small"
_AUTOENCODERS = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, where a folder names no others
_ONNX_SIDE = 224  # where a network takes pictures of any size


def build(name: str, allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The network of a name or path; raises UserError if it is not to be had."""
    path = Path(name)
    if name == "dinov2":
        return dinov2(allow_download, device)
    if path.suffix == ".onnx" and path.is_file():
        return onnx(path)
    if (path / "config.json").is_file():
        return folder(path, device)
    raise UserError(
        f"--features {name} is no file x.onnx and no folder with config.json and safetensors; give one of these, or "
        "own, encoder, gradients, inception or dinov2."
    )


def dinov2(allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The class token of DINOv2 (Oquab et al. 2023), small; raises UserError where its weights are missing."""
    transformers = _transformers("dinov2")
    try:
        net = transformers.AutoModel.from_pretrained(
            DINOV2, dtype=torch.float32, use_safetensors=True, local_files_only=not allow_download
        )
    except (OSError, ValueError):
        raise UserError(
            f"--features dinov2 needs {DINOV2} in the cache of Hugging Face, which is not there or cannot be fetched; "
            "give --allow-download (88 MB), a folder that holds it, or --features own."
        ) from None
    features = _transformer_features(net, {}, device)
    return FeatureNetwork("dinov2", features, f"class token of {DINOV2}", f"{DINOV2}/{net.config._commit_hash}")


def folder(path: Path, device: torch.device) -> FeatureNetwork:
    """A folder with config.json and safetensors: an autoencoder of diffusers, or a model of transformers."""
    config = read_json(path / "config.json", "--features")
    kind = config.get("_class_name", "")
    if kind in _AUTOENCODERS:
        network = encoder(_autoencoder(path, kind).to(device))
        about = f"pooled innermost maps of the encoder of {path.name}, a {kind}"
        return network._replace(name=path.name, about=about, identity=weights_hash(path))
    refuse_code_and_bombs(config, f"--features {path}")
    net, whole = _transformer(path)
    preparation = path / "preprocessor_config.json"
    prepared = read_json(preparation, "--features") if preparation.is_file() else {}
    features = _transformer_features(net, prepared, device, whole)
    about = f"{'pooled output' if whole else 'mean token'} of {path.name}, a {type(net).__name__}"
    return FeatureNetwork(path.name, features, about, weights_hash(path))


def _transformer(path: Path):
    """A model of transformers, and whether its pooling layer, which many files lack, came with it."""
    transformers = _transformers(path)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):  # what is missing is filled with random numbers
            net, found = transformers.AutoModel.from_pretrained(
                path,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,  # without this word it would ask on the terminal
                output_loading_info=True,
            )
    except Exception as error:  # settings that contradict each other make a constructor raise almost anything
        raise UserError(f"--features {path} cannot be loaded ({first_line(error)}); give another.") from None
    missing = sorted(found["missing_keys"])
    refuse_keys([name for name in missing if not name.startswith("pooler.")], "missing", f"--features {path}")
    refuse_keys(found["mismatched_keys"], "mismatched", f"--features {path}")
    refuse_non_finite(net, f"--features {path}")
    return net, not missing


def _autoencoder(path: Path, kind: str):
    from diffusers import AutoencoderTiny

    if kind == "AutoencoderTiny":
        return load_network(AutoencoderTiny, path, "--features")
    return load_autoencoder(path, "--features")


def _transformer_features(net, preparation: dict, device: torch.device, whole: bool = True):
    """Pooled output (B, d) of a vision model, of pictures resized and normalised as its preparation says."""
    net = net.to(device).eval().requires_grad_(False)
    side = _side(net, preparation)
    mean, std = (
        torch.tensor(preparation.get(name, default), device=device).reshape(-1, 1, 1)
        for name, default in (("image_mean", _MEAN), ("image_std", _STD))
    )

    def features(x: Tensor) -> Tensor:
        x = F.interpolate(as_channels(x, len(mean)) / 2 + 0.5, side, mode="bicubic", antialias=True).clamp(0, 1)
        output = net(pixel_values=(x - mean) / std)
        pooled = getattr(output, "pooler_output", None) if whole else None
        return _pooled(output.last_hidden_state if pooled is None else pooled)

    return features


def _side(net, preparation: dict) -> tuple[int, int]:
    """The (height, width) that a model is fed with."""
    size = preparation.get("crop_size") or preparation.get("size") or getattr(net.config, "image_size", 224)
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size.get("shortest_edge", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def onnx(path: Path) -> FeatureNetwork:
    """The first output of an ONNX network of pictures (B, C, H, W) in [-1, 1], pooled; raises UserError."""
    session = _session(path)
    given = session.get_inputs()[0]
    batch, channels, height, width = _shape(given.shape, path)

    def features(x: Tensor) -> Tensor:
        x = as_channels(x, channels or x.shape[1])
        size = height or x.shape[2], width or x.shape[3]
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return torch.cat([_run(session, given.name, part, batch) for part in x.split(batch or len(x))])

    about = f"first output of {path.name}"
    return FeatureNetwork(path.name, features, about, sha256(path))


def _session(path: Path):
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"--features {path} needs the package onnxruntime; pip install 'calotype[eval]'.") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    except Exception as error:  # its errors have no common class of their own
        raise UserError(f"--features {path} is no network that onnxruntime loads ({first_line(error)}).") from None


def _shape(shape: list, path: Path) -> list[int | None]:
    """(B, C, H, W) of an input, None where any will do."""
    if len(shape) != 4:
        raise UserError(f"--features {path} takes an input of shape {shape}; it must take pictures (B, C, H, W).")
    return [side if isinstance(side, int) else None for side in shape]


def _run(session, name: str, x: Tensor, batch: int | None) -> Tensor:
    """Features of at most `batch` pictures; a network of a fixed batch gets the last picture more than once."""
    whole = torch.cat([x, x[-1:].expand((batch or len(x)) - len(x), -1, -1, -1)])
    output = session.run(None, {name: whole.float().cpu().contiguous().numpy()})[0]
    return _pooled(torch.from_numpy(output)[: len(x)])


def _pooled(output: Tensor) -> Tensor:
    """Features (B, d) of maps (B, d, h, w), tokens (B, t, d) or features; (B, d, 1, 1) counts as maps."""
    if output.ndim == 3:
        return output.mean(1)
    return output.flatten(2).mean(2) if output.ndim > 3 else output.reshape(len(output), -1)


def _transformers(name):
    try:
        import transformers
    except ImportError:
        raise UserError(f"--features {name} needs the package transformers; pip install 'calotype[text]'.") from None
    return transformers
