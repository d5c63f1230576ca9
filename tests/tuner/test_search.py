"""The search: what it proposes, and that it finds a good config sooner than chance."""

import itertools
import math
import random
import statistics
from collections.abc import Mapping

import pytest

from tilewise.domain.config import Config, Value
from tilewise.domain.space import Constraint, Parameter, SearchSpace
from tilewise.tuner.search import STARTUP_TRIALS, Method, Search
from tilewise.tuner.surrogate import Neighbour

SIZES = (16, 32, 64, 128, 256, 512)


def small_area(values: Mapping[str, Value]) -> bool:
    return int(values["block_m"]) * int(values["block_n"]) <= 256 * 256


SPACE = SearchSpace(
    kernel="bowl",
    parameters=(
        Parameter("block_m", SIZES),
        Parameter("block_n", SIZES),
        Parameter("num_warps", (1, 2, 4, 8)),
        Parameter("mode", ("a", "b"), ordered=False),
        Parameter("persistent", (True, False), ordered=False),
    ),
    constraints=(Constraint("too large", small_area),),
    default=Config.of("bowl", block_m=64, block_n=64, num_warps=4, mode="a", persistent=True),
)
TINY = SearchSpace(
    kernel="tiny",
    parameters=(Parameter("block", (16, 32, 64)), Parameter("only", (1,))),
    default=Config.of("tiny", block=16, only=1),
)


def bowl(config: Config) -> float:
    """A landscape with one valley and a ridge between its modes."""
    m, n, warps = (math.log2(config[name]) for name in ("block_m", "block_n", "num_warps"))
    ratio = 0.6 * math.exp(0.08 * ((m - 7) ** 2 + (n - 5) ** 2 + (warps - 2) ** 2))
    return ratio * (1.0 if config["mode"] == "b" else 1.25) * (1.0 if config["persistent"] else 1.1)


def proposals(
    seed: int,
    count: int,
    tried: tuple[tuple[Config, float | None], ...] = (),
    method: Method = Method.SURROGATE,
) -> list[Config]:
    search = Search(SPACE, seed=seed, tried=tried, method=method)
    found = []
    for _ in range(count):
        config = search.ask()
        assert config is not None
        search.tell(config, bowl(config))
        found.append(config)
    return found


@pytest.fixture(params=[method for method in Method if method is not Method.GP])  # that takes seconds a trial
def method(request: pytest.FixtureRequest) -> Method:
    return Method(request.param)


def test_never_repeats_and_keeps_the_constraints(method: Method) -> None:
    found = proposals(0, 60, method=method)
    assert len(set(found)) == 60
    assert all(config in SPACE for config in found)


@pytest.mark.parametrize("method", Method)
def test_exhausts_a_small_space(method: Method) -> None:
    search = Search(TINY, seed=0, method=method)
    found = []
    while (config := search.ask()) is not None:
        search.tell(config, 1.0)
        found.append(config)
        assert search.remaining == 3 - len(found)
    assert sorted(config["block"] for config in found) == [16, 32, 64]
    assert search.ask() is None


def test_the_same_seed_gives_the_same_proposals(method: Method) -> None:
    assert proposals(3, 20, method=method) == proposals(3, 20, method=method)
    assert proposals(3, 20, method=method) != proposals(4, 20, method=method)


def test_several_may_be_asked_for_before_the_first_is_told(method: Method) -> None:
    search = Search(SPACE, seed=0, method=method)
    before = search.remaining
    asked = [search.ask() for _ in range(30)]
    assert None not in asked
    assert len(set(asked)) == 30
    assert search.remaining == before - 30 == sum(1 for _ in SPACE) - 30
    for config in asked:
        assert config is not None
        search.tell(config, bowl(config))
    assert search.ask() not in asked


def test_resumes_from_what_was_tried() -> None:
    first = proposals(1, 10)
    tried = tuple((config, bowl(config)) for config in first)
    later = proposals(1, 10, tried)
    assert not set(first) & set(later)
    # what it has learnt is there again: what it proposes now is better than what chance would
    everything = statistics.median(bowl(config) for config in SPACE)
    assert statistics.median(bowl(config) for config in later) < everything


@pytest.mark.parametrize("ratio", [None, math.nan, math.inf, 0.0, -1.0])
def test_a_failed_config_is_not_proposed_again(ratio: float | None) -> None:
    search = Search(TINY, seed=0)
    first = search.ask()
    assert first is not None
    search.tell(first, ratio)
    others = []
    while (config := search.ask()) is not None:
        search.tell(config, 1.0)
        others.append(config)
    assert first not in others
    assert len(others) == 2


def test_trials_of_another_space_do_no_harm() -> None:
    strange = [(Config.of("bowl", block_m=7), 0.1), (Config.of("other", block=16), 0.1)]
    assert proposals(0, 3, tuple(strange)) == proposals(0, 3)


def test_what_is_told_twice_counts_once_as_tried() -> None:
    search = Search(TINY, seed=0)
    for _ in range(2):
        search.tell(TINY.default, 1.0)
    assert search.remaining == 2


def test_what_is_given_comes_first_as_far_as_it_can_run() -> None:
    outside = Config.of("bowl", block_m=512, block_n=512, num_warps=4, mode="a", persistent=True)
    given = [outside, *list(SPACE)[40:43]]
    search = Search(SPACE, seed=0, first=given, tried=[(given[2], 1.0)])
    assert [search.ask(), search.ask()] == [given[1], given[3]]
    assert search.ask() not in given


def test_a_neighbour_shows_where_to_look() -> None:
    """Of another space: one size is not in this one, one is only here."""
    near = [(config, math.log(1.3 * bowl(config))) for config in random.Random(0).sample(list(SPACE), 60)]
    strange = (Config.of("bowl", block_m=1024, block_n=32, num_warps=4, mode="b", persistent=True), -0.2)
    other = (Config.of("bowl", block=3), -5.0)
    best = min(bowl(config) for config in SPACE)
    for seed in range(5):
        search = Search(SPACE, seed=seed, neighbours=[Neighbour((*near, strange, other))])
        found = []
        for _ in range(6):
            config = search.ask()
            assert config is not None
            search.tell(config, bowl(config))
            found.append(bowl(config))
        assert min(found) < 1.06 * best


@pytest.mark.parametrize("method", [Method.TPE, Method.SURROGATE])
def test_finds_a_good_config_sooner_than_chance(method: Method) -> None:
    trials, seeds = 30, 6
    every = list(SPACE)
    best = min(bowl(config) for config in every)
    searched = [min(bowl(config) for config in proposals(seed, trials, method=method)) / best for seed in range(seeds)]
    chance = [min(bowl(config) for config in random.Random(seed).sample(every, trials)) / best for seed in range(200)]
    assert trials > STARTUP_TRIALS
    # half the distance to the best that chance leaves, in the mean of all seeds
    assert statistics.mean(searched) - 1 < 0.5 * (statistics.mean(chance) - 1)


def test_landscape_has_one_best() -> None:
    every = sorted(bowl(config) for config in SPACE)
    assert len(every) > 300
    assert every[0] < every[1]
    assert all(math.isfinite(value) for value in itertools.islice(every, 5))
