"""Comparisons of finals: families, duels with their margins, pairs."""

import dataclasses
import math
from datetime import UTC, datetime

import pytest

from tilewise.api import comparison
from tilewise.api.comparison import EDGES, Size
from tilewise.db.finals import Final, Standing
from tilewise.domain.problem import Problem

BASE = Problem(batch=1, heads=32, kv_heads=8, q_len=4096, head_dim=128, causal=True)


def final(problem: Problem, noise: float = 0.001, spread: float = 0.0, ms: float = 1.0, **ratios: float) -> Final:
    standings = (Standing(name, ms * ratio, ratio, spread) for name, ratio in ratios.items())
    ordered = tuple(sorted(standings, key=lambda each: each.ratio))
    return Final(
        problem_key=problem.key,
        device_key="made.up",
        software="0" * 64,
        measured=datetime(2026, 1, 1, tzinfo=UTC),
        reference="sdpa",
        noise=noise,
        winner=ordered[0].backend,
        winner_ms=ordered[0].median_ms,
        standings=ordered,
    )


def sized(**changes: object) -> Problem:
    return dataclasses.replace(BASE, **changes)  # type: ignore[arg-type]


def test_problems_that_differ_in_length_alone_are_a_family() -> None:
    lengths = [sized(q_len=n, kv_len=n) for n in (16384, 512, 4096)]
    others = [sized(causal=False), sized(batch=2, q_len=512, kv_len=512), sized(q_len=16, kv_len=4096)]
    (found,) = comparison.families([final(each, sdpa=1.0, triton=0.8) for each in (*lengths, *others)], Size.LENGTH)
    assert found.sizes == (512, 4096, 16384)
    assert found.common == "inference.fp16.b1.h32.kv8.d128.causal"
    assert found.backends == ("triton", "sdpa")
    assert [each.speedup("triton") for each in found.finals] == [1.25] * 3


def test_problems_that_differ_in_hidden_size_alone_are_a_family() -> None:
    wider = [sized(head_dim=64, v_head_dim=64), BASE, sized(heads=64, kv_heads=16)]
    others = [sized(kv_heads=32), sized(v_head_dim=64), sized(q_len=512, kv_len=512)]
    (found,) = comparison.families([final(each, sdpa=1.0) for each in (*wider, *others)], Size.HIDDEN)
    assert found.sizes == (2048, 4096, 8192)


def test_one_size_is_no_family() -> None:
    assert comparison.families([final(BASE, sdpa=1.0)], Size.LENGTH) == ()
    assert comparison.families([], Size.HIDDEN) == ()


@pytest.mark.parametrize(
    ("ratio", "noise", "spread", "won"),
    [
        (0.5, 0.01, 0.0, 1),
        (2.0, 0.01, 0.0, -1),
        (0.995, 0.01, 0.0, 0),
        (1.005, 0.01, 0.0, 0),
        (0.95, 0.001, 0.06, 0),
        (0.95, 0.001, 0.04, 1),
        (1.0, 0.0, 0.0, 0),
    ],
)
def test_who_wins_beats_the_margin_of_the_tuner(ratio: float, noise: float, spread: float, won: int) -> None:
    (meeting,) = comparison.duel([final(BASE, noise, spread, sdpa=1.0, triton=ratio)], "triton", "sdpa").meetings
    assert meeting.won == won
    assert meeting.share == pytest.approx(1 / ratio)
    (other,) = comparison.duel([final(BASE, noise, spread, sdpa=1.0, triton=ratio)], "sdpa", "triton").meetings
    assert other.won == -won


def test_a_duel_counts_where_both_were() -> None:
    problems = [sized(batch=n) for n in range(1, 6)]
    ratios = (0.5, 1.0, 0.8, 2.0)
    finals = [final(each, sdpa=1.0, triton=ratio) for each, ratio in zip(problems, ratios, strict=False)]
    found = comparison.duel([*finals, final(problems[4], sdpa=1.0)], "triton", "sdpa")
    assert [meeting.share for meeting in found.meetings] == [0.5, 1.0, 1.25, 2.0]  # the worst first
    assert (found.count(1), found.count(0), found.count(-1)) == (2, 1, 1)
    assert found.geomean == pytest.approx(1.25**0.25)
    assert sum(found.distribution) == 4
    assert found.distribution[EDGES.index(0.98) + 1] == 1  # 0.98 to 1.02
    assert found.distribution[-1] == 1
    assert math.isnan(comparison.duel(finals, "flex", "sdpa").geomean)


def test_pairs_are_the_problems_of_both_what_got_slowest_first() -> None:
    one, two, three = (sized(batch=n) for n in (1, 2, 3))
    before = [final(one, ms=2.0, sdpa=1.0), final(two, ms=1.0, sdpa=1.0), final(three, sdpa=1.0)]
    after = [final(two, ms=2.0, sdpa=1.0), final(one, ms=1.0, sdpa=1.0)]
    found = comparison.pairs(before, after)
    assert [(pair.a.final.problem, pair.ratio) for pair in found] == [(two, 0.5), (one, 2.0)]


def test_one_backend_can_be_followed() -> None:
    before, after = final(BASE, ms=2.0, sdpa=1.0, triton=1.5), final(BASE, ms=2.0, sdpa=1.0, triton=0.5)
    (plan,) = comparison.pairs([before], [after])
    assert (plan.a.backend, plan.b.backend, plan.ratio, plan.b.speedup) == ("sdpa", "triton", 2.0, 2.0)
    (triton,) = comparison.pairs([before], [after], "triton")
    assert (triton.a.backend, triton.ratio) == ("triton", 3.0)
    assert triton.a.speedup == pytest.approx(2 / 3)
    assert comparison.pairs([before], [after], "flex") == ()


def test_where_torchs_own_choice_is_wrong_another_stands_in() -> None:
    made = dataclasses.replace(final(BASE, sdpa_math=1.0, triton=0.25), reference="sdpa_math")
    assert made.speedup("triton") == 4.0
    # and where ratios are taken against another path, the speed-up is over torch's choice all the same
    made = dataclasses.replace(final(BASE, sdpa_cudnn=1.0, sdpa=1.25, triton=0.5), reference="sdpa_cudnn")
    assert made.speedup("triton") == 2.5
