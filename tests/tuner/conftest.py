"""What every test of the tuner has."""

from collections.abc import Iterator

import pytest

from tilewise.tuner.crew import Crew
from tilewise.tuner.timing import CpuClock

from .fakes import CPU, FAST_LIMITS, set_up


@pytest.fixture(autouse=True)
def small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep through one MiB between calls, not 64: nothing here depends on how long a call takes."""
    monkeypatch.setattr(CpuClock, "_CACHE_BYTES", 1 << 20)


@pytest.fixture(scope="session")
def crew() -> Iterator[Crew]:
    """Warm workers of this CPU, which know the fakes."""
    with Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up) as hands:
        yield hands
