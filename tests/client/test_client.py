"""The client: what is sealed when, and that no source can break or delay a run."""

import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.domain.answer import Match
from tilewise.domain.errors import DeviceError, SettingsError, SnapshotError
from tilewise.domain.snapshot import Snapshot

from ..domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer
from .conftest import client
from .server import Service

OTHER = replace(PROBLEM, head_dim=32, v_head_dim=32)
NEWER = Snapshot.of([answer(), answer(OTHER)])


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def test_a_new_machine_answers_with_the_default_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = client().answer(PROBLEM)
    assert (found.match, found.plan.forward) == (Match.DEFAULT, SDPA)
    assert len(client().ready()) == 0
    assert warned(caplog) == []


def test_the_constructor_touches_nothing(home: Path, service: Service) -> None:
    start = time.perf_counter()
    client(service.address)
    assert time.perf_counter() - start < 0.05
    assert service.requests == []
    assert not home.exists()
    code = "import sys, tilewise.client.client; sys.exit('httpx' in sys.modules or 'sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": "src"}).returncode == 0


def test_settings_that_make_no_sense_are_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="expected http"):
        client("gopher://x")
    with pytest.raises(DeviceError, match="not a device key"):
        Client("../etc", SOFTWARE, Settings())
    with pytest.raises(SettingsError, match="timeout"):
        client().ready(timeout=0)


def test_without_ready_the_first_answer_seals_the_embedded_snapshot(home: Path, snapshot: Snapshot) -> None:
    write(home / "tilewise.snapshot.json", snapshot.dumps())
    one = client()
    assert one.answer(PROBLEM).plan.forward == TILED
    write(home / "tilewise.snapshot.json", NEWER.dumps())
    assert one.answer(OTHER).match is Match.DEFAULT
    assert one.table.snapshot_id == snapshot.id


@pytest.mark.parametrize("setting", ["source", "snapshot"])
def test_without_ready_a_snapshot_file_is_sealed(setting: str, tmp_path: Path, snapshot: Snapshot) -> None:
    path = write(tmp_path / "answers.json", snapshot.dumps())
    one = Client(DEVICE, SOFTWARE, Settings(**{setting: path}))  # type: ignore[arg-type]
    assert one.answer(PROBLEM).plan.forward == TILED


def test_without_ready_the_service_is_not_asked(service: Service, snapshot: Snapshot) -> None:
    assert client(service.address).answer(PROBLEM).match is Match.DEFAULT
    assert service.requests == []
    client(service.address).ready()
    assert client(service.address).answer(PROBLEM).plan.forward == TILED
    assert client(service.address).table.snapshot_id == snapshot.id
    assert len(service.requests) == 1
    assert client("http://other.invalid").answer(PROBLEM).match is Match.DEFAULT


def test_ready_seals_what_the_service_has(service: Service, snapshot: Snapshot) -> None:
    one = client(service.address, token="very-secret")
    table = one.ready()
    assert (table.snapshot_id, table.origin) == (snapshot.id, f"service {service.address}")
    service.snapshot = NEWER
    assert one.ready() is table
    assert one.answer(PROBLEM).plan.forward == TILED
    assert one.answer(OTHER).match is Match.DEFAULT
    assert len(service.requests) == 1


def test_ready_replaces_what_an_answer_before_it_sealed(service: Service) -> None:
    one = client(service.address)
    assert one.answer(PROBLEM).match is Match.DEFAULT
    one.ready()
    assert one.answer(PROBLEM).plan.forward == TILED


