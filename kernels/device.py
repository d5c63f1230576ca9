"""What this machine has: its devices as `Device`, and the software that decides what its kernels do."""

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import DeviceError
from tilewise.domain.software import Software

_VECTOR_FLAGS = (("sve", "sve"), ("asimd", "neon"))
# What torch compiled its own code for and chose here, which ATEN_CPU_CAPABILITY lowers; its least is x86-64's baseline.
_X86_VECTORS = {"AVX512": "avx512", "AVX2": "avx2"}


def select(name: str = "auto") -> torch.device:
    """Return the torch device called `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`.

    Without a number it is this process's current GPU: each rank of a job has its own.

    Raises DeviceError for a device that this machine does not have.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    present = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"no device {name!r}: expected auto or one of {present}") from None
    # torch keeps a number above 127 modulo 256: cuda:256 would be cuda:0
    if device.type != "cuda" or (device.index or 0) >= count or str(device) != name:
        raise DeviceError(f"no device {name!r} on this machine: expected auto or one of {present}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def describe(device: torch.device) -> Device:
    """Return what `device` is. For a CPU: with the number of threads torch computes with now."""
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    raise DeviceError(f"expected a cpu or cuda device, got {device}; tilewise measures on these two kinds")


@functools.lru_cache(maxsize=8)
def software(kind: DeviceKind) -> Software:
    """Return the versions that decide what a kernel does on a device of `kind`."""
    kernels = _kernel_hashes()
    torch_version = str(torch.__version__)  # its own type calls 2.13 and 2.13.0 equal
    if kind is DeviceKind.CPU:
        return Software(torch=torch_version, kernels=kernels)
    cudnn = torch.backends.cudnn.version()
    return Software(
        torch=torch_version,
        triton=_installed("triton"),
        cuda=torch.version.cuda,
        driver=_driver(),
        cudnn=str(cudnn) if cudnn else None,
        flash_attn=_installed("flash-attn-4") or _installed("flash-attn"),
        cute_dsl=_installed("nvidia-cutlass-dsl"),
        kernels=kernels,
    )


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a device says of itself at one moment; None where it does not tell.

    `others`: processes that compute on it, beside this one and those of its process group.
    """

    clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    others: int | None = None


def telemetry(device: torch.device) -> Telemetry:
    """Read, never set, the clock, power and temperature of `device`, and who else computes on it.

    A driver that tells nothing costs nobody a final.
    """
    if device.type != "cuda":
        return Telemetry()
    with contextlib.suppress(DeviceError), _nvml() as nvml, contextlib.suppress(nvml.NVMLError):
        handle = _handle(nvml, torch.cuda.current_device() if device.index is None else device.index)
        clock = power = temperature = None  # a slice or a virtual GPU does not tell all of them
        with contextlib.suppress(nvml.NVMLError):
            clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        with contextlib.suppress(nvml.NVMLError):
            power = nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        with contextlib.suppress(nvml.NVMLError):
            temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        return Telemetry(clock_mhz=clock, power_w=power, temperature_c=temperature, others=_others(nvml, handle))
    return Telemetry()


def _others(nvml: Any, handle: Any) -> int | None:
    try:
        running = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except nvml.NVMLError:
        return None
    if os.getpid() not in running:  # in a container with numbers of its own, one of them is this process
        return max(0, len(running) - 1)
    return sum(not _in_our_group(pid) for pid in running)


def _in_our_group(pid: int) -> bool:
    try:
        return os.getpgid(pid) == os.getpgrp()
    except OSError:
        return False


def _handle(nvml: Any, index: int) -> Any:
    return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")


@functools.lru_cache(maxsize=64)
def _cpu(threads: int) -> Device:
    info = _cpuinfo()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(
        kind=DeviceKind.CPU,
        name=info.get("model name") or platform.processor() or platform.machine(),
        arch=f"{platform.machine()}.{_vectors(info)}",
        units=threads,
        memory_gib=math.ceil(memory / 2**30),
    )


def _vectors(info: dict[str, str]) -> str:
    """Return the widest vector instructions that torch's own code uses on this CPU."""
    if platform.machine() in ("x86_64", "AMD64"):
        return _X86_VECTORS.get(torch.backends.cpu.get_cpu_capability(), "sse2")
    flags = (info.get("Features") or "").split()
    return next((name for flag, name in _VECTOR_FLAGS if flag in flags), "scalar")


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty where the kernel has none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.lru_cache(maxsize=64)
def _cuda(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    memory, watts, mig = properties.total_memory, None, None
    with _nvml() as nvml:
        handle = _handle(nvml, index)
        # torch leaves out what the driver reserves, which changes with the driver: ask the driver for all of it
        memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
        with contextlib.suppress(nvml.NVMLError):
            watts = round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000)
        mig = properties.name.partition(" MIG ")[2] or None
    return Device(
        kind=DeviceKind.CUDA,
        name=properties.name.partition(" MIG ")[0],
        arch=f"sm_{properties.major}{properties.minor}",
        units=properties.multi_processor_count,
        memory_gib=math.ceil((properties.total_memory if mig else memory) / 2**30),
        power_limit_w=watts,
        mig=mig,
        shared_memory=int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)),
    )


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml
    except ImportError:
        raise DeviceError("a CUDA device is read through NVML: pip install 'tilewise[gpu]'") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML does not start ({error}); check the driver with nvidia-smi") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _driver() -> str:
    with _nvml() as nvml:
        return str(nvml.nvmlSystemGetDriverVersion())


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_SHARED_BY_TILES = (
    "common",
    "ranges",
    "padding",
    "forward",
)  # the other kernels of the backend use the last one's tiles


@functools.cache
def _kernel_hashes() -> tuple[tuple[str, str], ...]:
    """Return a hash of the source of every kernel of ours: a changed kernel makes its measurements stale."""
    folder = Path(__file__).parent
    tiled = [folder / "tiles.py", *(folder / f"triton_kernels/{part}.py" for part in _SHARED_BY_TILES)]
    hopper = [*tiled, folder / "triton_kernels/hopper_common.py"]
    sources = {
        "cpu_tiled": [folder / "backends/tiled_cpu.py", folder / "packed.py"],
        "flash": [folder / "backends/flash.py"],
        "flash_cute": [folder / "backends/flash_cute.py"],
        "flex": [folder / "backends/flex.py", folder / "packed.py"],
        "plain": [folder / "backends/plain.py", folder / "reference.py", folder / "cache.py", folder / "packed.py"],
        "sdpa": [folder / "backends/sdpa.py", folder / "cache.py", folder / "packed.py"],
        "triton_decode": [
            folder / "tiles.py",
            *(folder / f"triton_kernels/{part}.py" for part in ("ranges", "decode", "combine")),
        ],
        "triton_forward": tiled,
        "triton_backward": [*tiled, *(folder / f"triton_kernels/{part}.py" for part in ("backward", "bias"))],
        "hopper_forward": [*hopper, folder / "triton_kernels/hopper_forward.py"],
        "hopper_backward": [*hopper, folder / "triton_kernels/hopper_backward.py"],
    }
    return tuple(
        (name, hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12])
        for name, paths in sources.items()
    )
