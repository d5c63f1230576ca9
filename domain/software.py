"""Software: the versions a measurement depends on, and what each backend depends on."""

import re
from dataclasses import dataclass, field, fields
from typing import Self

from .config import Candidate

_LIBRARIES = ("torch", "triton", "cuda", "driver", "cudnn", "flash_attn", "cute_dsl")

# What decides the code that a backend runs. A change of anything else voids none of its measurements.
# A name that ends in * is a prefix: a kernel's source hash counts under "kernel:<name>".
_DEPENDENCIES: dict[str, tuple[str, ...]] = {
    "triton": (
        "triton", "driver", "kernel:triton_forward", "kernel:triton_backward", "kernel:hopper_forward",
        "kernel:hopper_backward",
    ),
    "triton_decode": ("triton", "driver", "kernel:triton_decode"),
    "cpu_tiled": ("torch", "kernel:cpu_tiled"),
    "sdpa": ("torch", "cuda", "driver", "cudnn", "kernel:sdpa"),
    "sdpa_cudnn": ("torch", "cuda", "driver", "cudnn", "kernel:sdpa"),
    "sdpa_flash": ("torch", "cuda", "driver", "kernel:sdpa"),
    "sdpa_efficient": ("torch", "cuda", "driver", "kernel:sdpa"),
    "sdpa_math": ("torch", "cuda", "driver", "kernel:sdpa"),
    "plain": ("torch", "cuda", "driver", "kernel:plain"),
    "flex": ("torch", "triton", "driver", "kernel:flex"),
    "flex_cpu": ("torch", "kernel:flex"),
    "flash": ("flash_attn", "torch", "cuda", "driver", "kernel:flash"),
    "flash_cute": ("flash_attn", "cute_dsl", "driver", "kernel:flash_cute"),
}  # fmt: skip
# Of a backend with several kernels, what the kernel of a config is made of; dkdv and dq come with delta and dbias.
_SOURCES: dict[str, tuple[str, ...]] = {
    "triton_forward": ("triton_forward",),
    "triton_dkdv": ("triton_backward",),
    "triton_dq": ("triton_backward",),
    "hopper_forward": ("hopper_forward",),
    "hopper_dkdv": ("hopper_backward", "triton_backward"),
    "hopper_dq": ("hopper_backward", "triton_backward"),
}
_TOKEN = re.compile(r"(?P<name>[a-z_:0-9]+)@(?P<version>[A-Za-z0-9._+\-]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """Versions of what computes, and a source hash per kernel of ours. None: absent, or of no consequence."""

    torch: str | None = None
    triton: str | None = None
    cuda: str | None = None
    driver: str | None = None
    cudnn: str | None = None
    flash_attn: str | None = None
    cute_dsl: str | None = None
    kernels: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", tuple(sorted(self.kernels)))

    def for_backend(self, backend: str) -> Self:
        """Return only what `backend` depends on; everything, for a backend this version does not know."""
        wanted = _DEPENDENCIES.get(backend)
        return self if wanted is None else self._keep(wanted)

    def for_candidates(self, *candidates: Candidate) -> Self:
        """Return what any of `candidates` depends on: of a backend with several kernels, only those of its configs."""
        if any(each.backend not in _DEPENDENCIES for each in candidates):
            return self
        return self._keep(tuple(name for each in candidates for name in _wanted(each)))

    def _keep(self, wanted: tuple[str, ...]) -> Self:
        versions = {name: getattr(self, name) for name in _LIBRARIES if name in wanted}
        return type(self)(kernels=tuple(pair for pair in self.kernels if _wants_kernel(wanted, pair[0])), **versions)

    @property
    def key(self) -> str:
        """A compact, canonical form for a query parameter; `Software.parse` is its inverse."""
        pairs = [(name, getattr(self, name)) for name in _LIBRARIES]
        pairs += [(f"kernel:{name}", version) for name, version in self.kernels]
        return ",".join(f"{name}@{version}" for name, version in pairs if version is not None)

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return the Software whose `key` this is. Raises ValueError for anything else."""
        values: dict[str, str] = {}
        kernels: list[tuple[str, str]] = []
        for token in filter(None, key.split(",")):
            found = _TOKEN.fullmatch(token)
            if found is None:
                raise ValueError(f"not a software key: {token!r} in {key!r}; expected name@version, comma-separated")
            name, version = found["name"], found["version"]
            if name.startswith("kernel:"):
                kernels.append((name.removeprefix("kernel:"), version))
            elif name in _LIBRARIES:
                values[name] = version
        return cls(kernels=tuple(kernels), **values)

    def differences(self, other: Self) -> tuple[str, ...]:
        """Return the fields that differ, each as `name old -> new`, from `self` to `other`."""
        found = [
            f"{item.name} {getattr(self, item.name)} -> {getattr(other, item.name)}"
            for item in fields(self)
            if item.name != "kernels" and getattr(self, item.name) != getattr(other, item.name)
        ]
        mine, theirs = dict(self.kernels), dict(other.kernels)
        found += [
            f"kernel {name} {mine.get(name)} -> {theirs.get(name)}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]
        return tuple(found)


def _wanted(candidate: Candidate) -> tuple[str, ...]:
    every = _DEPENDENCIES[candidate.backend]
    used = [_SOURCES.get(config.kernel) for _, config in candidate.configs]
    if not used or None in used:
        return every
    kernels = {f"kernel:{name}" for sources in used if sources for name in sources}
    return tuple(name for name in every if not name.startswith("kernel:") or name in kernels)


def _wants_kernel(wanted: tuple[str, ...], kernel: str) -> bool:
    full = f"kernel:{kernel}"
    return any(full == name or (name.endswith("*") and full.startswith(name[:-1])) for name in wanted)
