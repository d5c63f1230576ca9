"""What goes on beside a run: fresh downloads, reports of use, back-off, peers of one machine, forks, signatures."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tilewise.client import background as background_module
from tilewise.client.background import LAST_BACKOFF, POLL_SECONDS, REFUSED_BACKOFF, Background, _Turn, after
from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.client.usage import MAX_KINDS, Recorder
from tilewise.db import signature
from tilewise.domain.answer import Match
from tilewise.domain.errors import RefusedError, SettingsError, SnapshotError
from tilewise.domain.snapshot import Snapshot

from ..domain.examples import DEVICE, PROBLEM, SOFTWARE, TILED, answer
from .conftest import client
from .server import Service, serving

ROOT = Path(__file__).resolve().parents[2]
OTHER = replace(PROBLEM, head_dim=32, v_head_dim=32)
NEWER = Snapshot.of([answer(), answer(OTHER)])


def until(true: Callable[[], bool], limit: float = 10.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, own_background: Background) -> Background:
    """The background thread, which does not wait for minutes."""
    monkeypatch.setattr(background_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(background_module, "FIRST_BACKOFF", 0.02)
    monkeypatch.setattr(background_module, "REFUSED_BACKOFF", 0.02)
    return own_background


def test_newer_answers_reach_the_disk_and_not_the_run(service: Service, snapshot: Snapshot, quick: Background) -> None:
    one = client(service.address)
    one.ready()
    service.snapshot = NEWER
    cached = one._cache
    until(lambda: (found := cached.load(*one._cache_key())) is not None and found.id == NEWER.id)
    assert one.table.snapshot_id == snapshot.id
    assert one.answer(OTHER).match is Match.DEFAULT
    assert quick._thread is not None
    assert quick._thread.daemon
    assert one.refresh().snapshot_id == NEWER.id


def test_use_and_misses_are_reported_once(service: Service, snapshot: Snapshot, quick: Background) -> None:
    one = client(service.address, token="very-secret")
    one.ready()
    for problem, calls in ((PROBLEM, 5), (OTHER, 2)):
        one.used(one.answer(problem)).calls += calls
    until(lambda: bool(service.reports))
    one.used(one.answer(OTHER)).calls += 1
    until(lambda: len(service.reports) == 2)
    first, second = (json.loads(body) for body in service.reports)
    assert (first["device"], first["snapshot"]) == (DEVICE, snapshot.id)
    assert {(use["problem"], use["match"]): use["calls"] for use in first["uses"]} == {
        (PROBLEM.key, "exact"): 5,
        (OTHER.bucket().key, "default"): 2,
    }
    assert [use["calls"] for use in second["uses"]] == [1]
    assert quick is not None


def test_what_could_not_be_reported_is_reported_later(service: Service, quick: Background) -> None:
    one = client(service.address)
    one.ready()
    one.used(one.answer(PROBLEM)).calls += 3
    service.behaviour = "500"
    until(lambda: all(turn.backoff > 0 for turn in quick._turns.values()))
    one.used(one.answer(PROBLEM)).calls += 4
    service.behaviour = "well"
    until(lambda: bool(service.reports))
    assert sum(use["calls"] for body in service.reports for use in json.loads(body)["uses"]) == 7


def test_a_refused_token_is_tried_again(service: Service, quick: Background) -> None:
    service.behaviour = "401"
    one = client(service.address, token="old")
    one.ready()
    until(lambda: len(service.requests) > 3)
    with pytest.raises(RefusedError, match="check TILEWISE_TOKEN"):
        one.revalidate()
    service.behaviour = "well"  # the token was renewed
    until(lambda: one._cache.load(*one._cache_key()) is not None)
    assert quick is not None


def test_the_waits_grow_to_a_limit_and_start_anew() -> None:
    random.seed(0)
    turn = _Turn(0.0)
    waits = [after(turn, failed=True, refused=False) for _ in range(8)]
    bounds = [1, 2, 4, 8, 16, 30, 30, 30]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert turn.backoff == LAST_BACKOFF
    assert REFUSED_BACKOFF / 2 <= after(turn, failed=True, refused=True) <= REFUSED_BACKOFF
    assert POLL_SECONDS / 2 <= after(turn, failed=False, refused=False) <= POLL_SECONDS
    assert after(turn, failed=True, refused=False) <= 1


def test_a_client_that_nobody_holds_is_not_kept(service: Service, quick: Background) -> None:
    one = client(service.address)
    one.ready()
    assert len(quick._turns) == 1
    del one
    until(lambda: len(quick._turns) == 0)


def test_kinds_of_use_are_bounded() -> None:
    recorder = Recorder()
    found = answer()
    for batch in range(1, MAX_KINDS + 50):
        recorder.of(replace(found, problem=replace(PROBLEM, batch=batch))).calls += 1
    reports = list(recorder.batches(DEVICE, None))
    assert sum(len(usage.uses) for usage, _ in reports) == MAX_KINDS
    assert max(len(usage.uses) for usage, _ in reports) <= 1000


PEER = """
import sys
from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tests.domain.examples import DEVICE, SOFTWARE
print(Client(DEVICE, SOFTWARE, Settings(source=sys.argv[1], timeout=20)).ready().snapshot_id)
"""


def test_of_the_processes_of_a_machine_one_asks(service: Service, snapshot: Snapshot) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", PEER, service.address],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in peers] == [snapshot.id] * 4
    assert len(service.requests) <= 2  # rank 0 asks even if a peer was there before it


def test_a_clock_that_jumped_makes_no_download_young(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    client(service.address).ready()
    asked = len(service.requests)
    client(service.address).ready()  # young: its peer fetched it
    assert len(service.requests) == asked
    one = client(service.address)
    path = one._cache.path(*one._cache_key())
    for jump in (86_400, -86_400):
        os.utime(path, (time.time() + jump, time.time() + jump))
        client(service.address).ready()
        asked += 1
        assert len(service.requests) == asked


def test_a_peer_that_hangs_with_the_lock_delays_the_others_for_their_limit_only(service: Service) -> None:
    one = client(service.address)
    with one._cache.turn(*one._cache_key(), timeout=5):
        start = time.monotonic()
        client(service.address).ready(timeout=0.3)
        assert time.monotonic() - start < 2


def test_a_forked_child_answers_and_does_not_tell_for_its_parent(service: Service, quick: Background) -> None:
    one = client(service.address)
    one.ready()
    one.used(one.answer(PROBLEM)).calls += 3
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    one._fetching.acquire()  # a thread of the parent was busy at the moment of the fork

    def child() -> None:
        threads = [thread.name for thread in threading.enumerate()]
        told = list(one._usage.batches(DEVICE, None))
        results.put((one.answer(PROBLEM).plan.forward == TILED, one.refresh().snapshot_id, threads, len(told)))

    process = context.Process(target=child)
    process.start()
    found = results.get()
    process.join()
    one._fetching.release()
    assert found == (True, service.snapshot.id, ["MainThread"], 0)
    assert process.exitcode == 0
    assert quick._thread is not None


class TestPins:
    def test_a_channel_is_asked_for_by_name(self, service: Service, snapshot: Snapshot) -> None:
        one = client(service.address, snapshot="stable")
        assert one.ready().snapshot_id == snapshot.id
        assert service.requests[-1][0] == "/v1/channels/stable/snapshot"
        service.behaviour = "500"
        with pytest.raises(SnapshotError, match=r"the pinned snapshot stable cannot be had: service .* status 500"):
            client(service.address, snapshot="stable").ready()

    def test_an_id_is_asked_for_by_itself(self, service: Service, snapshot: Snapshot) -> None:
        assert client(service.address, snapshot=snapshot.id).ready().snapshot_id == snapshot.id
        assert service.requests[-1][0] == f"/v1/snapshots/{snapshot.id}"
        service.behaviour = "500"  # what an id names never changes: the disk has it
        assert client(service.address, snapshot=snapshot.id).ready().snapshot_id == snapshot.id

    def test_without_a_service_a_name_is_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "stable").write_bytes(NEWER.dumps())
        assert Client(DEVICE, SOFTWARE, Settings(snapshot="stable")).ready().snapshot_id == NEWER.id


class TestSignatures:
    def test_only_what_is_signed_with_the_key_is_used(
        self, snapshot: Snapshot, caplog: pytest.LogCaptureFixture
    ) -> None:
        private, public = signature.generate()
        signed = snapshot.signed(signature.Signer(private).sign(snapshot.id))
        forged = snapshot.signed(signature.Signer(signature.generate()[0]).sign(snapshot.id))
        for served, match in ((snapshot, Match.DEFAULT), (forged, Match.DEFAULT), (signed, Match.EXACT)):
            with serving(served) as service:
                assert client(service.address, key=public).answer(PROBLEM).match is Match.DEFAULT
                one = client(service.address, key=public)
                one.ready()
                assert one.answer(PROBLEM).match is match
        assert "is not signed, and TILEWISE_SNAPSHOT_KEY asks for it" in caplog.text
        assert "is not signed with the key" in caplog.text

    def test_a_download_from_before_the_key_is_not_used(self, service: Service, snapshot: Snapshot) -> None:
        client(service.address).ready()
        service.behaviour = "500"
        one = client(service.address, key=signature.generate()[1])
        one.ready()
        assert one.answer(PROBLEM).match is Match.DEFAULT
        assert snapshot.signature is None

    def test_a_key_that_is_none_is_refused_at_once(self) -> None:
        with pytest.raises(SettingsError, match="key: expected an Ed25519 public key"):
            Settings(key="c2hvcnQ=")
