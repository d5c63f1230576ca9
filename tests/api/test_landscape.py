"""Landscapes: what is made of thousands of trials."""

import dataclasses
import math

import pytest
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, measurement

from tilewise.api.landscape import Landscape, Parameter, Space, Spot, best, grid, narrowed, parameters, sample, shade
from tilewise.api.pages.charts import Figure, Points
from tilewise.api.pages.landscape_charts import MOST_LINES, MOST_POINTS, course, parallel
from tilewise.api.points import PointBook
from tilewise.db.session import Database
from tilewise.db.trial_points import TrialPoint, TrialPointRepository
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate, Config, Value
from tilewise.domain.trial import Outcome, Stage, Trial

FORWARD = Space("triton", "forward", "k")


def candidate(**values: Value) -> Candidate:
    return Candidate.of("triton", forward=Config.of("k", **values))


def point(
    number: int, tried: Candidate, ratio: float | None = None, outcome: Outcome = Outcome.OK, reference: float = 2.0
) -> TrialPoint:
    right = outcome is Outcome.OK
    median = reference * (ratio or 1.0) if right else None
    return TrialPoint(number, tried, "forward", outcome, median, ratio if right else None)


def map_of(tried: list[tuple[int, int, float]]) -> Landscape:
    """A landscape of (block_m, num_warps, ratio)."""
    return Landscape(
        tuple(
            point(number, candidate(block_m=block, num_warps=warps, tma=True), ratio)
            for number, (block, warps, ratio) in enumerate(tried, 1)
        )
    )


def test_levels_compare_by_the_ratio_to_what_ran_beside() -> None:
    # the second ran while the device was twice as slow, which its reference was too
    fast, slow = point(1, candidate(a=1), 0.5), point(2, candidate(a=2), 0.4, reference=4.0)
    failed, alone = point(3, candidate(a=3), outcome=Outcome.WRONG_RESULT), point(4, SDPA, None)
    trials = Landscape((fast, slow, failed, alone))
    assert trials.reference == 3.0
    assert list(trials.levels) == [1.5, pytest.approx(1.2), None, 2.0]


def test_forwards_come_before_gradients_and_the_most_tried_first() -> None:
    both = Candidate.of("triton", forward=Config.of("k", a=1), dq=Config.of("q", b=1))
    other = Candidate.of("flex", forward=Config.of("flex", c=1))
    trials = Landscape((point(1, SDPA, 1.0), *(point(n, both, 1.0) for n in (2, 3, 4)), point(5, other, 1.0)))
    found = [(space.name, number) for space, number in trials.spaces]
    assert found == [("triton.forward.k", 3), ("flex.forward.flex", 1), ("triton.dq.q", 3)]


def test_what_explains_the_spread_comes_first_and_what_does_not_vary_is_no_parameter() -> None:
    trials = map_of([(block, warps, block / 64 + warps / 1000) for block in (64, 128) for warps in (4, 8)])
    first, second = trials.parameters(FORWARD)
    assert (first.name, first.values, second.name) == ("block_m", (64, 128), "num_warps")
    assert first.effect > 0.99
    assert 0 <= second.effect < 0.01


def test_a_grid_keeps_the_fastest_of_each_pair_and_counts_the_rest() -> None:
    tried = [(64, 4, 1.0), (64, 4, 0.8), (128, 4, 0.4), (128, 8, 0.41)]
    points = [*map_of(tried).points, point(9, candidate(block_m=64, num_warps=8), outcome=Outcome.TIMED_OUT)]
    spots = Landscape(tuple(points)).spots(FORWARD)
    block, warps = (next(each for each in parameters(spots) if each.name == name) for name in ("block_m", "num_warps"))
    found = grid(spots, block, warps)
    assert [step.label for step in found.columns] == ["64", "128"]
    (_, four), (_, eight) = found.rows
    assert four[0].best is not None
    assert (four[0].best.trial, four[0].trials, four[0].shade) == (2, 2, 6)
    assert (four[1].shade, eight[1].shade) == (0, 1)
    assert (eight[0].best, eight[0].trials, eight[0].failed, eight[0].shade) == (None, 1, 1, None)


def test_many_values_of_a_parameter_are_put_together() -> None:
    spots = [Spot(n, {"a": n, "b": n % 2}, 1.0 + n, Outcome.OK) for n in range(1, 101)]
    wide = Parameter("a", tuple(range(1, 101)), 1.0)
    found = grid(spots, wide, Parameter("b", (0, 1), 0.0))
    assert len(found.columns) == 24
    assert {value for step in found.columns for value in step.values} == set(range(1, 101))
    assert (found.columns[0].label, found.columns[-1].label) == ("1 to 4", "96 to 100")


def test_filters_are_spelled_as_on_the_page() -> None:
    spots = map_of([(64, 4, 1.0), (128, 4, 0.5)]).spots(FORWARD)
    assert [spot.trial for spot in narrowed(spots, {"block_m": "128", "tma": "yes"})] == [2]
    assert narrowed(spots, {"tma": "no"}) == ()
    assert best(()) is None


@pytest.mark.parametrize(("slower", "expected"), [(1.0, 0), (1.02, 0), (1.03, 1), (2.5, 7), (900.0, 8)])
def test_shades_begin_with_the_best(slower: float, expected: int) -> None:
    assert shade(slower) == expected


