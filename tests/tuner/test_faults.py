"""A tuner that cannot be killed: whatever a candidate does costs one trial, and whoever is right and fastest wins."""

import multiprocessing
import random
import sqlite3
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate
from tilewise.domain.job import JobState
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels.device import describe
from tilewise.tuner import processes
from tilewise.tuner.crew import Crew
from tilewise.tuner.ledger import NOT_TRIED
from tilewise.tuner.printed import MESSAGE_LIMIT
from tilewise.tuner.tune import Verdict, tune

from . import killed
from .fakes import BUDGET, CPU, TINY, seen

RIGHT = {"sdpa", "plain", "right", "compiles"}
FAULTS = {
    "segfaults": (Outcome.WORKER_DIED, "killed by SIGSEGV (phase check)"),
    "aborts": (Outcome.WORKER_DIED, "Assertion `layout' failed"),
    "exits": (Outcome.WORKER_DIED, "ended with exit code 3"),
    "hangs": (Outcome.TIMED_OUT, "no end within its time limit (phase check)"),
    "hangs_in_native_code": (Outcome.TIMED_OUT, "no end within its time limit (phase check)"),
    "allocates_without_end": (Outcome.OUT_OF_RESOURCES, "Cannot allocate memory"),
    "not_a_number": (Outcome.WRONG_RESULT, "times the bound"),
    "slightly_wrong": (Outcome.WRONG_RESULT, "out of the case 'masked rows'"),
    "prints_and_raises": (Outcome.COMPILE_FAILED, "PassManager::run failed"),
    "prints_and_aborts": (Outcome.WORKER_DIED, "error: operand #0 does not dominate"),
    "compile_raises": (Outcome.COMPILE_FAILED, "the pass pipeline gave up"),
    "compile_hangs": (Outcome.TIMED_OUT, "no end within its time limit (phase compile)"),
    "compile_segfaults": (Outcome.WORKER_DIED, "killed by SIGSEGV (phase compile)"),
    "compile_too_large": (Outcome.INFEASIBLE, "out of resource"),
    # planted bugs: wrong in little, or only sometimes
    "stale": (Outcome.WRONG_RESULT, "times the bound"),
    "shared_buffer": (Outcome.WRONG_RESULT, "of negated values"),
    "misses_the_last_column": (Outcome.WRONG_RESULT, "times the bound"),
    "writes_over_its_inputs": (Outcome.WRONG_RESULT, "it wrote over its inputs"),
    "wrong_at_times": (Outcome.WRONG_RESULT, "times the bound"),
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path}/tilewise.db", upgrade=True) as opened:
        yield opened


def tuned(database: Database, crew: Crew, *backends: str) -> Verdict:
    return tune(TINY, device=CPU, database=database, budget=BUDGET, backends=backends, crew=crew)


def trials(database: Database) -> dict[str, Trial]:
    with database.read() as session:
        kept = TrialRepository(session).list(TINY, describe(CPU).key)
    return {trial.candidate.backend: trial for trial in kept}


def test_every_fault_costs_one_trial_and_the_right_ones_win(
    database: Database, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = tuned(database, crew, *seen(monkeypatch, *FAULTS, "right", "compiles"), "plain")
    kept = trials(database)
    assert {name: kept[name].outcome for name in RIGHT} == dict.fromkeys(RIGHT, Outcome.OK)
    for name, (outcome, says) in FAULTS.items():
        assert (name, kept[name].outcome) == (name, outcome)
        assert says in kept[name].message
        assert len(kept[name].message) <= MESSAGE_LIMIT + 100
    with database.read() as session:
        (job,) = JobRepository(session).list()
    assert job.job.state is JobState.SUCCEEDED
    assert verdict.answer.evidence is not None
    finalists = {finalist.candidate.backend for finalist in verdict.answer.evidence.finalists}
    assert verdict.answer.plan.forward.backend in finalists <= RIGHT

    # nothing is tried twice, not even what killed a process
    assert tuned(database, crew, *FAULTS, "right", "compiles", "plain").resumed == len(FAULTS) + len(RIGHT)
    assert {name: trial.when for name, trial in trials(database).items()} == {n: t.when for n, t in kept.items()}


@pytest.mark.parametrize(
    ("name", "outcome", "says"),
    [
        ("dies_when_called_often", Outcome.WORKER_DIED, "killed by SIGABRT (phase measure)"),
        ("fails_when_called_often", Outcome.FAILED, "called too often"),
    ],
)
def test_who_kills_a_final_is_named_and_leaves_it(
    name: str, outcome: Outcome, says: str, database: Database, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew.measurer.stop()  # the fakes count their calls in a process
    budget = BUDGET.__class__(name="test", trials=9, seconds=60, patience=9, finalists=3, rounds=80)
    monkeypatch.setattr("tests.tuner.test_faults.BUDGET", budget)
    verdict = tuned(database, crew, *seen(monkeypatch, name))
    assert trials(database)[name].outcome is outcome
    assert says in trials(database)[name].message
    assert verdict.answer.plan.forward == Candidate("sdpa")


def test_kill_9_at_random_moments_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Twenty times; what was told to be kept is kept, and the next run goes on from there."""
    url, drawn = f"sqlite:///{tmp_path / 'tilewise.db'}", random.Random(0)
    Database.open(url, upgrade=True).close()
    processes.prestart()
    most = 0
    for _ in range(20):
        mine, theirs = processes._context.Pipe(duplex=False)
        tuner = started(url, theirs)
        theirs.close()
        for _ in range(drawn.randint(1, 5)):
            assert mine.poll(60), "the tuner says nothing"
            phase, told = mine.recv()
            most = max(most, told)
        tuner.join(timeout=drawn.uniform(0, 0.05))  # any moment: between two trials, or within one
        tuner.kill()
        tuner.join()
        with sqlite3.connect(tmp_path / "tilewise.db") as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found = candidates(connection)
        connection.close()
        assert len(found) == len(set(found)) >= most, phase
    assert 20 < most < killed.BUDGET.trials, "every round was killed within the search"

    mine, theirs = processes._context.Pipe(duplex=False)
    last = started(url, theirs)
    theirs.close()
    ends = []
    while mine.poll(120):
        try:
            ends.append(mine.recv())
        except EOFError:
            break
    last.join()
    assert (last.exitcode, ends[-1]) == (0, ("done", killed.BUDGET.trials))
    with sqlite3.connect(tmp_path / "tilewise.db") as connection:
        found = candidates(connection)
    connection.close()
    assert len(found) == len(set(found)) == killed.BUDGET.trials


def started(url: str, told: "Connection[Any, Any]") -> ForkProcess:
    """Return a running tuner, forked from this process, which has imported all that it needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: those here are idle
        tuner = multiprocessing.get_context("fork").Process(target=killed.tune_and_tell, args=(url, told))
        tuner.start()
    return tuner


def candidates(connection: sqlite3.Connection) -> list[str]:
    left_out = ", ".join(f"'{outcome}'" for outcome in NOT_TRIED)
    rows = connection.execute(f"SELECT candidate_digest FROM trials WHERE outcome NOT IN ({left_out})")
    return [digest for (digest,) in rows]
