"""The loop of a benchmark over its rows: what fails costs one row, and what the time does not suffice for is left."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .core_row import MESSAGE_LIMIT, usable

Wanted = TypeVar("Wanted")
Row = TypeVar("Row")


def measure_each(
    waiting: Sequence[Wanted],
    measure: Callable[[Wanted], Row],
    keep: Callable[[Row], str],
    *,
    title: Callable[[Wanted], str],
    key: Callable[[Wanted], str],
    device: torch.device,
    until: float,
    tell: Callable[[str], None],
    fatal: type[Exception],
) -> tuple[tuple[str, ...], int]:
    """Measure one row after another; return which failed, each with its reason, and how many are left.

    - keep: is given what was measured, and returns what to say of it; what it raises ends the loop.
    - title, key: what to call a row in progress, and in a failure.
    - until: a time.monotonic() that no row but the first is started for if it would probably pass it.
    - fatal: what ends the loop; and so does whatever leaves the device unusable.
    """
    failed: list[str] = []
    longest = 0.0
    for number, wanted in enumerate(waiting):
        begun = time.monotonic()
        if number and begun + longest > until:
            return tuple(failed), len(waiting) - number
        name = f"[{number + 1}/{len(waiting)}] {title(wanted)}"
        try:
            row = measure(wanted)
        except fatal:
            raise
        except Exception as error:  # whatever goes wrong costs one row, not those that wait
            if not usable(device):
                raise
            failed.append(f"{key(wanted)}: {type(error).__name__}: {error}"[:MESSAGE_LIMIT])
            tell(f"{name}: {failed[-1]}")
        else:
            tell(f"{name}: {keep(row)}")
        longest = max(longest, time.monotonic() - begun)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return tuple(failed), 0
