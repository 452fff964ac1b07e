"""`calotype demo MODEL`: serve a page to play with a model, on this machine, with nothing from elsewhere."""

import os
import signal
import tempfile
from pathlib import Path

from calotype.errors import UserError

# What the server refuses: uploads beyond this size, a longer queue, files older than an hour, any call past the queue.
LAUNCH = {
    "prevent_thread_lock": True,
    "quiet": True,
    "share": False,
    "show_error": False,
    "max_file_size": "8mb",
    "max_threads": 8,
    "state_session_capacity": 200,
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "footer_links": [],
}
QUEUE = {"max_size": 16, "api_open": False}
MOST_BYTES = 9_000_000  # of any request


def main(settings) -> None:
    """Serve the demo until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes in any case
    with tempfile.TemporaryDirectory(prefix="calotype-demo-") as temporary:
        app = build(settings.model, temporary)
        url = serve(app, settings.host, settings.port, inbrowser=settings.open_browser)
        print(f"The demo of {settings.model} is at {url} (Ctrl-C ends it).", flush=True)
        app.block_thread()


def build(model: Path, temporary: str):
    """The Gradio page for a model folder or a run; the environment is set before Gradio reads it on import."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=temporary, HF_HUB_OFFLINE="1")
    from calotype.demo import page
    from calotype.demo.explore import Explorer
    from calotype.demo.run_folder import find_run

    run = find_run(model)
    still_trains = run is not None and not (run.folder / "pipeline" / "model_index.json").is_file()
    studio = None if still_trains else open_studio(model)
    explorer = Explorer.of_run(run.folder) if still_trains else None
    return page.build(studio, title_of(model), run, explorer).queue(**QUEUE)


def open_studio(model: Path):
    """The model of a folder or run, ready to serve."""
    from calotype.demo.explore import Explorer
    from calotype.demo.studio import Studio
    from calotype.pipeline.generate import find, load

    pipe, folder = load(model), find(model)
    return Studio(pipe, Explorer.open(folder, pipe.vae), folder)


def serve(app, host: str, port: int | None, inbrowser: bool = False) -> str:
    """Launch a page with the house's limits in the background and return its address."""
    from starlette.middleware import Middleware

    from calotype.demo import page
    from calotype.demo.door import Door

    guarded = {"app_kwargs": {"middleware": [Middleware(Door, most_bytes=MOST_BYTES)]}}
    looks = {"theme": page.theme(), "css": page.CSS}
    try:
        app.launch(server_name=host, server_port=port, inbrowser=inbrowser, **looks, **guarded, **LAUNCH)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); try another --port") from None
    return app.local_url


def title_of(folder: Path) -> str:
    """A name for the page: that of the run where the folder is the pipeline of one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name
