"""The service as a process of its own, on a machine without torch."""

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.domain.examples import DEVICE, PROBLEM, answer

from tilewise.api.server import bind, url_of
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain.errors import SettingsError
from tilewise.domain.snapshot import Snapshot

SERVE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "optuna", "ray", "numpy"):
            raise ImportError(f"{name} is not part of the service")

sys.meta_path.insert(0, Blocked())

from tilewise.api.server import serve
from tilewise.db.session import Database

with Database.open(sys.argv[1], upgrade=False) as database:
    serve(database, "127.0.0.1", 0, announce=lambda url: print(url, flush=True))
print("stopped")
"""


@contextlib.contextmanager
def serving(url: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVE, url],
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_service_starts_answers_and_stops_without_torch(sqlite: Database, stop: signal.Signals) -> None:
    with sqlite.write() as session:
        AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
    assert sqlite.file is not None
    with serving(f"sqlite:///{sqlite.file}") as (process, url), httpx.Client(base_url=url, timeout=20) as client:
        assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
        assert client.get(f"/v1/answers/{DEVICE}/{PROBLEM.key}").json()["plan"]["forward"]["backend"] == "cpu_tiled"
        assert Snapshot.loads(client.get(f"/v1/answers/{DEVICE}").content).answers == (answer(),)
        assert "server" not in client.get("/").headers
        process.send_signal(stop)
        output, errors = process.communicate(timeout=20)
    assert errors == ""
    if stop is signal.SIGINT:
        assert (output, process.returncode) == ("stopped\n", 0)


def test_a_port_in_use_is_one_clear_line() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError) as caught:
            bind("127.0.0.1", port)
    assert str(caught.value) == (
        f"cannot serve on 127.0.0.1 port {port}: address already in use; try another port, or --port 0 for a free one"
    )


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "port: expected 0 to 65535, got 70000"),
        ("no such host", 0, "cannot serve on host 'no such host'"),
        ("192.0.2.1", 0, "cannot serve on 192.0.2.1 port 0: cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_taken_is_named(host: str, port: int, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        bind(host, port)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")])
def test_the_url_can_be_opened(host: str, shown: str) -> None:
    with contextlib.closing(bind(host, 0)) as listening:
        port = listening.getsockname()[1]
        assert url_of(listening) == f"http://{shown}:{port}"
        socket.create_connection((shown, port), timeout=5).close()
