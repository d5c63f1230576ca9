"""What `bench core` tries of a backend without a search."""

import random
from collections.abc import Iterator, Mapping, Sequence

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace
from tilewise.kernels.backends import backend_named
from tilewise.tuner.known import known


def candidates(
    problem: Problem,
    device: Device,
    backend: str,
    *,
    configs: int,
    explore: int = 0,
    best: Sequence[Candidate] = (),
    seed: int = 0,
) -> tuple[Candidate, ...]:
    """Return what to try of our `backend`: its default, `best` as far as the spaces hold them, then one role at a time.

    Of each kernel of a role come its default, `configs` known ones, and `explore` drawn from those that differ from a
    known one in a single parameter. They take turns, so that whoever stops early has tried something of every role.
    """
    spaces = backend_named(backend).spaces(problem, device)
    default = backend_named(backend).default(problem, device)
    fitting = [each for each in best if each.backend == backend and _fits(each, spaces)]
    turns = []
    for role, space in ((role, each) for role, whole in spaces.items() for each in whole.by_kernel):
        first = [space.default, *known(space, problem)[:configs]]
        near = sorted({config for each in first for config in _neighbours(each, space)}, key=str)
        random.Random(seed).shuffle(near)
        tried = [*first, *[config for config in near if config not in first][:explore]]
        turns.append([default.with_config(role, config) for config in tried])
    longest = max(map(len, turns), default=0)
    in_turn = [turn[place] for place in range(longest) for turn in turns if place < len(turn)]
    return tuple(dict.fromkeys([default, *fitting, *in_turn]))


def _fits(candidate: Candidate, spaces: Mapping[str, SearchSpace]) -> bool:
    configs = dict(candidate.configs)
    return configs.keys() == spaces.keys() and all(configs[role] in space for role, space in spaces.items())


def _neighbours(config: Config, space: SearchSpace) -> Iterator[Config]:
    for parameter in space.parameters:
        for value in parameter.values:
            near = Config.of(space.kernel, **{**config.as_dict(), parameter.name: value})
            if near != config and near in space:
                yield near
