"""What every test of the tuner has."""

import pytest

from tilewise.tuner.timing import CpuClock


@pytest.fixture(autouse=True)
def small_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweep through one MiB between calls, not 64: nothing here depends on how long a call takes."""
    monkeypatch.setattr(CpuClock, "_CACHE_BYTES", 1 << 20)
