"""What a bench does with a candidate, with a clock whose times are given and a device that keeps errors."""

import os
from collections.abc import Callable, Sequence

import pytest
import torch

from tilewise.domain.config import Candidate
from tilewise.domain.trial import Mode, Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.device import Telemetry
from tilewise.tuner import timing
from tilewise.tuner.correctness import Checker
from tilewise.tuner.limits import Limits
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import CpuClock
from tilewise.tuner.trying import Bench, classify, unwatched

from .fakes import CPU, TINY, register, right, writes_over_its_inputs

FAKE, SDPA = Candidate("fake"), Candidate("sdpa")
Times = Callable[[str, bool], float]  # by backend and whether it is alone


class Told(CpuClock):
    """Runs every step once, and says that it took as long as it is told."""

    def __init__(self, times: Times, *, bound: bool = False) -> None:
        super().__init__()
        self.times, self.bound = times, bound
        self.ran: list[str] = []
        self.replayed: list[str] = []

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        names = [self._name(step) for step in steps]
        return [[self.times(name, len(steps) == 1)] * rounds for name in names]

    def _name(self, step: Step) -> str:
        self.ran.clear()
        step()
        return self.ran[-1]

    def launch_bound(self, step: Step) -> bool:  # noqa: ARG002
        return self.bound

    def captured(self, step: Step) -> Step | None:
        name = self._name(step)
        if name == "plain":
            return None

        def replay() -> None:
            self.replayed.append(name)
            self.ran.append(name)

        return replay


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[Told], Bench]:
    """Return a bench by its clock; the clock learns who is called."""
    register(monkeypatch, right)

    def made(clock: Told, mode: Mode | None = None) -> Bench:
        class Named(Bench):
            def step(self, candidate: Candidate) -> Step:
                step = super().step(candidate)

                def call() -> object:
                    clock.ran.append(candidate.backend)
                    return step()

                return call

        return Named(Checker(TINY, CPU, seed=0), clock, SDPA, job="", attempt=1, mode=mode)

    return made


def judge(bench: Bench, *candidates: Candidate) -> tuple[bool, list[str]]:
    judged = bench.judge(candidates, rounds=15, seconds=1, enter=unwatched, limits=Limits())
    return judged.final is not None, [f"{trial.candidate}: {trial.message}" for trial in judged.failures]


def test_who_is_fast_only_between_others_leaves(bench: Callable[[Told], Bench]) -> None:
    clock = Told(lambda name, alone: {"sdpa": 1.0, "fake": 2.0 if alone else 0.4}[name])
    assert judge(bench(clock), SDPA, FAKE) == (False, ["fake: alone it takes 5.00 times as long as between others"])


def test_a_device_that_is_slower_for_all_is_not_suspicious(bench: Callable[[Told], Bench]) -> None:
    clock = Told(lambda name, alone: {"sdpa": 1.0, "fake": 0.4}[name] * (7 if alone else 1))
    assert judge(bench(clock), SDPA, FAKE) == (True, [])


def test_a_moment_of_other_work_is_not_suspicious(bench: Callable[[Told], Bench]) -> None:
    seen: list[str] = []

    def times(name: str, alone: bool) -> float:
        if alone and name == "fake":
            seen.append(name)
            return 9.0 if len(seen) == 1 else 0.4
        return {"sdpa": 1.0, "fake": 0.4}[name]

    assert judge(bench(Told(times)), SDPA, FAKE) == (True, [])
    assert len(seen) == 2


def test_replays_are_timed_where_calls_wait_for_the_host(bench: Callable[[Told], Bench]) -> None:
    """And who cannot be captured is timed as it is called, and says so."""
    clock = Told(lambda _, __: 1.0, bound=True)
    here = bench(clock)
    trial = here.attempt(FAKE, best_ratio=1.0)
    assert trial.outcome is Outcome.OK
    assert trial.measurement is not None
    assert trial.measurement.mode is Mode.GRAPH
    judged = here.judge((SDPA, FAKE, Candidate("plain")), rounds=15, seconds=1, enter=unwatched, limits=Limits())
    assert judged.final is not None
    assert [each.mode for each in judged.final.measurements] == [Mode.GRAPH, Mode.GRAPH, Mode.EAGER]
    assert set(clock.replayed) == {"sdpa", "fake"}


def test_calls_are_timed_otherwise(bench: Callable[[Told], Bench]) -> None:
    clock = Told(lambda _, __: 1.0)
    trial = bench(clock).attempt(FAKE, best_ratio=1.0)
    assert trial.measurement is not None
    assert (trial.measurement.mode, clock.replayed) == (Mode.EAGER, [])


@pytest.mark.parametrize("mode", Mode)
def test_calls_are_timed_as_it_was_said(bench: Callable[..., Bench], mode: Mode) -> None:
    """Whatever the reference's calls say here."""
    clock = Told(lambda _, __: 1.0, bound=mode is Mode.EAGER)
    trial = bench(clock, mode).attempt(FAKE, best_ratio=1.0)
    assert trial.measurement is not None
    assert trial.measurement.mode is mode


def test_who_writes_over_the_inputs_breaks_the_bench(
    bench: Callable[[Told], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bench(Told(lambda _, __: 1.0))
    assert here.attempt(FAKE, best_ratio=1.0).outcome is Outcome.OK
    assert not here.broken
    register(monkeypatch, writes_over_its_inputs)
    trial = here.attempt(FAKE, best_ratio=1.0)
    assert (trial.outcome, here.broken) == (Outcome.WRONG_RESULT, True)
    assert trial.message.endswith("\nit wrote over its inputs")


def test_a_device_that_keeps_an_error_breaks_the_bench(
    bench: Callable[[Told], Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = bench(Told(lambda _, __: 1.0))

    def poisoned() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(here, "_synchronize", poisoned)
    trial = here.attempt(FAKE, best_ratio=1.0)
    assert (trial.outcome, here.broken) == (Outcome.FAILED, True)
    assert trial.message.count("illegal memory access") == 2
    assert "the device keeps the error" in trial.message
    assert trial.measurement is None


@pytest.mark.parametrize(("others", "state"), [(None, "settled"), (0, "settled"), (2, "shared")])
def test_other_processes_on_the_device_are_noted(
    others: int | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "telemetry", lambda _: Telemetry(others=others))
    found = timing.final(CpuClock(), [lambda: None], rounds=15, seconds=0.1, device=CPU)
    assert found.measurements[0].power_state == state


def test_torchs_allocator_on_a_cpu_is_out_of_resources() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert classify(raised.value) is Outcome.OUT_OF_RESOURCES


class Process:
    def __init__(self, pid: int) -> None:
        self.pid = pid


@pytest.mark.parametrize(
    ("pids", "others"),
    [((), 0), (("me",), 0), (("me", "group"), 0), (("me", "else"), 1), (("else", "else too"), 1)],
)
def test_who_else_computes_on_a_gpu(pids: tuple[str, ...], others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"me": 10, "group": 11, "else": 12, "else too": 13}
    monkeypatch.setattr(os, "getpid", lambda: 10)
    monkeypatch.setattr(os, "getpgrp", lambda: 10)
    monkeypatch.setattr(os, "getpgid", lambda pid: 10 if pid < 12 else pid)

    class Nvml:
        NVMLError = RuntimeError

        @staticmethod
        def nvmlDeviceGetComputeRunningProcesses(_: object) -> list[Process]:  # noqa: N802
            return [Process(numbers[name]) for name in pids]

    assert devices._others(Nvml, None) == others
