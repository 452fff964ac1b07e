"""The tab Reconstruct: a picture of the visitor's own, through the latents and back."""

import gradio as gr

from calotype.demo.parts import MODEL, PRINT, PRIVATE, crisp, for_visitors
from calotype.demo.studio import Studio


def reconstruct_tab(studio: Studio) -> None:
    """A picture of the visitor's own, through the latents and back."""
    with gr.Row():
        with gr.Column(min_width=240):
            upload = gr.File(label="A picture of your own", file_types=["image"], height=190)
            note = gr.Markdown("See what the autoencoder keeps of it.")
        original = gr.Image(label="As the model sees it", elem_classes=["print", crisp(studio)], **PRINT)
        copy = gr.Image(label="Back from the latents", elem_classes=["print", crisp(studio)], **PRINT)

    def show(file):
        with for_visitors():
            result = studio.reconstruct(file)
            return result.original, result.copy, f"**{result.psnr:.1f} dB** PSNR between the two"

    upload.upload(show, upload, [original, copy, note], api_name="reconstruct", **MODEL)
    upload.clear(lambda: (None, None, ""), None, [original, copy, note], **PRIVATE)
