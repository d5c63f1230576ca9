"""Compiles a candidate's kernels before the device that will run them is free, on any CPU core.

What is compiled lies in a cache on disk afterwards, Triton's or flash-attn-4's, where the process that measures finds
it. Backends that are not in COMPILERS compile when they are first called: FlexAttention, because inductor asks the GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Pass, Problem


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


def compile_flash_cute(problem: Problem, candidate: Candidate, device: Device) -> tuple[Footprint, ...]:
    """Compile every kernel that a flash_cute candidate launches for `device`. Raises what the CuTe DSL raises.

    The backend's own calls run on tensors that pretend to be on a GPU, so that what is asked for is what the real calls
    ask for: flash-attn-4 compiles and launches nothing under torch's FakeTensorMode. This process must use no GPU, and
    sees none afterwards (`flash_cute_package.target`). What a kernel needs is not told: no footprints.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .backends.flash_cute import FlashCute
    from .backends.flash_cute_package import target
    from .offline import call_without_data

    target(device)
    backend = FlashCute()
    with FakeTensorMode(), torch.no_grad():
        call = call_without_data(problem, "cuda")
        out, lse = backend.compute(call, candidate.config())
        if problem.pass_ is Pass.TRAINING:
            assert lse is not None, "it gives the LSE"
            backend.backward(call, out, lse, torch.empty_like(out), candidate)
    return ()


COMPILERS: dict[str, Compiler] = {
    "triton": compile_triton,
    "triton_decode": compile_triton,
    "flash_cute": compile_flash_cute,
}


def compiles_ahead(backend: str) -> bool:
    """Whether what another process compiles of a backend is found by the one that runs it."""
    if backend == "flash_cute":
        from .backends.flash_cute_package import keeps_compiled

        return backend in COMPILERS and keeps_compiled()
    return backend in COMPILERS


def _named(role: str, kernel: str, candidate: Candidate) -> str:
    """Return what `kernels.offline` calls the kernel of a role."""
    if candidate.backend == "triton_decode":
        return "decode"
    return f"hopper_{role}" if kernel.startswith("hopper_") else role
