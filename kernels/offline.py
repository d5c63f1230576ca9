"""Compile what our launches compile, for an NVIDIA GPU that this machine need not have.

The launch code of the backends runs as it is, on tensors without data (device "meta"), while Triton's active driver is
one that only compiles: arguments, specialisations and constexprs are those of a real launch. What we rely on of Triton
stands in this file: the methods of a driver that a launch calls, and the hooks of `triton.knobs`.
"""

import contextlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tilewise.domain.config import Config
from tilewise.domain.errors import ConfigError, DeviceError
from tilewise.domain.problem import Layout, Problem

from .call import TORCH_DTYPES, Call
from .inputs import DROPOUT, DROPOUT_SEED, SOFTCAP

# what each role of a problem compiles; a role without parameters takes no config
KERNELS = {
    "forward": "attention_forward",
    "dkdv": "dkdv_kernel",
    "dq": "dq_kernel",
    "hopper_forward": "hopper_forward",
    "hopper_dkdv": "hopper_dkdv",
    "hopper_dq": "hopper_dq",
    "delta": "delta_rows",
    "dbias": "dbias_kernel",
    "decode": "attention_decode",
    "combine": "combine_splits",
}
UNLIMITED = 1 << 30  # bytes of shared memory
_numbers = itertools.count()  # of devices: Triton keeps what it compiled by the number of the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of one kernel. Sizes are bytes of a block (shared memory) and of a thread (stack: what spilled)."""

    kernel: str
    shared_memory: int
    registers: int
    stack: int
    seconds: float
    ptx: str
    cubin: bytes


class CompileOnly:
    """Triton's driver of a GPU that only compiles: nothing is loaded, and a launch does nothing."""

    def __init__(self, capability: int, shared_memory: int) -> None:
        self._target, self._shared_memory = GPUTarget("cuda", capability, 32), shared_memory
        self._number = next(_numbers)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:  # noqa: ARG002
        return {"max_shared_mem": self._shared_memory}

    def load_binary(self, *_: object) -> tuple[None, None, int, int, int]:
        """Return module, function, registers, spills and the most threads of a block."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, *_: object) -> Callable[..., None]:
        return lambda *_: None


class Disguised:
    """The driver of this machine's GPU, which says that it is one of another capability."""

    def __init__(self, real: Any, capability: int) -> None:
        self._real, self._target = real, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@contextlib.contextmanager
def compiling(
    capability: int, *, shared_memory: int = UNLIMITED, cache: Path | None = None, assemble_for: int | None = None
) -> Iterator[dict[str, Compiled]]:
    """Within, launches compile for a device of `capability` and run nothing; yields what was compiled, by kernel.

    - shared_memory: bytes that a block of the device can have; more raises Triton's OutOfResources, as a launch would.
    - cache: Triton's cache folder, else one for the time being.
    - assemble_for: capability of the machine code, if it is not that of the PTX; needs a cache of its own.

    Raises DeviceError where TRITON_INTERPRET made interpreted functions of the kernels.
    """
    from .triton_kernels.forward import attention_forward

    if not isinstance(attention_forward, triton.JITFunction):
        raise DeviceError("Triton interprets its kernels in this process: unset TRITON_INTERPRET to compile them")
    with _driven_by(CompileOnly(capability, shared_memory), cache, assemble_for) as found:
        yield found


@contextlib.contextmanager
def running_as(capability: int, *, cache: Path) -> Iterator[dict[str, Compiled]]:
    """Within, launches run the code of a lower `capability` on this machine's GPU, its PTX assembled for the GPU.

    Use a process in which no kernel has run yet, and a cache that `compiling` filled with the same `assemble_for`.
    """
    real = driver.active
    with _driven_by(Disguised(real, capability), cache, real.get_current_target().arch) as found:
        yield found


@contextlib.contextmanager
def _driven_by(active: object, cache: Path | None, assemble_for: int | None) -> Iterator[dict[str, Compiled]]:
    found: dict[str, Compiled] = {}

    def listener(*, src: Any, metadata: Any, metadata_group: dict[str, str], times: Any, **_: object) -> None:
        files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        found[src.name] = _compiled(src.name, metadata["shared"], files, times.total / 1e6)

    def assembled(backend: Any = None, stages: Any = None, options: Any = None, *_: object) -> tuple[str, str]:
        if backend is not None:
            stages["cubin"] = lambda ptx, metadata: backend.make_cubin(ptx, metadata, options, assemble_for)
        return (f"assembled for {assemble_for}",) * 2  # newer ones ask for what tells apart, without arguments

    with contextlib.ExitStack() as stack:
        for scoped in (knobs.cache, knobs.compilation, knobs.runtime):
            stack.enter_context(scoped.scope())
        knobs.cache.dir = str(cache or stack.enter_context(tempfile.TemporaryDirectory()))
        knobs.compilation.listener = listener
        if assemble_for is not None:
            knobs.runtime.add_stages_inspection_hook = assembled
        stack.callback(driver.set_active, None)  # whoever is next to ask makes the default again
        driver.set_active(active)
        yield found


