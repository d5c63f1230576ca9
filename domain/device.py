"""Device: what a measurement was taken on, as far as it changes the verdict."""

import enum
import re
from dataclasses import dataclass

from .errors import DeviceError


class DeviceKind(enum.StrEnum):
    CUDA = "cuda"
    CPU = "cpu"


_KEY = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, a slice of one, or the CPU threads of a process.

    - name: the full marketing name as the driver or the kernel gives it, `NVIDIA H200`.
    - arch: `sm_90` for CUDA; `x86_64.avx512` (machine and widest vector ISA) for a CPU.
    - units: streaming multiprocessors, or the threads this process computes with.
    - memory_gib: device memory rounded up to whole GiB.
    - power_limit_w: the enforced power limit in watts: cards of one name are sold and set with several.
    - mig: the MIG profile (`3g.40gb`) when the device is a slice.
    - shared_memory: bytes of shared memory one block can opt in to; 0 for a CPU.
    """

    kind: DeviceKind
    name: str
    arch: str
    units: int
    memory_gib: int
    power_limit_w: int | None = None
    mig: str | None = None
    shared_memory: int = 0

    @property
    def key(self) -> str:
        """A readable, URL-safe name: `nvidia-h200.sm90.141g.700w`, `amd-epyc-9b14.avx512.2t`."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if self.kind is DeviceKind.CPU:
            return f"{name}.{self.arch.rpartition('.')[2].replace('_', '-')}.{self.units}t"
        parts = [name, self.arch.replace("_", ""), f"{self.memory_gib}g"]
        if self.mig:
            parts.append("mig-" + self.mig.replace(".", "-"))
        if self.power_limit_w:
            parts.append(f"{self.power_limit_w}w")
        return ".".join(parts)

    @property
    def capability(self) -> int:
        """The CUDA compute capability as one number, 90 for sm_90; 0 for a CPU."""
        found = re.match(r"sm_(\d+)", self.arch)
        return int(found[1]) if found else 0


def check_device_key(key: str) -> str:
    """Return `key` if it has the form of a Device.key, else raise DeviceError."""
    if not _KEY.fullmatch(key) or len(key) > 200:
        raise DeviceError(
            f"not a device key: {key!r}; expected the form nvidia-h200.sm90.141g.700w (`tilewise doctor` prints yours)"
        )
    return key
