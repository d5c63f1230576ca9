"""What the first view of each page of the dashboard costs, with 10,000 answers and 50,000 trials of one problem.

    python -m tilewise.bench.dashboard --output bench/results/dashboard_cpu.json

Pages are asked for through the whole service, in this process, over SQLite. Times are those that the process ran, of a
machine that may be busy with other things. Bytes are compressed. With the page of problems a browser fetches the style
sheet and the modules too, and no chart.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.orm import Session

from tilewise.api.app import create_app
from tilewise.api.assets import PLOTLY, assets
from tilewise.api.settings import ServiceSettings
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, Outcome, Stage, Trial

from .service import DEVICE, made_answer

ANSWERS = 10_000
DEVICES = 10
ANSWER_COLUMNS = (
    "problem_key, version, software_digest, updated, backend, kernels, expected_ms, baseline_ms, default_speedup, "
    "trials, measured"
)
TRIALS = 50_000
REPEATS = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One address: the time of its first view and the median of later ones in ms, and its compressed bytes."""

    path: str
    first_ms: float
    median_ms: float
    bytes: int


def problems(number: int) -> list[Problem]:
    """Return so many problems that differ as those of a team do; up to 20,000."""
    return [
        Problem(
            batch=1 + n % 25,
            heads=8 * (1 + n // 25 % 10),
            q_len=256 * (1 + n // 1000 % 20),
            head_dim=(64, 128)[n // 250 % 2],
            dtype=(Dtype.FP16, Dtype.BF16)[n // 500 % 2],
            causal=n % 3 > 0,
        )
        for n in range(number)
    ]


def fill(database: Database, *, answers: int, trials: int) -> None:
    """Keep so many answers, the same on each of ten devices, and so many trials of the first problem on the first one.

    Answers of the other devices are copied by SQLite itself: a tenth of the time.
    """
    made = problems(answers // DEVICES)
    with database.write() as session:
        for problem in made:
            assert AnswerRepository(session).replace(made_answer(problem), expected_version=0, reason="made")
        for number in range(1, DEVICES):
            _copy(session, f"{DEVICE}.mig-{number}g")
    with database.write() as session:
        repository = TrialRepository(session)
        for number in range(trials):
            trial = _trial(number)
            repository.add(trial, problem=made[0], device_key=DEVICE, software=Software(torch="2.13.0"))


def _copy(session: Session, device_key: str) -> None:
    names = {"device": DEVICE, "other": device_key}
    session.execute(text("INSERT INTO devices (key) VALUES (:other)"), {"other": device_key})
    for table, columns in (("answers", ANSWER_COLUMNS), ("answer_changes", "problem_key, version, reason, changed")):
        statement = (
            f"INSERT INTO {table} (device_key, document, {columns}) "
            f"SELECT :other, replace(document, :device, :other), {columns} FROM {table} WHERE device_key = :device"
        )
        session.execute(text(statement), names)


def view(client: TestClient, path: str, repeats: int = REPEATS) -> View:
    """Return what an address costs the service."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        reply: httpx.Response = client.get(path, headers={"Accept": "text/html"})  # type: ignore[assignment]
        times.append((time.process_time() - start) * 1e3)
        assert reply.status_code == 200, (path, reply.text)
    size = reply.headers.get("content-length")
    return View(
        path=path,
        first_ms=times[0],
        median_ms=statistics.median(times[1:]),
        bytes=int(size) if size else len(reply.content),
    )


def own_files() -> int:
    """Return the compressed bytes of what every page fetches beside itself, once for all pages."""
    return sum(len(asset.gzipped) for name, asset in assets().items() if name != PLOTLY)


def _trial(number: int) -> Trial:
    """Return a trial of a search: configs differ, one of eight fails, times depend on the config."""
    values = {
        "block_m": (16, 32, 64, 128, 256)[number % 5],
        "block_n": (16, 32, 64, 128)[number // 5 % 4],
        "num_warps": (1, 2, 4, 8)[number // 20 % 4],
        "num_stages": 1 + number // 80 % 6,
        "swizzle": number // 480 % 9,
        "tma": number // 4320 % 2 == 0,
    }
    candidate = Candidate.of("triton", forward=Config("triton_forward", tuple(values.items())))
    if number % 8 == 7:
        message = f"needs {1000 * (200 + number % 64)} bytes of shared memory"
        return Trial(candidate=candidate, stage=Stage.FORWARD, outcome=Outcome.INFEASIBLE, message=message)
    ratio = 0.8 + abs(values["block_m"] - 128) / 200 + abs(values["num_warps"] - 8) / 20 + number % 97 / 500
    times = Measurement(median_ms=ratio, p20_ms=ratio * 0.99, p80_ms=ratio * 1.01, samples=9, ratio=ratio)
    return Trial(candidate=candidate, stage=Stage.FORWARD, outcome=Outcome.OK, measurement=times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    one = f"/problems/{DEVICE}/{problems(1)[0].key}"
    paths = ["/", "/problems", "/problems?q=d128&sort=-speedup&mask=causal&match=exact", "/problems?page=150", one]
    paths += [f"{one}?p.tma=yes&p.block_m=128", f"{one}/charts/course", f"{one}/charts/parallel", "/trials/1"]
    paths += ["/compare", "/compare/backends", "/jobs", "/devices", "/snapshots", "/demand", "/tokens"]
    with (
        tempfile.TemporaryDirectory() as folder,
        Database.open(f"sqlite:///{folder}/tilewise.db", upgrade=True) as database,
    ):
        fill(database, answers=ANSWERS, trials=TRIALS)
        with TestClient(create_app(database, ServiceSettings(rate=0))) as client:
            found = [view(client, path) for path in paths]
    document = {
        "command": "python -m tilewise.bench.dashboard --output FILE",
        "answers": ANSWERS,
        "trials_of_one": TRIALS,
        "files_bytes": own_files(),
        "plotly_bytes": len(assets()[PLOTLY].gzipped),
        "views": [asdict(each) for each in found],
    }
    given.output.write_text(json.dumps(document, indent=1) + "\n")
    for each in found:
        print(f"{each.first_ms:7.0f} ms first, {each.median_ms:5.0f} ms then, {each.bytes / 1e3:6.1f} kB  {each.path}")


if __name__ == "__main__":
    main()
