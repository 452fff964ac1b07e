"""The tab Generate: from noise to pictures, with everything on the way in sight."""

import math
import time
from collections.abc import Iterator
from functools import partial

import gradio as gr
from PIL import Image

from calotype.demo.parts import MODEL, PRINT, PRIVATE, crisp, data_uri, for_visitors
from calotype.demo.studio import MOST_GUIDANCE, MOST_IMAGES, MOST_PROMPT, MOST_SEED, MOST_STEPS, Request, Studio

ANY = ""  # the value behind "any"; no label is empty
PREVIEW_SECONDS = 0.12
EMPTY = '<div class="tray empty"><p>Press Generate and watch the pictures develop.</p></div>'


def generate_tab(studio: Studio) -> None:
    """From noise to pictures, with everything on the way in sight."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            orders, generate, stop = controls(studio)
            status = gr.Markdown()
        with gr.Column(scale=3, min_width=340):
            tray = gr.HTML(EMPTY, elem_classes=crisp(studio))
            gallery = gr.Gallery(visible=False, show_label=False, elem_classes=["print", crisp(studio)], **PRINT)
    running = generate.click(
        partial(developing, studio),
        orders,
        [tray, gallery, status, orders[2], stop],
        api_name="generate",
        show_progress="hidden",
        **MODEL,
    )
    stop.click(lambda: ("Stopped.", gr.update(interactive=False)), None, [status, stop], cancels=[running], **PRIVATE)


def controls(studio: Studio) -> tuple[list, gr.Button, gr.Button]:
    """What a visitor can set, in the order that `developing` takes it, and the two buttons."""
    pipe = studio.pipe
    label = prompt_or_label(pipe)
    count = gr.Slider(1, MOST_IMAGES, value=min(9, MOST_IMAGES), step=1, label="Images")
    with gr.Group():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED)
        roll = gr.Radio([("⚄ new each time", True), ("↺ reuse this one", False)], value=True, show_label=False)
    steps = gr.Slider(1, MOST_STEPS, value=min(pipe.default_steps, MOST_STEPS), step=1, label="Steps")
    guidance = gr.Slider(0, MOST_GUIDANCE, value=pipe.default_guidance, step=0.1, label="Guidance",
                         visible=pipe.condition in ("class", "text"))  # fmt: skip
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", scale=2)
        stop = gr.Button("Stop", interactive=False, scale=1)
    return [label, count, seed, roll, steps, guidance], generate, stop


def prompt_or_label(pipe) -> gr.components.FormComponent:
    """Where a visitor says what to draw."""
    if pipe.condition == "text":
        return gr.Textbox("", label="Prompt", placeholder="what to draw", max_length=MOST_PROMPT)
    choices = [("any", ANY), *((label, label) for label in pipe.labels)]
    return gr.Dropdown(choices, value=ANY, label="Label", filterable=True, visible=bool(pipe.labels))


def developing(studio: Studio, label, count, seed, roll, steps, guidance) -> Iterator[tuple]:
    """Previews while the sampler runs, then the gallery; being closed stops the sampler at the step it is in."""
    with for_visitors():
        request = studio.request(label, count, None if roll else seed, steps, guidance)
        began = shown = time.monotonic()
        hidden, can_stop = gr.update(visible=False), gr.update(interactive=True)
        yield gr.skip(), gr.skip(), "Starting …", request.seed, can_stop
        for event in studio.develop(request):
            now = time.monotonic()
            if event.step < event.steps and now - shown > PREVIEW_SECONDS:
                shown = now
                yield (
                    gr.update(value=tray_of(event), visible=True),
                    hidden,
                    f"Step {event.step} of {event.steps}",
                    request.seed,
                    can_stop,
                )
        note = f"Seed {request.seed} · {event.steps} steps · {now - began:.1f} s"
        yield (
            gr.update(visible=False),
            gr.update(value=titled(request, event.images), columns=_columns(event), visible=True),
            note,
            request.seed,
            gr.update(interactive=False),
        )


def titled(request: Request, images: list[Image.Image]) -> list:
    """Finished pictures; with their labels where those differ."""
    return list(zip(images, request.label)) if isinstance(request.label, list) else images


def tray_of(event) -> str:
    """The pictures of one step as HTML, so that previews leave no files behind."""
    pictures = "".join(f'<img alt="" decoding="sync" src="{data_uri(image)}">' for image in event.images)
    bar = f'<div class="bar"><i style="width: {100 * event.step / event.steps:.0f}%"></i></div>'
    return f'<div class="tray" style="--columns: {_columns(event)}">{bar}{pictures}</div>'


def _columns(event) -> int:
    return min(4, math.ceil(math.sqrt(len(event.images))))
