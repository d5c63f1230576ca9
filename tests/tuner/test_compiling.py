"""Compiling ahead, for a GPU that is not here: what is compiled is found again by whoever has the same cache."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewise.domain.problem import Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.backends import backend_named
from tilewise.tuner.compiling import Compiled, Compiling
from tilewise.tuner.limits import Limits
from tilewise.tuner.processes import Worker

from ..kernels.test_backends import H200
from .tasks import compiled_by

PROBLEM = Problem.parse("inference.fp16.b2.h8.kv2.q1.k1024.d64")


def cache_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker(Limits(), memory_gib=8, strict=True)
    yield one
    one.stop()


def compiled(worker: Worker, folder: Path, shared_memory: int = H200.shared_memory) -> Compiled:
    task = Compiling(
        problem=PROBLEM,
        candidate=backend_named("triton_decode").default(PROBLEM, H200),
        device=dataclasses.replace(H200, shared_memory=shared_memory),
        limits=Limits(),
        setup=functools.partial(cache_in, str(folder)),
    )
    return compiled_by(worker, task)


def test_what_is_compiled_ahead_is_found_by_another_process(worker: Worker, tmp_path: Path) -> None:
    first = compiled(worker, tmp_path)
    assert first.outcome is Outcome.OK, first.message
    assert [footprint.kernel for footprint in first.footprints] == ["attention_decode", "combine_splits"]
    assert 0 < first.footprints[0].shared_memory <= H200.shared_memory
    assert all(0 < footprint.registers <= 255 for footprint in first.footprints)
    kept = sorted(tmp_path.rglob("*"))
    assert kept
    worker.stop()  # the next process has nothing in its memory
    assert compiled(worker, tmp_path).footprints == first.footprints
    assert sorted(tmp_path.rglob("*")) == kept, "nothing was compiled again"


def test_what_the_device_has_not_room_for_is_infeasible(worker: Worker, tmp_path: Path) -> None:
    found = compiled(worker, tmp_path, shared_memory=1024)
    assert found.outcome is Outcome.INFEASIBLE
    assert "OutOfResources" in found.message
