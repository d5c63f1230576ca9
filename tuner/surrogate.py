"""Our own sampler: a Gaussian process over the finite set of feasible configs, and expected improvement over all of it.

A space has hundreds of configs, so the best of the acquisition is found by looking at every one: no config is ever
proposed that is not feasible, and none is lost between grid points. The kernel is Matern 5/2 with a length for each
parameter (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, 4.2.1). Lengths, amplitude and noise
are not fitted but sampled, and the acquisition is the mean over the samples (Snoek, Larochelle and Adams, "Practical
Bayesian Optimization of Machine Learning Algorithms", 2012, 3.2): a fit to a dozen points is too sure of itself.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewise.domain.config import Config
from tilewise.domain.errors import ConfigError
from tilewise.domain.space import Parameter, SearchSpace

Array = NDArray[np.float64]
SAMPLES = 10  # of lengths, amplitude and noise
MOVES, FIRST_MOVES = 4, 25  # of each sample between two proposals, and before the first
WORST = math.log(4.0)  # above the best: how much worse something is than that teaches nothing
_LENGTH, _AMPLITUDE, _NOISE = (math.log(0.7), 0.7), (0.0, 0.5), (math.log(0.03), 0.7)  # lognormal priors
_TASK_LENGTH = (math.log(0.8), 0.7)  # of the distance between problems
_JITTER = 1e-6
_OCTAVES = 3.0  # powers of two that are as far apart as two categories


@dataclass(frozen=True, slots=True)
class Neighbour:
    """What was found for a near problem: configs of the same kernel with the logarithm of their ratios."""

    found: tuple[tuple[Config, float], ...]


class Surrogate:
    """Proposes the config of `configs` that is expected to improve most on the best so far; minimises."""

    def __init__(
        self, space: SearchSpace, configs: Sequence[Config], *, seed: int, neighbours: Sequence[Neighbour] = ()
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._parameters = space.parameters
        self._at = {config: place for place, config in enumerate(configs)}
        tasks = 1 if neighbours else 0
        self._points = np.array([self._features(config) for config in configs])
        self._points = np.hstack([self._points, np.zeros((len(configs), tasks))])
        self._values: dict[int, float] = {}
        self._failed: set[int] = set()
        self._moved = False
        near = [
            (np.append(features, 1.0), value)
            for neighbour in neighbours
            for features, value in self._standardised(neighbour)
        ]
        self._near_points = np.array([point for point, _ in near]).reshape(-1, self._points.shape[1])
        self._near_values = np.array([value for _, value in near])
        means = [_LENGTH] * (self._points.shape[1] - tasks) + [_TASK_LENGTH] * tasks + [_AMPLITUDE, _NOISE]
        self._mean, self._spread = (np.array(column) for column in zip(*means, strict=True))
        self._samples = self._mean + self._spread * self._random.standard_normal((SAMPLES, len(means)))

    @property
    def informed(self) -> bool:
        """Whether anything is known to go by."""
        return bool(self._values or self._failed or len(self._near_values))

    def tell(self, config: Config, value: float | None) -> None:
        """Note the logarithm of a config's ratio, None where it failed."""
        place = self._at[config]
        if value is None:
            self._failed.add(place)
        else:
            self._values[place] = value

    def propose(self, choices: Sequence[Config], pending: Sequence[Config]) -> Config:
        """Return one of `choices`, once it is `informed`.

        What is `pending` counts as if it were found to be as it is expected to be.
        """
        places = np.array([self._at[config] for config in choices])
        known = [*self._values, *self._failed]
        assert self.informed, "something is known"
        points = np.vstack([self._points[known], self._near_points])
        values, best = self._targets()
        waiting = [self._at[config] for config in pending]
        self._move(points, values)
        gain = np.zeros(len(choices))
        for sample in self._samples:
            process = _Process(points, values, sample)
            if waiting:
                expected, _ = process.predict(self._points[waiting])
                process = _Process(
                    np.vstack([points, self._points[waiting]]), np.concatenate([values, expected]), sample
                )
            gain += _expected_improvement(*process.predict(self._points[places]), best)
        return choices[int(np.argmax(gain + 1e-12 * self._random.random(len(choices))))]

    def _features(self, config: Config) -> Array:
        return np.array([feature for each in self._parameters for feature in _feature(each, config)])

    def _standardised(self, neighbour: Neighbour) -> list[tuple[Array, float]]:
        """Return features and values of what this space can learn from: configs whose values it knows."""
        found = []
        for config, value in neighbour.found:
            with contextlib.suppress(ConfigError, ValueError):
                found.append((self._features(config), value))
        if not found:
            return []
        least = min(value for _, value in found)
        values = np.array([min(value, least + WORST) for _, value in found])
        values = (values - values.mean()) / max(float(values.std()), 1e-3)
        return [(features, float(value)) for (features, _), value in zip(found, values, strict=True)]

    def _targets(self) -> tuple[Array, float]:
        """Return what the process is to explain, standardised, and the best of it."""
        own = np.array([*self._values.values()], dtype=float)
        if len(own):
            own = np.minimum(own, own.min() + WORST)
        worst = own.max() if len(own) else 0.0
        own = np.concatenate([own, np.full(len(self._failed), worst)])
        if len(own):
            own = (own - own.mean()) / (max(float(own.std()), 1e-3) if len(own) > 1 else 1.0)
        best = float(own.min()) if len(own) else float(self._near_values.min())
        return np.concatenate([own, self._near_values]), best

    def _move(self, points: Array, values: Array) -> None:
        """Move the samples of lengths, amplitude and noise by Metropolis' rule."""
        density = np.array([self._density(points, values, sample) for sample in self._samples])
        for _ in range(MOVES if self._moved else FIRST_MOVES):
            step = 0.35 * self._spread * self._random.standard_normal(self._samples.shape)
            moved = self._samples + step
            there = np.array([self._density(points, values, sample) for sample in moved])
            taken = np.log(self._random.random(len(moved))) < there - density
            self._samples[taken], density[taken] = moved[taken], there[taken]
        self._moved = True

    def _density(self, points: Array, values: Array, sample: Array) -> float:
        prior = -0.5 * float((((sample - self._mean) / self._spread) ** 2).sum())
        return prior + _Process(points, values, sample).likelihood


