"""Runs the service in this process."""

import contextlib
import socket
from collections.abc import Callable

import uvicorn

from tilewise.db.session import Database
from tilewise.domain.errors import SettingsError, TilewiseError

from .app import create_app

BACKLOG = 2048


def serve(database: Database, host: str, port: int, *, announce: Callable[[str], None] = print) -> None:
    """Serve until interrupted (SIGINT or SIGTERM). `announce` is called once with the URL, when it can be opened.

    Port 0 takes a free one. Raises SettingsError when the address cannot be taken, and DatabaseError when the
    database cannot be used.
    """
    database.check()
    with contextlib.closing(bind(host, port)) as listening:
        announce(url_of(listening))
        # The access log costs a third of the requests per second.
        config = uvicorn.Config(
            create_app(database), access_log=False, log_level="warning", server_header=False, ws="none", lifespan="on"
        )
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        if not server.started:
            raise TilewiseError("the service did not start; the lines above say why")


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket at `host` and `port`: who connects from now on waits until the service runs.

    Raises SettingsError when the address does not exist here, is in use or is not ours to take.
    """
    if not 0 <= port <= 65535:
        raise SettingsError(f"port: expected 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise SettingsError(f"cannot serve on host {host!r}: {error.strerror}; try 127.0.0.1 or 0.0.0.0") from error
    listening = socket.socket(family, kind, protocol)
    try:
        # So that a service can be started again at once after it was stopped; does not share a port that is in use.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise SettingsError(
            f"cannot serve on {host} port {port}: {(error.strerror or str(error)).lower()}; "
            "try another port, or --port 0 for a free one"
        ) from error
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL to open: a listener on all addresses is reached by this machine's own."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
