"""Which addresses there are at all, and who may ask for them: what the page does not need is not there."""

import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from calotype.demo.cache import Cache

_API = "/gradio_api/"
_FILE = f"{_API}file="
_READ = re.compile(
    r"/(config|theme\.css|manifest\.json|robots\.txt|favicon\.ico|logout|healthz|readyz)/?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|queue/data|upload_progress|login_check|user|app_id|theme\.css)/?"
    r"|/gradio_api/(heartbeat/[^/]+|call/[^/]+/[^/]+|file=.+)",
    re.DOTALL,
)
_ASK = re.compile(
    r"/login/?|/gradio_api/(queue/join|upload|cancel|component_server|reset|run/[^/]+|call/[^/]+)/?", re.DOTALL
)
_HERE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)  # as a browser on this machine says
_OF_PROXIES = {b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-for", b"x-forwarded-prefix", b"forwarded"}


class Gate:
    """An ASGI middleware: 404 for what the page does not use, 403 for files elsewhere and for other sites' forms.

    Unless it is `public`, the server answers to the names of this machine alone: no other site can pass as one.
    """

    def __init__(self, app: ASGIApp, cache: Cache, pages: set[str], public: bool = False):
        self.app, self.cache, self.public = app, cache, public
        self.pages = {"/", *(f"/{page}" for page in pages)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._refusal(scope)
            await (refusal or self.app)(self._as_sent_here(scope), receive, send)
        else:
            await send({"type": "websocket.close"})  # the page has none

    def _refusal(self, scope: Scope) -> Response | None:
        """The answer to what must not come in."""
        headers = Headers(scope=scope)
        if not self.public and not _HERE.fullmatch(headers.get("host", "")):
            return PlainTextResponse("This server goes by another name.", 421)
        if not self._exists(scope["method"], scope["path"]):
            return PlainTextResponse("There is nothing here.", 404)
        if scope["path"].startswith(_FILE) and not self.cache.holds(scope["path"].removeprefix(_FILE)):
            return PlainTextResponse("There is no such file here.", 403)
        if scope["method"] == "POST" and _from_elsewhere(headers):
            return PlainTextResponse("Only the page itself may ask for this.", 403)
        return None

    def _exists(self, method: str, path: str) -> bool:
        if method == "POST":
            return _ASK.fullmatch(path) is not None
        return method in ("GET", "HEAD") and ((path.rstrip("/") or "/") in self.pages or bool(_READ.fullmatch(path)))

    def _as_sent_here(self, scope: Scope) -> Scope:
        """The request without what only a proxy may say, where there is none; Gradio believes these headers."""
        strange = {b"x-gradio-server"} | (set() if self.public else _OF_PROXIES)
        return scope | {"headers": [pair for pair in scope["headers"] if pair[0].lower() not in strange]}


def _from_elsewhere(headers: Headers) -> bool:
    """Whether a browser says that another site's page sends this, or, where it does not say, names another origin."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    host = headers.get("x-forwarded-host", headers.get("host", "")).partition(",")[0].strip()
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()
