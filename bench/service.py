"""What the service and the client cost, as ratios within one run on one machine.

    python -m tilewise.bench.service --output bench/results/service_cpu.json

- one answer: GET through wrk with 32 connections, against a plain FastAPI route of the same app that returns a
  constant;
- many: POST of 1,000 problems against POST of one, and the same for the first one of a service that just started;
- lookup: a key built and looked up in this process; the constructor of a client whose service refuses, hangs, answers
  500 or garbage;
- ranks: 2,000 simulated ranks that start at once against one service process.

The service runs as a process of its own, with uvloop and httptools, on loopback.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.client.table import SealedTable
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Answer, Evidence, Finalist, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import TilewiseError
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement

DEVICE = "nvidia-h200.sm90.141g.700w"
CONNECTIONS = 32
RANKS = 2000
COLD_STARTS = 5
SERVE = """
import sys
from tilewise.api import server
from tilewise.api.app import create_app
from tilewise.api.settings import ServiceSettings
from tilewise.db.session import Database

def with_constant(database, settings):
    app = create_app(database, settings)
    @app.get("/v1/constant")
    async def constant():
        return {"answer": "constant"}
    # before the routes that end in a path, as one of ours would be
    app.router.routes.insert(0, app.router.routes.pop())
    return app

server.create_app = with_constant
with Database.open(sys.argv[1], upgrade=False) as database:
    server.serve(database, "127.0.0.1", 0, ServiceSettings(rate=0), announce=lambda url: print(url, flush=True))
