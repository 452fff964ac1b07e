"""What somebody might send to a demo who means no good: addresses, values, names, bodies, headers, pictures."""

import io
import json
import zlib

from PIL import Image, PngImagePlugin

PREFIXES = (
    *("/gradio_api/file=", "/gradio_api/file/", "/file=", "/file/", "/static/", "/assets/", "/svelte/", "/"),
    *(
        "/gradio_api/proxy=",
        "/gradio_api/stream/",
        "/gradio_api/custom_component/a/b/c/",
        "/theme.css/",
        "/favicon.ico",
    ),
)
# {up} goes up to the root from anywhere, {file} is the canary from there without its first slash.
ROUTES = (
    *("/{file}", "{up}{file}", "%2e%2e%2f{up}{file}", "%252e%252e%252f" * 9 + "{file}", "..%2f" * 9 + "{file}"),
    *("..%5c" * 9 + "{file}", "....//" * 9 + "{file}", "..;/" * 9 + "{file}", "%c0%ae%c0%ae/" * 9 + "{file}"),
    *("%ef%bc%8e%ef%bc%8e/" * 9 + "{file}", "{cache}/../../../../../../../..//{file}", "/{file}%00.png", "//{file}"),
    *("file:///{file}", "/proc/self/root/{file}", "/{file}%20", "/./{file}", "\\{file}", "/{file}?a=b", "{link}"),
)
TARGETS = (
    *("/etc/passwd", "../../../../etc/passwd", "/proc/self/environ", "file:///etc/passwd", "FILE:///etc/passwd"),
    *("http://169.254.169.254/latest/meta-data/", "http://[::1]:{port}/", "http://127.0.0.1:{port}/a.png"),
    *(
        "http://localhost:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f000001:{port}/",
        "https://example.org/a.png",
    ),
    *("http://user@127.0.0.1:{port}/", "ftp://127.0.0.1:{port}/a", "gopher://127.0.0.1:{port}/", "//127.0.0.1:{port}/"),
    *("data:image/png;base64,AAAA", "a\0b.png", "x" * 400, "CON", "", ".", "~/.ssh/id_rsa", "{canary}", "{link}"),
    *("{cache}/../../{canary}", "{cache}", "{cache}/nothing.png"),
)
NAMES = (
    *("../../x.png", "..\\..\\x.png", "a\0b.png", "x" * 400 + ".png", "CON", "CON.png", "nul.txt", "/etc/cron.d/x"),
    *(
        "<img src=x onerror=alert(1)>.html",
        "page.html",
        "drawing.svg",
        "page.xhtml",
        "run.js",
        "a.xml",
        "\u202egnp.exe",
    ),
    *(".hidden", ".", "..", "a/b/c.png", "%2e%2e%2fx.png", "file:///x.png", "a\r\nSet-Cookie: a=b.png", "é\u0301.png"),
    *(
        "state.json",
        "playlist.m3u8",
        "x.pdf",
        "-rf",
        "$(id).png",
        "`id`.png",
        "a;b.png",
        "x.png.exe",
        " ",
        "\u2028.png",
    ),
)
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "X")
BYPASSES = (
    *(("POST", f"/gradio_api/{way}/{name}") for way in ("run", "api") for name in ("generate", "edit", "grid", "x")),
    *(
        ("POST", f"/{way}")
        for way in ("run/generate", "api/generate", "queue/join", "upload", "call/generate", "reset")
    ),
    *(("POST", f"/gradio_api/vibe-{way}/") for way in ("edit", "code", "starter-queries")),
    *(
        ("GET", f"/gradio_api/{way}")
        for way in ("openapi.json", "vibe-code", "runs", "startup-events", "token", "mcp/sse")
    ),
    *(
        ("GET", f"/{way}")
        for way in ("docs", "redoc", "openapi.json", "monitoring", "monitoring/summary", "monitoring/a")
    ),
    *(("GET", f"/gradio_api/{way}") for way in ("deep_link?session_hash=a", "dev/reload", "profiling/traces")),
    *(
        ("POST", f"/gradio_api/{way}")
        for way in ("process_recording", "stream/a", "stream/a/close", "run-history/connect")
    ),
    *((method, "/config") for method in _METHODS[2:]),
    *((method, "/gradio_api/queue/join") for method in _METHODS if method != "POST"),
)
VALUES = (
    {},
    [],
    "",
    "null",
    1,
    None,
    True,
    -1,
    1e308,
    "x" * 9000,
    {"path": 7},
    {"__type__": "update"},
    [[[]]],
    "\ud800",
)


