"""Interleaving, and what is made of the times; no test looks at a clock."""

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import pytest

from tilewise.tuner import timing
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import Clock, CpuClock, clock_for, final, screen

from .fakes import CPU


class Script(Clock):
    """Gives each step the times that it brings itself, in order."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.settled = 0

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        self.rounds.append(rounds)
        return [[float(str(step())) for _ in range(rounds)] for step in steps]

    def settle(self, steps: Sequence[Step]) -> str:
        self.settled += len(steps)
        return "settled"

    def peak_memory(self, step: Step) -> int | None:
        return int(float(str(step())))


def steady(milliseconds: float) -> Step:
    return lambda: milliseconds


def noisy(milliseconds: float, seed: int) -> Step:
    generator = random.Random(seed)
    return lambda: milliseconds * generator.lognormvariate(0, 0.02)


@pytest.mark.parametrize("count", range(1, 8))
def test_every_step_follows_every_other_equally_often(count: int) -> None:
    orders = [timing._order(count, turn) for turn in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    follows = Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert set(follows.values()) <= {2}
    assert len(follows) == count * (count - 1)
    first = Counter(order[0] for order in orders)
    assert set(first.values()) == {2}


def test_a_cpu_clock_calls_each_step_once_a_round() -> None:
    called: list[int] = []
    steps = [lambda index=index: called.append(index) for index in range(3)]
    times = CpuClock().interleave(steps, 5)
    assert [len(row) for row in times] == [5, 5, 5]
    assert all(time > 0 for row in times for time in row)
    assert [called[first : first + 3] for first in range(0, 15, 3)] == [timing._order(3, turn) for turn in range(5)]


def test_a_cpu_clock_settles_with_a_call_of_each_and_knows_no_memory() -> None:
    called: list[int] = []
    clock = CpuClock()
    assert clock.settle([lambda: called.append(0), lambda: called.append(1)]) == "settled"
    assert called == [0, 1]
    assert clock.peak_memory(lambda: None) is None
    assert isinstance(clock_for(CPU), CpuClock)


# screening


def test_a_screen_is_interleaved_with_the_reference() -> None:
    clock = Script()
    found = screen(clock, steady(2.0), steady(4.0), best_ratio=1.0, seconds=1.0)
    assert clock.rounds == [1, 1, timing.SCREEN_ROUNDS]
    assert (found.median_ms, found.ratio, found.samples) == (2.0, 0.5, timing.SCREEN_ROUNDS)
    assert found.power_state == "unknown"


@pytest.mark.parametrize(("best", "rounds"), [(1.0, [1, 1]), (float("inf"), [1, 1, 9]), (2.0, [1, 1, 9])])
def test_a_slow_step_is_given_up_after_one_round(best: float, rounds: list[int]) -> None:
    clock = Script()
    found = screen(clock, steady(5.0), steady(1.0), best_ratio=best, seconds=10.0)
    assert clock.rounds == rounds
    assert found.ratio == 5.0
    assert (found.spread is None) == (found.samples == 1)


def test_slow_steps_get_few_rounds_but_three() -> None:
    clock = Script()
    screen(clock, steady(500.0), steady(400.0), best_ratio=1.0, seconds=0.6)
    assert clock.rounds[-1] == 3


# the final


def test_the_final_measures_everything_against_the_first() -> None:
    clock = Script()
    result = final(clock, [steady(4.0), steady(2.0), steady(6.0)], rounds=20, seconds=60, device=CPU)
    assert [measured.ratio for measured in result.measurements] == [1.0, 0.5, 1.5]
    assert [measured.peak_memory_bytes for measured in result.measurements] == [4, 2, 6]
    assert {measured.samples for measured in result.measurements} == {20}
    assert {measured.power_state for measured in result.measurements} == {"settled"}
    assert result.noise == 0
    assert clock.rounds == [1, 20]
    assert clock.settled == 4  # the reference is there twice


def test_the_noise_is_what_the_reference_differs_from_itself() -> None:
    result = final(Script(), [noisy(4.0, 1), noisy(2.0, 2)], rounds=100, seconds=60, device=CPU)
    assert 0 < result.noise < 0.02
    assert result.measurements[1].ratio == pytest.approx(0.5, rel=0.02)
    assert result.measurements[1].p20_ms < result.measurements[1].median_ms < result.measurements[1].p80_ms


def test_a_reference_that_is_slower_the_second_time_is_noise() -> None:
    class Drifting(Script):
        def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
            assert len(steps) == 3
            return [[1.0] * rounds, [0.9] * rounds, [1.25] * rounds]

    result = final(Drifting(), [steady(1.0), steady(0.9)], rounds=20, seconds=60, device=CPU)
    assert result.noise == pytest.approx(0.25)


def test_a_final_has_fifteen_rounds_whatever_the_budget() -> None:
    clock = Script()
    final(clock, [steady(1000.0)], rounds=100, seconds=1, device=CPU)
    assert clock.rounds[-1] == timing.LEAST_ROUNDS


def test_the_sweeps_between_its_calls_are_of_the_seconds_of_a_final() -> None:
    class Sweeping(Script):
        def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
            until = time.perf_counter() + 0.05
            while rounds == 1 and time.perf_counter() < until:
                pass
            return super().interleave(steps, rounds)

    clock = Sweeping()
    final(clock, [steady(0.01)], rounds=1000, seconds=1, device=CPU)
    assert timing.LEAST_ROUNDS <= clock.rounds[-1] <= 20


# statistics


def test_the_ratio_is_the_median_of_each_rounds_ratio() -> None:
    """A device that gets slower for both changes the times, not the ratio."""
    reference = [1.0, 2.0, 10.0, 3.0, 100.0]
    row = [0.5 * time for time in reference]
    found = timing._measurement(row, reference, "settled")
    assert found.ratio == 0.5
    assert found.spread == 0
    assert found.median_ms == statistics.median(row)


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # ranks of the 95% interval of a median, counted from 0: tables in Conover 1999, and 1.96 sqrt(n) / 2 around n / 2
    [(2, 0, 1), (5, 0, 4), (9, 1, 7), (15, 3, 11), (25, 7, 17), (100, 40, 59)],
)
def test_the_spread_is_the_medians_confidence_interval(count: int, low: int, high: int) -> None:
    ordered = [1.0 + index for index in range(count)]
    expected = (ordered[high] - ordered[low]) / 2 / statistics.median(ordered)
    assert timing._median_spread(ordered) == pytest.approx(expected)


def test_the_spread_covers_the_true_median_95_times_in_100() -> None:
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        sample = sorted(generator.gauss(10, 1) for _ in range(60))
        middle = statistics.median(sample)
        covered += abs(middle - 10) <= timing._median_spread(sample) * middle
    assert 0.93 * 2000 < covered < 0.98 * 2000


def test_percentiles() -> None:
    row = [float(value) for value in range(11)]
    found = timing._measurement(random.Random(0).sample(row, 11), [1.0] * 11, "settled")
    assert (found.p20_ms, found.median_ms, found.p80_ms) == (2.0, 5.0, 8.0)