class _Process:
    """A Gaussian process given some values; `sample` holds the logarithms of lengths, amplitude and noise."""

    def __init__(self, points: Array, values: Array, sample: Array) -> None:
        self._lengths, self._amplitude = np.exp(sample[:-2]), float(np.exp(2 * sample[-2]))
        self._scaled = points / self._lengths
        covariance = self._amplitude * _matern(self._scaled, self._scaled)
        covariance[np.diag_indices_from(covariance)] += float(np.exp(2 * sample[-1])) + _JITTER
        self._root = np.linalg.cholesky(covariance)
        self._whitened = np.linalg.solve(self._root, values)
        self.likelihood = -0.5 * float(self._whitened @ self._whitened) - float(np.log(np.diag(self._root)).sum())

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation at each of `points`."""
        cross = self._amplitude * _matern(self._scaled, points / self._lengths)
        half = np.linalg.solve(self._root, cross)
        variance = self._amplitude - (half**2).sum(0)
        return half.T @ self._whitened, np.sqrt(np.maximum(variance, 1e-9))


def _matern(first: Array, second: Array) -> Array:
    squared = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :] - 2 * first @ second.T
    distance = np.sqrt(5 * np.maximum(squared, 0))
    found: Array = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return found


_erf = np.vectorize(math.erf)


def _expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Return by how much a value is expected to lie below `best` (Jones, Schonlau and Welch 1998, 4.1)."""
    z = (best - mean) / deviation
    found: Array = deviation * (z * 0.5 * (1 + _erf(z / math.sqrt(2))) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    return found


def _feature(parameter: Parameter, config: Config) -> list[float]:
    """Return a parameter as coordinates: sizes by their logarithm, so that a size lies at the same place in every
    space; other ordered values by their place, and those without order on an axis each.

    Raises ConfigError or ValueError where `config` has no such parameter or value.
    """
    value, values = config[parameter.name], parameter.values
    if parameter.ordered and all(isinstance(each, int) and each > 0 for each in values):
        return [math.log2(value) / _OCTAVES]
    place, count = values.index(value), len(values)
    if parameter.ordered or count <= 2:
        return [place / max(1, count - 1)]
    return [math.sqrt(0.5) * (place == each) for each in range(count)]
