"""The server under the page: our own application around Gradio's, uvicorn as we want it, and how both end."""

import contextlib
import ctypes
import socket
import threading
import warnings
from collections.abc import Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.route_utils import FnIndexInferError
from gradio.utils import LRUCache
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from calotype.demo import page
from calotype.demo.access import Lock
from calotype.demo.cache import Cache
from calotype.demo.door import RETRY_AFTER, Door
from calotype.demo.gate import Gate
from calotype.demo.headers import Headers
from calotype.demo.leaving import Departures
from calotype.demo.listening import MOST_CONNECTIONS, address
from calotype.demo.loading import Loading
from calotype.demo.uploads import refuse_strangers_files

# Said in full where Gradio's own defaults or its environment variables say otherwise.
MOUNT = {
    "show_error": False,
    "max_file_size": "8mb",
    "allowed_paths": [],
    "enable_monitoring": False,
    "run_history": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "footer_links": [],
}
QUEUE = {"max_size": 16, "api_open": False, "default_concurrency_limit": 1}
THREADS, SESSIONS = 8, 200
MOST_BYTES = 9_000_000  # of an upload with what stands around it
MOST_WORDS = 256_000  # bytes of any other request; Gradio remembers what its last visitors asked for
NONSENSE = (KeyError, ValueError, RecursionError, FnIndexInferError)
_ARENA_MAX = -8  # glibc: M_ARENA_MAX
GRACE = 2  # seconds for answers under way when the server ends


def application(
    blocks: gr.Blocks, cache: Cache, password: str | None = None, public: bool = False, loading: Loading | None = None
) -> ASGIApp:
    """The page under an application of our own, with what stands before it.

    With a `password` it is asked for. A `public` page is found by any name, and from behind proxies. While models are
    still `loading` it is not ready.
    """
    blocks.max_threads, blocks.state_session_capacity = THREADS, SESSIONS
    blocks.queue(**QUEUE)
    blocks._queue.pending_messages_per_session = LRUCache(SESSIONS)  # Gradio: of the last 2,000, whoever has left
    blocks._queue.pending_event_ids_session = LRUCache(10 * SESSIONS)  # Gradio: of all, for ever
    blocks.has_launched = True  # mounting does not say so, and until then Gradio takes any file for one of its own
    refuse_strangers_files(blocks, cache)
    # Gradio lets other sites read a public page with its visitors' cookies unless the application has its own rule.
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=cache.kept_small,
        middleware=[Middleware(CORSMiddleware)],
    )
    app.get("/healthz")(_alive)
    app.get("/readyz")(_Readiness(blocks, loading or Loading()))
    limits = {"most_bytes": MOST_BYTES, "most_words": MOST_WORDS, "make_room": cache.make_room}
    door = Middleware(Door, **limits, nonsense=NONSENSE)
    before = {"middleware": [door, Middleware(Departures)]}
    looks = {"theme": page.theme(), "css": page.CSS}
    with warnings.catch_warnings():  # that pages for several models cannot be rendered here, which nobody wants
        warnings.filterwarnings("ignore", "SSR mode", UserWarning)
        gr.mount_gradio_app(app, blocks, path="/", app_kwargs=before, **looks, **MOUNT)
    pages = {name for name, *_ in blocks.pages}
    return Headers(Gate(app if password is None else Lock(app, password), cache, pages, public))


async def _alive() -> Response:
    return PlainTextResponse("alive")


class _Readiness:
    """Whether one more request would be taken."""

    def __init__(self, blocks: gr.Blocks, loading: Loading):
        self.blocks, self.loading = blocks, loading

    async def __call__(self) -> Response:
        queue = self.blocks._queue
        if not self.loading.is_done:
            return PlainTextResponse("loading", 503, {"retry-after": str(RETRY_AFTER)})
        if queue.stopped or not self.blocks.is_running or len(queue) >= QUEUE["max_size"]:
            return PlainTextResponse("busy", 503, {"retry-after": str(RETRY_AFTER)})
        return PlainTextResponse("ready")


class Server(uvicorn.Server):
    """uvicorn on a socket that listens already; `ready` is called once it serves."""

    def __init__(self, app: ASGIApp, blocks: gr.Blocks, ready: Callable[[], None] = lambda: None):
        more = {"log_level": "warning", "access_log": False, "server_header": False, "proxy_headers": False}
        limits = {"limit_concurrency": MOST_CONNECTIONS, "timeout_graceful_shutdown": GRACE}
        super().__init__(uvicorn.Config(app, ws="none", lifespan="on", **more, **limits))
        self.blocks, self.ready = blocks, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve."""
        await super().startup(sockets)
        self.ready()

    def end(self) -> None:
        """End as after Ctrl-C; any thread may say so."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop drawing, let answers under way finish for GRACE seconds, and end."""
        self.blocks._queue.close()
        self.blocks.is_running = False
        await super().shutdown(sockets)


class Background:
    """A server in a thread of its own, for tests and notebooks; `url` is where it is, `close()` ends it."""

    def __init__(self, app: ASGIApp, blocks: gr.Blocks, listening: socket.socket):
        self.url, self.blocks, started = address(listening), blocks, threading.Event()
        self.server = Server(app, blocks, started.set)
        self._thread = threading.Thread(target=self.server.run, args=([listening],), daemon=True)
        self._thread.start()
        while not started.wait(0.1):
            assert self._thread.is_alive(), "the server did not start"

    def close(self) -> None:
        """End the server; what it still draws ends at its next step."""
        self.server.should_exit = True
        self._thread.join()


def few_arenas() -> None:
    """Let glibc keep its memory in two arenas; of sixteen each would hold on to what its threads once needed."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)
