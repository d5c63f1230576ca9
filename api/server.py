"""Runs the service in this process."""

import contextlib
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from tilewise.db.session import Database
from tilewise.db.tokens import TokenRepository
from tilewise.domain.errors import SettingsError, TilewiseError

from . import log
from .app import create_app
from .settings import ServiceSettings

BACKLOG = 2048


def serve(
    database: Database,
    host: str,
    port: int,
    settings: ServiceSettings | None = None,
    *,
    insecure: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted (SIGINT or SIGTERM). `announce` is called once with the URL, when it can be opened.

    Port 0 takes a free one. Raises SettingsError when the address cannot be taken, or is not only this machine's while
    there is no token and `insecure` does not allow that; and DatabaseError when the database cannot be used.
    """
    settings = replace(settings or ServiceSettings(), any_host=insecure)
    database.check()
    if not insecure and not settings.require_tokens and not _only_here(host) and not _has_token(database):
        raise SettingsError(
            f"host {host!r} can be reached from other machines, and without a token anybody there could change what "
            "jobs run: make one with `tilewise tokens create`, or serve with --insecure"
        )
    with contextlib.closing(bind(host, port)) as listening:
        log.configure()
        announce(url_of(listening))
        # The access log costs a third of the requests per second.
        config = uvicorn.Config(
            create_app(database, settings),
            access_log=False,
            log_config=None,
            server_header=False,
            ws="none",
            lifespan="on",
            # a stream of events that nobody ends must not hold the process
            timeout_graceful_shutdown=3,
        )
        server = uvicorn.Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
        if not server.started:
            raise TilewiseError("the service did not start; the lines above say why")


def _only_here(host: str) -> bool:
    """Return whether a listener at `host` is reached from this machine alone."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
    except (OSError, ValueError):
        return True  # no address at all: `bind` says so in better words


def _has_token(database: Database) -> bool:
    with database.read() as session:
        return bool(TokenRepository(session).all())


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
