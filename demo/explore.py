"""The tab Explore: a dot roams the latent space, and what is decoded there follows it."""

import base64
import io
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torch import Tensor

from calotype.autoencoder import Vae, decode, posterior
from calotype.errors import UserError
from calotype.images import denormalize, normalize, to_pil
from calotype.pipeline.latent_map import LatentMap, open_run

PATIENCE = 0.5  # seconds for which a frame waits while somebody draws
_LARGEST = 1e9
_SMALL = 64  # pixels
_ASSETS = files("calotype.pipeline")
_START = """
const calm = async (answer) => {
  const found = await answer;
  if (found.error) throw new Error(found.error);
  return found;
};
latentExplorer(element.querySelector(".explorer"), props.map, {
  encode: (number) => calm(server.encode(number)),
  deviation: (z) => calm(server.deviation(z)),
  async decode(z) {
    const image = Object.assign(new Image(), { src: (await calm(server.frame(z))).src });
    await image.decode();
    return image;
  },
});
"""


class Explorer:
    """Frames of an autoencoder for a LatentMap; give it the `lock` of the studio where visitors share the weights."""

    def __init__(self, vae: Vae, latent_map: LatentMap):
        self.vae = vae
        self.map = latent_map
        self.lock = threading.Lock()
        self.is_loading = False
        self.prepare()

    def prepare(self) -> None:
        """Bring the weights into the order that halves the time for one small picture on a CPU."""
        self.vae.to(memory_format=torch.channels_last)

    @classmethod
    def open(cls, folder: Path, vae: Vae) -> "Explorer | None":
        """The explorer of a model folder; None where the folder has no map."""
        latent_map = LatentMap.load(folder)
        return None if latent_map is None else cls(vae, latent_map)

    @classmethod
    def of_run(cls, run: Path) -> "Explorer | None":
        """The explorer of a run's autoencoder; None where its latents are not there, or not there yet."""
        try:
            return cls(*open_run(run))
        except UserError:
            return None

    def frame(self, z: Any) -> dict[str, str]:
        """The picture decoded at z, a list of D numbers, as an address that holds it."""
        code = self._code(z)
        with self._model():
            pixels = self._decode(code)
        return {"src": _address(to_pil(denormalize(pixels[0])))}

    def encode(self, number: Any) -> dict[str, list[float] | None]:
        """Mean and deviation (D,) of the preset picture with this number."""
        if type(number) is not int or not 0 <= number < len(self.map.pictures):
            raise UserError(f"picture {str(number)[:20]!r} is not one of {len(self.map.pictures)}")
        with self._model():
            return self._posterior(normalize(self.map.pictures[number : number + 1]))

    def deviation(self, z: Any) -> dict[str, list[float] | None]:
        """The deviation (D,) that the encoder gives to what is decoded at z."""
        code = self._code(z)
        with self._model():
            return self._posterior(self._decode(code).clamp(-1, 1))

    def _code(self, z: Any) -> Tensor:
        """A visitor's numbers as latents (1, c, h, w), none beyond the map's limit; raises UserError."""
        size = math.prod(self.map.facts.shape)
        if not isinstance(z, list) or len(z) != size or not all(_is_number(x) for x in z):
            raise UserError(f"a place in this latent space is a list of {size} numbers")
        limit = self.map.facts.limit
        return torch.tensor(z, dtype=torch.float32).clamp(-limit, limit).reshape(1, *self.map.facts.shape)

    def _decode(self, z: Tensor) -> Tensor:
        return decode(self.vae, z.to(self.vae.device), tuple(self.map.facts.image_size))

    def _posterior(self, x: Tensor) -> dict[str, list[float] | None]:
        moments = posterior(self.vae, x.to(self.vae.device, self.vae.dtype))
        return {name: moments[name].flatten().tolist() if name in moments else None for name in ("mean", "std")}

    @contextmanager
    def _model(self) -> Iterator[None]:
        """The weights for a moment; nobody may queue here, so whoever waits too long is told to come again."""
        if not self.lock.acquire(timeout=PATIENCE):
            doing = "is still being loaded" if self.is_loading else "is drawing for somebody"
            raise UserError(f"the model {doing}; this goes on in a moment")
        threads = torch.get_num_threads()
        try:
            if max(self.map.facts.image_size) <= _SMALL:
                torch.set_num_threads(1)  # the others would cost more to wake than they do; the browser wants them too
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(threads)
            self.lock.release()


def explore_tab(explorer: Explorer) -> None:
    """The pad, with frames from this server; nothing of it goes through the queue."""
    gr.HTML(
        html_template='<div class="explorer"></div>',
        apply_default_css=False,
        css_template=_asset("explorer.css"),
        js_on_load=_asset("explorer.js") + _START,
        map=explorer.map.for_browser(),
        server_functions=[_told(explorer.frame), _told(explorer.encode), _told(explorer.deviation)],
    )


def _told(function: Callable[[Any], dict]) -> Callable[[Any], dict]:
    """The function with our own errors as an answer: Gradio would make something else of them."""

    def answer(data: Any) -> dict:
        try:
            return function(data)
        except UserError as error:
            return {"error": str(error)}

    answer.__name__ = function.__name__
    return answer


def _asset(name: str) -> str:
    return _ASSETS.joinpath(name).read_text(encoding="utf-8")


def _is_number(x: Any) -> bool:
    return type(x) in (int, float) and -_LARGEST <= x <= _LARGEST  # neither NaN, nor an integer beyond any float


def _address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
