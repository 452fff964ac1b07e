"""Pictures that were decoded while their folder was read, at their final size: nobody has to decode them twice."""

from pathlib import Path

from PIL import Image

from calotype.images import Fit, fit_image

_MEMORY = 2**30  # bytes


class Prepared:
    """Pictures by file, each to be taken once; as many as fit into the memory meant for them."""

    def __init__(self, size: tuple[int, int], fit: Fit):
        self.size, self.fit = size, fit
        self._room = _MEMORY // (3 * size[0] * size[1])
        self._kept: dict[Path, Image.Image] = {}

    def add(self, file: Path, picture: Image.Image) -> None:
        """Keep an RGB picture, decoded so that its short side is no shorter than the longer one of `size`."""
        if len(self._kept) < self._room:
            self._kept[file] = fit_image(picture, self.size, self.fit)

    def take(self, file: Path, channels: int) -> Image.Image | None:
        """The picture of a file, which is forgotten; None where it was not kept. One channel is right for grey ones."""
        picture = self._kept.pop(file, None)
        return picture if picture is None else picture.convert("L" if channels == 1 else "RGB")
