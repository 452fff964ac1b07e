"""Tiny real data and commands for the measurements of resuming and of several processes."""

from pathlib import Path

from calotype import shapes

COUNT = 96
_GAN = "--perceptual features --adversarial 0.5 --adversarial-start 0.2 --adversarial-pretraining 5".split()
MEMBERS = {  # flags of stage 1, each with something of its own to keep equal
    "kl": ["--regularizer", "kl"],
    "vq": ["--regularizer", "vq"],
    "fsq": ["--regularizer", "fsq", "--levels", "5,4"],
    "tc": ["--regularizer", "tc", "--gamma", "10"],
    "gan": _GAN,
    "vqgan": ["--regularizer", "vq", *_GAN],
}
CONDITIONS = {  # flags of stage 2
    "class": [],
    "text": ["--condition", "text", "--text-width", "32", "--text-layers", "1"],
    "inpaint": ["--condition", "inpaint"],
    "superres": ["--condition", "superres:2"],
    "edges": ["--condition", "edges"],
    "options": "--weighting uncertainty --density mode --gradient-checkpointing".split(),
    "muon": ["--optimizer", "muon"],  # whose bf16 makes more of a rounding error: not for two processes
}


def write_pictures(folder: Path, size: int = 16) -> Path:
    """A folder of small shapes with captions, a sub-folder a colour."""
    for i in range(COUNT):
        factors = shapes.draw_factors(0, i, shapes.PLAIN)
        place = folder / factors.colour
        place.mkdir(parents=True, exist_ok=True)
        shapes.render(factors, (size, size)).save(place / f"{i:03d}.png")
        (place / f"{i:03d}.txt").write_text(factors.caption)
    return folder


def vae_flags(sheet: Path, out: Path, *more: str) -> list[str]:
    """`train-vae` small enough to take seconds."""
    model = [
        "--width",
        "8",
        "--factor",
        "2",
        "--latent-channels",
        "2",
        "--batch-size",
        "8",
        "--lr",
        "2e-3",
        "--precision",
        "fp32",
        "--warmup-steps",
        "3",
    ]
    return ["train-vae", str(sheet), *model, "--out", str(out), *more]


def diffusion_flags(latents: Path, vae: Path, out: Path, *more: str) -> list[str]:
    """`train-diffusion` small enough to take seconds."""
    model = "--width 16 --depth 2 --batch-size 8 --lr 1e-3 --precision fp32 --warmup-steps 3 --sampler-steps 4".split()
    return ["train-diffusion", "--latents", str(latents), "--vae", str(vae), *model, "--out", str(out), *more]
