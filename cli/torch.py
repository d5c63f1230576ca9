"""Commands that measure need torch; the bare install does not bring it."""

import importlib.util

from tilewise.domain.errors import DeviceError


def need_torch() -> None:
    """Raise DeviceError, saying what to install, where torch is absent."""
    if importlib.util.find_spec("torch") is None:
        raise DeviceError("torch is not installed, and devices are read through it: pip install 'tilewise[gpu]'")
