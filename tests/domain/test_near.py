"""Near answers: served only where even their worst case beats torch's own choice, with bounds that hold."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.domain import transfer
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.matching import KeptAnswers, match
from tilewise.domain.near import MAX_DISTANCE, NearIndex, distance, group
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.transfer import Bound, CostModel, Models

from .examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer

# its plan takes a third of torch's time
KEPT = {PROBLEM.key: answer()}


def asked(problem: Problem, kept: dict[str, Answer] | None = None) -> Answer:
    return match(problem, DEVICE, SOFTWARE, KeptAnswers(KEPT if kept is None else kept))


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a doubling of the ratio and a tenth of the time for each doubling of the problem."""
    made = CostModel(regret=Bound(base=0.05, problem=0.1), drift=Bound(base=0.0, problem=math.log(2) / 2))
    models = {"cpu_tiled.cpu_tiled.inference": Models(near=made)}
    monkeypatch.setattr(transfer, "shipped", lambda: models)


def test_a_neighbour_whose_worst_case_wins_is_served_with_its_bounds() -> None:
    twice = replace(PROBLEM, batch=2)
    found = asked(twice)
    assert (found.match, found.problem, found.measured) == (Match.NEAR, twice, PROBLEM)
    assert found.plan == answer().plan
    assert found.regret == pytest.approx(0.15)
    assert found.missed == f"problem: {twice.key} was not measured on {DEVICE}; {PROBLEM.key} was"
    assert found.expected_ms == pytest.approx(20)  # twice the operations
    assert found.baseline_ms == pytest.approx(60)
    assert found.interval == pytest.approx((2 * 9.8 / math.sqrt(2), 2 * 10.3 * math.sqrt(2)))
    assert found.interval is not None
    assert found.baseline_ms is not None
    assert found.interval[1] < found.baseline_ms


def test_a_neighbour_whose_worst_case_loses_is_not_served() -> None:
    # its plan takes 0.4 of torch's time; after 2 doublings perhaps 0.8, after 3 perhaps 1.13
    kept = {PROBLEM.key: replace(answer(), expected_ms=12.0)}
    assert distance(PROBLEM, replace(PROBLEM, batch=8)) == 3.0
    assert asked(replace(PROBLEM, batch=8), kept).match is Match.DEFAULT
    assert asked(replace(PROBLEM, batch=4), kept).match is Match.NEAR
    assert asked(replace(PROBLEM, batch=16)).match is Match.DEFAULT  # farther than anything that was fitted


@pytest.mark.parametrize(
    "change",
    [{"head_dim": 32}, {"causal": False, "window": None}, {"dtype": "fp32"}, {"dropout": True}, {"window": (128, 0)}],
)
def test_another_kind_of_problem_is_never_near(change: dict[str, object]) -> None:
    assert asked(replace(PROBLEM, **change)).match is Match.DEFAULT  # type: ignore[arg-type]


def test_masks_that_broadcast_otherwise_are_not_near() -> None:
    whole = Problem(batch=2, heads=8, q_len=64, head_dim=64, mask="bias")
    assert group(whole) != group(replace(whole, mask="bias.q1"))
    assert group(whole) == group(replace(whole, batch=4, q_len=128))


def test_the_nearest_is_taken_and_stale_comes_before() -> None:
    far = replace(PROBLEM, batch=4)
    kept = {**KEPT, far.key: answer(far)}
    assert asked(replace(PROBLEM, batch=3), kept).measured == far
    old = replace(SOFTWARE, torch="1.0")
    twice = replace(PROBLEM, batch=2)
    stale = {**KEPT, twice.key: answer(twice, software=old)}
    assert asked(twice, stale).match is Match.STALE
    # what was measured with other software is near to nothing
    assert asked(replace(PROBLEM, batch=2), {PROBLEM.key: answer(software=old)}).match is Match.DEFAULT


def test_a_backend_without_a_model_and_one_that_does_not_win_are_not_served() -> None:
    twice = replace(PROBLEM, batch=2)
    assert asked(twice, {PROBLEM.key: replace(answer(), plan=Plan(SDPA))}).match is Match.DEFAULT
    assert asked(twice, {PROBLEM.key: replace(answer(), expected_ms=29.0)}).match is Match.DEFAULT
    assert asked(twice, {PROBLEM.key: replace(answer(), interval=None)}).match is Match.DEFAULT


def test_a_model_is_of_one_kernel_and_pass() -> None:
    assert transfer.subject(answer().plan, PROBLEM) == "cpu_tiled.cpu_tiled.inference"
    assert transfer.subject(answer().plan, replace(PROBLEM, q_len=1, window=None)) == "cpu_tiled.cpu_tiled.decode"
    training = replace(PROBLEM, pass_=Pass.TRAINING)
    assert asked(replace(training, batch=2), {training.key: answer(training)}).match is Match.DEFAULT
    assert transfer.subject(Plan(SDPA), PROBLEM) is None
    # of several roles the landscapes vary one at a time: what all cost together was not seen
    roles = TILED.with_config("dq", Config.of("triton_dq", block_m=64))
    assert transfer.subject(roles, training) is None
    assert transfer.subject(Plan(TILED, Candidate("sdpa")), training) is None


sizes = st.builds(
    Problem,
    batch=st.integers(1, 64),
    heads=st.sampled_from([8, 16, 32]),
    kv_heads=st.sampled_from([1, 2, 8]),
    q_len=st.integers(17, 5000),
    kv_len=st.integers(17, 5000),
    head_dim=st.just(64),
)


@given(sizes, sizes, sizes)
def test_the_distance_is_one(one: Problem, two: Problem, three: Problem) -> None:
    assert distance(one, one) == 0
    assert distance(one, two) == pytest.approx(distance(two, one))
    assert distance(one, three) <= distance(one, two) + distance(two, three) + 1e-9


@given(st.lists(sizes, max_size=12), sizes)
def test_the_index_finds_what_a_walk_finds(kept: list[Problem], problem: Problem) -> None:
    found = NearIndex({one.key for one in kept}).nearest(problem)
    walked = {one for one in kept if group(one) == group(problem) and distance(problem, one) <= MAX_DISTANCE}
    assert {one for _, one in found} == walked
    assert [far for far, _ in found] == sorted(far for far, _ in found)
