"""Answers from the tilewise service: GET {base}/v1/answers/{device}, a snapshot with its id as ETag, gzipped.

The service is not trusted: a request ends at its deadline whatever comes in, a body has a size limit after
decompression, a redirect is not followed (the token stays with its host), and Snapshot.loads verifies what arrived.
"""

import contextlib
import socket
import threading
import time
import zlib
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote, urlsplit

from tilewise.domain import codec
from tilewise.domain.errors import RefusedError, SettingsError, SnapshotError, SourceError
from tilewise.domain.snapshot import Snapshot, is_snapshot_id
from tilewise.domain.usage import Usage

from ..deadline import too_slow
from ..settings import without_secrets

if TYPE_CHECKING:
    import httpx

SIZE_LIMIT = 64 * 2**20
_MESSAGE_LIMIT = 400
_ADVICE = {
    401: "check TILEWISE_TOKEN",
    403: "check TILEWISE_TOKEN",
    404: "check that TILEWISE_SOURCE is the base address of a tilewise service, and that it has TILEWISE_SNAPSHOT",
    429: "it is overloaded; try again later",
}


class HttpSource:
    """The service at `base`. Raises SettingsError for an address that cannot be one.

    size_limit: bytes of one body after decompression.
    """

    local = False

    def __init__(self, base: str, *, token: str | None = None, size_limit: int = SIZE_LIMIT) -> None:
        self.name = f"service {without_secrets(base)}"
        self._base = _checked(base)
        self._token, self._size_limit = token, size_limit
        self._last: dict[str, tuple[str, Snapshot]] = {}  # path -> ETag and what came with it

    def fetch(
        self, device_key: str, *, timeout: float, pin: str | None = None, known: Snapshot | None = None
    ) -> Snapshot:
        path = f"/v1/answers/{quote(device_key, safe='')}"
        if pin is not None:
            path = f"/v1/snapshots/{pin}" if is_snapshot_id(pin) else f"/v1/channels/{quote(pin, safe='')}/snapshot"
        etag, last = self._last.get(path, (None, None))
        if etag is None and known is not None:
            etag, last = f'W/"{known.id}"', known
        headers = {"If-None-Match": etag} if etag else {}
        status, data, etag = self._request("GET", path, headers, b"", timeout)
        if status == 304 and last is not None:
            return last
        self._check_status(status, 200)
        try:
            snapshot = Snapshot.loads(data, name=f"what {self.name} sent")
        except SnapshotError as error:
            raise SnapshotError(self._clean(str(error))) from error
        if etag:
            self._last[path] = (etag, snapshot)
        return snapshot

    def report(self, usage: Usage, *, timeout: float) -> None:
        body = {"device": usage.device_key, "snapshot": usage.snapshot, "uses": codec.to_json(usage.uses)}
        headers = {"Content-Type": "application/json"}
        status, _, _ = self._request("POST", "/v1/usage", headers, codec.canonical(body), timeout)
        self._check_status(status, 204)

    def _request(
        self, method: str, path: str, more: dict[str, str], content: bytes, timeout: float
    ) -> tuple[int, bytes, str | None]:
        """Return status, body (of a 200 only) and ETag of a response that came whole within `timeout` seconds."""
        import httpx  # 0.1 s, which a job with a local snapshot need not spend

        headers = {"Accept": "application/json", "Accept-Encoding": "gzip", "User-Agent": "tilewise", **more}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        with _Watchdog(timeout) as watchdog:
            try:
                # one client per request: nothing is shared with a forked child, and requests are rare
                with (
                    httpx.Client(timeout=timeout, follow_redirects=False) as client,
                    client.stream(
                        method, self._base + path, headers=headers, content=content,
                        extensions={"trace": watchdog.trace},
                    ) as response,
                ):  # fmt: skip
                    if response.has_redirect_location:
                        raise SourceError(
                            f"{self.name} answered with status {response.status_code}, expected 200; redirects are not "
                            "followed: set TILEWISE_SOURCE to where the service really is"
                        )
                    data = self._read(response, watchdog) if response.status_code == 200 else b""
                    return response.status_code, data, response.headers.get("ETag")
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, zlib.error) as error:
                if watchdog.expired or isinstance(error, httpx.TimeoutException):
                    raise SourceError(too_slow(self.name, timeout)) from error
                raise SourceError(self._clean(f"{self.name} could not be asked ({error}); {_REACH}")) from error

    def _check_status(self, status: int, expected: int) -> None:
        if status == expected:
            return
        advice = _ADVICE.get(status, "see the log of the service")
        kind = RefusedError if status in (401, 403) else SourceError
        raise kind(f"{self.name} answered with status {status}, expected {expected}; {advice}")

    def _read(self, response: "httpx.Response", watchdog: "_Watchdog") -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("gzip", "identity"):
            raise SourceError(self._clean(f"{self.name} sent encoding {encoding!r}, expected gzip; {_REACH}"))
        unzip = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
        body = bytearray()
        for chunk in response.iter_raw():
            # one byte above the limit is enough to know, however much a chunk would unpack to
            body += unzip.decompress(chunk, self._size_limit + 1 - len(body)) if unzip else chunk
            if len(body) > self._size_limit:
                raise SourceError(f"{self.name} sent more than {self._size_limit} bytes; {_REACH}")
            if unzip and unzip.unused_data:
                raise SourceError(f"{self.name} sent more than its gzip stream; {_REACH}")
            if watchdog.expired:
                raise SourceError(too_slow(self.name, watchdog.timeout))
        if unzip and not unzip.eof:
            raise SourceError(f"{self.name} sent a truncated gzip stream; {_REACH}")
        return bytes(body)

    def _clean(self, message: str) -> str:
        """Return `message` as one line of bounded length without the token: parts of it were sent to us."""
        line = " ".join(message.split())
        if self._token:
            line = line.replace(self._token, "***")
        return line if len(line) <= _MESSAGE_LIMIT else f"{line[:_MESSAGE_LIMIT]}..."


_REACH = "see whether TILEWISE_SOURCE is the base address of a tilewise service that is up"


def _checked(base: str) -> str:
    """Return `base` without a slash at its end. The messages do not quote it: it may hold a password."""
    try:
        parts = urlsplit(base)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise SettingsError(f"source: expected http(s)://host[:port][/path], got a bad address ({error})") from error
    if not host or any(character <= " " for character in base):
        raise SettingsError(f"source: expected http(s)://host[:port][/path], got {without_secrets(base)!r}")
    if "@" in parts.netloc:
        raise SettingsError("source: a password in an http address would be logged; give it as TILEWISE_TOKEN")
    if parts.query or parts.fragment:
        raise SettingsError(f"source: expected the base address of the service, got one with ? or #: {_shown(parts)}")
    return base.rstrip("/")


def _shown(parts: Any) -> str:
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


class _Watchdog:
    """Shuts the connection of one request down at its deadline, so that even a body of one byte a second ends then.

    httpx limits each phase and each read, not their sum. Its trace extension shows the socket; a duplicate shares the
    connection, also below TLS.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(timeout, self._shut)
        self._timer.daemon = True

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._deadline

    def trace(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            connection = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._sockets.append(connection.dup())
            if self.expired:
                self._shut()

    def _shut(self) -> None:
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()
