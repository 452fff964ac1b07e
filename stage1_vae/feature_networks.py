"""Features in which two sets of pictures are compared, and how far the sets lie apart in them.

A network is any function of pictures with a name; the name stands in the label of every figure, because distances in
different features have nothing to do with each other.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError  # what weights_only raises; nothing of it is opened here
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from calotype.errors import UserError
from calotype.metrics import Moments, frechet_distance, kernel_distance
from calotype.stage1_vae.perceptual import GradientFeatures

_SIDE = 299  # of the pictures that Inception was trained on


class FeatureNetwork(NamedTuple):
    """Features (B, d) of pictures (B, C, H, W) in [-1, 1]; `about` says what they are."""

    name: str
    features: Callable[[Tensor], Tensor]
    about: str


class SetDistance:
    """Fréchet and kernel distance between pictures and their reconstructions, in the features of a network."""

    def __init__(self, network: FeatureNetwork):
        self.network = network
        self.real: list[Tensor] = []
        self.made: list[Tensor] = []

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Take in pictures (B, C, H, W) in [-1, 1] and their reconstructions."""
        for kept, pictures in ((self.real, x), (self.made, x_hat)):
            kept.append(self.network.features(pictures).float().cpu())

    def figures(self) -> tuple[float, float, int]:
        """Both distances, and the number of features."""
        real, made = torch.cat(self.real), torch.cat(self.made)
        return frechet_distance(_moments(real), _moments(made)), kernel_distance(real, made), real.shape[1]


def _moments(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def build(name: str, allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The network called gradients or inception; raises UserError if it is not to be had."""
    return gradients() if name == "gradients" else inception(allow_download, device)


def gradients() -> FeatureNetwork:
    """Mean and deviation over space of edges and texture at several scales: fixed filters, always there."""
    maps = GradientFeatures().features

    def features(x: Tensor) -> Tensor:
        pooled = [statistic for f in maps(x) for statistic in (f.mean((2, 3)), f.std((2, 3), correction=0))]
        return torch.cat(pooled, dim=1)

    return FeatureNetwork("gradients", features, "pooled edges and texture by fixed filters, no Inception network")


def inception(allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The 2,048 pooled features of torchvision's Inception v3; raises UserError where its weights are missing."""
    from torchvision.models import inception_v3

    with torch.device("meta"):  # the weights come from the file, and no generator is read
        net = inception_v3(weights=None, init_weights=False)
    _load(net, allow_download)
    net.fc = torch.nn.Identity()
    net = net.to(device).eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        rgb = x if x.shape[1] == 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        # The network takes [-1, 1] as it is; torchvision's own preparation comes to the same.
        return net(F.interpolate(rgb, (_SIDE, _SIDE), mode="bilinear", antialias=True))

    about = "pooled features of torchvision's Inception v3; other weights of it, as papers use them, give other values"
    return FeatureNetwork("inception", features, about)


def _load(net: torch.nn.Module, allow_download: bool) -> None:
    """Put the weights of the file into a network without any, fetching the file only if that was asked for."""
    from torchvision.models import Inception_V3_Weights

    url = Inception_V3_Weights.IMAGENET1K_V1.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not (file.is_file() or allow_download):
        raise UserError(
            f"--features inception needs the weights {file}, which are not there; give --allow-download to fetch them "
            "(104 MiB), or --features gradients."
        )
    try:
        weights = torch.hub.load_state_dict_from_url(url, str(file.parent), check_hash=True, weights_only=True)
        net.load_state_dict(weights, assign=True)
    except OSError as error:
        raise UserError(
            f"--features inception: {url} cannot be fetched ({error}); put the file into {file.parent}, or give "
            "--features gradients."
        ) from None
    except (RuntimeError, EOFError, UnpicklingError):
        raise UserError(f"--features inception: {file} is damaged; delete it and give --allow-download.") from None
