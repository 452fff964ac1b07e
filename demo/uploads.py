"""The gate for what visitors send: Gradio keeps it as it came, and only `load_image` looks inside."""

import io
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
from gradio.components.base import server
from gradio.components.image_editor import EditorData, EditorDataBlobs
from gradio.data_classes import DataWithFiles
from PIL import Image, ImageChops

from calotype.demo.cache import Cache
from calotype.errors import UserError
from calotype.images import load_image
from calotype.picture_files import FORMATS as READABLE

MOST_PIXELS = 16_000_000  # a small file can hold a picture that fills the memory
FORMATS = tuple(name for name in READABLE if name != "AVIF")  # its pixels may be many more than its header says
MOST_LAYERS = 4
MOST_SKETCHES = 16  # brushed pictures that wait for their request
MOST_BYTES = 8_000_000  # of one layer
MOST_SKETCHED = 32_000_000  # bytes of all of these together

Source = str | bytes


def _derived(base: type, **methods) -> type:
    """A component of Gradio's with methods of ours. A class statement would write an interface file beside this one."""
    return type.__new__(type(base), base.__name__, (base,), {"is_template": True, **methods})


def _path(field, payload) -> str | None:
    """Instead of decoding a picture: where it lies in Gradio's cache."""
    return None if payload is None else payload.path


def _sketch(canvas, payload: EditorData | None) -> dict | None:
    """Instead of decoding: {"background", "layers"} as paths in Gradio's cache, or as bytes that the browser sent."""
    if payload is None:
        return None
    sent = canvas.blob_storage.pop(payload.id, None) if payload.id is not None else payload
    if sent is None:
        return None
    layers = [_source(layer) for layer in sent.layers[:MOST_LAYERS] if layer is not None]
    return {"background": _source(sent.background), "layers": layers}


@server
def _accept_blobs(canvas, data: DataWithFiles) -> None:
    """Keep one layer of a sketch until its request comes; what is too large, too much or not one is left out."""
    if _is_layer(data):
        gr.ImageEditor.accept_blobs(canvas, data)
    kept = canvas.blob_storage
    while len(kept) > MOST_SKETCHES or sum(map(_size, list(kept.values()))) > MOST_SKETCHED:
        kept.pop(next(iter(kept)), None)


def _size(sketch: EditorDataBlobs) -> int:
    return sum(len(part) for part in (sketch.background, sketch.composite, *sketch.layers) if part)


def _is_layer(data) -> bool:
    if not isinstance(data, DataWithFiles) or not {"type", "index", "id"} <= data.data.keys():
        return False
    index = data.data["index"]
    placed = index in ("", "null") or (index.isdecimal() and int(index) < MOST_LAYERS)
    return placed and len(data.files) == 1 and len(data.files[0][1]) <= MOST_BYTES


_accept_blobs.__name__ = "accept_blobs"  # as the browser calls it
Upload = _derived(gr.Image, preprocess=_path)
Canvas = _derived(gr.ImageEditor, preprocess=_sketch, accept_blobs=_accept_blobs)


def upload_field(label: str, height: int, crisp: str = "", **more) -> gr.Image:
    """A field to drop a picture on; it hands over a path in Gradio's cache."""
    looks = {"height": height, "elem_classes": ["print", "dropped", crisp], "buttons": []}
    return Upload(label=label, type="filepath", sources=["upload"], **looks, **more)


def refuse_strangers_files(blocks: gr.Blocks, cache: Cache) -> None:
    """From now on a request may name files in the cache alone; Gradio would copy or fetch others before we see them."""
    unguarded = blocks.preprocess_data

    async def preprocess_data(function, inputs: list, *more, **options):
        for path in _paths(inputs):
            if not isinstance(path, str) or not cache.holds(path):
                raise gr.Error("This file was not uploaded here, or is gone; drop it again.", print_exception=False)
        return await unguarded(function, inputs, *more, **options)

    blocks.preprocess_data = preprocess_data


def _paths(data) -> Iterator:
    """What stands under "path" anywhere in JSON values, however deep."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if value.get("path") is not None:
                yield value["path"]
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _source(file) -> Source | None:
    return file if file is None or isinstance(file, bytes) else file.path


def open_picture(source: Source | None, channels: int, background: tuple[int, int, int] = (255,) * 3) -> Image.Image:
    """What a visitor sent as a picture; raises UserError where there is none that can be read."""
    if source is None:
        raise UserError("no picture yet; drop one on the field first")
    content = source if isinstance(source, bytes) else _content(source)
    stream = io.BytesIO(content)  # without a name: a visitor must not see this machine's paths
    return load_image(stream, channels=channels, max_pixels=MOST_PIXELS, formats=FORMATS, background=background)


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # the cache is swept
        raise UserError("this picture is gone; drop it again") from None


def strokes(layers: list[Source]) -> Image.Image | None:
    """Where anything was brushed, as "L": the layers' opacity; None where nothing was."""
    painted = None
    for layer in layers:
        opacity = _opacity(layer)
        painted = opacity if painted is None else ImageChops.lighter(painted, opacity.resize(painted.size))
    return None if painted is None or painted.getbbox() is None else painted


def _opacity(layer: Source) -> Image.Image:
    """From the layer on white and on black: where it is opaque they do not differ."""
    white, black = (open_picture(layer, 1, (level,) * 3) for level in (255, 0))
    return ImageChops.invert(ImageChops.subtract(white, black))
