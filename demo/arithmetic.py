"""Sums of codes: a picture, plus the mean of some, minus the mean of others."""

from functools import partial

import gradio as gr

from calotype.demo import parts
from calotype.demo.parts import MODEL, crisp, for_visitors
from calotype.demo.prints import file_prints
from calotype.demo.studio import Studio, clamp
from calotype.errors import UserError
from calotype.pipeline.latent_space import arithmetic

MOST_PICTURES = 32  # in one field
MOST_AMOUNT = 3.0
FIELDS = ("These pictures", "plus the mean of", "minus the mean of")


def arithmetic_section(studio: Studio) -> None:
    """Three fields for pictures, how much, and the sums."""
    gr.HTML('<div class="run"><h3>Arithmetic <small>pictures plus what sets others apart</small></h3></div>')
    with gr.Row(elem_classes="bench"):
        fields = [pictures_field(name, crisp(studio)) for name in FIELDS]
        with gr.Column(min_width=200):
            amount = gr.Slider(-MOST_AMOUNT, MOST_AMOUNT, value=1, step=0.05, label="Times", buttons=[])
            begin = gr.Button("Add up", variant="primary")
            note = parts.status_line("The codes are added, then decoded.")
    sums = parts.gallery_field(studio, "Sums")
    begin.click(partial(adding, studio), [*fields, amount], [sums, note], api_name="arithmetic", **MODEL)


def pictures_field(name: str, crisp: str) -> gr.Gallery:
    """A field for several pictures, which are handed over unopened."""
    return gr.Gallery(label=name, type="filepath", sources=["upload"], file_types=["image"], columns=3, height=240,
                      interactive=True, buttons=[], min_width=180, elem_classes=["print", crisp])  # fmt: skip


def adding(studio: Studio, these, plus, minus, amount) -> tuple:
    """The sums as files, and a word on them."""
    with for_visitors():
        amount = clamp("times", amount, -MOST_AMOUNT, MOST_AMOUNT)
        sets = [pictures(studio, name, items) for name, items in zip(FIELDS, (these, plus, minus), strict=True)]
        with studio.working() as pipe:
            images = arithmetic(pipe, sets[0], [sets[1]], [sets[2]], amount)
        facts = {"edit": f"arithmetic, {amount:g} times {len(sets[1])} minus {len(sets[2])} pictures"}
        files = file_prints(images, [facts] * len(images))
    return gr.update(value=files, visible=True, columns=min(8, len(files))), f"{len(files)} moved by {amount:g}"


def pictures(studio: Studio, name: str, items) -> list:
    """The pictures of one field at the model's size; raises UserError for none and for too many."""
    if not items:
        raise UserError(f"{name!r}: no picture yet; drop at least one on each field")
    if len(items) > MOST_PICTURES:
        raise UserError(f"{name!r}: {len(items)} pictures are more than {MOST_PICTURES}; drop fewer")
    return [studio.picture(file) for file, _ in items]
