"""A training loop whose service breaks in every way that we know, one after the other.

    python -m tilewise.bench.client_faults --output bench/results/client_faults_cpu.json

A proxy stands between the client and a real service, and does to its answers what a fault does. Each run begins well,
then the fault comes and another answer is kept meanwhile, then it goes. The loop looks an answer up at every step and
asks for a refresh now and then. No step may raise; the longest is stated, and whether the loop had the new answer soon
after the fault was over.
"""

import argparse
import contextlib
import http.server
import json
import resource
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import httpx

from tilewise.client import cache as disk_cache
from tilewise.client import client as clients
from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain import codec
from tilewise.domain.software import Software

from .faults import Trainer, free_port, start
from .service import DEVICE, made_answer, problems

SLOW_SECONDS = 30.0
RECOVERY_SECONDS = 10.0
DAY = 86_400.0
GARBAGE = b"<html>" + bytes(range(256)) * 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Times in milliseconds. A refresh may take REFRESH_LIMIT of bench/faults.py.

    recovered: whether the loop had the answer that was kept during the fault within RECOVERY_SECONDS of its end.
    """

    fault: str
    steps: int
    longest_step_ms: float
    refreshes: int
    longest_refresh_ms: float
    raised: tuple[str, ...]
    recovered: bool


class Proxy:
    """Passes requests on to the service at `upstream`, and does to its answers what `fault` says."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.fault = upstream, ""
        self._over = threading.Event()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.answer(self)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.answer(self)

            def log_message(self, *_: object) -> None:
                """A fault writes no lines."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        fault = self.fault
        if fault == "hangs":
            self._over.wait(SLOW_SECONDS)
            return
        if fault == "slow by 30 s" and self._over.wait(SLOW_SECONDS):
            return
        if fault in ("answers 500", "answers garbage"):
            self._send(handler, 500 if fault == "answers 500" else 200, GARBAGE)
            return
        if handler.command == "POST":
            self._send(handler, 204, b"")
            return
        try:
            reply = httpx.get(self.upstream + handler.path, headers={"Accept-Encoding": "identity"}, timeout=60)
        except httpx.HTTPError:
            return  # the connection ends without a word, as that of a dead service does
        body = reply.content
        if fault == "wrong hash":  # every digit of it is right but for one of an answer
            body = body.replace(b'"expected_ms":0.5', b'"expected_ms":0.4')
        self._send(handler, reply.status_code, body)

    def _send(self, handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        with contextlib.suppress(OSError):  # who asked may be gone
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

    def close(self) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def proxied(fault: str, proxy: Proxy) -> Iterator[None]:
    """A fault of the service as the client sees it."""
    proxy.fault = fault
    yield
    proxy.fault = ""


@contextlib.contextmanager
def jumping_clock() -> Iterator[None]:
    """The wall clock of this process goes a day ahead and back, ten times a second."""
    with contextlib.ExitStack() as stack:
        for module in (clients, disk_cache):
            real = module.time

            class Jumping:
                def __getattr__(self, name: str, real: object = real) -> object:
                    return getattr(real, name)

                def time(self) -> float:
                    moment = time.time()
                    return moment + (DAY if int(moment * 10) % 2 else -DAY)

            stack.enter_context(mock.patch.object(module, "time", Jumping()))
        yield


@contextlib.contextmanager
def full_disk(process: subprocess.Popen[str]) -> Iterator[None]:
    """No file of the service may grow at all: for it alone, the disk is full."""
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def killed(running: "Running") -> Iterator[None]:
    """SIGKILL, and the service is started again afterwards."""
    running.process.kill()
    running.process.communicate()
    yield
    running.process = start(running.url, running.port)


@dataclass
class Running:
    """A service as a process of its own, behind a proxy."""

    url: str
    port: int
    process: subprocess.Popen[str]
    proxy: Proxy


FAULTS: dict[str, Callable[[Running], contextlib.AbstractContextManager[None]]] = {
    "killed": killed,
    **{
        kind: lambda running, kind=kind: proxied(kind, running.proxy)  # type: ignore[misc]
        for kind in ("hangs", "answers 500", "answers garbage", "slow by 30 s", "wrong hash")
    },
    "clock jumps": lambda _: jumping_clock(),
    "disk full": lambda running: full_disk(running.process),
}


def under(fault: str, folder: Path, *, seconds: float) -> Report:
    """Run a training loop through a fault that lasts for `seconds`."""
    url, port = f"sqlite:///{folder}/tilewise.db", free_port()
    problem = problems(1)[0]
    with Database.open(url, upgrade=True) as database:
        keep(database, 0)
        running = Running(url, port, start(url, port), Proxy(f"http://127.0.0.1:{port}"))
        stop = threading.Event()
        trainer = Trainer(Client(DEVICE, Software(), Settings(source=running.proxy.address)), stop)
        thread = threading.Thread(target=trainer.run)
        thread.start()
        try:
            wait_for(lambda: trainer.client.answer(problem).version == 1)
            with FAULTS[fault](running):
                keep(database, 1)
                time.sleep(seconds)
            recovered = wait_for(lambda: trainer.client.answer(problem).version == 2)
        finally:
            stop.set()
            thread.join()
            running.proxy.close()
            running.process.kill()
            running.process.communicate()
    return Report(
        fault=fault,
        steps=len(trainer.steps),
        longest_step_ms=max(trainer.steps) * 1e3,
        refreshes=len(trainer.refreshes),
        longest_refresh_ms=max(trainer.refreshes, default=0.0) * 1e3,
        raised=tuple(trainer.raised),
        recovered=recovered,
    )


def keep(database: Database, version: int) -> None:
    with database.write() as session:
        AnswerRepository(session).replace(made_answer(problems(1)[0]), expected_version=version, reason="made")


def wait_for(true: Callable[[], bool]) -> bool:
    """Return whether it came true within RECOVERY_SECONDS."""
    end = time.monotonic() + RECOVERY_SECONDS
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each fault lasts")
    given = parser.parse_args()
    reports = []
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", TILEWISE_HOME=folder):
            reports.append(under(fault, Path(folder), seconds=given.seconds))
        print(reports[-1], flush=True)
    command = f"python -m tilewise.bench.client_faults --output {given.output}"
    document = {"command": command, "seconds": given.seconds, "faults": codec.to_json(tuple(reports))}
    given.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
