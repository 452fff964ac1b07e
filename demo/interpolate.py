"""The tab Interpolate: the way from one picture or seed to another, and sums of codes."""

from collections.abc import Iterator
from functools import partial

import gradio as gr
from PIL import Image

from calotype.demo import parts
from calotype.demo.arithmetic import arithmetic_section
from calotype.demo.parts import PRINT, crisp, for_visitors
from calotype.demo.prints import file_animation
from calotype.demo.studio import MOST_IMAGES, MOST_SEED, Studio, clamp
from calotype.demo.uploads import upload_field
from calotype.demo.walks import Walk, walking


def interpolate_tab(studio: Studio) -> None:
    """Two ends on the left, the way between them as an animation on the right and as a film strip below."""
    with gr.Row(elem_classes="bench"):
        with gr.Column(scale=6, min_width=320):
            controls, begin, stop = all_controls(studio)
        with gr.Column(scale=4, min_width=320):
            tray = parts.tray_field("The way appears here, moving.", "low", crisp(studio))
            motion = gr.Image(label="Moving", visible=False, elem_classes=["print", crisp(studio)], **PRINT)
            status = parts.status_line()
    film = gr.HTML(label="Film strip", elem_classes=crisp(studio), apply_default_css=False)
    drawing = parts.Drawing(begin, partial(interpolating, studio), controls, "interpolate")
    parts.wire([drawing], [tray, motion, status, film], stop)
    arithmetic_section(studio)


def all_controls(studio: Studio) -> tuple[list[gr.components.Component], gr.Button, gr.Button]:
    """Both ends and how to go from one to the other, in the order that `interpolating` takes them; the two buttons."""
    with gr.Row():
        ends = [end_controls(studio, *end) for end in (("From", 1), ("To", 2))]
    with gr.Group():
        count = gr.Slider(2, MOST_IMAGES, value=9, step=1, label="Pictures on the way", buttons=[])
        with gr.Row():
            steps, guidance = parts.steps_and_guidance(studio)
    return [*ends[0], *ends[1], count, steps, guidance], *parts.two_buttons("Interpolate")


def end_controls(studio: Studio, name: str, seed: int) -> tuple:
    """One end: a seed with a label, or a picture in place of the seed."""
    known = studio.pipe.labels
    value = {} if studio.pipe.condition == "text" or not known else {"value": known[seed % len(known) - 1]}
    with gr.Column(min_width=140):
        with gr.Group():
            number = gr.Number(seed, label=f"{name} seed", precision=0, minimum=0, maximum=MOST_SEED, buttons=[])
            label = parts.prompt_or_label(studio.pipe, nothing="none", **value)
        picture = upload_field(f"{name} a picture instead", height=104, crisp=crisp(studio))
    return number, label, picture


def interpolating(
    studio: Studio, seed_a, label_a, picture_a, seed_b, label_b, picture_b, count, steps, guidance, halt=None
) -> Iterator[tuple]:
    """The pictures as they come, then the animation and the film strip; being closed stops the work at its step."""
    with for_visitors():
        walk = Walk(
            a=end_of(studio, seed_a, picture_a),
            b=end_of(studio, seed_b, picture_b),
            labels=(label_of(studio, label_a), label_of(studio, label_b)),
            request=studio.request("", clamp("pictures", count, 2, MOST_IMAGES), 0, steps, guidance),
        )
        done = yield from parts.watching(walking(studio, walk), halt, parts.tray, gr.skip())
        if done is None:
            return
        motion = gr.update(value=file_animation(done.images, "calotype-interpolation"), visible=True)
        note = f"{len(done.images)} pictures · {done.seconds:.1f} s"
        yield gr.update(visible=False), motion, note, film_of(done.images), gr.update(interactive=False)


def end_of(studio: Studio, seed, picture) -> int | Image.Image:
    """The picture where there is one, else the seed."""
    return int(clamp("seed", seed, 0, MOST_SEED)) if picture is None else studio.picture(picture)


def label_of(studio: Studio, label) -> str | None:
    """A checked label or prompt; None where none is given."""
    studio.request(label, 1, 0, 1, 1)
    return label or None


def film_of(images: list[Image.Image]) -> str:
    """The pictures as a film strip."""
    frames = "".join(
        f"<figure>{parts.cell(image, f'Picture {i}', lossless=True)}<figcaption>{i}</figcaption></figure>"
        for i, image in enumerate(images, start=1)
    )
    return f'<div class="run"><div class="film" tabindex="0" role="group" aria-label="Film strip">{frames}</div></div>'
