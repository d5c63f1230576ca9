"""How far two devices are, by what their keys say of them."""

import math
import re
from dataclasses import dataclass, fields
from typing import Self

# Bits of a vector of x86-64; instructions of other machines are only like themselves.
_X86_BITS = {"sse2": 128, "avx": 256, "avx2": 256, "avx512": 512}
# Numbers are short: a snapshot may hold keys that no device has.
_CPU = re.compile(r"(?P<name>[^.]+)\.(?P<isa>[^.]+)\.(?P<units>\d{1,6})t")
_CUDA = re.compile(
    r"(?P<name>[^.]+)\.sm(?P<capability>\d{1,4})\.(?P<memory>\d{1,6})g"
    r"(?:\.mig-(?P<mig>[^.]+))?(?:\.(?P<watts>\d{1,6})w)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGap:
    """What differs between two devices of a kind.

    - model: 1 where they are of another name.
    - arch: doublings of the width of vectors; of GPUs, tenths of the difference of their compute capabilities.
    - size: doublings of threads; of GPUs, of memory, which tells cards of one name apart.
    - power: doublings of the power limit.
    """

    model: float = 0.0
    arch: float = 0.0
    size: float = 0.0
    power: float = 0.0

    @property
    def distance(self) -> float:
        return self.model + self.arch + self.size + self.power

    def within(self, reach: Self) -> bool:
        """Return whether nothing differs by more than in `reach`."""
        return all(getattr(self, each.name) <= getattr(reach, each.name) + 1e-9 for each in fields(self))

    def widened(self, other: Self) -> Self:
        """Return the least reach that both are within."""
        return type(self)(
            **{each.name: max(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        )


def device_gap(one: str, other: str) -> DeviceGap | None:
    """Return how far two device keys are; None where they are not comparable.

    Those are devices of two kinds or instruction sets, slices of GPUs that are not alike, GPUs of which only one tells
    its power limit, and keys that say nothing of a device.
    """
    for pattern, gap in ((_CUDA, _cuda_gap), (_CPU, _cpu_gap)):
        here, there = pattern.fullmatch(one), pattern.fullmatch(other)
        if here or there:
            return gap(here, there) if here and there else None
    return None


def _cuda_gap(one: re.Match[str], other: re.Match[str]) -> DeviceGap | None:
    if one["mig"] != other["mig"] or (one["watts"] is None) != (other["watts"] is None):
        return None
    return DeviceGap(
        model=float(one["name"] != other["name"]),
        arch=abs(int(one["capability"]) - int(other["capability"])) / 10,
        size=_doublings(int(one["memory"]), int(other["memory"])),
        power=_doublings(int(one["watts"] or 1), int(other["watts"] or 1)),
    )


def _cpu_gap(one: re.Match[str], other: re.Match[str]) -> DeviceGap | None:
    if one["isa"] != other["isa"] and not {one["isa"], other["isa"]} <= _X86_BITS.keys():
        return None
    return DeviceGap(
        model=float(one["name"] != other["name"]),
        arch=_doublings(_X86_BITS.get(one["isa"], 1), _X86_BITS.get(other["isa"], 1)),
        size=_doublings(int(one["units"]), int(other["units"])),
    )


def _doublings(one: int, other: int) -> float:
    return abs(math.log2(max(one, 1) / max(other, 1)))
