"""Figures of samples against real pictures in the features of a network, each with the contract it was made under."""

from torch import Tensor

from calotype import device, features
from calotype.data import Pictures, evenly_spaced
from calotype.features import FeatureNetwork, standardised
from calotype.manifold import DENSITY_K, PRECISION_K, overlap
from calotype.metrics import frechet_distance, kernel_interval, moments
from calotype.own_features import Own, own
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.measured import Samples
from calotype.pipeline.references import reference

LEAST = DENSITY_K + 1  # pictures on either side
_WORDS = {"val": "held-out", "train": "training"}


def figures(settings, pipe: LatentDiffusionPipeline, pictures: Pictures, samples: Samples) -> dict[str, dict]:
    """Entries for metrics.json: distances, overlap, and accuracy by class; each with its contract."""
    folder = settings.run / "evaluation"
    judge = own(pictures.sheet, folder / "own", settings.precision) if settings.features == "own" else None
    network = judge.network if judge else _network(settings, pipe)
    real = reference(folder, settings.reference, pictures, network)
    made = network.of(samples.batches(), device.device())
    if network.name == "encoder":
        real, made = standardised(real, real), standardised(made, real)
    found = distances(real, made, network.name) | overlaps(real, made, network.name)
    if judge and judge.classes and samples.labels is not None:
        found |= accuracy(judge, samples)
    shared = {"n": len(made), "contract": contract(settings, pictures, samples, network)}
    return {name: entry | shared for name, entry in found.items()}


def _network(settings, pipe: LatentDiffusionPipeline) -> FeatureNetwork:
    if settings.features == "encoder":
        return features.encoder(pipe.vae)
    return features.build(settings.features, settings.allow_download, device.device())


def contract(settings, pictures: Pictures, samples: Samples, network: FeatureNetwork) -> str:
    """Everything that two figures must share to be compared."""
    sheet = pictures.sheet
    height, width = sheet.image_size
    return (
        f"{samples.contract}; against {len(pictures):,} {_WORDS[settings.reference]} pictures, {height}x{width} "
        f"{'grey' if sheet.channels == 1 else 'colour'}, fit {sheet.fit}; features {network.name}: {network.about}"
    )


def distances(real: Tensor, made: Tensor, name: str) -> dict[str, dict]:
    """Fréchet distance and unbiased kernel distance of features (m, d) and (n, d)."""
    rough = "" if min(len(real), len(made)) > real.shape[1] else ", rough: no more pictures than features"
    kid = kernel_interval(real, made)
    return {
        f"fid[{name}]": {
            "value": frechet_distance(moments(real), moments(made)),
            "how": f"Fréchet distance, d = {real.shape[1]:,}{rough}, smaller with more pictures",
        },
        f"kid[{name}]": kid._asdict() | {"how": "unbiased kernel distance over all pairs, 95 % interval by jackknife"},
    }


def overlaps(real: Tensor, made: Tensor, name: str) -> dict[str, dict]:
    """Precision, recall, density and coverage, of equally many features on both sides."""
    n = min(len(real), len(made))
    real, made = (side[evenly_spaced(len(side), n)] for side in (real, made))
    ks = {"precision": PRECISION_K, "recall": PRECISION_K, "density": DENSITY_K, "coverage": DENSITY_K}
    return {
        f"{figure}[{name}]": {"value": value, "how": f"k = {ks[figure]}, {n:,} pictures on each side"}
        for figure, value in overlap(real, made)._asdict().items()
    }


def accuracy(judge: Own, samples: Samples) -> dict[str, dict]:
    """How many samples the network takes for what they were asked to be, and the same class by class."""
    right = (judge.classify(samples.batches()) == samples.labels).double()
    classes = {
        name: right[samples.labels == i].mean().item()
        for i, name in enumerate(judge.classes)
        if (samples.labels == i).any()
    }
    worst = sorted(classes, key=classes.get)[:3]
    how = "share of samples whose class the network sees as asked, least "
    how += ", ".join(f"{name} {classes[name]:.0%}" for name in worst)
    return {"accuracy[own]": {"value": right.mean().item(), "how": how, "classes": classes}}
