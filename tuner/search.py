"""Proposes the next config to try. The one file that knows Optuna, through ask and tell.

Nothing is stored here: a search is rebuilt from what was tried, so a killed one resumes from the trials in the
database.
"""

import math
import random
import warnings
from collections.abc import Iterable

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from tilewise.domain.config import Config, Value
from tilewise.domain.space import Parameter, SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)

STARTUP_TRIALS = 8
MAX_REPEATS = 20


class Search:
    """Optuna's TPE over one SearchSpace, minimising a ratio; never proposes a config twice.

    Several may be asked for before the first is told: what is on its way counts as bad, and the next lies elsewhere.
    Ordered parameters are searched as positions in their list of values, so that neighbours count as near. A config
    that failed is told to the sampler as a failed trial, and is not proposed again.
    """

    def __init__(self, space: SearchSpace, *, seed: int, tried: Iterable[tuple[Config, float | None]] = ()) -> None:
        self._space = space
        self._open = set(space)
        self._asked: dict[Config, optuna.Trial] = {}
        self._random = random.Random(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS
            )
        self._study = optuna.create_study(sampler=sampler, direction="minimize")
        self._distributions = {parameter.name: _distribution(parameter) for parameter in space.parameters}
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
        for _ in range(MAX_REPEATS):
            trial = self._study.ask(self._distributions)
            config = self._config(trial.params)
            if config in self._open:
                self._asked[config] = trial
                self._open.discard(config)
                return config
            self._study.tell(trial, state=TrialState.FAIL)
        config = self._random.choice(sorted(self._open, key=str))
        self._open.discard(config)
        return config

    def tell(self, config: Config, ratio: float | None) -> None:
        """Note that `config` was tried: its ratio to the reference candidate, or None when it failed."""
        self._open.discard(config)
        if config not in self._space:
            return
        failed = ratio is None or not math.isfinite(ratio) or ratio <= 0
        value = None if failed else math.log(ratio or 1)
        state = TrialState.FAIL if failed else TrialState.COMPLETE
        asked = self._asked.pop(config, None)
        if asked is not None:
            self._study.tell(asked, value, state=state)
            return
        params, distributions = self._params(config), self._distributions
        self._study.add_trial(create_trial(params=params, distributions=distributions, state=state, value=value))

    def _config(self, params: dict[str, object]) -> Config:
        return Config.of(self._space.kernel, **{p.name: _value(p, params[p.name]) for p in self._space.parameters})

    def _params(self, config: Config) -> dict[str, object]:
        return {p.name: p.values.index(config[p.name]) if p.ordered else config[p.name] for p in self._space.parameters}


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.ordered:
        return IntDistribution(0, len(parameter.values) - 1)
    return CategoricalDistribution(parameter.values)


def _value(parameter: Parameter, sampled: object) -> Value:
    if parameter.ordered:
        assert isinstance(sampled, int)
        return parameter.values[sampled]
    assert isinstance(sampled, int | float | bool | str)
    return sampled
