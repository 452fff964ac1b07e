"""The tab Generate: from noise to pictures, with everything on the way in sight."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import gradio as gr

from calotype.demo import parts
from calotype.demo.grid import grid_controls, gridding
from calotype.demo.parts import ANY, PRIVATE, for_visitors
from calotype.demo.prints import file_prints, read_facts
from calotype.demo.studio import MOST_GUIDANCE, MOST_SEED, MOST_STEPS, Request, Studio
from calotype.demo.uploads import upload_field
from calotype.pipeline.samplers import SAMPLERS

WAITING = "Press Generate and watch the pictures develop."
RESTORE = "Drop a picture made here to restore its settings"


class Controls(NamedTuple):
    """What a visitor can set, in the order that `developing` takes it."""

    label: gr.components.FormComponent
    count: gr.Slider
    seed: gr.Number
    roll: gr.Radio
    steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    low: gr.Slider
    high: gr.Slider
    rescale: gr.Slider
    fast: gr.Checkbox


def generate_tab(studio: Studio) -> None:
    """From noise to pictures, singly or in a grid; a picture made here brings its settings back."""
    with gr.Row(elem_classes="bench"):
        with gr.Column(scale=2, min_width=320):
            controls, generate, stop = all_controls(studio)
            grid, draw_grid = grid_controls(studio)
            dropped = upload_field(RESTORE, height=120)
        with gr.Column(scale=3, min_width=360):
            outcome = parts.outcome_fields(studio, WAITING, "Finished pictures")
    drawings = [
        parts.Drawing(generate, partial(developing, studio), controls, "generate"),
        parts.Drawing(draw_grid, partial(gridding, studio), [*grid, *controls], "grid"),
    ]
    parts.wire(drawings, [*outcome, controls.seed], stop)
    controls.fast.input(partial(switched, studio), controls.fast, list(controls[4:7]), **PRIVATE)
    restoring = partial(restore, studio)
    dropped.upload(restoring, dropped, [*controls, outcome[-1]], api_name="restore", show_progress="hidden")


def all_controls(studio: Studio) -> tuple[Controls, gr.Button, gr.Button]:
    """The controls and the two buttons."""
    with gr.Group():
        label = parts.prompt_or_label(studio.pipe)
        with gr.Row():
            seed, roll = parts.seed_controls()
        count = parts.images_slider(9)
        with gr.Row():
            steps, guidance = parts.steps_and_guidance(studio)
        fast = gr.Checkbox(False, label="Fast: the student's few steps", visible=studio.has_student)
    generate, stop = parts.two_buttons("Generate")
    with gr.Accordion("Advanced", open=False):
        own = studio.pipe.config.sampler or "saved"
        sampler = gr.Dropdown([(f"the model's own ({own})", ANY), *SAMPLERS], value=ANY, label="Sampler")
        interval = {"minimum": 0, "maximum": 1, "step": 0.01, "visible": studio.is_guided, "buttons": []}
        low = gr.Slider(value=0, label="Guidance from time (0 is the picture)", **interval)
        high = gr.Slider(value=1, label="Guidance to time (1 is noise)", **interval)
        rescale = gr.Slider(value=0, label="Guidance rescale", **interval)
    controls = Controls(label, count, seed, roll, steps, guidance, sampler, low, high, rescale, fast)
    return controls, generate, stop


def developing(
    studio: Studio, label, count, seed, roll, steps, guidance,
    sampler=ANY, low=0, high=1, rescale=0, fast=False, halt=None,
) -> Iterator[tuple]:  # fmt: skip
    """Previews while the sampler runs, then the gallery; being closed stops the sampler at the step it is in."""
    with for_visitors():
        seed = None if roll else seed
        request = studio.request(label, count, seed, steps, guidance, sampler, low, high, rescale, fast)
        done = yield from parts.watching(studio.develop(request), halt, parts.tray, request.seed)
        if done is None:
            return
        gallery = parts.gallery_of(titled(studio, request, done.images))
        note = f"Seed {request.seed} · {done.steps} steps · {done.seconds:.1f} s"
        yield gr.update(visible=False), gallery, note, request.seed, gr.update(interactive=False)


def titled(studio: Studio, request: Request, images: list) -> list[tuple[str, str]]:
    """Finished pictures as files that carry their settings; with their labels where those differ."""
    facts = [studio.facts(request.alone(i)) for i in range(len(images))]
    captions = request.label if isinstance(request.label, list) else [None] * len(images)
    return list(zip(file_prints(images, facts), captions, strict=True))


def switched(studio: Studio, fast: bool) -> tuple:
    """Steps, guidance and sampler as the student has them, or back as the model has them."""
    steps = studio.pipe.config.student_steps if fast else studio.pipe.default_steps
    return steps, gr.update(interactive=not fast), gr.update(interactive=not fast)


def restore(studio: Studio, file) -> list:
    """The controls as they were when a picture was drawn, and a word on it."""
    with for_visitors():
        facts = read_facts(file)
    label = facts.get("label", ANY)
    known = studio.pipe.condition == "text" or label in studio.pipe.labels
    low, _, high = facts.get("guidance-interval", "0 1").partition(" ")
    sampler = facts.get("sampler", ANY)
    values = Controls(
        label=label if known else ANY,
        count=1,
        seed=int(number(facts.get("seed"), 0, MOST_SEED, 0)),
        roll=False,
        steps=int(number(facts.get("steps"), 1, MOST_STEPS, studio.pipe.default_steps)),
        guidance=number(facts.get("guidance"), 0, MOST_GUIDANCE, studio.pipe.default_guidance),
        sampler=sampler if sampler in SAMPLERS else ANY,
        low=number(low, 0, 1, 0),
        high=number(high, 0, 1, 1),
        rescale=number(facts.get("guidance-rescale"), 0, 1, 0),
        fast=studio.has_student and facts.get("fast") == "yes",
    )
    return [*values, welcome(studio, facts)]


def welcome(studio: Studio, facts: dict[str, str]) -> str:
    """What to do with restored settings, and whether they can give the same picture."""
    if studio.model and facts.get("model") != studio.model:
        return "Settings restored; **another model** drew that picture, so this one will draw its own."
    return "Settings restored: press Generate to draw the picture again."


def number(text: str | None, low: float, high: float, otherwise: float) -> float:
    """The number that a picture carries, moved into its range; `otherwise` where it carries none."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return otherwise
    return otherwise if math.isnan(value) else min(max(value, low), high)
