"""All backends by name."""

from tilewise.domain.device import Device
from tilewise.domain.errors import ConfigError
from tilewise.domain.problem import Problem

from ..backend import Backend
from .flash import Flash
from .flash_cute import FlashCute
from .flex import FLEX_BACKENDS
from .plain import Plain
from .sdpa import SDPA_BACKENDS
from .tiled_cpu import TiledCpu
from .triton import Triton
from .triton_decode import TritonDecode

# Other people's kernels that torch's SDPA does not hold; last, for some compile for seconds when they are first used.
PEERS: tuple[Backend, ...] = (FlashCute(), Flash(), *FLEX_BACKENDS)

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (*SDPA_BACKENDS, Triton(), TritonDecode(), TiledCpu(), Plain(), *PEERS)
}


def backend_named(name: str) -> Backend:
    """Return the backend of that name. Raises ConfigError, listing the names, for an unknown one."""
    try:
        return BACKENDS[name]
    except KeyError:
        raise ConfigError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}") from None


def supporting(problem: Problem, device: Device) -> list[Backend]:
    """Return the backends that compute `problem` on `device`, torch's own choice first."""
    return [backend for backend in BACKENDS.values() if backend.supports(problem, device) is None]
