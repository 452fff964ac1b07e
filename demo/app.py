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


def main(settings) -> None:
    """Serve the demo until Ctrl-C."""
    from calotype.pipeline.generate import find

    folder = find(settings.model)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the temporary folder goes in any case
    with tempfile.TemporaryDirectory(prefix="calotype-demo-") as temporary:
        app = build(folder, temporary)
        url = serve(app, settings.host, settings.port, inbrowser=settings.open_browser)
        print(f"The demo of {folder} is at {url} (Ctrl-C ends it).", flush=True)
        app.block_thread()


def build(folder: Path, temporary: str):
    """The Gradio page for a model folder; the environment is set before Gradio reads it on import."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=temporary, HF_HUB_OFFLINE="1")
    from calotype.demo import page
    from calotype.demo.studio import Studio
    from calotype.pipeline.generate import load

    pipe = load(folder)
    if pipe.takes_image:
        raise UserError(
            f"MODEL {folder} draws from given pictures ({pipe.condition}), which the page cannot take yet; "
            "use `calotype generate --image`."
        )
    return page.build(Studio(pipe), title_of(folder)).queue(**QUEUE)


def serve(app, host: str, port: int | None, inbrowser: bool = False) -> str:
    """Launch a page with the house's limits in the background and return its address."""
    from calotype.demo import page

    try:
        app.launch(server_name=host, server_port=port, inbrowser=inbrowser, theme=page.theme(), css=page.CSS, **LAUNCH)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); try another --port") from None
    return app.local_url


def title_of(folder: Path) -> str:
    """A name for the page: that of the run where the folder is the pipeline of one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "pipeline" else folder.name
