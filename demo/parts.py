"""What the tabs share: how pictures are shown, how events are queued, and how an error reaches a visitor."""

import base64
import io
from contextlib import contextmanager

import gradio as gr
from PIL import Image

from calotype.demo.studio import Studio
from calotype.errors import UserError

MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
PRINT = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}  # PNG: nothing is lost
PRIVATE = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


@contextmanager
def for_visitors():
    """Turn our own one-line errors into Gradio's, the only ones that it shows."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def crisp(studio: Studio) -> str:
    """The CSS class of small pictures: enlarged by whole pixels."""
    return "crisp" if max(studio.pipe.image_size) <= 128 else ""


def data_uri(image: Image.Image) -> str:
    """A picture as an address that holds it, so that it leaves no file behind."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escape(text: str) -> str:
    """Text as it stands, within HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
