"""The snapshot file beside the embedded database."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, answer

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.db.answers import AnswerRepository
from tilewise.db.embedded import refresh_snapshot
from tilewise.db.session import Database
from tilewise.db.snapshots import SnapshotRepository
from tilewise.domain.errors import DatabaseError
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot, path_beside


def put(database: Database, problem: Problem = PROBLEM, expected_version: int = 0) -> None:
    with database.write() as session:
        assert AnswerRepository(session).replace(answer(problem), expected_version=expected_version, reason="test")


def test_the_file_holds_the_standing_answers(sqlite: Database) -> None:
    put(sqlite)
    path = refresh_snapshot(sqlite)
    assert sqlite.file is not None
    assert path == path_beside(sqlite.file)
    with sqlite.read() as session:
        assert Snapshot.loads(path.read_bytes()) == AnswerRepository(session).snapshot()


def test_what_the_file_held_before_can_still_be_had_by_its_id(sqlite: Database) -> None:
    put(sqlite)
    path = refresh_snapshot(sqlite)
    assert path is not None
    before = path.read_bytes()
    put(sqlite, expected_version=1)
    refresh_snapshot(sqlite)
    assert path.read_bytes() != before
    ran_with = Snapshot.loads(before)
    with sqlite.read() as session:
        assert SnapshotRepository(session).load(ran_with.id).dumps() == before
    pinned = Settings(source=f"sqlite:///{sqlite.file}", snapshot=ran_with.id, timeout=5.0)
    assert Client(DEVICE, SOFTWARE, pinned).ready().snapshot_id == ran_with.id


def test_a_server_has_no_file(postgres_url: str) -> None:
    with Database.open(postgres_url, upgrade=True) as database:
        assert refresh_snapshot(database) is None


def test_an_unchanged_file_is_not_written_again(sqlite: Database) -> None:
    put(sqlite)
    path = refresh_snapshot(sqlite)
    assert path is not None
    before = path.stat().st_ino
    refresh_snapshot(sqlite)
    assert path.stat().st_ino == before
    put(sqlite, expected_version=1)
    refresh_snapshot(sqlite)
    assert path.stat().st_ino != before


def test_whoever_refreshes_last_the_file_is_whole_and_the_newest(sqlite: Database) -> None:
    problems = [Problem(batch=n + 1, heads=8, q_len=128, head_dim=64) for n in range(12)]
    assert sqlite.file is not None
    path = path_beside(sqlite.file)
    refresh_snapshot(sqlite)
    done = threading.Event()

    def verdict(problem: Problem) -> None:
        put(sqlite, problem)
        refresh_snapshot(sqlite)

    def read() -> int:
        seen = 0
        while not done.is_set():
            now = len(Snapshot.loads(path.read_bytes()).answers)
            assert now >= seen
            seen = now
        return seen

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        list(pool.map(verdict, problems))
        done.set()
        reader.result()
    assert {one.problem for one in Snapshot.loads(path.read_bytes()).answers} == set(problems)


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(sqlite: Database, tmp_path: Path) -> None:
    put(sqlite)
    assert sqlite.file is not None
    path_beside(sqlite.file).mkdir()
    with pytest.raises(DatabaseError, match=r"^cannot write .*tilewise\.snapshot\.json: Is a directory"):
        refresh_snapshot(sqlite)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]