"""


def made_answer(problem: Problem, device_key: str = DEVICE) -> Answer:
    """Return an answer of ordinary size: a final of six."""
    tuned = Candidate.of("triton", forward=Config.of("triton_forward", block_m=128, block_n=64, num_warps=8, tma=True))
    measured = Measurement(median_ms=0.5, p20_ms=0.49, p80_ms=0.51, samples=60, ratio=0.8, spread=0.002)
    finalists = tuple(
        Finalist(candidate=tuned if not number else Candidate(f"sdpa_{number}"), measurement=measured)
        for number in range(6)
    )
    evidence = Evidence(
        job="0" * 32, measured=datetime(2026, 1, 1, tzinfo=UTC), reference=Candidate("sdpa"), finalists=finalists,
        noise=0.002, trials=80, failed=2, seconds=61.5, reason="fastest in the final",
    )  # fmt: skip
    return Answer(
        problem=problem, device_key=device_key, plan=Plan(tuned), match=Match.EXACT, measured=problem, expected_ms=0.5,
        interval=(0.49, 0.51), regret=0.0, baseline_ms=0.6, evidence=evidence,
        software=Software(torch="2.13.0", triton="3.7.1", driver="580.82"),
    )  # fmt: skip


def problems(number: int) -> list[Problem]:
    return [
        Problem(batch=1 + n % 64, heads=64, kv_heads=8, q_len=1024 * (1 + n // 64), head_dim=128, causal=True)
        for n in range(number)
    ]


@dataclass(frozen=True, slots=True)
class Serving:
    """A service that runs as a process of its own."""

    address: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the time that the process ran so far, which other work on the machine does not stretch much."""
        user, system = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(url: str) -> Iterator[Serving]:
    """Run the service until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield Serving(process.stdout.readline().strip(), process.pid)
    finally:
        process.terminate()
        process.communicate()


def wrk(url: str, seconds: float) -> dict[str, float]:
    """Return requests a second and the 50th and 99th percentile in milliseconds."""
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:g}s", "--latency", url]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in said, said
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    assert rate is not None, said
    found = {"requests_per_s": float(rate[1])}
    for percent in ("50", "99"):
        value = re.search(rf"\s{percent}%\s+([\d.]+)(us|ms|s)", said)
        assert value is not None, said
        found[f"p{percent}_ms"] = float(value[1]) * {"us": 1e-3, "ms": 1, "s": 1e3}[value[2]]
    return found


def one_answer(service: Serving, seconds: float, rounds: int) -> dict[str, Any]:
    """Alternate both routes, so that what else the machine does hits both.

    cpu_ratio compares the time that the service's process ran for a request: what of the ratio is its own.
    """
    paths = {"answer": f"/v1/answers/{DEVICE}/{problems(1)[0].key}?software=torch@2.13.0", "constant": "/v1/constant"}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            before = service.cpu_seconds()
            run = wrk(service.address + path, seconds)
            run["cpu_us"] = (service.cpu_seconds() - before) / (run["requests_per_s"] * seconds) * 1e6
            runs[name].append(run)
    found: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()
    }
    ratios = [one["requests_per_s"] / two["requests_per_s"] for one, two in zip(*runs.values(), strict=True)]
    return {
        **found,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": found["constant"]["cpu_us"] / found["answer"]["cpu_us"],
        "p99_ratio": found["answer"]["p99_ms"] / found["constant"]["p99_ms"],
    }


def post(client: httpx.Client, number: int) -> float:
    """Ask for `number` problems and return the seconds until the answers were there."""
    question = {"device": DEVICE, "problems": [problem.key for problem in problems(number)]}
    body = json.dumps(question).encode()
    start = time.perf_counter()
    client.post("/v1/answers", content=body, headers={"Content-Type": "application/json"}).raise_for_status()
    return time.perf_counter() - start


def many_answers(url: str) -> dict[str, float]:
    """Time a POST of one problem and of 1,000: the first of a service that just started, and warm, in turn."""
    cold: dict[int, list[float]] = {1: [], 1000: []}
    warm: dict[int, list[float]] = {1: [], 1000: []}
    for _ in range(COLD_STARTS):
        for number, times in cold.items():
            with serving(url) as service, httpx.Client(base_url=service.address, timeout=60) as client:
                client.get("/healthz").raise_for_status()  # the connection is there, and the service knows its routes
                times.append(post(client, number))
    with serving(url) as service, httpx.Client(base_url=service.address, timeout=60) as client:
        post(client, 1000)
        for _ in range(60):
            for number, times in warm.items():
                times.append(post(client, number))
    one, many, first_one, first_many = (
        statistics.median(each) * 1e3 for times in (warm, cold) for each in times.values()
    )
    return {
        "one_ms": one, "thousand_ms": many, "ratio": many / one, "first_one_ms": first_one,
        "first_thousand_ms": first_many, "first_ratio": first_many / first_one,
    }  # fmt: skip


def per_call(work: Callable[[], object], number: int = 20_000) -> float:
    """Return the median microseconds of a call, over 15 runs."""
    runs = []
    for _ in range(15):
        start = time.perf_counter()
        for _ in range(number):
            work()
        runs.append((time.perf_counter() - start) / number)
    return statistics.median(runs) * 1e6


def lookup() -> dict[str, float]:
    """A key of shapes and flags, built as a call site builds it, and looked up; and a whole Problem looked up."""
    table = SealedTable(Snapshot.of([made_answer(problem) for problem in problems(200)]), DEVICE, Software(), origin="")
    problem = problems(1)[0]
    shape, dtype = (1, 1024, 64, 128), "fp16"

    def by_key() -> Answer:
        return table.lookup_key((shape, shape, shape, dtype, True, None, False, False), lambda: problem)

    by_key()
    table.lookup(problem)
    return {"key_and_lookup_us": per_call(by_key), "problem_lookup_us": per_call(lambda: table.lookup(problem))}


def client_start() -> dict[str, dict[str, float]]:
    """The constructor and ready(), with a limit of 0.5 s, against services that do not work."""
    found = {}
    for kind in ("refuses", "hangs", "answers 500", "answers garbage"):
        with _broken(kind) as address:
            start = time.perf_counter()
            client = Client(DEVICE, Software(), Settings(source=address, timeout=0.5))
            constructed = time.perf_counter() - start
            start = time.perf_counter()
            with contextlib.suppress(TilewiseError):
                client.ready()
            found[kind] = {"constructor_ms": constructed * 1e3, "ready_ms": (time.perf_counter() - start) * 1e3}
    return found


@contextlib.contextmanager
def _broken(kind: str) -> Iterator[str]:
    listening = socket.create_server(("127.0.0.1", 0), backlog=16)
    port = listening.getsockname()[1]
    if kind == "refuses":
        listening.close()
        yield f"http://127.0.0.1:{port}"
        return
    said = {
        "hangs": b"",
        "answers 500": b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        "answers garbage": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n<ht>",
    }[kind]
    held: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                held.append(connection)
                if said:
                    connection.recv(65536)
                    connection.sendall(said)
                    connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        for connection in held:
            connection.close()
        thread.join()


async def ranks(address: str) -> dict[str, float]:
    """Let RANKS connections, all opened at once, each ask for all answers of the device; all must come whole."""
    host, port = address.removeprefix("http://").split(":")
    request = (
        f"GET /v1/answers/{DEVICE} HTTP/1.1\r\nHost: {host}\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    ).encode()
    waits: list[float] = []
    statuses: dict[str, int] = {}
    begin = asyncio.Event()

    async def rank() -> None:
        await begin.wait()
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request)
        data = await reader.read()
        while chunk := await reader.read():
            data += chunk
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        assert length is not None, head
        assert len(body) == int(length[1]), "a body came cut"
        status = head.split(b" ", 2)[1].decode()
        statuses[status] = statuses.get(status, 0) + 1
        waits.append(time.perf_counter() - start)

    tasks = [asyncio.create_task(rank()) for _ in range(RANKS)]
    await asyncio.sleep(0.2)
    begin.set()
    await asyncio.gather(*tasks)
    assert statuses == {"200": RANKS}, statuses
    ordered = sorted(waits)
    return {"ranks": RANKS, "median_s": ordered[RANKS // 2], "p99_s": ordered[-RANKS // 100], "longest_s": ordered[-1]}


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """Run everything and return it."""
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/tilewise.db"
        with Database.open(url, upgrade=True) as database, database.write() as session:
            for problem in problems(1000):
                AnswerRepository(session).replace(made_answer(problem), expected_version=0, reason="made")
        with serving(url) as service:
            found = {"one_answer": one_answer(service, seconds, rounds)}
            httpx.get(f"{service.address}/v1/answers/{DEVICE}")  # the file is made once, for whoever asks first
            found["ranks"] = asyncio.run(ranks(service.address))
        found["many_answers"] = many_answers(url)
    return {**found, "lookup": lookup(), "client_start": client_start()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each run of wrk")
    parser.add_argument("--rounds", type=int, default=5, help="of each route")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    found = measure(given.seconds, given.rounds)
    command = " ".join(["python", "-m", "tilewise.bench.service", *sys.argv[1:]])
    about = {"command": command, "kind": DeviceKind.CPU, "cores": os.cpu_count(), "load": [before, os.getloadavg()[0]]}
    given.output.write_text(json.dumps({**about, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
