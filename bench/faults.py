"""A service that is killed under write load, and a training loop that must not notice.

    python -m tilewise.bench.faults --output bench/results/faults_cpu.json

Writers queue jobs over HTTP as fast as they can; the service is killed with SIGKILL at random moments and started again
on the same port and database. Every write that was acknowledged must be in the database at the end. Beside them a
training loop looks answers up, with a client that follows the service; no step may raise, and the longest is stated.
"""

import argparse
import contextlib
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.domain import codec
from tilewise.domain.answer import Match
from tilewise.domain.software import Software

from .service import DEVICE, made_answer, problems

SERVE = """
import sys
from tilewise.api.server import serve
from tilewise.api.settings import ServiceSettings
from tilewise.db.session import Database

with Database.open(sys.argv[1], upgrade=False) as database:
    serve(database, "127.0.0.1", int(sys.argv[2]), ServiceSettings(rate=0), announce=lambda _: print(flush=True))
"""
# a step of training would do something; a lookup every millisecond is more often than any layer asks
STEP_SECONDS = 0.001
REFRESH_LIMIT = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """acknowledged: writes that were answered with 201; lost: those of them that the database does not hold.

    Times in milliseconds: of the loop's steps (a lookup and its count), and of refresh(), whose limit was
    REFRESH_LIMIT seconds. default_steps: steps that torch's own choice answered, before the first answers came.
    """

    kills: int
    acknowledged: int
    refused: int
    lost: int
    steps: int
    default_steps: int
    longest_step_ms: float
    median_step_ms: float
    refreshes: int
    longest_refresh_ms: float
    raised: tuple[str, ...]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def start(url: str, port: int) -> subprocess.Popen[str]:
    """Start the service as a process of its own and return once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, url, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


@dataclass
class Writer:
    """Queues jobs until it is told to stop, and notes the ids that were acknowledged."""

    address: str
    stop: threading.Event
    acknowledged: list[str] = field(default_factory=list)
    refused: int = 0

    def run(self) -> None:
        body = {"problem": problems(1)[0].key, "device": DEVICE, "budget": "quick"}
        with httpx.Client(base_url=self.address, timeout=5) as client:
            while not self.stop.is_set():
                try:
                    reply = client.post("/v1/jobs", json=body)
                except httpx.HTTPError:
                    self.refused += 1
                    self.stop.wait(0.02)
                    continue
                if reply.status_code == 201:
                    self.acknowledged.append(reply.json()["job"]["id"])
                else:
                    self.refused += 1


@dataclass
class Trainer:
    """A training loop: looks an answer up at every step, and asks for a refresh now and then."""

    client: Client
    stop: threading.Event
    steps: list[float] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)
    default_steps: int = 0
    raised: list[str] = field(default_factory=list)

    def run(self) -> None:
        problem = problems(1)[0]
        try:
            self.client.ready(REFRESH_LIMIT)
            while not self.stop.is_set():
                begin = time.perf_counter()
                answer = self.client.answer(problem)
                self.client.used(answer).calls += 1
                self.steps.append(time.perf_counter() - begin)
                self.default_steps += answer.match is Match.DEFAULT
                if len(self.steps) % 500 == 0:
                    begin = time.perf_counter()
                    self.client.refresh(REFRESH_LIMIT)
                    self.refreshes.append(time.perf_counter() - begin)
                time.sleep(STEP_SECONDS)
        except Exception as error:  # whatever it is, it would have ended a training job
            self.raised.append(f"{type(error).__name__}: {error}")


def killed(url: str, kills: int, *, seed: int = 0, writers: int = 3) -> Report:
    """Kill the service of the database at `url` so many times under load, and tell what was lost."""
    chance, port, stop = random.Random(seed), free_port(), threading.Event()
    address = f"http://127.0.0.1:{port}"
    with Database.open(url, upgrade=True) as database:
        with database.write() as session:
            AnswerRepository(session).replace(made_answer(problems(1)[0]), expected_version=0, reason="made")
        process = start(url, port)
        load = [Writer(address, stop) for _ in range(writers)]
        trainer = Trainer(Client(DEVICE, Software(), Settings(source=address)), stop)
        threads = [threading.Thread(target=work) for work in (*(each.run for each in load), trainer.run)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(kills):
                time.sleep(chance.uniform(0.05, 0.8))
                process.kill()
                process.communicate()
                process = start(url, port)
            time.sleep(0.3)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            process.terminate()
            process.communicate()
        acknowledged = [job for writer in load for job in writer.acknowledged]
        with database.read() as session:
            lost = sum(JobRepository(session).get(job) is None for job in acknowledged)
    return Report(
        kills=kills,
        acknowledged=len(acknowledged),
        refused=sum(writer.refused for writer in load),
        lost=lost,
        steps=len(trainer.steps),
        default_steps=trainer.default_steps,
        longest_step_ms=max(trainer.steps) * 1e3,
        median_step_ms=statistics.median(trainer.steps) * 1e3,
        refreshes=len(trainer.refreshes),
        longest_refresh_ms=max(trainer.refreshes, default=0.0) * 1e3,
        raised=tuple(trainer.raised),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--db", help="An empty PostgreSQL database; by default a SQLite file.")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        report = killed(given.db or f"sqlite:///{folder}/tilewise.db", given.kills)
    kind = "postgresql" if given.db else "sqlite"
    known = json.loads(given.output.read_text()) if given.output.exists() else {}
    known |= {"command": "python -m tilewise.bench.faults --output FILE [--db URL]", kind: codec.to_json(report)}
    given.output.write_text(json.dumps(known, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()
