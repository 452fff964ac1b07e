"""What the tabs share: how pictures are shown while they develop, how events are queued, how an error is told."""

import base64
import io
import logging
import math
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import gradio as gr
from PIL import Image

from calotype.demo.leaving import Halt, waited_for
from calotype.demo.studio import MOST_GUIDANCE, MOST_IMAGES, MOST_PROMPT, MOST_SEED, MOST_STEPS, Progress, Studio
from calotype.errors import UserError

ANY = ""  # the value behind "any"; no label is empty
PREVIEW_SECONDS = 0.12
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
PRINT = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}  # PNG: nothing is lost
PRIVATE = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}


@contextmanager
def for_visitors():
    """Turn our own one-line errors into Gradio's, the only ones that it shows, and others into a number in the log."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except Exception as error:
        number = secrets.token_hex(4)
        logging.getLogger(__name__).exception("error %s", number)
        words = f"Something went wrong here. Whoever runs this page finds error {number} in its log."
        raise gr.Error(words, print_exception=False) from error


class Finished(NamedTuple):
    """What a drawing came to, and how long it took."""

    images: list[Image.Image]
    steps: int
    seconds: float


def watching(
    events: Iterator[Progress], halt: Halt | None, show: Callable[[Progress], str], third=None
) -> Generator[tuple, None, Finished | None]:
    """What a tab shows while pictures develop: preview, finished ones, status, a `third` thing, the Stop button.

    Returns what came of it, or None where it was halted; being closed closes `events`.
    """
    halt = halt or Halt()
    halt.wanted = False
    began, hidden, can_stop = time.monotonic(), gr.update(visible=False), gr.update(interactive=True)
    with waited_for(halt), closing(events):
        yield gr.skip(), gr.skip(), "Starting …", third, can_stop
        for progress in paced(events, halt):
            if progress.done < progress.total:
                preview = gr.update(value=show(progress), visible=True)
                yield preview, hidden, f"Step {progress.done} of {progress.total}", third, can_stop
    if halt.wanted:
        note = f"Stopped at step {progress.done} of {progress.total}."
        yield gr.skip(), gr.skip(), note, third, gr.update(interactive=False)
        return None
    return Finished(progress.images, progress.total, time.monotonic() - began)


def paced(events: Iterator, halt: Halt) -> Iterator:
    """The events that are worth showing: one every PREVIEW_SECONDS and the last, which comes early if it is halted."""
    shown = time.monotonic()
    for event in events:
        waiting = time.monotonic() - shown < PREVIEW_SECONDS
        if not waiting:
            shown = time.monotonic()
            yield event
        if halt.wanted:
            break
    if waiting:
        yield event


# Controls


def prompt_or_label(pipe, nothing: str = "any", **looks) -> gr.components.FormComponent:
    """Where a visitor says what to draw; `nothing` is how it is called to give no label."""
    if pipe.condition == "text":
        return gr.Textbox("", label="Prompt", placeholder="what to draw", max_length=MOST_PROMPT, **looks)
    choices = [(nothing, ANY), *((label, label) for label in pipe.labels)]
    looks = {"value": ANY, "filterable": True, "visible": bool(pipe.labels)} | looks
    return gr.Dropdown(choices, label="Label", **looks)


def images_slider(value: int) -> gr.Slider:
    """How many pictures."""
    return gr.Slider(1, MOST_IMAGES, value=value, step=1, label="Images", min_width=150, buttons=[])


def seed_controls() -> tuple[gr.Number, gr.Radio]:
    """The seed, and whether a new one is rolled for each drawing."""
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, scale=2, min_width=110, buttons=[])
    choices = [("⚄ new", True), ("↺ same", False)]
    return seed, gr.Radio(choices, value=True, label="Seed of each drawing", scale=3, min_width=210)


def steps_and_guidance(studio: Studio) -> tuple[gr.Slider, gr.Slider]:
    """How long the drawing takes, and how closely it keeps to what it is told."""
    pipe = studio.pipe
    looks = {"min_width": 150, "buttons": []}
    steps = gr.Slider(1, MOST_STEPS, value=min(pipe.default_steps, MOST_STEPS), step=1, label="Steps", **looks)
    guidance = gr.Slider(0, MOST_GUIDANCE, value=pipe.default_guidance, step=0.1, label="Guidance",
                         visible=studio.is_guided, **looks)  # fmt: skip
    return steps, guidance


def two_buttons(name: str) -> tuple[gr.Button, gr.Button]:
    """The button that begins and the one that stops."""
    with gr.Row(elem_classes="begin"):
        begin = gr.Button(name, variant="primary", scale=2, min_width=120)
        stop = gr.Button("Stop", interactive=False, scale=1, min_width=80)
    return begin, stop


class Drawing(NamedTuple):
    """What a button begins: a function of the controls' values and of a Halt, and its name in the API."""

    button: gr.Button
    function: Callable
    controls: Sequence[gr.components.Component]
    name: str


