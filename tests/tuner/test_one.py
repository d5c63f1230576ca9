"""A single candidate beside torch's own choice: right, wrong, and without anything to compare with."""

import pytest

from tilewise.domain.config import Candidate, Config
from tilewise.domain.errors import ConfigError, TuningError
from tilewise.domain.trial import Outcome
from tilewise.tuner.crew import Crew
from tilewise.tuner.one import Attempted, try_one

from .fakes import CPU, FAST_LIMITS, TINY, set_up_without_sdpa, set_up_without_torch

TILED = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=32, block_k=32, heads_per_chunk=1))


def attempt(crew: Crew, candidate: Candidate) -> Attempted:
    with crew:
        return try_one(TINY, candidate, crew=crew, rounds=5, seconds=20, seed=0)


def test_torchs_own_choice_itself_needs_no_other() -> None:
    found = attempt(Crew(CPU), Candidate("sdpa"))
    assert found.trial.outcome is Outcome.OK
    assert found.finalists == (Candidate("sdpa"),)
    assert found.final is not None


def test_another_path_stands_in_where_torchs_own_choice_fails() -> None:
    found = attempt(Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up_without_sdpa), TILED)
    assert found.finalists == (Candidate("sdpa_math"), TILED)
    assert found.final is not None
    assert found.final.measurements[0].ratio == 1


def test_nothing_is_said_where_nothing_can_be_compared() -> None:
    with pytest.raises(TuningError, match=r"nothing can be compared: sdpa fails: .*broken.*; plain fails: .*broken"):
        attempt(Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up_without_torch), TILED)


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        (Candidate.of("cpu_tiled", dq=TILED.configs[0][1]), "cpu_tiled has the roles forward here, not 'dq'"),
        (Candidate.of("sdpa", forward=Config.of("x")), "sdpa has the roles none here, not 'forward'"),
        (
            Candidate.of("cpu_tiled", forward=Config.of("tiled_cpu", block_q=32, block_k=32, heads_per_chunk=1)),
            "a config of cpu_tiled with block_k, block_q, heads_per_chunk; got tiled_cpu with block_k=32 block_q=32",
        ),
        (
            Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=32)),
            "with block_k, block_q, heads_per_chunk; got cpu_tiled with block_q=32",
        ),
    ],
    ids=["role", "no roles", "kernel", "parameters"],
)
def test_what_a_backend_would_not_run_is_not_tried(candidate: Candidate, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        attempt(Crew(CPU), candidate)
