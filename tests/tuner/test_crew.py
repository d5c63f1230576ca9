"""In which order candidates go through a crew, and what becomes of them when the search ends."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewise.domain.config import Candidate
from tilewise.domain.trial import Mode, Outcome
from tilewise.tuner.crew import Crew, Pipeline
from tilewise.tuner.measuring import Preparation

from .fakes import FAKES, TINY, seen, set_up

NEVER = float("inf")


def behind(gate: str) -> None:
    while not Path(gate).exists():
        time.sleep(0.01)
    set_up()


def die() -> None:
    os._exit(3)


@pytest.fixture
def pipeline(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """Compiling and measuring at once, as on a GPU; `right` takes a second to compile, where it is measured."""
    seen(monkeypatch, "right", "compiles", "compile_hangs", "compile_raises")
    monkeypatch.setattr(FAKES["right"], "compile_seconds", 1.0)
    preparation = Preparation(problem=TINY, device="cpu", reference=Candidate("sdpa"), seed=0, threads=1, setup=set_up)
    one = Pipeline(crew, preparation)
    one._alone = False
    yield one
    one.abandon()


def order(pipeline: Pipeline) -> list[str]:
    found = []
    while pipeline.pending:
        found.append(pipeline.take(best_ratio=NEVER).trial.candidate.backend)
    return found


def test_what_compiles_where_it_is_measured_waits_for_the_rest(pipeline: Pipeline) -> None:
    for name in ("right", "compiles", "plain", "sdpa"):
        pipeline.submit(Candidate(name))
    pipeline.defer(60)
    found = order(pipeline)
    assert found[-1] == "right"
    assert sorted(found) == ["compiles", "plain", "right", "sdpa"]


def test_but_not_longer_than_it_may(pipeline: Pipeline) -> None:
    for name in ("plain", "right", "sdpa"):
        pipeline.submit(Candidate(name))
    pipeline.defer(0)
    assert order(pipeline) == ["right", "plain", "sdpa"]


def test_it_waits_until_the_search_had_a_chance_to_submit(pipeline: Pipeline) -> None:
    pipeline.submit(Candidate("sdpa"))
    pipeline.submit(Candidate("right"))
    pipeline.defer(60)
    assert pipeline.take(best_ratio=NEVER).trial.candidate == Candidate("sdpa")
    pipeline.submit(Candidate("plain"))
    assert order(pipeline) == ["plain", "right"]


def test_all_are_timed_as_the_reference_was(pipeline: Pipeline) -> None:
    def mode() -> Mode | None:
        return pipeline._preparation.mode

    pipeline.submit(Candidate("plain"))
    pipeline.take(best_ratio=NEVER)
    assert mode() is None
    pipeline.submit(Candidate("sdpa"))
    measured = pipeline.take(best_ratio=NEVER).trial.measurement
    assert measured is not None
    assert mode() is measured.mode is Mode.EAGER
    pipeline.time_as(dataclasses.replace(measured, mode=Mode.GRAPH))
    pipeline.time_as(None)
    assert mode() is Mode.GRAPH
    pipeline.compare_with(Candidate("plain"))
    assert mode() is None


def test_what_compiles_ahead_is_wanted_whatever_else_waits(pipeline: Pipeline) -> None:
    for name in ("right", "plain", "sdpa"):
        pipeline.submit(Candidate(name))
    assert pipeline.wants("compiles")
    assert not pipeline.wants("right")
    for _ in range(2):  # one more than there are processes
        pipeline.submit(Candidate("compiles"))
    assert not pipeline.wants("compiles")


def test_the_end_of_a_search_tries_what_must_be(pipeline: Pipeline) -> None:
    for name in ("right", "compiles", "compile_raises"):
        pipeline.submit(Candidate(name), must=True)
    for name in ("plain", "compile_hangs"):
        pipeline.submit(Candidate(name))
    found = {tried.trial.candidate.backend: tried for tried in pipeline.finish(grace=60)}
    assert {name: tried.trial.outcome for name, tried in found.items()} == {
        "right": Outcome.OK, "compiles": Outcome.OK, "compile_raises": Outcome.COMPILE_FAILED,
    }  # fmt: skip
    assert {name for name, tried in found.items() if tried.compiled} == {"compiles"}
    assert not pipeline.pending


def test_what_is_not_compiled_then_is_waited_for_a_little(pipeline: Pipeline) -> None:
    pipeline.submit(Candidate("compile_hangs"), must=True)
    pipeline.submit(Candidate("compiles"), must=True)  # behind it: there is one process
    pipeline.submit(Candidate("right"), must=True)
    found = {tried.trial.candidate.backend: tried.trial for tried in pipeline.finish(grace=0.3)}
    assert {name: trial.outcome for name, trial in found.items()} == {
        "compile_hangs": Outcome.SKIPPED, "compiles": Outcome.SKIPPED, "right": Outcome.OK,
    }  # fmt: skip
    assert found["compiles"].message == "not compiled 0.3 s after the end of the search; allow more seconds"


def test_a_trial_imports_what_it_needs(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen(monkeypatch, "loads")
    monkeypatch.setattr(FAKES["loads"], "compile_seconds", 1.0)
    pipeline.submit(Candidate("loads"))
    trial = pipeline.take(best_ratio=NEVER).trial
    assert trial.outcome is Outcome.OK, trial.message
    judged = pipeline.judge((Candidate("sdpa"), Candidate("loads")), rounds=15, seconds=5)
    assert judged.final is not None


@pytest.fixture
def inheriting(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """The pipeline's crew, to get an heir that imports `loads`."""
    seen(monkeypatch, "loads")
    monkeypatch.setattr(FAKES["loads"], "compile_seconds", 1.0)
    crew = pipeline._crew
    crew.measurer.stop()  # it may have imported it
    yield crew
    crew.part_with_heir()
    crew.measurer.stop()


