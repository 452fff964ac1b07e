"""`calotype interpolate`: the way from one picture or seed to another, as pictures and an animation."""

from pathlib import Path

from PIL import Image

from calotype.metrics import psnr
from calotype.pipeline import latent_space
from calotype.pipeline.generate import facts_of, for_users, load, order_of, picture
from calotype.pipeline.latent_diffusion import LatentDiffusionPipeline
from calotype.pipeline.latent_space import End
from calotype.pipeline.pictures import to_tensor
from calotype.pipeline.png import write_png


def main(settings) -> None:
    """Write 000.png … and animation.webp; for pictures, say how well they come back from their noise."""
    pipe = load(settings.model, settings.precision, compiled=settings.compile)
    ends = tuple(_end(pipe, words, flag) for words, flag in ((settings.begin, "FROM"), (settings.end, "TO")))
    labels = settings.label, settings.label if settings.to_label is None else settings.to_label
    with for_users(settings.precision):
        frames = latent_space.interpolate(pipe, *ends, settings.n, labels, **order_of(settings))
    facts = {"from": _named(settings.begin), "to": _named(settings.end)} | facts_of(pipe, settings)
    for i, frame in enumerate(frames):
        write_png(frame, settings.out / f"{i:03d}.png", {"label": f"{labels[0] or ''} to {labels[1] or ''}"} | facts)
    animate(frames, settings.out / "animation.webp", settings.milliseconds)
    for end, frame, name in zip(ends, (frames[0], frames[-1]), ("FROM", "TO"), strict=True):
        if not isinstance(end, int):
            found = psnr(*(to_tensor([image.convert(end.mode)]) for image in (frame, end))).item()
            print(f"{name} comes back from its noise with {found:.1f} dB.")
    print(f"{len(frames)} pictures and animation.webp in {settings.out}")


def animate(frames: list[Image.Image], file: Path, milliseconds: int) -> None:
    """Write an endless WebP animation that goes there and back."""
    there_and_back = frames + frames[-2:0:-1]
    large = [frame.resize((frame.width * _zoom(frame), frame.height * _zoom(frame)), 0) for frame in there_and_back]
    large[0].save(file, save_all=True, append_images=large[1:], duration=milliseconds, loop=0, lossless=True)


def _zoom(frame: Image.Image) -> int:
    """Small pictures are shown larger, pixel by pixel."""
    return max(1, 256 // max(frame.size))


def _end(pipe: LatentDiffusionPipeline, words: str, flag: str) -> End:
    return int(words) if words.isdecimal() else picture(Path(words), flag, pipe.image_channels, pipe.image_size)


def _named(words: str) -> str:
    """A seed, or a file without its folder: a picture that is passed on must not tell where it was made."""
    return words if words.isdecimal() else Path(words).name
