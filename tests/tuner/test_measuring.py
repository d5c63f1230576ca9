"""What the measuring process keeps between tasks: the tensors of one problem, whatever they are asked for."""

from dataclasses import replace

import pytest
import torch

from tilewise.domain.config import Candidate
from tilewise.tuner import measuring
from tilewise.tuner.crew import Crew
from tilewise.tuner.limits import Limits
from tilewise.tuner.measuring import Preparation, Readying, no_setup
from tilewise.tuner.serving import Room

from .fakes import CPU, TINY
from .tasks import prepared, run

PREPARATION = Preparation(
    problem=TINY, device="cpu", reference=Candidate("sdpa"), seed=0, threads=torch.get_num_threads(), setup=no_setup
)


class Silent(Room):
    """A room in which the phases are noted."""

    def __init__(self) -> None:
        self.broken, self.phases = False, list[str]()

    def enter(self, phase: str, seconds: float) -> None:  # noqa: ARG002
        self.phases.append(phase)


def test_tensors_are_made_once_for_all_jobs_and_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ready", None)
    room, limits = Silent(), Limits()
    Readying(preparation=PREPARATION, limits=limits)(room)
    first = measuring._bench(room, PREPARATION, limits)
    job = replace(PREPARATION, job="a", attempt=2)
    second = measuring._bench(room, job, limits)
    third = measuring._bench(room, replace(job, reference=Candidate("plain")), limits)
    assert room.phases == ["prepare"]
    assert first.checker is second.checker is third.checker
    assert third.reference == Candidate("plain")
    trial = second.refused(Candidate("sdpa"), "no")
    assert (trial.job, trial.attempt) == ("a", 2)
    other = measuring._bench(room, replace(PREPARATION, seed=1), limits)
    assert room.phases == ["prepare", "prepare"]
    assert other.checker is not first.checker


def test_a_crew_makes_the_tensors_that_its_next_tuning_asks_for() -> None:
    with Crew(CPU, compilers=0) as crew:
        crew.begin(TINY, seed=0)
        assert run(crew.measurer, prepared).result == replace(PREPARATION, job="a", attempt=2).tensors
        assert crew.measurer.started == 1
