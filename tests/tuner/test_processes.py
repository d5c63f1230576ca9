"""Processes that may do anything: each way to end costs one task, and the next has a fresh process."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import NoReturn

import pytest

from tilewise.domain.trial import Outcome
from tilewise.tuner import processes
from tilewise.tuner.limits import Limits
from tilewise.tuner.printed import MESSAGE_LIMIT, TAIL_BYTES, Printed
from tilewise.tuner.processes import Worker, wait_for
from tilewise.tuner.serving import Task

from . import tasks
from .tasks import Calls, Says, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker(Limits(), memory_gib=2, strict=False)
    yield one
    one.stop()


def test_a_worker_stays_warm_and_has_a_heart_that_beats(worker: Worker) -> None:
    first, second = run(worker, Says("a")), run(worker, Says("b"))
    assert (first.outcome, first.phase) == (Outcome.OK, "say")
    assert isinstance(first.result, tuple)
    assert isinstance(second.result, tuple)
    assert (first.result[0], second.result[0]) == ("a", "b")
    assert first.result[1] == second.result[1] == worker.pid != os.getpid()
    assert worker.started == 1


def test_a_fresh_worker_has_torch_and_no_thread_that_a_fork_would_lose(worker: Worker) -> None:
    assert run(worker, tasks.state).result == (0, "unset", True)


@pytest.mark.parametrize(
    ("fake", "outcome", "says"),
    [
        ("segfaults", Outcome.WORKER_DIED, "killed by SIGSEGV (phase segfaults)"),
        ("aborts", Outcome.WORKER_DIED, "Assertion `layout' failed"),
        ("exits", Outcome.WORKER_DIED, "ended with exit code 3"),
        ("broken", Outcome.FAILED, "RuntimeError: the kernel is broken"),
    ],
)
def test_a_death_is_told_from_an_error(worker: Worker, fake: str, outcome: Outcome, says: str) -> None:
    ended = run(worker, Calls(fake))
    assert ended.outcome is outcome
    assert says in ended.message
    assert ended.phase == fake
    assert run(worker, Says(1)).outcome is Outcome.OK
    assert worker.started == (1 if outcome is Outcome.FAILED else 2)


@pytest.mark.parametrize("fake", ["hangs", "hangs_in_native_code"])
def test_a_hang_is_ended(worker: Worker, fake: str) -> None:
    ended = run(worker, Calls(fake, 0.3))
    assert (ended.outcome, ended.phase) == (Outcome.TIMED_OUT, fake)
    assert "no end within its time limit" in ended.message
    assert run(worker, Says(1)).outcome is Outcome.OK


def test_a_worker_gives_way_to_others() -> None:
    polite = Worker(Limits(), memory_gib=2, strict=False, nice=5)
    try:
        run(polite, Says("there"))
        assert polite.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, polite.pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
    finally:
        polite.stop()


def test_silence_is_ended_before_the_time_limit() -> None:
    worker = Worker(Limits(silence=1.0), memory_gib=2, strict=False)
    worker.start(tasks.sleeps)
    while worker.phase != "sleep":
        worker.poll()
        wait_for([worker])
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    while (ended := worker.poll()) is None:
        wait_for([worker])
    assert ended.outcome is Outcome.TIMED_OUT
    assert "no sign of life for 1 s" in ended.message


def test_each_phase_has_a_limit_of_its_own(worker: Worker) -> None:
    assert run(worker, tasks.two_phases).result == "done"


@pytest.mark.parametrize("strict", [False, True])
def test_memory_is_limited(strict: bool) -> None:
    worker = Worker(Limits(), memory_gib=1.0, strict=strict)
    ended = run(worker, Calls("allocates_without_end" if strict else "writes_memory_without_end", 120))
    if strict:  # the allocation fails, and the process lives
        assert (ended.outcome, worker.started) == (Outcome.FAILED, 1)
        assert "Cannot allocate memory" in ended.message
    else:
        assert ended.outcome is Outcome.OUT_OF_RESOURCES
        assert "more than 1 GiB of memory" in ended.message
    assert run(worker, Says(1)).outcome is Outcome.OK
    worker.stop()


@pytest.mark.parametrize("fake", ["prints_and_raises", "prints_and_aborts"])
def test_of_megabytes_printed_the_end_and_the_error_are_kept(worker: Worker, fake: str) -> None:
    ended = run(worker, Calls(fake))
    assert "error: operand #0 does not dominate" in ended.message
    assert ended.message.endswith("the last line")
    assert len(ended.message) <= MESSAGE_LIMIT
    assert "bytes left out" in ended.message


def test_a_broken_process_is_not_used_again(worker: Worker) -> None:
    first = run(worker, tasks.breaks)
    assert first.outcome is Outcome.OK
    assert run(worker, tasks.breaks).result != first.result


def test_a_result_that_cannot_be_sent_is_an_error(worker: Worker) -> None:
    ended = run(worker, tasks.unpicklable)
    assert ended.outcome is Outcome.FAILED
    assert "pickle" in ended.message


def test_what_is_begun_is_done_before_the_first_task(worker: Worker) -> None:
    worker.begin(tasks.remembers)
    assert not worker.busy
    assert run(worker, tasks.remembered).result == 1
    worker.begin(tasks.remembers)  # in the process that is there
    assert run(worker, tasks.remembered).result == 2
    assert worker.started == 1


@pytest.mark.parametrize("begun", [Calls("broken"), Calls("segfaults"), tasks.absent])
def test_what_is_begun_in_vain_costs_nothing(worker: Worker, begun: Task) -> None:
    """An error, a death, a task that the process cannot read: the next task is done all the same, and answered once."""
    worker.begin(begun)
    worker._arrived()
    assert worker._live is not None
    if begun == Calls("segfaults"):
        wait([worker._live.process.sentinel])
    for word in ("a", "b"):
        ended = run(worker, Says(word))
        assert isinstance(ended.result, tuple)
        assert ended.result[0] == word


@pytest.mark.parametrize("fake", ["segfaults", "hangs"])
def test_what_is_begun_is_no_fault_of_the_task_that_waits_for_it(worker: Worker, tmp_path: Path, fake: str) -> None:
    gate = tmp_path / "gate"
    worker.begin(tasks.Behind(str(gate), fake))
    worker.start(Says("a"))
    gate.touch()
    while (ended := worker.poll()) is None:
        wait_for([worker])
    assert (ended.outcome, ended.message) == (Outcome.OK, "")
    assert worker.started == 2
    assert run(worker, Calls("exits")).outcome is Outcome.WORKER_DIED, "that is its own"


def test_a_process_that_cannot_be_begun_is_asked_for_again(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> NoReturn:
        raise OSError("too many open files")

    monkeypatch.setattr(worker, "_spawned", refused)
    worker.begin(Says("a"))
    with pytest.raises(OSError, match="too many open files"):
        worker.start(Says("b"))
    worker.stop()
    monkeypatch.undo()
    assert run(worker, Says("c")).outcome is Outcome.OK


def test_a_worker_is_stopped_while_it_begins(worker: Worker) -> None:
    worker.begin(Says(1))
    coming = worker._coming
    assert coming is not None
    ended = threading.Event()
    worker.stop()
    coming.add_done_callback(lambda _: ended.set())  # behind the one that ends the process
    assert worker.pid is None
    assert ended.wait(60)
    with pytest.raises(ValueError, match="closed"):
        coming.result().process.is_alive()


def test_workers_end_together() -> None:
    workers = [Worker(Limits(), memory_gib=2, strict=False) for _ in range(3)]
    for each in workers:
        run(each, Says(1))
    pids = [each.pid for each in workers]
    processes.stop_all(workers)
    assert [each.pid for each in workers] == [None] * 3
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_was_killed_while_idle_is_replaced(worker: Worker) -> None:
    run(worker, Says(1))
    assert worker.pid is not None
    before = worker.pid
    os.kill(before, signal.SIGKILL)
    assert worker._live is not None
    wait([worker._live.process.sentinel])
    ended = run(worker, Says(2))
    assert isinstance(ended.result, tuple)
    assert ended.result[0] == 2
    assert worker.pid != before


def test_a_worker_dies_with_who_started_it() -> None:
    """Even while it hangs where no Python runs, and though what it was forked from lives."""
    mine, theirs = processes._context.Pipe()
    starter = processes._context.Process(target=tasks.orphans, args=(theirs,))
    starter.start()
    assert mine.poll(60)
    orphan = os.pidfd_open(mine.recv())
    starter.kill()
    starter.join()
    ready = wait([orphan], timeout=20)
    os.close(orphan)
    assert ready, "the worker outlived who started it"


def test_what_killed_workers_leave_is_cleared_up_without_a_word() -> None:
    script = "from tests.tuner import tasks; tasks.ends(tasks.holds)"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_ctrl_c_while_it_still_imports_reaches_no_worker() -> None:
    script = "from tests.tuner import tasks; tasks.interrupts()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_what_was_printed_is_found_across_chunks() -> None:
    printed = Printed()
    for chunk in (b"a.cpp:1: err", b"or: half of a line", b" and its end\n", b"z" * 5000):
        printed.feed(chunk)
    said = str(printed)
    assert said.startswith("a.cpp:1: error: half of a line")
    assert len(said) < TAIL_BYTES + 500
    assert str(Printed()) == ""
