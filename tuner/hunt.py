"""Hunt: which space to search next, and with which candidate. A problem has several: of backends, roles and kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tilewise.domain.config import Candidate, Config
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome, Trial

from .known import KNOWN_FIRST
from .neighbours import Near, of_kernel
from .search import Search

Role = tuple[str, str, str]  # backend, role and kernel
GUESS_SECONDS = 0.5  # that a trial takes, until it is done
POWER = 4.0  # a space whose best takes 1.2 times as long as the best of all gets half the time


@dataclass(slots=True)
class _Space:
    search: Search
    spent: float = 0.0
    best: float = float("inf")

    def cost(self, best: float) -> float:
        """Return what was spent on this space, weighed by how far it lies behind the best of all."""
        behind = self.best / best if self.best < float("inf") else 1.0
        return self.spent * float(behind**POWER)


class Hunt:
    """Searches all spaces of a problem side by side.

    The space that has had the least time is next, so what compiles for long is tried less often; and the further a
    space's best lies behind the best of all, the less time it gets. A config of one role is tried with the best known
    configs of the others. Each search begins with what near problems have taught, or else with the configs that `known`
    gives of a space.
    """

    def __init__(
        self,
        spaces: Mapping[Role, SearchSpace],
        *,
        seed: int,
        near: Sequence[Near] = (),
        known: Callable[[SearchSpace], Sequence[Config]] = lambda _: (),
    ) -> None:
        self._spaces = {}
        for key, space in spaces.items():
            first, neighbours = of_kernel(near, *key)
            first = first or [*known(space)[:KNOWN_FIRST]]
            self._spaces[key] = _Space(Search(space, seed=seed, first=first, neighbours=neighbours))
        self._asked: dict[Candidate, tuple[Role, Config]] = {}
        self._expected: set[Candidate] = set()
        self._best = float("inf")
        self._defaults = {key: space.default for key, space in spaces.items()}
        self._refused: set[str] = set()  # backends that cannot be imported, say: no config of theirs will do better

    def ask(self, best_of: Callable[[str], Candidate], wants: Callable[[str], bool]) -> Candidate | None:
        """Return the next candidate of a backend that `wants` accepts; None where there is none.

        - best_of: gives the fastest candidate of a backend so far.
        """
        spaces = ((key, each) for key, each in self._spaces.items() if key[0] not in self._refused)
        ready = [key for key, each in spaces if each.search.remaining and wants(key[0])]
        if not ready:
            return None
        key = min(ready, key=lambda each: self._spaces[each].cost(self._best))
        space = self._spaces[key]
        config = space.search.ask()
        assert config is not None, "configs remain"
        backend, role, _ = key
        candidate = best_of(backend).with_config(role, config)
        self._asked[candidate] = key, config
        space.spent += GUESS_SECONDS
        return candidate

    def expect(self, candidate: Candidate) -> None:
        """Note that a candidate is on its way without having been asked for: its configs are not asked for again."""
        self._expected.add(candidate)
        for role, config in candidate.configs:
            space = self._spaces.get((candidate.backend, role, config.kernel))
            if space is not None:
                space.search.expect(config)

    def tell(self, trial: Trial) -> None:
        """Note what came of a candidate, asked for or not."""
        ratio = trial.measurement.ratio if trial.measurement else None
        if trial.outcome is Outcome.UNSUPPORTED and self._is_default(trial.candidate):
            self._refused.add(trial.candidate.backend)
        if ratio is not None:
            self._best = min(self._best, ratio)
        asked = self._asked.pop(trial.candidate, None)
        if asked is not None:
            (key, config), seconds = asked, trial.seconds - GUESS_SECONDS
            self._note(self._spaces[key], config, ratio, seconds)
            return
        expected = trial.candidate in self._expected
        self._expected.discard(trial.candidate)
        for role, config in trial.candidate.configs:
            space = self._spaces.get((trial.candidate.backend, role, config.kernel))
            if space is not None:
                self._note(space, config, ratio, trial.seconds / len(trial.candidate.configs) if expected else 0.0)

    def _is_default(self, candidate: Candidate) -> bool:
        keys = {(candidate.backend, role, config.kernel): config for role, config in candidate.configs}
        return all(self._defaults.get(key) == config for key, config in keys.items())

    def _note(self, space: _Space, config: Config, ratio: float | None, seconds: float) -> None:
        space.spent += seconds
        if ratio is not None:
            space.best = min(space.best, ratio)
        space.search.tell(config, ratio)
