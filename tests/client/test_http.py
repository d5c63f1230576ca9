"""The HTTP source against a service that does everything wrong."""

import logging
import socket
import threading
import time
from pathlib import Path

import pytest

from tilewise.client.sources import HttpSource
from tilewise.domain.errors import SnapshotError, SourceError
from tilewise.domain.snapshot import Snapshot

from ..domain.examples import DEVICE
from .server import Service, serving

TOKEN = "very-secret"


def fetch(service: Service, *, timeout: float = 5.0) -> Snapshot:
    return HttpSource(service.address, token=TOKEN, size_limit=2**20).fetch(DEVICE, timeout=timeout)


@pytest.mark.parametrize("behaviour", ["well", "plain"])
def test_a_snapshot_is_fetched(behaviour: str, service: Service, snapshot: Snapshot) -> None:
    service.behaviour = behaviour
    assert fetch(service) == snapshot
    path, headers = service.requests[0]
    assert path == f"/v1/answers/{DEVICE}"
    assert (headers["authorization"], headers["accept-encoding"]) == (f"Bearer {TOKEN}", "gzip")


def test_an_unchanged_snapshot_is_not_sent_again(service: Service, snapshot: Snapshot) -> None:
    source = HttpSource(f"{service.address}/")
    first = source.fetch(DEVICE, timeout=5)
    assert source.fetch(DEVICE, timeout=5) is first
    assert [headers.get("if-none-match") for _, headers in service.requests] == [None, f'"{snapshot.id}"']
    assert "authorization" not in service.requests[0][1]
    service.snapshot = Snapshot(())
    assert source.fetch(DEVICE, timeout=5) == Snapshot(())


@pytest.mark.parametrize(
    ("behaviour", "error", "says"),
    [
        ("garbage", SnapshotError, "is not a tilewise snapshot"),
        ("wrong hash", SnapshotError, "is damaged"),
        ("truncated gzip", SourceError, "truncated gzip"),
        ("not gzip", SourceError, "incorrect header check"),
        ("gzip and more", SourceError, "more than its gzip stream"),
        ("brotli", SourceError, "expected gzip"),
        ("bomb", SourceError, "more than 1048576 bytes"),
        ("oversized", SourceError, "more than 1048576 bytes"),
        ("short body", SourceError, "could not be asked"),
        ("not http", SourceError, "could not be asked"),
        ("unasked 304", SourceError, "status 304, expected 200"),
        ("echo the token", SnapshotError, "schema"),
        ("401", SourceError, "check TILEWISE_TOKEN"),
        ("404", SourceError, "check that TILEWISE_SOURCE"),
        ("500", SourceError, "status 500, expected 200; see the log"),
    ],
)
def test_trouble_is_one_line_that_says_what_to_do(
    behaviour: str, error: type[Exception], says: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    service.behaviour = behaviour
    with pytest.raises(error, match=says) as caught:
        fetch(service)
    message = str(caught.value)
    assert service.address in message
    assert "\n" not in message
    assert len(message) < 500
    assert TOKEN not in message + caplog.text


def test_a_refused_connection() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(SourceError, match=r"could not be asked \(.*refused.*\); see whether TILEWISE_SOURCE"):
            HttpSource(address).fetch(DEVICE, timeout=2)


@pytest.mark.parametrize("behaviour", ["hang", "drip headers", "drip body"])
def test_the_limit_is_on_the_whole_request(behaviour: str, service: Service) -> None:
    fetch(service)  # httpx is imported
    service.behaviour = behaviour
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"gave no whole answer within 0\.3 s"):
        fetch(service, timeout=0.3)
    assert time.monotonic() - start < 0.5
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.is_alive()]


def test_the_token_stays_with_its_host(service: Service, snapshot: Snapshot) -> None:
    with serving(snapshot) as other:
        service.behaviour = f"redirect {other.address}/v1/answers/{DEVICE}"
        with pytest.raises(SourceError, match="status 307, expected 200; redirects are not followed"):
            fetch(service)
        assert other.requests == []


def test_a_device_key_cannot_leave_its_place_in_the_path(service: Service) -> None:
    HttpSource(service.address).fetch("../../x?y", timeout=5)
    assert service.requests[0][0] == "/v1/answers/..%2F..%2Fx%3Fy"


def test_a_fetch_leaves_no_file_open(service: Service) -> None:
    source = HttpSource(service.address)
    source.fetch(DEVICE, timeout=5)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        source.fetch(DEVICE, timeout=5)
    # the service's threads may still be closing their end of the last requests
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
