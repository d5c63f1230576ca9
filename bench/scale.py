"""A database with 10,000 answers and 1,000,000 trials: is anything slower than with 10?

    python -m tilewise.bench.scale --db postgresql:///empty_database --output bench/results/scale_postgresql.json

Pages are asked for through the whole service, in this process: the first page of every list, under each of its filters
and orders, and pages from the middle and the end. Lookups are those of the service's table.
"""

import argparse
import base64
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient
from sqlalchemy import text

from tilewise.api.app import create_app
from tilewise.api.settings import ServiceSettings
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate
from tilewise.domain.job import BUDGETS
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, Outcome, Stage, Trial

from .service import DEVICE, made_answer, per_call

OTHER = "nvidia-a100.sm80.80g.400w"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    answers: int
    trials: int


def many(number: int) -> list[Problem]:
    return [
        Problem(batch=1 + n % 50, heads=16 * (1 + n // 50 % 20), q_len=512 * (1 + n // 1000), head_dim=128, causal=True)
        for n in range(number)
    ]


def fill(database: Database, size: Size) -> None:
    """Put answers on two devices, their trials, and 1,000 jobs."""
    problems = many(size.answers // 2)
    with database.write() as session:
        for problem in problems:
            for device in (DEVICE, OTHER):
                AnswerRepository(session).replace(made_answer(problem, device), expected_version=0, reason="made")
        for problem in problems[:1000]:
            job = JobRepository(session).create(problem, DEVICE, BUDGETS["quick"])
        measured = Measurement(median_ms=0.5, p20_ms=0.49, p80_ms=0.51, samples=60, ratio=0.8)
        for outcome in (Outcome.OK, Outcome.FAILED):
            trial = Trial(
                candidate=Candidate("triton" if outcome is Outcome.OK else "flex"), stage=Stage.FORWARD,
                outcome=outcome, measurement=measured if outcome is Outcome.OK else None, job=job.id,
            )  # fmt: skip
            TrialRepository(session).add(trial, problem=problems[0], device_key=DEVICE, software=Software())
    # the two trials above, once more for every answer of another
    names = (
        "software_digest, job_id, attempt, backend, candidate, candidate_digest, stage, outcome, ratio, measurement, "
        "error, message, seconds, tried"
    )
    kinds = ", ".join(f"kind.{name}" for name in names.split(", "))
    statement = (
        f"INSERT INTO trials (problem_key, device_key, median_ms, {names}) "
        f"SELECT answers.problem_key, answers.device_key, kind.median_ms * (1 + random()), {kinds} "
        "FROM answers, (SELECT * FROM trials ORDER BY id LIMIT 2) AS kind, generate_series(1, :times)"
    )
    with database.write() as session:
        session.execute(text(statement), {"times": size.trials // size.answers // 2})
        session.execute(text("ANALYZE"))


def cursor_at(query: str, values: list[Any]) -> str:
    """Return the page of a list that begins behind a position."""
    return f"{query}&cursor={base64.urlsafe_b64encode(json.dumps(values).encode()).decode()}"


def pages(client: TestClient, size: Size) -> dict[str, float]:
    """Return the median milliseconds of each page, of five."""
    key = many(size.answers // 2)[-1].key
    middle, newest = size.trials // 2, client.get("/v1/trials?limit=1").json()["items"][0]["id"]
    filters = ["", f"&device={DEVICE}", f"&problem={key}", "&backend=flex", "&outcome=failed"]
    combined = [*filters, f"&device={OTHER}&problem={key}&outcome=ok", "&backend=nothing", "&outcome=timed_out"]
    asked = [f"/v1/trials?limit=200&order={order}{one}" for one in combined for order in ("-id", "id")]
    medians = [f"/v1/trials?limit=200&problem={key}&order={order}" for order in ("median_ms", "-median_ms")]
    asked += [f"{path}{one}" for path in medians for one in ("", f"&device={OTHER}", "&backend=flex", "&outcome=ok")]
    asked += [cursor_at(f"/v1/trials?limit=200{one}", [place]) for one in filters for place in (middle, 300)]
    asked += [cursor_at(path, [0.75, 0]) for path in medians]
    asked += [f"/v1/problems?limit=200{one}" for one in ("", "&q=h320", "&head_dim=128", "&order=-key", "&q=nothing")]
    asked += [f"/v1/jobs?limit=200{one}" for one in ("", "&state=queued", "&state=failed", f"&device={OTHER}")]
    asked += [
        "/v1/devices?limit=200",
        "/v1/snapshots",
        "/v1/demand",
        "/",
        "/problems",
        "/problems?q=h320&sort=speedup&page=9",
        "/problems?page=150",
    ]
    found = {}
    for path in asked:
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            reply: httpx.Response = client.get(path)  # type: ignore[assignment]
            runs.append(time.perf_counter() - start)
            assert reply.status_code == 200, (path, reply.text)
        found[path] = statistics.median(runs) * 1e3
    assert newest > middle
    return found


def measure(database: Database, size: Size) -> dict[str, Any]:
    """Fill an empty database and measure."""
    fill(database, size)
    problem = many(size.answers // 2)[0]
    start = time.perf_counter()
    app = create_app(database, ServiceSettings(rate=0))
    with TestClient(app) as client:
        client.get(f"/v1/answers/{DEVICE}/{problem.key}")
        started = time.perf_counter() - start
        book = app.state.answer_book
        start = time.perf_counter()
        client.get(f"/v1/answers/{DEVICE}", headers={"Accept-Encoding": "gzip"})
        all_answers = time.perf_counter() - start
        every = pages(client, size)
        return {
            "size": asdict(size),
            "start_s": started,
            "lookup_us": per_call(lambda: book.answer(DEVICE, problem, None), 2000),
            "first_download_s": all_answers,
            "slowest_page_ms": max(every.values()),
            "slowest_page": max(every, key=lambda path: every[path]),
            "pages_ms": every,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--db", required=True, help="An empty PostgreSQL database for 10,000 answers.")
    parser.add_argument("--small-db", required=True, help="Another empty one, for 10.")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    found = {}
    for name, url, size in (
        ("small", given.small_db, Size(answers=10, trials=1000)),
        ("large", given.db, Size(answers=10_000, trials=1_000_000)),
    ):
        with Database.open(url, upgrade=True) as database:
            found[name] = measure(database, size)
    command = "python -m tilewise.bench.scale --db URL --small-db URL --output FILE"
    given.output.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    for name, each in found.items():
        print(name, {key: value for key, value in each.items() if key != "pages_ms"})


if __name__ == "__main__":
    main()
