"""The overview: how things stand, what was won, and what to tune next."""

import dataclasses

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, answer

from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Match
from tilewise.domain.job import BUDGETS
from tilewise.domain.problem import Problem
from tilewise.domain.usage import Usage, Use

from . import html

BUCKET = PROBLEM.bucket()
MISSED = Problem(batch=4, heads=8, q_len=1024, head_dim=64)


def report(database: Database, *uses: tuple[Problem, Match, int]) -> None:
    with database.write() as session:
        found = tuple(Use(problem=problem, match=match, calls=calls) for problem, match, calls in uses)
        DemandRepository(session).add(Usage(device_key=DEVICE, snapshot=None, uses=found))


def put(database: Database, batch: int, expected_ms: float, version: int = 0) -> None:
    one = dataclasses.replace(answer(dataclasses.replace(BUCKET, batch=batch)), expected_ms=expected_ms)
    with database.write() as session:
        assert AnswerRepository(session).replace(one, expected_version=version, reason=f"batch {batch} is fastest so")


def test_an_empty_database_says_what_to_do_first(client: TestClient) -> None:
    page = html.get(client, "/")
    assert "Nothing has been tuned yet" in page.text
    assert "tilewise tune --model llama3_70b --budget quick" in page.text
    assert page.all("table") == []


def test_reports_alone_are_shown_beside_what_to_do(client: TestClient, sqlite: Database) -> None:
    report(sqlite, (MISSED, Match.DEFAULT, 10))
    text = html.get(client, "/").text
    assert "Nothing has been tuned yet" in text
    assert "no client has reported yet" in text  # of an answer: nothing was saved


def test_time_saved_is_calls_times_what_the_final_won(client: TestClient, sqlite: Database) -> None:
    put(sqlite, 1, 10.0)  # torch takes 30 ms
    one = dataclasses.replace(BUCKET, batch=1)
    report(sqlite, (one, Match.EXACT, 1000), (one, Match.STALE, 500), (one, Match.DEFAULT, 9999))
    with sqlite.read() as session:
        saved = DemandRepository(session).saved()
    assert (saved.ms, saved.calls) == (1500 * 20.0, 1500)
    assert "GPU time saved 30.0 s in 1.5 k calls since" in html.get(client, "/").text


def test_the_biggest_wins_and_the_newest_changes(client: TestClient, sqlite: Database) -> None:
    for batch in range(1, 11):
        put(sqlite, batch, 31.0 - batch)
    put(sqlite, 3, 2.0, version=1)
    page = html.get(client, "/")
    wins = page.text.partition("Biggest wins")[2].partition("Asked for")[0]
    assert [f"batch {batch}," in wins for batch in (3, 10, 9, 8, 7, 6, 5)] == [True] * 6 + [False]
    changes = page.text.partition("Newest changes")[2]
    assert changes.index("batch 3 is fastest so") < changes.index("batch 10 is fastest so")
    assert "batch 1 is fastest so" not in changes
    assert f"/problems/{DEVICE}/{dataclasses.replace(BUCKET, batch=3).key}" in page.links


def test_what_was_asked_and_not_tuned_leads_to_a_job(client: TestClient, sqlite: Database) -> None:
    put(sqlite, 1, 10.0)
    report(sqlite, (MISSED, Match.DEFAULT, 10_000))
    page = html.get(client, "/")
    assert "batch 4, 8 heads, 1,024 tokens" in page.text
    assert f"/jobs/new?problem={MISSED.key}&device={DEVICE}" in page.links
    with sqlite.write() as session:
        JobRepository(session).create(MISSED, DEVICE, BUDGETS["quick"])
    page = html.get(client, "/")
    assert "every problem that clients reported is tuned, or waits in a job" in page.text
    assert "Jobs running 0 1 waiting" in page.text


@pytest.mark.parametrize("calls", [0, 1, 2**53])
def test_any_number_of_calls_is_added_up(sqlite: Database, calls: int) -> None:
    put(sqlite, 1, 10.0)
    report(sqlite, (dataclasses.replace(BUCKET, batch=1), Match.EXACT, calls))
    with sqlite.read() as session:
        assert DemandRepository(session).saved().ms == pytest.approx(calls * 20.0)
