"""The page: its masthead, its looks, and a tab for each thing that the loaded model can do."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from calotype import report
from calotype.demo.anomalies import Guard, anomalies_tab
from calotype.demo.edit import edit_tab
from calotype.demo.generate import generate_tab
from calotype.demo.interpolate import interpolate_tab
from calotype.demo.parts import escape
from calotype.demo.reconstruct import reconstruct_tab
from calotype.demo.run_folder import RunFolder, run_tab
from calotype.demo.studio import Studio

_SHEETS = (
    report.TEMPLATE.with_name("stages.css"),
    files("calotype.density").joinpath("anomaly_rows.css"),
    Path(__file__).with_name("style.css"),
)
CSS = "".join(sheet.read_text(encoding="utf-8") for sheet in _SHEETS)
SANS = ["system-ui", "Segoe UI", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
# From the lightest shade to the darkest.
SEPIA = "fcf4eb f8e6d3 f0cba6 e8b079 e2914f c8722f a3531c 8a4516 6d3812 512a0f 351b09"
PAPER = "faf7f0 f3eee3 e4dccd cec3b1 a2968a 766a5c 574c40 423930 2b251e 1d1914 15120e"


def theme() -> gr.themes.Base:
    """Warm paper by day, a darkroom by night; fonts of the visitor's own machine."""
    return gr.themes.Base(primary_hue=_hue(SEPIA), neutral_hue=_hue(PAPER), font=SANS, font_mono=MONO).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_background_fill="#fffdf8",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
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


class Served(NamedTuple):
    """A model, or an autoencoder alone, the run of either, and its detector; what is None has no tabs."""

    studio: Studio | None
    run: RunFolder | None = None
    explorer: Any = None
    guard: Guard | None = None


def build(studio: Studio | None, title: str, run: RunFolder | None = None, explorer=None) -> gr.Blocks:
    """The page for one model, with the tabs that it can serve."""
    return build_all({title: Served(studio, run, explorer)})


def build_all(served: dict[str, Served]) -> gr.Blocks:
    """The page with a leaf for each model, which visitors turn to by its name."""
    (title, first), *others = served.items()
    with gr.Blocks(
        title=f"{', '.join(served)} · Calotype", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
    ) as app:
        if others:
            gr.Navbar(main_page_name=title)
        leaf(app, title, first)
    for title, model in others:
        with app.route(title, path_of(title)):
            leaf(app, title, model)
    return app


def path_of(title: str) -> str:
    """The address of a model's leaf."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.") or "model"


def leaf(app: gr.Blocks, title: str, served: Served) -> None:
    """Everything about one model."""
    gr.HTML(masthead(served.studio, title, served.guard), apply_default_css=False)
    if served.studio is not None:
        model_tabs(served.studio)
    elif served.explorer is not None:
        explorer_tab(served.explorer)
    if served.guard is not None:
        with gr.Tab("Anomalies"):
            anomalies_tab(served.guard)
    if served.run is not None:
        with gr.Tab("Run"):
            run_tab(served.run, app)


def model_tabs(studio: Studio) -> None:
    """A tab for each thing that the model can do."""
    studio.tell = gr.Info
    if not studio.pipe.takes_image:
        with gr.Tab("Generate"):
            generate_tab(studio)
    with gr.Tab("Edit"):
        edit_tab(studio)
    with gr.Tab("Reconstruct"):
        reconstruct_tab(studio)
    if not studio.pipe.takes_image:
        with gr.Tab("Interpolate"):
            interpolate_tab(studio)
    if studio.explorer is not None:
        explorer_tab(studio.explorer)


def explorer_tab(explorer) -> None:
    """The tab that an autoencoder needs no diffusion model for."""
    from calotype.demo.explore import explore_tab

    with gr.Tab("Explore"):
        explore_tab(explorer)


def masthead(studio: Studio | None, title: str, guard: Guard | None = None) -> str:
    """The title with a line on what the model makes."""
    alone = "A run that has no model to draw with yet" if guard is None else "A detector of anomalies"
    facts = alone if studio is None else facts_of(studio.pipe)
    return f'<div class="masthead"><p class="kicker">Calotype</p><h1>{escape(title)}</h1><p>{facts}</p></div>'


def facts_of(pipe) -> str:
    """What the model makes, of what."""
    height, width = pipe.image_size
    colour = "grey" if pipe.image_channels == 1 else "colour"
    kind, _, factor = pipe.condition.partition(":")
    told = {
        "class": f"by {len(pipe.labels)} labels",
        "text": "by prompt",
        "inpaint": "that fill a hole",
        "superres": f"from others {factor} times smaller",
        "edges": "from their edges",
    }
    return " ".join(filter(None, (f"{width}×{height} {colour} pictures", told.get(kind, ""))))
