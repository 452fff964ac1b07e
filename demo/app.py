"""`calotype demo MODEL [MODEL ...]`: serve a page to play with models, on this machine, with nothing from elsewhere."""

import os
import signal
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from calotype.demo import access
from calotype.demo.cache import Cache
from calotype.demo.listening import address, listen
from calotype.demo.loading import Loading

if TYPE_CHECKING:
    import gradio as gr

    from calotype.demo.server import Background

# Gradio reads these on import. It would keep figures on its last 10,000 events, and make a table of them after each.
ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9),
    "GRADIO_SHARE": "False",
    "HF_HUB_OFFLINE": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def main(settings) -> None:
    """Serve the demo until Ctrl-C or SIGTERM, and leave nothing behind."""
    models = [model.resolve() for model in settings.models]
    password = access.password_for(settings.public, settings.no_auth, settings.password_file)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes in any case
    try:
        with tempfile.TemporaryDirectory(prefix="calotype-demo-", ignore_cleanup_errors=True) as temporary:
            _serve(settings, models, Path(temporary), password)
    except KeyboardInterrupt:
        print("The demo has ended.", flush=True)


def _serve(settings, models: list[Path], temporary: Path, password: str | None) -> None:
    """Listen first, which may be refused, then show the page, and load the models behind it."""
    folders = [temporary / name for name in ("cache", "spool", "empty")]
    for folder in folders:
        folder.mkdir(mode=0o700)
    cache, spool, empty = folders
    tempfile.tempdir = str(spool)
    os.chdir(empty)  # Gradio hands out files of the working directory if a function names one
    with listen(settings.address, settings.port) as listening:
        loading = Loading()
        blocks = build(models, str(cache), loading)
        from calotype.demo import server

        def ready() -> None:
            print(welcome(blocks.title, address(listening), settings, password), flush=True)
            loading.start(served.end)
            if settings.open_browser:
                webbrowser.open(address(listening))

        server.few_arenas()
        app = server.application(blocks, Cache(cache), password, settings.public, loading)
        served = server.Server(app, blocks, ready)
        served.run(sockets=[listening])
        loading.raise_error()


def welcome(title: str, url: str, settings, password: str | None) -> str:
    """What is said once the page is there."""
    lines = [f"The demo of {title.removesuffix(' · Calotype')} is at {url} (Ctrl-C ends it)."]
    if password is not None and settings.password_file is None:
        lines.append(f"Visitors log in as {access.USER} with the password {password} (a new one each time).")
    if settings.public:
        lines.append("Others can reach it; put a proxy with TLS before it where the network is not your own.")
    return "\n".join(lines)


def build(models: Path | list[Path], temporary: str, loading: Loading | None = None) -> "gr.Blocks":
    """The Gradio page for model folders or runs; the environment is set before Gradio reads it on import.

    With `loading` their weights are left to it.
    """
    os.environ.update(ENVIRONMENT, GRADIO_TEMP_DIR=os.path.realpath(temporary))
    from calotype.demo import page

    return page.build_all(registry([models] if isinstance(models, Path) else models, loading))


def registry(models: list[Path], loading: Loading | None = None) -> dict:
    """What is served by the name that visitors choose; of models of the same name the later ones have a number."""
    served = {}
    for model in models:
        name = title = title_of(model)
        while name in served:
            name = f"{title} {sum(other.startswith(title) for other in served) + 1}"
        served[name] = open_model(model, loading)
    return served


def open_model(model: Path, loading: Loading | None = None):
    """What the page shows of a model folder or run, ready to serve; its weights are left to `loading`."""
    from calotype.demo.explore import Explorer
    from calotype.demo.page import Served
    from calotype.demo.run_folder import find_run

    run = find_run(model)
    still_trains = run is not None and not (run.folder / "pipeline" / "model_index.json").is_file()
    studio = None if still_trains else open_studio(model, loading)
    explorer = Explorer.of_run(run.folder) if still_trains else None
    return Served(studio, run, explorer, open_guard(model, loading))


def open_guard(model: Path, loading: Loading | None = None):
    """The detector of anomalies of a run, None where it has none; its weights are left to `loading`."""
    from calotype.demo.anomalies import Guard

    guard = Guard.of_model(model)
    if guard is not None and loading is not None:
        loading.add(guard.load_later())
    return guard if guard is None or loading is not None else guard.load()


def open_studio(model: Path, loading: Loading | None = None):
    """The model of a folder or run, ready to serve; its weights are left to `loading`."""
    from calotype.demo.explore import Explorer
    from calotype.demo.studio import Studio
    from calotype.pipeline.model_folder import fill, find, load, outlined

    pipe = load(model) if loading is None else outlined(model)
    studio = Studio(pipe, Explorer.open(find(model), pipe.vae), find(model))
    if loading is not None:
        loading.add(studio.load_later(lambda: fill(pipe, model)))
    return studio


def serve(
    blocks: "gr.Blocks", host: str = "127.0.0.1", port: int | None = None, password: str | None = None
) -> "Background":
    """Serve a page in the background with the house's limits; raises UserError."""
    from calotype.demo import server

    listening = listen(host, port)
    cache = Cache(os.environ["GRADIO_TEMP_DIR"])
    return server.Background(server.application(blocks, cache, password), blocks, listening)


def title_of(folder: Path) -> str:
    """A name for the page: that of the run where the folder is the pipeline of one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name
