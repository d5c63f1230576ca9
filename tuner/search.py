"""Proposes the next config to try. The one file that knows Optuna, through ask and tell.

Nothing is stored here: a search is rebuilt from what was tried, so a killed one resumes from the trials in the
database.
"""

import abc
import enum
import math
import random
import warnings
from collections.abc import Iterable, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tilewise.domain.config import Config, Value
from tilewise.domain.space import Parameter, SearchSpace

from .surrogate import Neighbour, Surrogate

optuna.logging.set_verbosity(optuna.logging.WARNING)

STARTUP_TRIALS = 8  # of Optuna's samplers, at random
SURROGATE_STARTUP = 6
MAX_REPEATS = 20


class Method(enum.StrEnum):
    """How a search chooses: at random, by one of Optuna's samplers, or by our surrogate."""

    RANDOM = "random"
    TPE = "tpe"
    GP = "gp"
    CMAES = "cmaes"
    SURROGATE = "surrogate"


class _Chooser(abc.ABC):
    """Chooses among the configs that are left."""

    @abc.abstractmethod
    def choose(self, choices: Sequence[Config], pending: Sequence[Config]) -> Config:
        """Return one of `choices`, which are not empty; `pending` are on their way."""

    @abc.abstractmethod
    def tell(self, config: Config, value: float | None) -> None:
        """Note the logarithm of a ratio, None for a failure."""


class Search:
    """One SearchSpace, minimising a ratio; never proposes a config twice, nor one that is not feasible.

    Several may be asked for before the first is told. A config that failed is not proposed again.

    - tried: configs with their ratios to the reference candidate, None where they failed.
    - first: configs to ask for before anything is chosen, as far as the space holds them.
    - neighbours: what was found for near problems; only the surrogate learns from it.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        tried: Iterable[tuple[Config, float | None]] = (),
        method: Method = Method.SURROGATE,
        first: Sequence[Config] = (),
        neighbours: Sequence[Neighbour] = (),
    ) -> None:
        self._space = space
        self._open = dict.fromkeys(space)
        self._pending: dict[Config, None] = {}
        self._first = [config for config in reversed(first) if config in self._open]
        self._chooser: _Chooser
        if method is Method.RANDOM:
            self._chooser = _Random(seed)
        elif method is Method.SURROGATE:
            self._chooser = _BySurrogate(space, [*self._open], seed, neighbours)
        else:
            self._chooser = _ByOptuna(space, method, seed)
        for config, ratio in tried:
            self.tell(config, ratio)

    @property
    def remaining(self) -> int:
        """How many feasible configs were neither tried nor asked for yet."""
        return len(self._open)

    def ask(self) -> Config | None:
        """Return a feasible config that was neither tried nor asked for, or None when there is none left."""
        if not self._open:
            return None
        config = None
        while self._first and config not in self._open:
            config = self._first.pop()
        if config not in self._open:
            config = self._chooser.choose([*self._open], [*self._pending])
        assert config is not None, "a chooser chooses"
        del self._open[config]
        self._pending[config] = None
        return config

    def expect(self, config: Config) -> None:
        """Note that `config` is on its way without having been asked for."""
        if config in self._open:
            del self._open[config]
            self._pending[config] = None

    def tell(self, config: Config, ratio: float | None) -> None:
        """Note that `config` was tried: its ratio to the reference candidate, or None when it failed."""
        self._open.pop(config, None)
        self._pending.pop(config, None)
        if config not in self._space:
            return
        failed = ratio is None or not math.isfinite(ratio) or ratio <= 0
        self._chooser.tell(config, None if failed else math.log(ratio or 1))


class _Random(_Chooser):
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, choices: Sequence[Config], pending: Sequence[Config]) -> Config:  # noqa: ARG002
        return self._random.choice(choices)

    def tell(self, config: Config, value: float | None) -> None:
        """Chance learns nothing."""


class _BySurrogate(_Chooser):
    """A few at random, then what the surrogate expects most of."""

    def __init__(self, space: SearchSpace, configs: Sequence[Config], seed: int, near: Sequence[Neighbour]) -> None:
        self._surrogate = Surrogate(space, configs, seed=seed, neighbours=near)
        self._random = random.Random(seed)
        self._startup = 0 if self._surrogate.informed else SURROGATE_STARTUP
        self._seen = 0

    def choose(self, choices: Sequence[Config], pending: Sequence[Config]) -> Config:
        if self._seen + len(pending) < self._startup or not self._surrogate.informed:
            return self._random.choice(choices)
        return self._surrogate.propose(choices, pending)

    def tell(self, config: Config, value: float | None) -> None:
        self._seen += 1
        self._surrogate.tell(config, value)


class _ByOptuna(_Chooser):
    """An Optuna sampler. Ordered parameters are places in their list of values, so that neighbours count as near.

    It knows no constraints: what it samples that is not left to choose is told to it as failed, and after MAX_REPEATS
    of these chance chooses.
    """

    def __init__(self, space: SearchSpace, method: Method, seed: int) -> None:
        self._space = space
        self._random = random.Random(seed)
        self._asked: dict[Config, optuna.Trial] = {}
        self._study = optuna.create_study(sampler=_sampler(method, seed), direction="minimize")
        self._distributions = {parameter.name: _distribution(parameter, method) for parameter in space.parameters}

    def choose(self, choices: Sequence[Config], pending: Sequence[Config]) -> Config:  # noqa: ARG002
        left = frozenset(choices)
        for _ in range(MAX_REPEATS):
            trial = self._study.ask(self._distributions)
            config = self._config(trial.params)
            if config in left:
                self._asked[config] = trial
                return config
            self._study.tell(trial, state=TrialState.FAIL)
        return self._random.choice(choices)

    def tell(self, config: Config, value: float | None) -> None:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        asked = self._asked.pop(config, None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        params, distributions = self._params(config), self._distributions
        self._study.add_trial(create_trial(params=params, distributions=distributions, state=state, value=value))

    def _config(self, params: dict[str, object]) -> Config:
        return Config.of(self._space.kernel, **{p.name: self._value(p, params[p.name]) for p in self._space.parameters})

    def _params(self, config: Config) -> dict[str, object]:
        return {
            p.name: p.values.index(config[p.name]) if self._by_place(p) else config[p.name]
            for p in self._space.parameters
        }

    def _by_place(self, parameter: Parameter) -> bool:
        return isinstance(self._distributions[parameter.name], IntDistribution)

    def _value(self, parameter: Parameter, sampled: object) -> Value:
        if self._by_place(parameter):
            assert isinstance(sampled, int)
            return parameter.values[sampled]
        assert isinstance(sampled, int | float | bool | str)
        return sampled


def _sampler(method: Method, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if method is Method.GP:
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if method is Method.CMAES:
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=1)
        # what is on its way counts as bad, so that the next lies elsewhere
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS
        )


def _distribution(parameter: Parameter, method: Method) -> BaseDistribution:
    """Return the distribution of a parameter; CMA-ES knows no categories, and takes them as places too."""
    if parameter.ordered or method is Method.CMAES:
        return IntDistribution(0, len(parameter.values) - 1)
    return CategoricalDistribution(parameter.values)
