"""Where the server listens; known, or refused, before a model is loaded."""

import errno
import socket

from calotype.errors import UserError

FIRST_PORT, PORTS = 7860, 100
MOST_CONNECTIONS = 512


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at this port, or at the first free one from FIRST_PORT; raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS)
    for number in ports:
        try:
            return socket.create_server((host, number), family=family, backlog=MOST_CONNECTIONS)
        except OSError as error:
            reason = error
            if error.errno != errno.EADDRINUSE:
                break
    where = f"--host {host} --port {port}" if port is not None else f"--host {host}"
    raise UserError(f"{where}: cannot listen there ({reason.strerror or reason}); try another --port or --host")


def address(listening: socket.socket) -> str:
    """Where a browser on this machine finds a listening socket."""
    host, port = listening.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"
