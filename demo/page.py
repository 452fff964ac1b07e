"""The page itself: two tabs, their events, their looks."""

import base64
import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import gradio as gr
from PIL import Image

from calotype.demo.studio import MOST_GUIDANCE, MOST_IMAGES, MOST_PROMPT, MOST_SEED, MOST_STEPS, Request, Studio
from calotype.errors import UserError

ANY = ""  # the value behind "any"; no label is empty
PREVIEW_SECONDS = 0.12
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
PRINT = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}  # PNG: nothing is lost
PRIVATE = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
EMPTY = '<div class="tray empty"><p>Press Generate and watch the pictures develop.</p></div>'
SANS = ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
# From the lightest shade to the darkest.
SEPIA = "fcf4eb f8e6d3 f0cba6 e8b079 e2914f c8722f a3531c 8a4516 6d3812 512a0f 351b09"
PAPER = "faf7f0 f3eee3 e4dccd cec3b1 a2968a 766a5c 574c40 423930 2b251e 1d1914 15120e"
CSS = """
.gradio-container > main { max-width: 1100px; margin: 0 auto; }
.masthead { padding: 30px 2px 12px; }
.masthead h1 { margin: 0; font: 500 38px/1.1 "Iowan Old Style", Palatino, Georgia, "DejaVu Serif", serif; }
.masthead p { margin: 6px 0 0; color: var(--body-text-color-subdued); }
.masthead .kicker { margin: 0 0 4px; color: var(--link-text-color); letter-spacing: .14em; text-transform: uppercase;
  font-size: 12px; font-weight: 600; }
.tray { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 6px; padding: 12px;
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--block-background-fill); }
.tray img, .print img { width: 100% !important; object-fit: contain !important; border-radius: 2px; }
.print .image-frame { width: 100%; }
.html-container { padding: 0 !important; }
.crisp img { image-rendering: pixelated; }
.print .grid-wrap { max-height: none; }
.tray.empty { --columns: 1; min-height: 420px; place-items: center; color: var(--body-text-color-subdued); }
.tray .bar { grid-column: 1 / -1; height: 3px; border-radius: 2px; background: var(--border-color-primary); }
.tray .bar i { display: block; height: 100%; border-radius: 2px; background: var(--slider-color); }
"""


def theme() -> gr.themes.Base:
    """Warm paper by day, a darkroom by night; fonts of the visitor's own machine."""
    return gr.themes.Base(primary_hue=_hue(SEPIA), neutral_hue=_hue(PAPER), font=SANS, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="#fffdf8",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_400",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )


def _hue(shades: str) -> gr.themes.Color:
    return gr.themes.Color(*(f"#{shade}" for shade in shades.split()))


def build(studio: Studio, title: str) -> gr.Blocks:
    """The page for one model."""
    with gr.Blocks(
        title=f"{title} · Calotype", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as app:
        gr.HTML(masthead(studio, title))
        with gr.Tab("Generate"):
            generate_tab(studio)
        with gr.Tab("Reconstruct"):
            reconstruct_tab(studio)
    return app


def masthead(studio: Studio, title: str) -> str:
    """The title with a line on what the model makes."""
    height, width = studio.pipe.image_size
    colour = "grey" if studio.pipe.image_channels == 1 else "colour"
    labels = f", {len(studio.pipe.labels)} labels" if studio.pipe.labels else ""
    facts = f"{width}×{height} {colour} pictures{labels}"
    return f'<div class="masthead"><p class="kicker">Calotype</p><h1>{_escape(title)}</h1><p>{facts}</p></div>'


def generate_tab(studio: Studio) -> None:
    """From noise to pictures, with everything on the way in sight."""
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            orders, generate, stop = controls(studio)
            status = gr.Markdown()
        with gr.Column(scale=3, min_width=340):
            tray = gr.HTML(EMPTY, elem_classes=_crisp(studio))
            gallery = gr.Gallery(visible=False, show_label=False, elem_classes=["print", _crisp(studio)], **PRINT)
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
    pictures = "".join(f'<img alt="" decoding="sync" src="{_data_uri(image)}">' for image in event.images)
    bar = f'<div class="bar"><i style="width: {100 * event.step / event.steps:.0f}%"></i></div>'
    return f'<div class="tray" style="--columns: {_columns(event)}">{bar}{pictures}</div>'


def reconstruct_tab(studio: Studio) -> None:
    """A picture of the visitor's own, through the latents and back."""
    with gr.Row():
        with gr.Column(min_width=240):
            upload = gr.File(label="A picture of your own", file_types=["image"], height=190)
            note = gr.Markdown("See what the autoencoder keeps of it.")
        original = gr.Image(label="As the model sees it", elem_classes=["print", _crisp(studio)], **PRINT)
        copy = gr.Image(label="Back from the latents", elem_classes=["print", _crisp(studio)], **PRINT)

    def show(file):
        with for_visitors():
            result = studio.reconstruct(file)
            return result.original, result.copy, f"**{result.psnr:.1f} dB** PSNR between the two"

    upload.upload(show, upload, [original, copy, note], api_name="reconstruct", **MODEL)
    upload.clear(lambda: (None, None, ""), None, [original, copy, note], **PRIVATE)


@contextmanager
def for_visitors():
    """Turn our own one-line errors into Gradio's, the only ones that it shows."""
    try:
        yield
    except UserError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _columns(event) -> int:
    return min(4, math.ceil(math.sqrt(len(event.images))))


def _crisp(studio: Studio) -> str:
    return "crisp" if max(studio.pipe.image_size) <= 128 else ""


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
