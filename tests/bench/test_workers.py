"""Jobs in processes of their own: each way to fail costs one job."""

import math
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from tilewise.bench.workers import MESSAGE_LIMIT, run_each, shortened
from tilewise.domain.trial import Outcome


def test_results_come_with_their_jobs() -> None:
    done = list(run_each(math.sqrt, [1.0, 4.0, -1.0, 9.0], processes=2, seconds=60))
    assert {each.job: each.result for each in done} == {1.0: 1.0, 4.0: 2.0, -1.0: None, 9.0: 3.0}
    (failed,) = (each for each in done if each.outcome is not Outcome.OK)
    assert failed.outcome is Outcome.COMPILE_FAILED
    assert failed.message.startswith("ValueError: ")


def test_a_death_costs_one_job() -> None:
    outcomes = [(each.outcome, each.message) for each in run_each(os._exit, [3, 0], processes=1, seconds=60)]
    assert outcomes == [(Outcome.WORKER_DIED, "exit code 3"), (Outcome.WORKER_DIED, "exit code 0")]


def test_a_job_that_hangs_is_ended() -> None:
    (done,) = run_each(time.sleep, [3600], processes=1, seconds=0.2)
    assert (done.outcome, done.message) == (Outcome.TIMED_OUT, "more than 0.2 s")


def test_memory_is_limited() -> None:
    (done,) = run_each(bytes, [3 << 30], processes=1, seconds=60, memory_gib=2)
    assert done.outcome is Outcome.COMPILE_FAILED
    assert done.message.startswith("MemoryError")


def test_an_early_end_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    running = run_each(math.sqrt, [1.0] * 50, processes=2, seconds=60)
    assert next(running).result == 1.0
    assert multiprocessing.active_children()
    running.close()
    assert not multiprocessing.active_children()
    assert not list(tmp_path.iterdir())


def test_a_message_is_the_first_line_and_the_first_error_printed() -> None:
    printed = (
        b"x" * 10_000_000 + b"\n  k.py:3:1: error: operand #0 does not dominate\nerror: another\n" + b"y" * 10_000_000
    )
    assert shortened("RuntimeError: PassManager::run failed\nmore", printed) == (
        "RuntimeError: PassManager::run failed; k.py:3:1: error: operand #0 does not dominate"
    )
    assert len(shortened("long " * 1000, b"")) == MESSAGE_LIMIT
    assert shortened("exit code -6", b"python: x.cpp:7: f(): Assertion `a' failed.\n") == (
        "exit code -6; python: x.cpp:7: f(): Assertion `a' failed."
    )