def test_an_heir_takes_over_once_it_has_imported(pipeline: Pipeline, inheriting: Crew, tmp_path: Path) -> None:
    first = inheriting.measurer
    gate = tmp_path / "gate"
    waiting = dataclasses.replace(pipeline._preparation, setup=functools.partial(behind, str(gate)))
    inheriting.bring_up(waiting, ["loads"])
    for name in ("loads", "sdpa", "plain"):
        pipeline.submit(Candidate(name))
    assert [pipeline.take(best_ratio=NEVER).trial.candidate.backend for _ in range(2)] == ["sdpa", "plain"]
    assert inheriting.measurer is first
    assert inheriting.awaits("loads")
    assert not inheriting.awaits("sdpa")
    gate.touch()
    trial = pipeline.take(best_ratio=NEVER).trial
    assert (trial.candidate, trial.outcome) == (Candidate("loads"), Outcome.OK)
    assert inheriting.measurer is not first
    assert first.pid is None
    assert not inheriting.awaits("loads")
    inheriting.bring_up(waiting, ["loads"])
    assert inheriting.measuring == (inheriting.measurer,), "it has imported it"
    inheriting.measurer.stop()
    pipeline.submit(Candidate("sdpa"))
    pipeline.take(best_ratio=NEVER)
    inheriting.bring_up(pipeline._preparation, ["loads"])
    assert inheriting.awaits("loads"), "a fresh process has not"


def test_the_end_of_a_search_does_not_wait_for_an_heir(pipeline: Pipeline, inheriting: Crew, tmp_path: Path) -> None:
    never = dataclasses.replace(pipeline._preparation, setup=functools.partial(behind, str(tmp_path / "never")))
    inheriting.bring_up(never, ["loads"])
    pipeline.submit(Candidate("sdpa"), must=True)
    pipeline.submit(Candidate("loads"), must=True)
    while not any(waiting.compiled for waiting in pipeline._queues.to_measure):
        pipeline._go_on()
    found = {tried.trial.candidate.backend: tried.trial for tried in pipeline.finish(grace=1.0)}
    assert {name: trial.outcome for name, trial in found.items()} == {"sdpa": Outcome.OK, "loads": Outcome.SKIPPED}
    assert found["loads"].message == "its package was not imported 1 s after the end of the search; allow more seconds"
    heir = inheriting.measuring[1]
    assert pipeline.judge((Candidate("sdpa"), Candidate("plain")), rounds=15, seconds=5).final is not None
    assert heir.pid is None, "a final has the device to itself"


def test_nobody_looks_at_an_heir_while_something_is_measured(
    pipeline: Pipeline, inheriting: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beats would wake who waits for the trial, again and again."""
    seen(monkeypatch, "hangs")
    inheriting.bring_up(pipeline._preparation, ["loads"])
    heir = inheriting.measuring[1]
    pipeline.submit(Candidate("hangs"))
    pipeline._go_on()
    assert inheriting.measuring == (inheriting.measurer,)
    rounds = 0
    while pipeline._queues.measuring is not None:
        pipeline._go_on()
        rounds += 1
    assert rounds < 1000
    assert heir in (inheriting.measurer, *inheriting.measuring)


def test_a_crew_that_goes_on_has_no_heir_of_another_problem(
    inheriting: Crew, pipeline: Pipeline, tmp_path: Path
) -> None:
    never = dataclasses.replace(pipeline._preparation, setup=functools.partial(behind, str(tmp_path / "never")))
    inheriting.bring_up(never, ["loads"])
    first, heir = inheriting.measuring
    inheriting.begin(TINY, seed=1)
    assert inheriting.measuring == (first,)
    assert heir.pid is None


def test_an_heir_in_the_place_of_another(inheriting: Crew, pipeline: Pipeline, tmp_path: Path) -> None:
    never = dataclasses.replace(pipeline._preparation, setup=functools.partial(behind, str(tmp_path / "never")))
    inheriting.bring_up(never, ["loads"])
    heir = inheriting.measuring[1]
    inheriting.bring_up(pipeline._preparation, ["loads", "compiles"])
    assert heir.pid is None
    assert inheriting.awaits("compiles")


@pytest.mark.parametrize("before", [False, True], ids=["while it is awaited", "before anybody asks"])
def test_an_heir_that_dies_leaves_things_as_they_were(pipeline: Pipeline, inheriting: Crew, before: bool) -> None:
    first = inheriting.measurer
    inheriting.bring_up(dataclasses.replace(pipeline._preparation, setup=die), ["loads"])
    if before:
        heir = inheriting.measuring[1]
        heir._arrived()
        assert heir._live is not None
        heir._live.process.join(20)
    for name in ("sdpa", "loads"):
        pipeline.submit(Candidate(name))
    assert sorted(order(pipeline)) == ["loads", "sdpa"]
    assert inheriting.measurer is first
    assert inheriting.measuring == (first,)
