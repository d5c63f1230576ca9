"""The database source against a real SQLite file."""

from pathlib import Path

import pytest

from tilewise.client.sources import open_source
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.domain.answer import Match
from tilewise.domain.errors import SnapshotError, SourceError
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.usage import Usage, Use

from ..domain.examples import DEVICE, PROBLEM, TILED, answer
from .conftest import client


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database with one answer for the device and one for another."""
    url = f"sqlite:///{tmp_path}/tilewise.db"
    with Database.open(url, upgrade=True) as database, database.write() as session:
        for device_key in (DEVICE, "nvidia-h200.sm90.141g"):
            AnswerRepository(session).replace(answer(device_key=device_key), expected_version=0, reason="a test")
    return url


def test_the_answers_of_the_device_are_read(url: str) -> None:
    assert open_source(url).fetch(DEVICE, timeout=5) == Snapshot.of([answer()])


def test_without_ready_a_sqlite_file_is_sealed(url: str) -> None:
    one = client(url)
    assert one.answer(PROBLEM).plan.forward == TILED
    assert one.ready() is one.table


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "tilewise.db").write_bytes(b"no database" * 100)
    with pytest.raises(SourceError, match=r"^database sqlite:///.*tilewise\.db: "):
        open_source(f"sqlite:///{tmp_path}/tilewise.db").fetch(DEVICE, timeout=5)


def test_a_server_that_refuses() -> None:
    with pytest.raises(SourceError, match=r"^database postgresql://127\.0\.0\.1:1/tiles: ") as caught:
        open_source("postgresql://me:hidden@127.0.0.1:1/tiles").fetch(DEVICE, timeout=5)
    assert "hidden" not in str(caught.value)


def test_a_channel_and_an_id_pin_a_frozen_snapshot(url: str) -> None:
    with Database.open(url, upgrade=False) as database, database.write() as session:
        frozen = AnswerRepository(session).snapshot(DEVICE)
        SnapshotRepository(session).freeze(frozen)
        ChannelRepository(session).move("stable", frozen.id, reason="test", actor="test")
        AnswerRepository(session).replace(answer(), expected_version=1, reason="a newer one")
    source = open_source(url)
    for pin in ("stable", frozen.id):
        assert source.fetch(DEVICE, timeout=5, pin=pin).dumps() == frozen.dumps()
        assert client(url, snapshot=pin).ready().snapshot_id == frozen.id
    assert client(url).ready().snapshot_id != frozen.id
    with pytest.raises(SourceError, match="has no channel 'beta'"):
        source.fetch(DEVICE, timeout=5, pin="beta")
    with pytest.raises(SnapshotError, match=r"the pinned snapshot beta cannot be had: database .* has no channel"):
        client(url, snapshot="beta").ready()


def test_use_is_kept_in_the_database(url: str) -> None:
    uses = (Use(problem=PROBLEM, match=Match.EXACT, calls=5),)
    open_source(url).report(Usage(device_key=DEVICE, snapshot=None, uses=uses), timeout=5)
    with Database.open(url, upgrade=False) as database, database.read() as session:
        (found,) = DemandRepository(session).list()
    assert (found.problem, found.calls) == (PROBLEM, 5)