def test_a_sample_holds_the_fastest_and_some_of_all_others() -> None:
    spots = [Spot(n, {}, float(n), Outcome.OK) for n in range(1, 1001)] + [Spot(0, {}, None, Outcome.FAILED)]
    found = [spot.trial for spot in sample(spots, 30)]
    assert len(found) == 30
    assert found[:10] == list(range(1, 11))
    assert found == sorted(found)
    assert found[-1] > 900


def drawn_by(figure: Figure) -> dict[str, Points]:
    """The traces of a figure by their names."""
    return {trace.name: trace for trace in figure.traces if isinstance(trace, Points)}


def many(count: int) -> Landscape:
    return map_of([(2 ** (4 + n % 5), 2 ** (n % 3), 0.5 + (n * 7919 % 1000) / 1000) for n in range(count)])


def test_a_long_search_is_drawn_by_the_best_of_each_stretch_and_a_short_one_whole() -> None:
    trials = many(20_000)
    drawn = drawn_by(course(trials, start=None, end=None, log=True))
    assert 1000 < len(drawn["triton"].x) <= MOST_POINTS
    fastest = min(level for level in trials.levels if level is not None)
    assert fastest in drawn["triton"].y
    assert drawn["best so far"].y[-1] == fastest
    near = drawn_by(course(trials, start=5001, end=5100, log=False))
    assert list(near["triton"].x) == list(range(5001, 5101))
    # the best so far goes on from what was best before the stretch
    assert near["best so far"].y[0] == min(level or math.inf for level in trials.levels[:5001])


def test_the_course_marks_what_failed() -> None:
    trials = Landscape((point(1, SDPA, 1.0), point(2, candidate(a="<b>"), outcome=Outcome.COMPILE_FAILED)))
    failed = drawn_by(course(trials, start=None, end=None, log=True))["not right"]
    assert (list(failed.x), list(failed.links)) == ([2], ["/trials/2"])
    assert "&lt;b&gt;" in failed.texts[0]


@pytest.mark.parametrize("trials", [Landscape(()), Landscape((point(1, SDPA, outcome=Outcome.FAILED),))])
def test_nothing_to_draw_is_drawn_as_nothing(trials: Landscape) -> None:
    assert course(trials, start=3, end=1, log=True).plotly()["data"][-1]["x"] == []
    assert parallel((), ()).plotly()["data"] == []


def test_lines_across_all_parameters_are_few_and_lead_to_their_trials() -> None:
    trials = many(5000)
    spots = trials.spots(FORWARD)
    traces = list(drawn_by(parallel(spots, parameters(spots))).values())
    assert sum(list(trace.x).count(None) for trace in traces) == MOST_LINES
    assert traces[-1].name == "within 2%"  # the fastest on top
    top = spots[min(range(len(spots)), key=lambda index: spots[index].level or math.inf)]
    assert f"/trials/{top.trial}" in traces[-1].links


def test_a_parameter_that_few_have_breaks_no_line() -> None:
    few = [point(n, candidate(a=n, b=n % 2, rare=n), 0.5) for n in (1, 2)]
    trials = Landscape((*few, *(point(n, candidate(a=n, b=n % 2), 0.6) for n in range(3, 9))))
    spots = trials.spots(FORWARD)
    figure = parallel(spots, parameters(spots))
    assert [text for _, text in figure.x.ticks or ()] == ["a", "b", "time"]


class TestPointBook:
    @staticmethod
    def keep(database: Database, *tried: Candidate) -> None:
        with database.write() as session:
            for each in tried:
                trial = Trial(
                    candidate=each, stage=Stage.FORWARD, outcome=Outcome.OK, measurement=measurement(1.0, 0.5)
                )
                TrialRepository(session).add(trial, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)

    @staticmethod
    def read(book: PointBook, database: Database) -> Landscape:
        with database.read() as session:
            return book.of(TrialPointRepository(session, DEVICE, PROBLEM))

    def test_it_follows_the_database_and_keeps_what_stands(self, sqlite: Database) -> None:
        book = PointBook()
        assert self.read(book, sqlite).points == ()
        self.keep(sqlite, SDPA, candidate(a=1))
        first = self.read(book, sqlite)
        assert [each.candidate for each in first.points] == [SDPA, candidate(a=1)]
        assert self.read(book, sqlite) is first
        self.keep(sqlite, candidate(a=2))
        second = self.read(book, sqlite)
        assert second.points[:2] == first.points
        assert second.points[0] is first.points[0]
        assert second.points[2].candidate == candidate(a=2)

    def test_a_trial_that_shows_up_behind_a_later_one_is_not_missed(self, sqlite: Database) -> None:
        from sqlalchemy import text

        book = PointBook()
        self.keep(sqlite, SDPA, candidate(a=1), candidate(a=2))
        with sqlite.write() as session:
            session.execute(text("UPDATE trials SET id = 10 WHERE id = 3"))
        assert len(self.read(book, sqlite).points) == 3
        with sqlite.write() as session:  # as a transaction that ended late leaves it
            session.execute(text("UPDATE trials SET id = 11 WHERE id = 10"))
        with sqlite.write() as session:
            session.execute(text("UPDATE trials SET id = 5 WHERE id = 2"))
        assert [each.id for each in self.read(book, sqlite).points] == [1, 5, 11]

    def test_only_so_many_points_stay(self, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tilewise.api.points.MOST_POINTS", 3)
        book = PointBook()
        self.keep(sqlite, SDPA, candidate(a=1))
        first = self.read(book, sqlite)
        with sqlite.read() as session:
            book.of(TrialPointRepository(session, DEVICE, dataclasses.replace(PROBLEM, batch=2)))
        assert self.read(book, sqlite) is first