def _compiled(kernel: str, shared_memory: int, files: dict[str, Path], seconds: float) -> Compiled:
    usage = _resource_usage(files[".cubin"])
    return Compiled(
        kernel=kernel,
        shared_memory=shared_memory,
        registers=usage["REG"],
        stack=usage["STACK"],
        seconds=seconds,
        ptx=files[".ptx"].read_text(),
        cubin=files[".cubin"].read_bytes(),
    )


def _resource_usage(cubin: Path) -> dict[str, int]:
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}


def call_without_data(problem: Problem, device: str = "meta") -> Call:
    """Return a call of `problem` whose tensors have shapes and strides and no data.

    - device: "meta", or one that torch's FakeTensorMode, in which this must run then, is to pretend.
    """
    p, dtype = problem, TORCH_DTYPES[problem.dtype]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def tensor(rows: int, length: int, heads: int, dim: int) -> torch.Tensor:
        if p.packed:
            return empty(rows * length, heads, dim)
        if p.layout is Layout.BHSD:
            return empty(rows, heads, length, dim).transpose(1, 2)
        return empty(rows, length, heads, dim)

    pages = -(-p.kv_len // p.page_size) if p.page_size else 0
    rows, length = (p.batch * pages, p.page_size) if pages else (p.batch, p.kv_len)
    kind, _, broadcast = p.mask.partition(".")
    full = (("b1", p.batch), ("h1", p.heads), ("q1", p.q_len), ("k1", p.kv_len))
    shape = [1 if name in broadcast else size for name, size in full]
    return Call(
        problem=p,
        query=tensor(p.batch, p.q_len, p.heads, p.head_dim),
        key=tensor(rows, length, p.kv_heads, p.head_dim),
        value=tensor(rows, length, p.kv_heads, p.v_head_dim),
        scale=p.head_dim**-0.5,
        mask=None if kind == "none" else empty(*shape, dtype=torch.bool if kind == "bool" else dtype),
        alibi_slopes=empty(p.heads, dtype=torch.float32) if p.alibi else None,
        softcap=SOFTCAP if p.softcap else 0.0,
        dropout=DROPOUT if p.dropout else 0.0,
        seed=DROPOUT_SEED,
        kv_lengths=empty(p.batch, dtype=torch.int32) if p.varlen and not p.packed else None,
        block_table=empty(p.batch, pages, dtype=torch.int32) if pages else None,
        cu_seqlens=(empty(p.batch + 1, dtype=torch.int32), empty(p.batch + 1, dtype=torch.int32)) if p.packed else None,
    )


def compiled(
    role: str, problem: Problem, config: Config | None, capability: int, *, shared_memory: int = UNLIMITED
) -> Compiled:
    """Compile the kernel of one role (`KERNELS`) and return it.

    Raises what Triton raises: OutOfResources where a block needs more than `shared_memory` bytes.
    """
    with compiling(capability, shared_memory=shared_memory) as found:
        launch(role, problem, config)
    return found[KERNELS[role]]


def launch(role: str, problem: Problem, config: Config | None) -> None:
    """Launch the kernel of one role on tensors without data."""
    from .backends.triton import Triton
    from .backends.triton_decode import TritonDecode
    from .triton_kernels import backward, bias, hopper_backward

    call = call_without_data(problem)
    if role in ("decode", "combine"):
        TritonDecode().forward(call, config)
    elif role in ("forward", "hopper_forward"):
        Triton().forward(call, config)
    else:
        out = call.query.new_empty(*call.query.shape[:-1], problem.v_head_dim)
        rows = (problem.heads, out.shape[0]) if problem.packed else (problem.batch, problem.heads, problem.q_len)
        lse = call.query.new_empty(rows, dtype=torch.float32)
        prepared = backward.prepare(call, out, lse, torch.empty_like(out))
        if role == "dkdv":
            backward.launch_dkdv(prepared, config or _missing(role))
        elif role == "dq":
            backward.launch_dq(prepared, config or _missing(role))
        elif role == "hopper_dkdv":
            hopper_backward.launch_dkdv(prepared, config or _missing(role))
        elif role == "hopper_dq":
            hopper_backward.launch_dq(prepared, config or _missing(role))
        elif role == "dbias":
            bias.launch_dbias(prepared)


def _missing(role: str) -> Config:
    raise ConfigError(f"{role}: expected a config, got none")