def test_refresh_reseals_and_a_failed_one_keeps_the_table(
    service: Service, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    one = client(service.address)
    table = one.refresh()
    assert one.refresh() is table  # 304: the same answers
    service.snapshot = NEWER
    assert one.refresh().snapshot_id == NEWER.id
    assert one.answer(OTHER).plan.forward == TILED
    service.behaviour = "wrong hash"
    assert one.refresh().snapshot_id == NEWER.id
    assert len(warned(caplog)) == 1
    assert "keeps its answers" in warned(caplog)[0]
    service.behaviour, service.snapshot = "well", snapshot
    assert one.refresh().snapshot_id == snapshot.id


@pytest.mark.parametrize("behaviour", ["500", "garbage", "wrong hash", "truncated gzip", "not http", "echo the token"])
def test_trouble_is_one_warning_and_the_default(
    behaviour: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.behaviour = behaviour
    one = client(service.address, token="very-secret")
    assert len(one.ready()) == 0
    assert one.answer(PROBLEM).plan.forward == SDPA
    (message,) = warned(caplog)
    assert message.endswith("This run goes on with the default answers.")
    assert "very-secret" not in caplog.text


def test_trouble_seals_the_last_download_before_the_embedded_snapshot(
    service: Service, home: Path, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
) -> None:
    write(home / "tilewise.snapshot.json", NEWER.dumps())
    service.behaviour = "500"
    assert client(service.address).ready().snapshot_id == NEWER.id
    service.behaviour = "well"
    client(service.address).ready()
    service.behaviour = "500"
    assert client(service.address).ready().snapshot_id == snapshot.id
    assert ["embedded" in warned(caplog)[0], "last download" in warned(caplog)[1]] == [True, True]
    (file,) = (home / "cache").glob("*.snapshot.json")
    file.write_bytes(file.read_bytes().replace(b"10.0", b"99.0"))
    assert client(service.address).ready().snapshot_id == NEWER.id


def test_a_cache_that_cannot_be_written_is_no_trouble(
    service: Service, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(home / "cache", b"a file where the folder should be")
    assert client(service.address).ready().snapshot_id == service.snapshot.id
    assert warned(caplog) == []


@pytest.mark.parametrize("behaviour", ["hang", "drip headers", "drip body"])
def test_a_hanging_service_holds_ready_for_its_limit_only(behaviour: str, service: Service) -> None:
    service.behaviour = behaviour
    one = client(service.address)
    start = time.monotonic()
    one.ready(timeout=0.3)
    assert time.monotonic() - start < 0.5
    service.behaviour = "well"
    assert one.refresh().snapshot_id == service.snapshot.id


def test_an_answer_does_not_wait_for_ready(service: Service) -> None:
    service.behaviour = "hang"
    one = client(service.address)
    thread = threading.Thread(target=one.ready, args=(0.5,))
    thread.start()
    start = time.monotonic()
    one.answer(PROBLEM)
    assert time.monotonic() - start < 0.2
    thread.join()


def test_an_error_of_our_own_ends_no_run(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Snapshot:
        raise ZeroDivisionError("oops")

    one = client()
    monkeypatch.setattr(one._source, "fetch", broken)
    assert one.answer(PROBLEM).match is Match.DEFAULT
    assert len(one.ready()) == 0
    assert all("ZeroDivisionError: oops" in message for message in warned(caplog))


def test_a_pinned_file_must_be_there(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "pinned.json"
    one = client("http://unused.invalid", snapshot=str(path))
    with pytest.raises(SnapshotError, match=r"the pinned snapshot .*pinned\.json cannot be had: .* does not exist"):
        one.ready()
    assert one.answer(PROBLEM).match is Match.DEFAULT
    write(path, snapshot.dumps()[:-1])
    with pytest.raises(SnapshotError, match="is not a tilewise snapshot"):
        one.ready()
    write(path, snapshot.dumps())
    assert one.ready().snapshot_id == snapshot.id
    path.unlink()
    assert one.refresh().snapshot_id == snapshot.id


def test_a_pinned_id_is_what_the_service_must_have(service: Service, snapshot: Snapshot) -> None:
    with pytest.raises(SnapshotError, match=f"holds snapshot {snapshot.id}, expected the pinned {'0' * 64}"):
        client(service.address, snapshot="0" * 64).ready()
    assert client(service.address, snapshot=snapshot.id.upper()).ready().snapshot_id == snapshot.id
    service.snapshot = NEWER
    again = client(service.address, snapshot=snapshot.id)  # a restart, after the service has moved on
    assert again.answer(PROBLEM).plan.forward == TILED
    assert again.ready().snapshot_id == snapshot.id
    assert again.refresh().snapshot_id == snapshot.id
    service.behaviour = "500"
    with pytest.raises(SnapshotError, match=r"cannot be had: .* status 500"):
        client(service.address, snapshot="0" * 64).ready()


def test_a_pinned_id_of_the_embedded_snapshot(home: Path, snapshot: Snapshot) -> None:
    with pytest.raises(SnapshotError, match="expected the pinned"):
        client(snapshot=snapshot.id).ready()
    write(home / "tilewise.snapshot.json", snapshot.dumps())
    assert client(snapshot=snapshot.id).ready().snapshot_id == snapshot.id


def test_a_group_seals_what_it_agreed_on(service: Service) -> None:
    one = client(service.address)
    assert one.seal(NEWER, origin="rank 0").origin == "rank 0"
    assert one.ready().snapshot_id == NEWER.id
    assert service.requests == []


def test_threads_get_the_same_answer(service: Service) -> None:
    one = client(service.address)
    found = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        one.ready()
        found.append(one.answer(PROBLEM))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert {id(item) for item in found} == {id(found[0])}
    assert len(service.requests) == 1


def test_a_forked_child_goes_on(service: Service) -> None:
    one = client(service.address)
    one.ready()
    with one._fetching, one._sealing:  # as if another thread were in refresh() when the fork happens
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any thread at a fork
            child = os.fork()
        if child == 0:
            same = one.ready() is one.table and one.answer(PROBLEM).plan.forward == TILED
            os._exit(0 if same and one.refresh().snapshot_id == service.snapshot.id else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
