"""A tilewise service on a loopback port that can misbehave in every way a test asks for."""

import contextlib
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tilewise.domain.snapshot import Snapshot


class Service:
    """Serves `snapshot`; a test sets `behaviour` to what goes wrong.

    requests: (path, headers) of every GET that came in; reports: the bodies of usage that were taken.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.behaviour = "well"
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.reports: list[bytes] = []
        self.stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                with contextlib.suppress(OSError):  # a client that gives up closes its end
                    answer(self, service)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with contextlib.suppress(OSError):
                    if service.behaviour == "well":
                        service.reports.append(body)
                        send(self, b"", status=204)
                    else:
                        answer(self, service)

            def log_message(self, *_: Any) -> None:
                """Keep stderr for what matters."""

        return Handler


def answer(handler: BaseHTTPRequestHandler, service: Service) -> None:
    """Answer one request the way `service.behaviour` says."""
    data = service.snapshot.dumps()
    packed = gzip.compress(data)
    etag = f'"{service.snapshot.id}"'
    match service.behaviour:
        case "well" if handler.headers.get("If-None-Match") == etag:
            send(handler, b"", {"ETag": etag}, status=304)
        case "well":
            send(handler, packed, {"ETag": etag, "Content-Encoding": "gzip"})
        case "plain":
            send(handler, data)
        case "hang":
            service.stopped.wait(30)
        case "drip headers":
            drip(handler, service, b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 1000)
        case "drip body":
            head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data)
            handler.wfile.write(head)
            drip(handler, service, data)
        case "garbage":
            send(handler, b"<html>sign in</html>")
        case "wrong hash":
            send(handler, data.replace(b'"expected_ms":10.0', b'"expected_ms":1.0'))
        case "truncated gzip":
            send(handler, packed[:-20], {"Content-Encoding": "gzip"})
        case "not gzip":
            send(handler, data, {"Content-Encoding": "gzip"})
        case "brotli":
            send(handler, data, {"Content-Encoding": "br"})
        case "gzip and more":
            send(handler, packed + b"more", {"Content-Encoding": "gzip"})
        case "bomb":
            send(handler, gzip.compress(b" " * 2**22), {"Content-Encoding": "gzip"})
        case "oversized":
            send(handler, b" " * 2**22)
        case "short body":
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[:10])
            handler.close_connection = True
        case "not http":
            handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            handler.close_connection = True
        case "unasked 304":
            send(handler, b"", status=304)
        case "echo the token":
            send(handler, b'{"id":"x","schema":"' + handler.headers["Authorization"].encode() + b'"}')
        case redirect if redirect.startswith("redirect "):
            send(handler, b"", {"Location": redirect.removeprefix("redirect ")}, status=307)
        case status:
            send(handler, b'{"title":"no"}', status=int(status))


def send(
    handler: BaseHTTPRequestHandler, body: bytes, headers: dict[str, str] | None = None, *, status: int = 200
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    if status not in (204, 304):
        handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def drip(handler: BaseHTTPRequestHandler, service: Service, data: bytes) -> None:
    for byte in data:
        handler.wfile.write(bytes([byte]))
        if service.stopped.wait(0.05):
            return


@contextlib.contextmanager
def serving(snapshot: Snapshot) -> Iterator[Service]:
    service = Service(snapshot)
    try:
        yield service
    finally:
        service.stop()
