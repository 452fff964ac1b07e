"""The tab Reconstruct: a picture of the visitor's own, through the latents and back."""

from functools import partial
from typing import NamedTuple

import gradio as gr
from diffusers import VQModel
from PIL import Image

from calotype.demo import codes, parts
from calotype.demo.parts import MODEL, PRINT, PRIVATE, crisp, for_visitors
from calotype.demo.prints import file_prints
from calotype.demo.studio import Studio
from calotype.demo.uploads import upload_field

HINT = "Drop a picture to see what the autoencoder keeps of it."


class Reconstruction(NamedTuple):
    """A picture and what comes back of it, where they differ, its code, and the figures; what the tab shows."""

    pair: tuple[Image.Image, Image.Image]
    error: Image.Image
    code: Image.Image
    note: str


def reconstruct_tab(studio: Studio) -> None:
    """Before and after on a slider, the error, and the code as a picture."""
    with gr.Row(elem_classes="bench"):
        with gr.Column(scale=2, min_width=320):
            upload = upload_field("A picture of your own", height=250, crisp=crisp(studio))
            own = gr.Button("Or draw one and take that", visible=not studio.pipe.takes_image)
            note = parts.status_line(HINT)
            with gr.Row():
                tile = PRINT | {"visible": False, "min_width": 140, "elem_classes": ["print", "crisp"]}
                error = gr.Image(label="Where they differ", **tile)
                code = gr.Image(label=code_title(studio.pipe), **tile)
        with gr.Column(scale=3, min_width=360):
            tray = parts.tray_field("Before and after appear here; drag the line between them.")
            pair = gr.ImageSlider(label="Left the picture, right what comes back of it", format="png",
                                  interactive=False, visible=False, max_height=2000, buttons=["fullscreen"],
                                  elem_classes=["print", crisp(studio)])  # fmt: skip
    shown = [pair, error, code, note, tray]
    upload.upload(partial(show, studio), upload, shown, api_name="reconstruct", **MODEL)
    own.click(partial(show_own, studio), None, [upload, *shown], api_visibility="private", **MODEL)
    hidden = gr.update(visible=False, value=None)
    upload.clear(lambda: (hidden, hidden, hidden, HINT, gr.update(visible=True)), None, shown, **PRIVATE)


def show(studio: Studio, file) -> tuple:
    """A visitor's picture through the latents and back, as the tab shows it."""
    with for_visitors():
        result = reconstruct(studio, studio.picture(file))
    *pictures, note = result
    return *(gr.update(value=picture, visible=True) for picture in pictures), note, gr.update(visible=False)


def show_own(studio: Studio) -> tuple:
    """The same for a picture that the model draws."""
    with for_visitors():
        request = studio.any_request()
        *_, last = studio.develop(request, preview=False)
        (file,) = file_prints(last.images, [studio.facts(request.alone(0))])
    return file, *show(studio, file)


def reconstruct(studio: Studio, original: Image.Image) -> Reconstruction:
    """A picture of the model's size, its copy, and what there is to say about both."""
    z = studio.encode(original)
    copy = studio.decode(z).convert(original.mode)
    sizes = f"{z.numel():,} numbers ({'×'.join(map(str, z.shape))})"
    pixels = original.width * original.height * len(original.getbands())
    note = [f"**{codes.psnr(original, copy):.1f} dB** PSNR between the two"]
    if isinstance(studio.pipe.vae, VQModel):
        code, count = codes.token_map(studio.pipe.vae, z)
        note.append(f"{code.width * code.height:,} tokens, {count:,} of them different")
    else:
        code = codes.code_tiles(z)
        note.append(f"the code: {sizes} for {pixels:,} of the picture")
    return Reconstruction((original, copy), codes.error_map(original, copy), code, " · ".join(note))


def code_title(pipe) -> str:
    """What the picture of the code shows."""
    return "Its tokens" if isinstance(pipe.vae, VQModel) else "Its code by channel"
