"""A home of its own for every test, and a service that the test can break."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewise.client.background import Background
from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.software import Software

from ..domain.examples import DEVICE, SOFTWARE, answer
from .server import Service, serving

VARIABLES = ("HOME", "DB", "SOURCE", "SNAPSHOT", "TOKEN", "TIMEOUT")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, empty, with none of the caller's settings and proxies."""
    for name in VARIABLES:
        monkeypatch.delenv(f"TILEWISE_{name}", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("TILEWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def own_background(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    """A background thread that has no client of another test, and none when the test is done."""
    made = Background()
    monkeypatch.setattr("tilewise.client.client.background", made)
    yield made
    made._turns.clear()
    made._wake.set()


@pytest.fixture
def snapshot() -> Snapshot:
    return Snapshot.of([answer()])


@pytest.fixture
def service(snapshot: Snapshot) -> Iterator[Service]:
    with serving(snapshot) as running:
        yield running


def client(source: str | None = None, *, software: Software = SOFTWARE, **settings: object) -> Client:
    """Return a client of the example's device, with a limit that a well-behaved source keeps easily."""
    return Client(DEVICE, software, Settings(source=source, **{"timeout": 5.0, **settings}))  # type: ignore[arg-type]
