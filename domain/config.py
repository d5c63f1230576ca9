"""Config, Candidate and Plan: what can be run, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from .errors import ConfigError

Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Config:
    """The parameters of one kernel: its name and sorted (name, value) pairs."""

    kernel: str
    values: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(sorted(self.values)))

    @classmethod
    def of(cls, kernel: str, **values: Value) -> Self:
        return cls(kernel, tuple(values.items()))

    def __getitem__(self, name: str) -> Any:
        for key, value in self.values:
            if key == name:
                return value
        raise ConfigError(f"config of {self.kernel} has no parameter {name!r}; it has {', '.join(dict(self.values))}")

    def as_dict(self) -> dict[str, Value]:
        return dict(self.values)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values)

    def to_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "values": dict(self.values)}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        if not (isinstance(data, Mapping) and isinstance(data.get("kernel"), str)):
            raise ValueError(f"config: expected an object with kernel and values, got {data!r}")
        values = data.get("values", {})
        if not isinstance(values, Mapping) or not all(isinstance(v, int | float | bool | str) for v in values.values()):
            raise ValueError(f"config of {data['kernel']}: expected numbers, strings or booleans, got {values!r}")
        return cls(data["kernel"], tuple((str(name), value) for name, value in values.items()))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend with its configs by role (forward, dkdv, dq, combine, ...); no configs where it has no parameters."""

    backend: str
    configs: tuple[tuple[str, Config], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "configs", tuple(sorted(self.configs, key=lambda pair: pair[0])))

    @classmethod
    def of(cls, backend: str, **configs: Config | None) -> Self:
        return cls(backend, tuple((role, config) for role, config in configs.items() if config is not None))

    def config(self, role: str = "forward") -> Config | None:
        """Return the config of `role`, or None where the candidate names none."""
        return next((config for name, config in self.configs if name == role), None) if self.configs else None

    def with_config(self, role: str, config: Config) -> Self:
        """Return this candidate with another config for `role`."""
        return type(self)(self.backend, tuple({**dict(self.configs), role: config}.items()))

    def __str__(self) -> str:
        if not self.configs:
            return self.backend
        if len(self.configs) == 1:
            return f"{self.backend}({self.configs[0][1]})"
        return f"{self.backend}({'; '.join(f'{role}: {config}' for role, config in self.configs)})"

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, "configs": {role: config.to_json() for role, config in self.configs}}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        if not (isinstance(data, Mapping) and isinstance(data.get("backend"), str)):
            raise ValueError(f"candidate: expected an object with backend and configs, got {data!r}")
        configs = data.get("configs", {})
        if not isinstance(configs, Mapping):
            raise ValueError(f"candidate {data['backend']}: expected configs by role, got {configs!r}")
        return cls(data["backend"], tuple((str(role), Config.from_json(item)) for role, item in configs.items()))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: a forward, and for training a backward; None means the forward backend's own backward."""

    forward: Candidate
    backward: Candidate | None = None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    def __str__(self) -> str:
        return str(self.forward) if self.backward is None else f"{self.forward} + {self.backward}"
