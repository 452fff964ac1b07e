"""The grid: one setting along the rows, another along the columns, drawn in one go."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import gradio as gr
import torch
from PIL import Image

from calotype.demo import parts
from calotype.demo.parts import PRIVATE, for_visitors
from calotype.demo.prints import file_prints
from calotype.demo.studio import MOST_GUIDANCE, MOST_PROMPT, MOST_STEPS, Progress, Request, Studio, clamp
from calotype.errors import UserError
from calotype.images import image_grid, to_uint8

MOST_VALUES = 12  # along one side


class Axis(NamedTuple):
    """What varies along one side: the field of a Request, its values and how they are called."""

    field: str
    values: list
    titles: list[str]


class GridControls(NamedTuple):
    """What a visitor can set beside the controls of a single drawing, in the order that `gridding` takes it."""

    rows: gr.Dropdown
    columns: gr.Dropdown
    labels: gr.components.FormComponent
    seeds: gr.Slider
    steps_list: gr.Textbox
    guidance_list: gr.Textbox


def grid_controls(studio: Studio) -> tuple[GridControls, gr.Button]:
    """The controls of the grid and its button, folded."""
    axes = axes_of(studio)
    names = [(name.capitalize(), name) for name in axes]
    with gr.Accordion("Grid", open=False):
        with gr.Row():
            rows = gr.Dropdown(names, value=axes[0], label="Rows", min_width=120)
            columns = gr.Dropdown(names, value=axes[1], label="Columns", min_width=120)
        labels = label_values(studio, axes[0] == "labels")
        seeds = gr.Slider(1, 8, value=4, step=1, label="Seeds, from the one above", buttons=[])
        steps = gr.Textbox("4, 8, 15, 30", label="Steps of each", max_length=80, visible="steps" in axes[:2])
        guidance = gr.Textbox("1, 1.5, 2.5, 4", label="Guidance of each", max_length=80, visible=False)
        draw = gr.Button("Draw the grid", min_width=120)
    fields = [labels, seeds, steps, guidance]
    for side in (rows, columns):
        side.input(partial(shown_fields, ("labels", "seeds", "steps", "guidance")), [rows, columns], fields, **PRIVATE)
    return GridControls(rows, columns, *fields), draw


def axes_of(studio: Studio) -> list[str]:
    """What can vary with this model."""
    told = ["labels"] if studio.pipe.labels or studio.pipe.condition == "text" else []
    return [*told, "seeds", "steps", *(["guidance"] if studio.is_guided else [])]


def label_values(studio: Studio, visible: bool) -> gr.components.FormComponent:
    """Several labels, or several prompts."""
    if studio.pipe.condition == "text":
        most = MOST_VALUES * MOST_PROMPT
        return gr.Textbox("", label="Prompts, one a line", lines=4, max_length=most, visible=visible)
    return gr.Dropdown(studio.pipe.labels, value=studio.pipe.labels[:4], label="Labels", multiselect=True,
                       max_choices=MOST_VALUES, visible=visible)  # fmt: skip


def shown_fields(names: tuple[str, ...], rows: str, columns: str) -> list:
    """Only the values of what varies are asked for."""
    return [gr.update(visible=name in (rows, columns)) for name in names]


def gridding(
    studio: Studio, rows, columns, labels, seeds, steps_list, guidance_list,
    label, count, seed, roll, steps, guidance, sampler, low, high, rescale, fast, halt=None,
) -> Iterator[tuple]:  # fmt: skip
    """The grid filling up, then the sheet and every picture as files; being closed stops the sampler."""
    with for_visitors():
        seed = None if roll else seed
        base = studio.request(label, 1, seed, steps, guidance, sampler, low, high, rescale, fast).alone(0)
        values = {"labels": labels, "seeds": seeds, "steps": steps_list, "guidance": guidance_list}
        down, across = sides(studio, base, rows, columns, values)
        cells = cells_of(base, down, across)
        events = studio.develop_cells(cells)
        done = yield from parts.watching(events, halt, partial(table, down, across), base.seed)
        if done is None:
            return
        gallery = parts.gallery_of(files(studio, cells, down, across, done.images), columns=6)
        note = f"{len(cells)} pictures · {done.steps} steps · {done.seconds:.1f} s"
        shown = gr.update(value=table(down, across, Progress(1, 1, done.images)), visible=True)
        yield shown, gallery, note, base.seed, gr.update(interactive=False)


def sides(studio: Studio, base: Request, rows, columns, values: dict) -> tuple[Axis, Axis]:
    """What varies along the rows and along the columns; raises UserError where it is the same."""
    if rows == columns:
        raise UserError(f"rows and columns both vary {str(rows)[:40]!r}; choose two different settings")
    return axis(studio, base, rows, values), axis(studio, base, columns, values)


def axis(studio: Studio, base: Request, name: str, values: dict) -> Axis:
    """One side of the grid, checked like a single drawing; raises UserError."""
    if name not in axes_of(studio):
        raise UserError(f"{str(name)[:40]!r} is nothing that varies here; choose one from the list")
    if name == "labels":
        return Axis("label", *[chosen_labels(studio, values["labels"])] * 2)
    if name == "seeds":
        count = int(clamp("seeds", values["seeds"], 1, 8))
        return Axis("seed", *zip(*((base.seed + i, f"seed {base.seed + i}") for i in range(count)), strict=True))
    if name == "steps":
        steps = [int(value) for value in numbers("steps", values["steps"], 1, MOST_STEPS)]
        return Axis("num_inference_steps", steps, [f"{value} steps" for value in steps])
    scales = numbers("guidance", values["guidance"], 0, MOST_GUIDANCE)
    return Axis("guidance_scale", scales, [f"guidance {value:g}" for value in scales])


def chosen_labels(studio: Studio, labels) -> list[str]:
    """The labels, or the lines of a text as prompts; raises UserError for none and for unknown ones."""
    if studio.pipe.condition == "text" and isinstance(labels, str):
        labels = [line.strip() for line in labels.splitlines() if line.strip()]
    if not isinstance(labels, list) or not 1 <= len(labels) <= MOST_VALUES:
        raise UserError(f"the grid varies the label; give from 1 to {MOST_VALUES} of them")
    for label in labels:
        studio.request(label, 1, 0, 1, 1)
    return labels


def numbers(name: str, text, low: float, high: float) -> list[float]:
    """Numbers with commas between them, each moved into its range; raises UserError."""
    words = str(text).replace(";", ",").split(",")
    try:
        values = [float(word) for word in words if word.strip()]
    except ValueError:
        raise UserError(f"{name} {str(text)[:60]!r} must be numbers with commas between, such as 2, 4, 8") from None
    if not 1 <= len(values) <= MOST_VALUES:
        raise UserError(f"{name}: give from 1 to {MOST_VALUES} numbers with commas between")
    return [clamp(name, value, low, high) for value in values]


def cells_of(base: Request, down: Axis, across: Axis) -> list[Request]:
    """An order for each cell, row by row."""
    pairs = itertools.product(down.values, across.values)
    return [replace(base, **{down.field: row, across.field: column}) for row, column in pairs]


def table(down: Axis, across: Axis, progress: Progress) -> str:
    """The grid as HTML with a title for each row and column, without a loss when all is done."""
    head = "".join(f"<b>{parts.escape(title)}</b>" for title in across.titles)
    width, rows, ready = len(across.values), [], progress.done == progress.total
    for i, title in enumerate(down.titles):
        names = (f"{title}, {other}" for other in across.titles)
        pictures = progress.images[i * width : (i + 1) * width]
        cells = "".join(parts.cell(*pair, lossless=ready) for pair in zip(pictures, names, strict=True))
        rows.append(f"<b>{parts.escape(title)}</b>{cells}")
    done = "" if ready else parts.bar(progress.done / progress.total)
    return f'<div class="tray grid" style="--columns: {width}">{done}<i></i>{head}{"".join(rows)}</div>'


def files(studio: Studio, cells: list[Request], down: Axis, across: Axis, images: list[Image.Image]) -> list[str]:
    """The sheet, then each picture, as files that carry their settings."""
    pixels = torch.stack([to_uint8(image) for image in images])
    captions = across.titles * len(down.titles)
    sheet = image_grid(pixels, len(across.titles), captions, row_labels=down.titles)
    facts = [{"sheet": f"{down.field} by {across.field}"}, *map(studio.facts, cells)]
    return file_prints([sheet, *images], facts)