def wire(drawings: list[Drawing], shown: Sequence[gr.components.Component], stop: gr.Button) -> None:
    """Let buttons begin drawings and `stop` end them at their next step; `shown` is what `watching` yields for."""
    halt = gr.State(Halt())
    begun = [
        button.click(function, [*controls, halt], [*shown, stop], api_name=name, **MODEL)
        for button, function, controls, name in drawings
    ]

    def order(halt: Halt):
        halt.wanted = True
        return gr.update(interactive=False)

    stop.click(order, halt, stop, **PRIVATE)
    for event in begun:  # however it ends, there is nothing left to stop
        event.then(lambda: gr.update(interactive=False), None, stop, **PRIVATE)


# Fields for what comes out


def tray_field(words: str, *classes: str) -> gr.HTML:
    """Where pictures are seen on their way; `words` stand there before."""
    return gr.HTML(empty(words), label="Preview", elem_classes=list(classes))


def gallery_field(studio: Studio, label: str) -> gr.Gallery:
    """Where finished pictures are, hidden until there are some."""
    looks = PRINT | {"show_label": False, "elem_classes": ["print", crisp(studio)]}
    return gr.Gallery(visible=False, label=label, **looks)


def outcome_fields(studio: Studio, words: str, title: str, *classes: str) -> tuple[gr.HTML, gr.Gallery, gr.Markdown]:
    """Where pictures develop, where they are when finished, and what is going on."""
    return tray_field(words, *classes, crisp(studio)), gallery_field(studio, title), status_line()


def gallery_of(files: list, columns: int | None = None) -> dict:
    """What puts finished files into a gallery."""
    return gr.update(value=files, columns=columns or columns_for(len(files)), visible=True)


def status_line(words: str = "") -> gr.Markdown:
    """What is going on."""
    return gr.Markdown(words, label="Status", elem_classes="status")


# Pictures as HTML: they leave no files behind


def empty(words: str) -> str:
    """The tray before there is anything in it."""
    return f'<div class="tray empty"><p>{escape(words)}</p></div>'


def tray(progress: Progress) -> str:
    """Pictures on their way, with how much is done."""
    pictures = "".join(map(cell, progress.images))
    columns = columns_for(len(progress.images))
    return f'<div class="tray" style="--columns: {columns}">{bar(progress.done / progress.total)}{pictures}</div>'


def bar(share: float) -> str:
    """A bar that is `share` full."""
    percent = f"{100 * share:.0f}"
    return (
        f'<div class="bar" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"><i style="width: {percent}%"></i></div>'
    )


def cell(image: Image.Image | None, alt: str = "", lossless: bool = False) -> str:
    """A picture as HTML; an empty place for one that is still to come."""
    if image is None:
        return '<i class="hole"></i>'
    return f'<img alt="{escape(alt)}" decoding="sync" src="{data_uri(image, lossless)}">'


def columns_for(count: int) -> int:
    """Columns of a nearly square tray."""
    return min(4, math.ceil(math.sqrt(count)))


def crisp(studio: Studio) -> str:
    """The CSS class of small pictures: enlarged by whole pixels."""
    return "crisp" if max(studio.pipe.image_size) <= 128 else "smooth"


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def escape(text: str) -> str:
    """Text as it stands, within HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
