"""Compiles a candidate's kernels before the device that will run them is free, on any CPU core.

What is compiled lies in Triton's cache on disk afterwards, where the process that measures finds it. Backends that are
not in COMPILERS compile when they are first called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one compiled kernel needs: bytes of shared memory of a block, registers and spilled bytes of a thread."""

    kernel: str
    shared_memory: int
    registers: int
    stack: int


Compiler = Callable[[Problem, Candidate, Device], tuple[Footprint, ...]]


def compile_triton(problem: Problem, candidate: Candidate, device: Device) -> tuple[Footprint, ...]:
    """Compile every kernel of a Triton candidate for `device`. Raises what Triton raises.

    A kernel that needs more shared memory than a block of the device has raises Triton's OutOfResources.
    """
    from triton import knobs

    from .offline import compiling, launch

    cache = Path(knobs.cache.dir)  # not the one for the time being: it is to be found again
    with compiling(device.capability, shared_memory=device.shared_memory, cache=cache) as found:
        for role, config in candidate.configs:
            launch(_named(role, config.kernel, candidate), problem, config)
        if problem.bias_grad:
            launch("dbias", problem, None)
    return tuple(
        Footprint(kernel=name, shared_memory=each.shared_memory, registers=each.registers, stack=each.stack)
        for name, each in found.items()
    )


COMPILERS: dict[str, Compiler] = {"triton": compile_triton, "triton_decode": compile_triton}


def _named(role: str, kernel: str, candidate: Candidate) -> str:
    """Return what `kernels.offline` calls the kernel of a role."""
    if candidate.backend == "triton_decode":
        return "decode"
    return f"hopper_{role}" if kernel.startswith("hopper_") else role
