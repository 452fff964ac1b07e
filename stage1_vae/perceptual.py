"""Distances between pictures that see edges and texture where a mean error sees only grey.

Each is a pair: `features` of pictures, computed once for the target and without a gradient, and the `distance` of two
sets of features, one value for each example.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from calotype import unpickle
from calotype.errors import UserError
from calotype.gradients import GradientFeatures

_LPIPS_SIDE = 16  # that VGG16 halves four times
_BACKBONE = "vgg16-397923af.pth"


class Lpips(nn.Module):
    """LPIPS (Zhang et al. 2018) with VGG16, in two halves; grey pictures count as three equal channels."""

    name = "lpips"

    def __init__(self, backbone: dict[str, Tensor]):
        super().__init__()
        lpips = _lpips_package()
        with torch.random.fork_rng(devices=[]):  # it fills the backbone with random numbers first
            whole = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
        slices = [part for i in range(1, 6) for part in getattr(whole.net, f"slice{i}").named_parameters()]
        for name, parameter in slices:  # the slices keep torchvision's numbers of layers
            parameter.data.copy_(backbone[f"features.{name}"])
        whole = whole.eval().requires_grad_(False)
        self.whole = whole.to(memory_format=torch.channels_last)  # 4 % less time on a CPU in fp32, 12 % in bf16

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps of unit length at each pixel, for pictures (B, C, H, W) in [-1, 1]."""
        outputs = self.whole.net(self.whole.scaling_layer(_rgb(x)))
        return [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in outputs]

    def distance(self, f: list[Tensor], g: list[Tensor]) -> Tensor:
        """LPIPS (B,)."""
        weighted = zip(self.whole.lins, f, g, strict=True)
        return torch.stack([lin((a - b).square()).flatten(1).mean(1) for lin, a, b in weighted]).sum(0)


def _rgb(x: Tensor) -> Tensor:
    """Pictures as colour: grey ones three times, more than three channels as their mean."""
    return x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def build(settings, size: tuple[int, int], device: torch.device) -> GradientFeatures | Lpips | None:
    """The perceptual loss that the settings name, for pictures of (height, width), announced in one line.

    Raises UserError if it is not to be had.
    """
    if settings.perceptual == "none":
        return None
    if settings.perceptual == "features":
        print("Perceptual loss: gradient features at several scales (nothing fetched, nothing trained).")
        return GradientFeatures()
    if min(size) < _LPIPS_SIDE:
        raise UserError(
            f"--perceptual lpips needs sides of {_LPIPS_SIDE} pixels or more, not {size[0]}x{size[1]}; give "
            "--perceptual features."
        )
    file = backbone_file(settings.allow_download)
    print(f"Perceptual loss: LPIPS with the VGG16 weights of {file}.")
    return load_lpips(file).to(device)


def backbone_file(allow_download: bool) -> Path:
    """Where torchvision keeps VGG16's weights; they are fetched only if that was asked for. Raises UserError."""
    _lpips_package()
    file = Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE
    if file.is_file() or allow_download:
        return file
    raise UserError(
        f"--perceptual lpips needs the VGG16 weights {file}, which are not there; give --allow-download to fetch them "
        "(528 MiB), or --perceptual features."
    )


def load_lpips(file: Path) -> Lpips:
    """LPIPS with the backbone of a file that `backbone_file` named, fetched where it is missing. Raises UserError."""
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        return Lpips(unpickle.published(url, file))
    except OSError as error:
        raise UserError(
            f"--perceptual lpips needs the VGG16 weights {url}, which cannot be fetched ({error}); put the file into "
            f"{file.parent}, or give --perceptual features."
        ) from None
    except (RuntimeError, KeyError, ValueError):
        raise UserError(
            f"--perceptual lpips needs the VGG16 weights {file}, which are damaged; delete the file and give "
            "--allow-download, or --perceptual features."
        ) from None


def _lpips_package():
    try:
        import lpips
    except ImportError:
        raise UserError("--perceptual lpips needs the package lpips; pip install 'calotype[eval]'.") from None
    return lpips
