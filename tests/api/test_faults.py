"""The service when something around it breaks; bench/faults.py runs the first of these at length."""

import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.domain.examples import DEVICE, PROBLEM, answer
from tests.postgres import Server, any_postgres, running_postgres

from tilewise.bench import client_faults, faults
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database

ONE = f"/v1/answers/{DEVICE}/{PROBLEM.key}"
JOB = {"problem": PROBLEM.key, "device": DEVICE, "budget": "quick"}


def put(database: Database, expected_version: int = 0) -> None:
    with database.write() as session:
        AnswerRepository(session).replace(answer(), expected_version=expected_version, reason="test")


def test_a_killed_service_loses_no_acknowledged_write_and_no_step(tmp_path: Path) -> None:
    report = faults.killed(f"sqlite:///{tmp_path / 'tilewise.db'}", kills=3)
    assert (report.lost, report.raised) == (0, ())
    assert report.acknowledged > 10
    assert report.refused > 0
    assert report.steps > 100
    assert report.longest_refresh_ms < faults.REFRESH_LIMIT * 1e3 + 400
    assert report.longest_step_ms < 400  # a lookup asks nobody: what is left is the scheduler of a busy machine


@pytest.mark.parametrize("fault", ["hangs", "wrong hash", "clock jumps"])
def test_a_loop_whose_service_breaks_goes_on_and_recovers(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bench/client_faults.py lets every kind of fault last longer."""
    report = client_faults.under(fault, tmp_path, seconds=1.0)
    assert (report.raised, report.recovered) == ((), True)
    assert report.steps > 100
    assert report.longest_step_ms < 400
    assert report.longest_refresh_ms < faults.REFRESH_LIMIT * 1e3 + 400
    kept = [record for record in caplog.records if "This run keeps its answers" in record.getMessage()]
    assert bool(kept) == (fault != "clock jumps")


@pytest.fixture
def two_services(sqlite: Database) -> Iterator[list[httpx.Client]]:
    """Two processes of the service on one database."""
    url = f"sqlite:///{sqlite.file}"
    ports = [faults.free_port() for _ in range(2)]
    processes = [faults.start(url, port) for port in ports]
    clients = [httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) for port in ports]
    yield clients
    for client in clients:
        client.close()
    for process in processes:
        process.kill()
        process.communicate()


def test_two_services_on_one_database_say_the_same(two_services: list[httpx.Client], sqlite: Database) -> None:
    one, two = two_services
    job = one.post("/v1/jobs", json=JOB).json()["job"]["id"]
    assert two.get(f"/v1/jobs/{job}").json()["job"]["state"] == "queued"
    assert two.delete(f"/v1/jobs/{job}").status_code == 200
    assert one.delete(f"/v1/jobs/{job}").status_code == 409
    assert one.get(ONE).json()["match"] == "default"
    for version in range(3):
        put(sqlite, version)
        end = time.monotonic() + 5
        while {client.get(ONE).json()["version"] for client in two_services} != {version + 1}:
            assert time.monotonic() < end, "a service did not follow the database"
            time.sleep(0.02)


def test_a_full_disk_stops_writes_only_and_until_there_is_room(sqlite: Database) -> None:
    put(sqlite)
    assert sqlite.file is not None
    port = faults.free_port()
    process = faults.start(f"sqlite:///{sqlite.file}", port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            assert client.post("/v1/jobs", json=JOB).status_code == 201
            # no file of the process may grow beyond what they have: like a full disk, but for this process alone
            hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
            size = sqlite.file.with_name(sqlite.file.name + "-wal").stat().st_size
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
            refused = client.post("/v1/jobs", json=JOB)
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:tilewise:error:database-unavailable")
            assert client.get(ONE).json()["match"] == "exact"
            assert len(client.get("/v1/jobs").json()["items"]) == 1
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
            assert client.post("/v1/jobs", json=JOB).status_code == 201
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    """A PostgreSQL that the test may restart."""
    with running_postgres(any_postgres(), durable=True) as running:
        yield running


def test_a_database_that_restarts_under_load_is_missed_by_writes_only(server: Server) -> None:
    with Database.open(server.url, upgrade=True) as database:
        put(database)
        port, stop = faults.free_port(), threading.Event()
        process = faults.start(server.url, port)
        address = f"http://127.0.0.1:{port}"
        writer = faults.Writer(address, stop)
        thread = threading.Thread(target=writer.run)
        thread.start()
        try:
            with httpx.Client(base_url=address, timeout=20) as client:
                matches, ready = [], []
                for mode in ("fast", "immediate"):
                    before = len(writer.acknowledged)
                    while len(writer.acknowledged) < before + 5:
                        time.sleep(0.01)
                    server.stop(mode)
                    matches += [client.get(ONE).json()["match"] for _ in range(50)]
                    ready.append(client.get("/readyz").status_code)
                    server.start()
                    end = time.monotonic() + 10
                    while client.get("/readyz").status_code != 200:
                        assert time.monotonic() < end, "the service did not find its database again"
                        time.sleep(0.02)
        finally:
            stop.set()
            thread.join()
            process.kill()
            process.communicate()
        assert matches == ["exact"] * 100
        assert ready == [503, 503]
        assert writer.refused > 0
        with database.read() as session:
            assert all(JobRepository(session).get(job) is not None for job in writer.acknowledged)
