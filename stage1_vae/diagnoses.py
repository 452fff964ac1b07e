"""What ails an autoencoder, from its held-out figures: one sentence each, with a way out, said when it first shows."""

from typing import Any

_COLLAPSED, _DEAD, _WINS = 0.05, 0.5, 0.95
_SETTLED = 0.2  # of the run: before that nothing is what it will be
_STD_RANGE = (0.1, 10.0)
_OVERFIT_GAP, _OVERFIT_FALL = 1.5, 0.2  # dB between seen and held-out pictures, and below the best so far


class Diagnoses:
    """Remembers what has been said and the best PSNR; `state` is JSON, so that a resumed run does not repeat itself."""

    def __init__(self):
        self.state: dict[str, Any] = {"active": [], "best_psnr": None}

    def of(self, figures: dict[str, float], progress: float) -> tuple[str, ...]:
        """The sentences about these figures that did not hold at the last validation; `progress` in [0, 1]."""
        if progress < _SETTLED:
            return ()
        found = {name: text for name, rule in RULES.items() if (text := rule(figures))}
        if text := self._over_fitting(figures):
            found["over-fitting"] = text
        new = tuple(text for name, text in found.items() if name not in self.state["active"])
        self.state["active"] = list(found)
        return new

    def _over_fitting(self, figures: dict[str, float]) -> str | None:
        psnr, seen, best = figures["psnr"], figures["psnr[train]"], self.state["best_psnr"]
        self.state["best_psnr"] = psnr if best is None else max(best, psnr)
        if best is None or psnr > best - _OVERFIT_FALL or seen < psnr + _OVERFIT_GAP:
            return None
        return (
            f"Over-fitting: training pictures come back at {seen:.1f} dB, held-out ones at {psnr:.1f} and falling; "
            "add pictures or --flip, lower --width, or stop earlier."
        )


def posterior_collapse(figures: dict[str, float]) -> str | None:
    """Hardly any element of the latent depends on the picture."""
    active = figures.get("active_units", 1.0)
    if active >= _COLLAPSED:
        return None
    return (
        f"Posterior collapse: {active:.1%} of the latent's elements depend on the picture; lower --beta, or give "
        "--free-bits or --beta-warmup."
    )


def dead_codes(figures: dict[str, float]) -> str | None:
    """Most of the codebook is not used."""
    usage = figures.get("code_usage", 1.0)
    if usage >= _DEAD:
        return None
    return (
        f"Dead codes: held-out pictures use {usage:.0%} of the codebook (perplexity {figures['perplexity']:.0f}); "
        "train longer, or give a smaller --codebook or fewer --levels."
    )


def discriminator_wins(figures: dict[str, float]) -> str | None:
    """The discriminator is so sure that the decoder learns nothing from it."""
    accuracy = figures.get("discriminator_accuracy", 0.0)
    if not accuracy > _WINS:
        return None
    return (
        f"The discriminator wins: it is right about {accuracy:.0%} of held-out patches; lower --discriminator-lr or "
        "raise --r1."
    )


def latent_scale(figures: dict[str, float]) -> str | None:
    """The latents are far from unit variance, so that noise drowns them or a pull is missing."""
    std = figures.get("latent_std", 1.0)
    if _STD_RANGE[0] <= std <= _STD_RANGE[1]:
        return None
    way = "lower --beta or --posterior-std" if std < 1 else "raise --beta, or lower --lr"
    return f"The latents are far from unit variance: their standard deviation is {std:.3g}; {way}."


RULES = {
    "posterior collapse": posterior_collapse,
    "dead codes": dead_codes,
    "discriminator wins": discriminator_wins,
    "latent scale": latent_scale,
}
