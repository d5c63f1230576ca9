"""SearchSpace: the parameters of one kernel on one device, and what may not be combined."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from .config import Config, Value
from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named choice. `ordered` tells the sampler that neighbours in `values` behave alike."""

    name: str
    values: tuple[Value, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Constraint:
    """A rule over the values of one config; `reason` tells why a config that breaks it cannot run."""

    reason: str
    holds: Callable[[Mapping[str, Value]], bool]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All configs of `kernel` worth trying, and the one to use when nothing was measured.

    `alternatives` are the spaces of other kernels that do the same work: their configs are in this space too.
    """

    kernel: str
    parameters: tuple[Parameter, ...]
    default: Config
    constraints: tuple[Constraint, ...] = ()
    alternatives: tuple["SearchSpace", ...] = ()

    def __post_init__(self) -> None:
        reason = self.why_not(self.default)
        if reason is not None:
            raise ConfigError(f"the default of {self.kernel} lies outside its own space: {reason}")

    def why_not(self, config: Config) -> str | None:
        """Return why `config` is not in the space, or None when it is."""
        other = next((space for space in self.alternatives if space.kernel == config.kernel), None)
        if other is not None:
            return other.why_not(config)
        if config.kernel != self.kernel:
            return f"it is a config of {config.kernel!r}, not of {self.kernel!r}"
        values = config.as_dict()
        names = {parameter.name for parameter in self.parameters}
        if values.keys() != names:
            return f"it has the parameters {sorted(values)}, not {sorted(names)}"
        for parameter in self.parameters:
            value = values[parameter.name]
            if not any(value == choice and type(value) is type(choice) for choice in parameter.values):
                return f"{parameter.name}={value!r} is none of {', '.join(map(str, parameter.values))}"
        return next((rule.reason for rule in self.constraints if not rule.holds(values)), None)

    def __contains__(self, config: Config) -> bool:
        return self.why_not(config) is None

    def __iter__(self) -> Iterator[Config]:
        """Yield every config that keeps the constraints, in the order of the parameters' values, by kernel."""
        names = [parameter.name for parameter in self.parameters]
        for values in itertools.product(*(parameter.values for parameter in self.parameters)):
            chosen = dict(zip(names, values, strict=True))
            if all(rule.holds(chosen) for rule in self.constraints):
                yield Config.of(self.kernel, **chosen)
        for space in self.alternatives:
            yield from space

    @property
    def by_kernel(self) -> tuple["SearchSpace", ...]:
        """The spaces of single kernels that this one is made of."""
        return (replace(self, alternatives=()), *self.alternatives)
