"""Features in which two sets of pictures are compared, and how far the sets lie apart in them.

A network is any function of pictures with a name; the name stands in the label of every figure, because distances in
different features have nothing to do with each other.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype import unpickle
from calotype.autoencoder import downsampling, pad
from calotype.errors import UserError
from calotype.gradients import GradientFeatures
from calotype.images import normalize
from calotype.metrics import frechet_distance, kernel_distance, moments

_SIDE = 299  # of the pictures that Inception was trained on
_BATCH = 64
_GRID, _THUMBNAIL = 4, 8  # cells and pixels a side of what the audit compares


class FeatureNetwork(NamedTuple):
    """Features (B, d) of pictures (B, C, H, W) in [-1, 1]; `about` says what they are.

    `identity` changes with the weights, so that kept features of other weights are known as such.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    about: str
    identity: str = ""

    @torch.no_grad()
    def of(self, pictures: Iterable[Tensor], device: torch.device) -> Tensor:
        """Features (n, d) on the CPU of batches of uint8 pictures (B, C, H, W)."""
        return torch.cat([self.features(normalize(x.to(device))).float().cpu() for x in pictures])


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
        return frechet_distance(moments(real), moments(made)), kernel_distance(real, made), real.shape[1]


class CheapKid:
    """Kernel distance of samples to some held-out pictures in the encoder's features, to watch a training with.

    A few hundred pictures on each side cost about as much as encoding them; the reference is encoded once. Features are
    standardised by the reference. Labels of samples should come at random, as those of the reference did: equally many
    of each class make the estimate a little too small.
    """

    def __init__(self, vae: nn.Module, reference: Tensor):
        """`reference` (n, C, H, W) in [-1, 1] are pictures that the autoencoder takes."""
        self.network = encoder(vae)
        self.reference = self._features(reference)

    def of(self, x: Tensor) -> float:
        """Unbiased kernel distance of samples (m, C, H, W) in [-1, 1]; about 0 where they are like the reference."""
        return kernel_distance(*(standardised(f, self.reference) for f in (self.reference, self._features(x))))

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([self.network.features(part).float().cpu() for part in x.split(_BATCH)])


def standardised(f: Tensor, by: Tensor) -> Tensor:
    """Features (n, d) in units of the deviation of others (m, d) about their mean.

    The kernel distance depends on the scale: large features make it a matter of a few outliers.
    """
    std, mean = torch.std_mean(by, dim=0)
    return (f - mean) / std.clamp_min(0.01 * std.mean())  # a feature that never changes must not decide alone


def build(name: str, allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The network called gradients, inception or dinov2, or that of an ONNX file or a folder; raises UserError."""
    from calotype import feature_files

    if name == "gradients":
        return gradients()
    if name == "inception":
        return inception(allow_download, device)
    return feature_files.build(name, allow_download, device)


def gradients() -> FeatureNetwork:
    """Mean and deviation over space of edges and texture at several scales: fixed filters, always there."""
    maps = GradientFeatures().features

    def features(x: Tensor) -> Tensor:
        pooled = [statistic for f in maps(x) for statistic in (f.mean((2, 3)), f.std((2, 3), correction=0))]
        return torch.cat(pooled, dim=1)

    about = "pooled edges and texture by fixed filters, no Inception network"
    return FeatureNetwork("gradients", features, about, "gradients/1")


def layout() -> FeatureNetwork:
    """Where in a picture what can be seen, by fixed filters: alike only for pictures that show the same thing.

    Nothing is trained, so training pictures and others are treated the same, as an audit for copies must.
    """
    maps = GradientFeatures().features

    def features(x: Tensor) -> Tensor:
        cells = [F.adaptive_avg_pool2d(f.abs(), _GRID) for f in maps(x)]
        small = F.interpolate(x, (_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True)
        return torch.cat([part.flatten(1) / part[0].numel() ** 0.5 for part in (small, *cells)], dim=1)

    about = f"a thumbnail, and edges and texture in {_GRID}x{_GRID} cells, by fixed filters"
    return FeatureNetwork("layout", features, about, "layout/1")


def encoder(vae: nn.Module) -> FeatureNetwork:
    """Mean and deviation over space of the innermost maps of an autoencoder's encoder, on the device it is on."""
    innermost = getattr(vae.encoder, "mid_block", vae.encoder)
    factor = downsampling(vae)
    maps: list[Tensor] = []

    def features(x: Tensor) -> Tensor:
        hook = innermost.register_forward_hook(lambda *call: maps.append(call[2]))
        try:
            vae.encoder(pad(as_channels(x.to(vae.device), vae.config.in_channels), factor))
        finally:
            hook.remove()
        f = maps.pop().float()
        return torch.cat([f.mean((2, 3)), f.std((2, 3), correction=0)], dim=1)

    about = "pooled innermost maps of the autoencoder's encoder, trained on the same pictures"
    return FeatureNetwork("encoder", features, about, _identity(vae.encoder))


def _identity(net: nn.Module) -> str:
    """A hash of the weights of a network."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()


def as_channels(x: Tensor, channels: int) -> Tensor:
    """Pictures (B, C, H, W) with so many channels: grey ones repeated, others averaged to grey first."""
    if x.shape[1] == channels:
        return x
    return x.mean(1, keepdim=True).expand(-1, channels, -1, -1)


def inception(allow_download: bool, device: torch.device) -> FeatureNetwork:
    """The 2,048 pooled features of torchvision's Inception v3; raises UserError where its weights are missing."""
    from torchvision.models import Inception_V3_Weights, inception_v3

    with torch.device("meta"):  # the weights come from the file, and no generator is read
        net = inception_v3(weights=None, init_weights=False)
    _load(net, allow_download)
    net.fc = torch.nn.Identity()
    net = net.to(device).eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        # The network takes [-1, 1] as it is; torchvision's own preparation comes to the same.
        return net(F.interpolate(as_channels(x, 3), (_SIDE, _SIDE), mode="bilinear", antialias=True))

    about = "pooled features of torchvision's Inception v3; other weights of it, as papers use them, give other values"
    return FeatureNetwork("inception", features, about, Path(Inception_V3_Weights.IMAGENET1K_V1.url).name)


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
        net.load_state_dict(unpickle.published(url, file), assign=True)
    except OSError as error:
        raise UserError(
            f"--features inception: {url} cannot be fetched ({error}); put the file into {file.parent}, or give "
            "--features gradients."
        ) from None
    except (RuntimeError, ValueError):
        raise UserError(f"--features inception: {file} is damaged; delete it and give --allow-download.") from None
