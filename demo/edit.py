"""The tab Edit: a picture changed as a whole, repainted where it is brushed, or drawn from the one that is given."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import gradio as gr
from PIL import Image, ImageDraw

from calotype.demo import parts
from calotype.demo.parts import MODEL, PRIVATE, crisp, for_visitors
from calotype.demo.prints import file_prints
from calotype.demo.studio import Request, Studio, clamp
from calotype.demo.uploads import Canvas, open_picture, strokes, upload_field
from calotype.errors import UserError
from calotype.images import fit_image
from calotype.pipeline.pictures import edges_of

BRUSHED = "where it is brushed"
ALL = "everywhere"
# Shares of width and height: left, top, right, bottom. They need no pointer.
REGIONS = {
    "in the middle": (0.25, 0.25, 0.75, 0.75),
    "in the left half": (0, 0, 0.5, 1),
    "in the right half": (0.5, 0, 1, 1),
    "in the upper half": (0, 0, 1, 0.5),
    "in the lower half": (0, 0.5, 1, 1),
}
CANVAS = 512  # pixels of the longer side to brush on
HEIGHT = 440  # of the field around it, on the screen
COVERED = 64  # of 255: how much of a pixel must be brushed
STRENGTH, REPAINTED = 0.6, 1.0  # of a picture as a whole, and of a part of it
VERBS = {"inpaint": "Fill it in", "edges": "Draw from it", "superres": "Enlarge"}


def edit_tab(studio: Studio) -> None:
    """The controls, the picture, and what becomes of it."""
    with gr.Row(elem_classes="bench"):
        with gr.Column(scale=4, min_width=320):
            controls, seed, begin, stop = all_controls(studio)
        with gr.Column(scale=5, min_width=360):
            sketch = sketch_field(studio)
        with gr.Column(scale=5, min_width=360):
            outcome = parts.outcome_fields(studio, "What becomes of it appears here.", "Edited pictures", "low")
    drawing = parts.Drawing(begin, partial(editing, studio), [sketch, *controls], "edit")
    parts.wire([drawing], [*outcome, seed], stop)


def sketch_field(studio: Studio) -> gr.components.Component:
    """Where the picture is dropped, and brushed where that means something; with a way to have one drawn."""
    if kind_of(studio) == "superres":
        return upload_field("The picture to enlarge", height=HEIGHT, crisp=crisp(studio))
    label = "Drop a picture, or brush" if kind_of(studio) == "edges" else "The picture to change"
    colour = "#ffffff" if kind_of(studio) == "edges" else "#e2914f"
    brush = gr.Brush(default_size=28, colors=[colour], default_color=colour, color_mode="fixed")
    height, width = (side * enlargement(studio) for side in studio.pipe.image_size)
    sketch = Canvas(label=label, type="filepath", sources=["upload"], format="png", canvas_size=(width, height),
                    layers=False, brush=brush, transforms=[], buttons=[], height=HEIGHT, placeholder="Drop a picture",
                    elem_classes=["print", "dropped"])  # fmt: skip
    sketch.upload(partial(prepared, studio), sketch, sketch, api_visibility="private", show_progress="hidden")
    if not studio.pipe.takes_image:
        own = gr.Button("Or draw one and take that")
        own.click(partial(drawn, studio), None, sketch, api_visibility="private", **MODEL)
    return sketch


def all_controls(studio: Studio) -> tuple[list[gr.components.Component], gr.Number, gr.Button, gr.Button]:
    """All but the picture, in the order that `editing` takes them; among them the seed; and the two buttons."""
    kind = kind_of(studio)
    with gr.Group():
        regions = [BRUSHED, *([] if kind == "inpaint" else [ALL]), *REGIONS]
        region = gr.Dropdown(regions, value=BRUSHED, label="It becomes new", visible=kind in ("", "inpaint"))
        strength = gr.Slider(0, 1, value=REPAINTED, step=0.01, label="Strength: 1 is all new",
                             visible=kind == "", buttons=[])  # fmt: skip
        region.input(lambda where: STRENGTH if where == ALL else REPAINTED, region, strength, **PRIVATE)
        edges = gr.Checkbox(True, label="Take the edges of the picture", visible=kind == "edges")
        label = parts.prompt_or_label(studio.pipe, nothing="none")
        count = parts.images_slider(4)
        seed, roll = parts.seed_controls()
    begin, stop = parts.two_buttons(VERBS.get(kind, "Change it"))
    with gr.Accordion("Advanced", open=False):
        steps, guidance = parts.steps_and_guidance(studio)
    return [region, strength, edges, label, count, seed, roll, steps, guidance], seed, begin, stop


def kind_of(studio: Studio) -> str:
    """What the model is given: "inpaint", "superres", "edges", or "" where any picture can be changed."""
    return studio.pipe.condition.partition(":")[0] if studio.pipe.takes_image else ""


def enlargement(studio: Studio) -> int:
    """By how much a picture of the model's is enlarged to be brushed on."""
    return max(1, CANVAS // max(studio.pipe.image_size))


def prepared(studio: Studio, sketch: dict | None):
    """A dropped picture as the model sees it, large enough to brush on."""
    if sketch is None or sketch["background"] is None:
        return gr.skip()
    with for_visitors():
        return on_canvas(studio, studio.picture(sketch["background"]))


def drawn(studio: Studio) -> dict:
    """A picture that the model draws, to brush on."""
    with for_visitors():
        *_, last = studio.develop(studio.any_request(), preview=False)
    return on_canvas(studio, last.images[0])


def on_canvas(studio: Studio, picture: Image.Image) -> dict:
    """A picture of the model's size as the value of a canvas."""
    factor = enlargement(studio)
    large = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return {"background": large, "layers": [], "composite": large}


def editing(
    studio: Studio, sketch, region, strength, edges, label, count, seed, roll, steps, guidance, halt=None
) -> Iterator[tuple]:
    """Previews while the sampler runs, then the gallery; being closed stops the sampler at the step it is in."""
    with for_visitors():
        request = studio.request(label, count, None if roll else seed, steps, guidance)
        request = replace(request, label=label or None)  # no label is none here, not any
        order = order_of(studio, sketch, region, strength, edges)
        done = yield from parts.watching(studio.develop(request, **order), halt, parts.tray, request.seed)
        if done is None:
            return
        facts = [how(studio, request.alone(i), order, region) for i in range(request.num_images)]
        gallery = parts.gallery_of(file_prints(done.images, facts))
        note = f"Seed {request.seed} · {done.steps} steps · {done.seconds:.1f} s"
        yield gr.update(visible=False), gallery, note, request.seed, gr.update(interactive=False)


def how(studio: Studio, request: Request, order: dict, region: str) -> dict:
    """What an edited picture tells of how it was made, beside what every picture tells."""
    facts = {"edit": region if "mask" in order else ALL} if not kind_of(studio) else {"edit": studio.pipe.condition}
    return studio.facts(request) | facts | {name: order[name] for name in ("strength",) if name in order}


def order_of(studio: Studio, sketch, region, strength, edges) -> dict:
    """What is given to the model beside the request; raises UserError."""
    source = sketch if isinstance(sketch, dict) else {"background": sketch, "layers": []}
    brushed, kind = strokes(source["layers"]), kind_of(studio)
    if kind == "edges":
        return {"image": edge_picture(studio, source["background"], brushed, edges)}
    picture = given_picture(studio, source["background"])
    if kind == "superres":
        return {"image": picture}
    mask = mask_of(studio, region, brushed)
    if kind == "inpaint":
        if mask is None:
            raise UserError("nothing is brushed; brush over what is to become new, or choose a region")
        return {"image": picture, "mask": mask}
    order = {"image": picture, "strength": clamp("strength", strength, 0, 1)}
    return order if mask is None else order | {"mask": mask}


def given_picture(studio: Studio, source) -> Image.Image:
    """The picture as the model takes it; one that was enlarged to be brushed on comes back exactly."""
    height, width = studio.pipe.given_size
    large = open_picture(source, channels=studio.pipe.image_channels)
    small = large.resize((width, height), Image.Resampling.BOX)
    if small.resize(large.size, Image.Resampling.NEAREST).tobytes() == large.tobytes():
        return small
    return fit_image(large, (height, width), "crop")


def mask_of(studio: Studio, region, brushed: Image.Image | None) -> Image.Image | None:
    """Where the picture becomes new, white, as "L"; None for everywhere."""
    height, width = studio.pipe.image_size
    if region == BRUSHED:
        return None if brushed is None else shrunk(brushed, (width, height))
    if region == ALL:
        return None
    if not isinstance(region, str) or region not in REGIONS:
        raise UserError(f"{str(region)[:40]!r} is no region; choose one from the list")
    left, top, right, bottom = REGIONS[region]
    mask = Image.new("L", (width, height))
    corners = (round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1)
    ImageDraw.Draw(mask).rectangle(corners, fill=255)
    return mask


def shrunk(brushed: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The strokes at (width, height): a pixel is in where enough of it was brushed."""
    return brushed.resize(size, Image.Resampling.BOX).point(lambda level: 255 if level >= COVERED else 0)


def edge_picture(studio: Studio, source, brushed: Image.Image | None, take_edges) -> Image.Image:
    """Edges of the dropped picture, or the picture as it is, with what was brushed as white lines over it."""
    height, width = studio.pipe.given_size
    mode = "L" if studio.pipe.image_channels == 1 else "RGB"
    if source is None and brushed is None:
        raise UserError("no picture yet; drop one on the field, or brush lines on it")
    picture = Image.new(mode, (width, height)) if source is None else given_picture(studio, source)
    if take_edges and source is not None:
        picture = edges_of(picture)
    if brushed is not None:
        picture.paste(Image.new(mode, (width, height), "white"), mask=shrunk(brushed, (width, height)))
    return picture