def junk(function: int, inputs: int) -> list[tuple[str, bytes]]:
    """Addresses and JSON bodies that fit no call; the function is one of the page's, with so many inputs."""
    good = {"fn_index": function, "session_hash": "probe"}
    joins = [
        {},
        [],
        None,
        3,
        "text",
        {"data": 3},
        {"data": None, "session_hash": "a"},
        {"data": [], "fn_index": 10**30, "session_hash": "a"},
        *({"data": [], "fn_index": index, "session_hash": "a"} for index in (-1, 10**9, "x", None, [], 1.5)),
        *(good | {"session_hash": session} for session in (7, [], {}, None, "x" * 9000, "../../x", "\0")),
        *(good | {"data": [value] * inputs} for value in VALUES),
        *(good | {"data": data} for data in ([], [1] * 40, "x", {"a": 1})),
        good | {"data": [1] * inputs, "trigger_id": "x", "event_data": {"target": "/etc/passwd"}, "batched": True},
    ]
    bodies = [("queue/join", json.dumps(body).encode()) for body in joins]
    bodies += [("queue/join", body) for body in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a":' * 50_000, b"NaN")]
    others = [{}, [], 3, {"session_hash": 1}, {"data": 1, "component_id": 10**9, "session_hash": "a", "fn_name": "x"}]
    others += [{"data": 1, "component_id": i, "session_hash": "a", "fn_name": "__init__"} for i in (0, "a", None, -1)]
    for way in ("component_server", "cancel", "reset", "call/generate", "call/nothing", "run/generate", "run/order"):
        bodies += [(way, json.dumps(body).encode()) for body in others]
    return bodies


HEADERS = (
    *({"Host": host} for host in ("evil.example", "127.0.0.1.evil.example", "a b", "", "localhost:99999999", "\xe4")),
    *({"Origin": origin} for origin in ("https://evil.example", "null", "http://127.0.0.1:1")),
    *({"X-Forwarded-Host": host} for host in ("evil.example", "evil.example/<script>", "a, b", "[", "\xff")),
    *({"X-Gradio-Server": "http://evil.example"}, {"X-Forwarded-Proto": "https"}, {"X-Forwarded-For": "1.2.3.4"}),
    *({"Range": value} for value in ("bytes=0-" + "9" * 40, "bytes=-1", "bytes=a-b", "bytes=0-1,2-3", "bytes=5-1")),
    *({"Cookie": "access-token=" + "a" * 4000}, {"Authorization": "Basic !!!"}, {"Accept-Encoding": "br;q=a"}),
    *({"Content-Type": kind} for kind in ("multipart/form-data", "multipart/form-data; boundary=", "a" * 3000, "\0")),
    *({"Content-Length": value} for value in ("-1", "1e9", "9" * 60, "0x10")),
    *(
        {"Transfer-Encoding": "chunked", "Content-Length": "4"},
        {"Transfer-Encoding": "gzip"},
        {"Expect": "100-continue"},
    ),
    *({"Content-Encoding": "gzip"}, {"X-HTTP-Method-Override": "DELETE"}, {"X-Long": "a" * 70_000}),
)


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def flat_png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = bytes(1_000_000)) -> bytes:
    """A PNG whose header says more than its pixels hold."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def saved(image: Image.Image, kind: str, **more) -> bytes:
    """A picture as bytes."""
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def small() -> bytes:
    """A picture without harm."""
    return saved(Image.new("RGB", (40, 30), "teal"), "PNG")


def bombs() -> dict[str, bytes]:
    """Small files that want to be large in memory."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "x" * 30_000_000, zip=True)
    profile = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", (9).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0]))
    profile += chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(60_000_000), 9)) + small()[33:]
    frames = [Image.new("P", (1500, 1500), i) for i in range(60)]
    lied = bytearray(saved(Image.new("RGB", (16, 16)), "JPEG"))
    at = lied.index(b"\xff\xc0")
    lied[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return {
        "60,000 square": flat_png(60_000, 60_000),
        "widest": flat_png(2**31 - 1, 1),
        "16 bits": flat_png(30_000, 30_000, 16, 2),
        "just too large": saved(Image.new("1", (4001, 4000)), "PNG"),
        "a line": saved(Image.new("L", (65_000, 300)), "PNG"),
        "text": saved(Image.new("RGB", (9, 9)), "PNG", pnginfo=text),
        "profile": profile,
        "frames": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "jpeg": bytes(lied),
        "tiff": saved(Image.new("1", (20_000, 20_000)), "TIFF", compression="group4"),
        "webp": saved(Image.new("RGB", (9000, 9000)), "WEBP"),
    }
