"""Who compiles what: processes that have begun with something, and those that import what is slow to import."""

import pytest

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Problem
from tilewise.kernels.backends.triton import Triton
from tilewise.tuner.compile_pool import CompilePool
from tilewise.tuner.crew import _foreseen
from tilewise.tuner.limits import Limits
from tilewise.tuner.processes import Worker, nothing
from tilewise.tuner.serving import Task

from ..kernels.test_backends import H200
from .fakes import FAKES, seen


def slow(block: int) -> Candidate:
    return Candidate.of("right", forward=Config.of("slow", block=block))


def quick(block: int) -> Candidate:
    return Candidate.of("compiles", forward=Config.of("quick", block=block))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Six workers without processes; what they begin with is in `begun`."""
    seen(monkeypatch, "right", "compiles")
    monkeypatch.setattr(FAKES["right"], "compile_seconds", 8.0)
    return [Worker(Limits(), memory_gib=1.0, strict=False) for _ in range(6)]


def tasks(*candidates: Candidate) -> dict[Candidate, Task]:
    return {candidate: (lambda _room, each=candidate: each) for candidate in candidates}  # type: ignore[misc]


def test_a_third_of_the_processes_import_what_is_slow(workers: list[Worker]) -> None:
    pool = CompilePool(workers)
    waiting = [slow(1), slow(2), slow(3), quick(1), quick(2)]
    taken = []
    for worker in workers:
        place = pool.choose(worker, waiting, mixed=True)
        if place is not None:
            taken.append(waiting.pop(place))
    assert taken == [slow(1), slow(2), quick(1), quick(2)]
    assert waiting == [slow(3)]
    assert pool.choose(workers[5], waiting, mixed=True) is None
    assert pool.choose(workers[0], waiting, mixed=True) == 0, "it has imported"


def test_where_nothing_else_compiles_all_import(workers: list[Worker]) -> None:
    pool, waiting = CompilePool(workers), [slow(block) for block in range(6)]
    assert pool.slots(mixed=False) == 6
    assert [pool.choose(worker, waiting, mixed=False) for worker in workers] == [0] * 6


def test_what_is_foreseen_is_what_a_search_tries_first() -> None:
    problem = Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)
    triton = Triton()
    found = _foreseen(problem, H200, [triton])
    assert found[0] == triton.default(problem, H200)
    assert len(found) == len(set(found)) > 8
    space = triton.spaces(problem, H200)["forward"]
    assert {config.kernel for each in found for _, config in each.configs} == {each.kernel for each in space.by_kernel}
    assert all(config in space for each in found for _, config in each.configs)


def test_whoever_has_begun_with_a_candidate_goes_on_with_it(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: dict[Worker, Task] = {}
    monkeypatch.setattr(Worker, "begin", lambda worker, task: begun.__setitem__(worker, task))
    pool = CompilePool(workers)
    wanted = tasks(slow(1), quick(1), slow(2), slow(3), quick(2))
    pool.begin(wanted)
    first = [slow(1), slow(2), quick(1), quick(2)]
    assert [begun[worker] for worker in workers] == [*(wanted[each] for each in first), nothing, nothing]

    waiting = [quick(2), slow(1), quick(9)]
    assert pool.choose(workers[5], waiting, mixed=True) == 2, "the others have begun with the rest"
    assert pool.choose(workers[3], waiting, mixed=True) == 0
    assert pool.choose(workers[0], waiting, mixed=True) == 1
    assert pool.choose(workers[4], [slow(3)], mixed=True) is None
    assert pool.choose(workers[1], [slow(3)], mixed=True) == 0
    assert pool.choose(workers[5], [slow(2), quick(2)], mixed=True) == 1, "a candidate is foreseen once"
    assert pool.choose(workers[0], [slow(2)], mixed=True) == 0, "who was to do it does something else"
