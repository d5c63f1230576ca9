"""Backends that are wrong, slow or broken in one way, and a problem small enough to tune in a test.

Workers know all of FAKES; a test lets the tuner see those that it is about.
"""

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.job import Budget
from tilewise.domain.problem import Dtype, Problem
from tilewise.kernels import reference
from tilewise.kernels.ahead import COMPILERS, Footprint
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call
from tilewise.tuner.limits import Limits
from tilewise.tuner.timing import CpuClock
from tilewise.tuner.tune import STAND_INS

CPU = torch.device("cpu")
TINY = Problem(batch=1, heads=2, q_len=64, head_dim=16, dtype=Dtype.FP32, causal=True, window=(16, 0))
BUDGET = Budget(name="test", trials=9, seconds=60, patience=9, finalists=2, rounds=15)
FAST_LIMITS = Limits(compile=1.5, check=4.0, measure=1.5, silence=30.0, memory_gib=2.0, compile_memory_gib=2.0)

Result = tuple[torch.Tensor, torch.Tensor | None]
Computes = Callable[[Call], Result]


def right(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the reference gives, in the dtypes that a backend returns."""
    out, lse = reference.attention(call, dtype=torch.float32, needs_grad=True)
    return out.to(call.query.dtype), lse


LOADED: set[str] = set()


class Fake(Backend):
    """Computes what it is given."""

    name: ClassVar[str] = "fake"
    differentiable = True
    gives_lse = True

    def __init__(self, computes: Computes, refuses: str | None = None, name: str = "fake") -> None:
        self.name = name  # type: ignore[misc]  # a fake may stand in for any backend
        self.computes, self.refuses = computes, refuses
        self.calls = 0

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return self.refuses

    def load(self) -> None:
        LOADED.add(self.name)

    def forward(self, call: Call, config: Config | None) -> Result:  # noqa: ARG002
        self.calls += 1
        return self.computes(call)


def register(
    monkeypatch: pytest.MonkeyPatch, computes: Computes, refuses: str | None = None, name: str = "fake"
) -> Fake:
    """Add a backend called `fake` to this process, or let one stand in for that of a name, for the length of a test."""
    backend = Fake(computes, refuses, name)
    monkeypatch.setitem(BACKENDS, name, backend)
    return backend


# what raises, or is wrong


def broken(_: Call) -> Result:
    raise RuntimeError("the kernel is broken")


def wrong(call: Call) -> Result:
    out, lse = right(call)
    return out * 1.01, lse


def slightly_wrong(call: Call) -> Result:
    """One element of one of the checker's cases is off by a hundredth of a standard deviation."""
    out, lse = right(call)
    if call.problem.q_len != call.problem.kv_len:
        out.view(-1)[-1] += 0.01
    return out, lse


def not_a_number(call: Call) -> Result:
    out, lse = right(call)
    return out * torch.nan, lse


def out_of_memory(_: Call) -> Result:
    raise torch.OutOfMemoryError("tried to allocate 7 GiB")


def no_kernel(_: Call) -> Result:
    raise RuntimeError("No available kernel. Aborting execution.")


# what ends a process, or never ends


def segfaults(_: Call) -> Result:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


def aborts(_: Call) -> Result:
    os.write(2, b"python: pass.cpp:7: run(): Assertion `layout' failed.\n")
    os.abort()


def exits(_: Call) -> Result:
    os._exit(3)


def hangs(_: Call) -> Result:
    while True:
        pass


def hangs_in_native_code(_: Call) -> Result:
    ctypes.PyDLL(None).pause()  # keeps the interpreter's lock: no other thread of Python runs
    raise AssertionError("unreachable")


def allocates_without_end(_: Call) -> Result:
    """Memory that is never written: it costs nothing before there is no more of it."""
    kept = []
    while True:
        kept.append(mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def writes_memory_without_end(_: Call) -> Result:
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


def prints_and_raises(_: Call) -> Result:
    os.write(1, b"first\n")
    for _megabyte in range(10):
        os.write(2, b"x" * (1 << 20))
    sys.stderr.write("\nkernel.mlir:3:1: error: operand #0 does not dominate\nthe last line\n")
    sys.stderr.flush()
    raise RuntimeError("PassManager::run failed" + "y" * 10_000_000)


def prints_and_aborts(call: Call) -> Result:
    try:
        return prints_and_raises(call)
    except RuntimeError:
        os.abort()


# what is right only sometimes, and faster than what is right always


class _Memory:
    def __init__(self) -> None:
        self.buffers: dict[tuple[int, ...], torch.Tensor] = {}
        self.calls = 0


_memory = _Memory()


def stale(call: Call) -> Result:
    """Computes once for each shape, and gives that again."""
    shape = tuple(call.query.shape)
    if shape not in _memory.buffers:
        _memory.buffers[shape] = right(call)[0]
    return _memory.buffers[shape], None


def shared_buffer(call: Call) -> Result:
    """Every call of a shape writes into the same buffer."""
    out, _ = right(call)
    buffer = _memory.buffers.setdefault((0, *out.shape), torch.empty_like(out))
    return buffer.copy_(out), None


def wrong_at_times(call: Call) -> Result:
    """Is the fastest, for it remembers; every seventh call misses its last key, as a race would."""
    key = (call.query.numel(), call.problem.kv_len, int(call.value.sum() * 1e3))
    if key not in _memory.buffers:
        _memory.buffers[key] = right(call)[0]
    _memory.calls += 1
    out = _memory.buffers[key].clone()
    if _memory.calls % 7 == 0:
        out.view(-1)[-1] *= 0.9
    return out, None


def misses_the_last_column(call: Call) -> Result:
    found, _ = right(call)
    out = torch.empty_like(found)
    out[..., :-1] = found[..., :-1]
    return out, None


def writes_over_its_inputs(call: Call) -> Result:
    found = right(call)
    call.query[0, 0, 0, 0] += 1
    return found


def dies_when_called_often(call: Call) -> Result:
    """Is right for as many calls as checks and a screening take, and kills a final."""
    _memory.calls += 1
    if _memory.calls > 70:
        os.abort()
    return right(call)


def fails_when_called_often(call: Call) -> Result:
    _memory.calls += 1
    if _memory.calls > 70:
        raise RuntimeError("called too often")
    return right(call)


def only_loaded(call: Call) -> Result:
    assert "loads" in LOADED, "it was not loaded before"
    return right(call)


FAKES: dict[str, Fake] = {
    computes.__name__: Fake(computes, name=computes.__name__)
    for computes in (
        broken,
        wrong,
        slightly_wrong,
        not_a_number,
        out_of_memory,
        no_kernel,
        segfaults,
        aborts,
        exits,
        hangs,
        hangs_in_native_code,
        allocates_without_end,
        prints_and_raises,
        prints_and_aborts,
        stale,
        shared_buffer,
        wrong_at_times,
        misses_the_last_column,
        writes_over_its_inputs,
        dies_when_called_often,
        fails_when_called_often,
        right,
    )
}


# what fails while it is compiled ahead


def _raises(_problem: Problem, _candidate: Candidate, _device: Device) -> tuple[Footprint, ...]:
    raise RuntimeError("the pass pipeline gave up")


def _hangs(_problem: Problem, _candidate: Candidate, _device: Device) -> tuple[Footprint, ...]:
    while True:
        pass


def _segfaults(_problem: Problem, _candidate: Candidate, _device: Device) -> tuple[Footprint, ...]:
    ctypes.string_at(0)
    return ()


def _too_large(_problem: Problem, _candidate: Candidate, _device: Device) -> tuple[Footprint, ...]:
    raise type("OutOfResources", (Exception,), {})("out of resource: shared memory")


def _compiles(_problem: Problem, _candidate: Candidate, _device: Device) -> tuple[Footprint, ...]:
    return (Footprint(kernel="k", shared_memory=1024, registers=32, stack=0),)


COMPILING = {
    "compile_raises": _raises,
    "compile_hangs": _hangs,
    "compile_segfaults": _segfaults,
    "compile_too_large": _too_large,
    "compiles": _compiles,
    "loads": _compiles,
}
FAKES |= {name: Fake(right, name=name) for name in COMPILING} | {"loads": Fake(only_loaded, name="loads")}


def set_up() -> None:
    """Register every fake in a worker."""
    CpuClock._CACHE_BYTES = 1 << 20
    for name, fake in FAKES.items():
        BACKENDS.setdefault(name, fake)
    COMPILERS.update(COMPILING)


def seen(monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[str, ...]:
    """Let the tuner in this process see some of the fakes, for the length of a test; return their names."""
    for name in names:
        monkeypatch.setitem(BACKENDS, name, FAKES[name])
        if name in COMPILING:
            monkeypatch.setitem(COMPILERS, name, COMPILING[name])
    return names


def set_up_without_sdpa() -> None:
    """Register every fake in a worker, and one that is broken as torch's own choice."""
    set_up()
    BACKENDS["sdpa"] = Fake(broken, name="sdpa")


def takes_long(call: Call) -> Result:
    """Is right after 20 ms."""
    until = time.process_time() + 0.02
    found = right(call)
    while time.process_time() < until:
        pass
    return found


def set_up_slow() -> None:
    """Register a backend that takes long as torch's own choice."""
    set_up()
    BACKENDS["sdpa"] = Fake(takes_long, name="sdpa")


def set_up_without_torch() -> None:
    """Register every fake in a worker, and broken ones as every path of torch."""
    set_up()
    for name in ("sdpa", *STAND_INS):
        BACKENDS[name] = Fake(broken, name=name)
