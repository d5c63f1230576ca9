"""From a final to an answer: every way it can go."""

import dataclasses
from datetime import UTC, datetime

import pytest

from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.trial import Measurement
from tilewise.tuner.timing import Final
from tilewise.tuner.verdict import Searched, decide

from ..domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer

OTHER = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=64, block_k=256, heads_per_chunk=1))
SEARCHED = Searched(job="job-1", trials=7, failed=2, seconds=1.5)


def measured(ratio: float, spread: float = 0.0) -> Measurement:
    return Measurement(
        median_ms=10 * ratio, p20_ms=9.9 * ratio, p80_ms=10.2 * ratio, samples=60, ratio=ratio, spread=spread
    )


def verdict(
    *ratios: tuple[Candidate, float], noise: float = 0.01, standing: Candidate | None = None, spread: float = 0.0
) -> tuple[Candidate, str]:
    candidates = (SDPA, *(candidate for candidate, _ in ratios))
    final = Final(measurements=(measured(1.0), *(measured(ratio, spread) for _, ratio in ratios)), noise=noise)
    answer = decide(PROBLEM, DEVICE, SOFTWARE, candidates, final, standing=standing, searched=SEARCHED)
    assert answer.evidence is not None
    return answer.plan.forward, answer.evidence.reason


def test_the_fastest_beats_torchs_own_choice() -> None:
    winner, reason = verdict((TILED, 0.5), (OTHER, 0.7))
    assert winner == TILED
    assert reason == f"{TILED} beats torch's own choice, sdpa, by 50.00%, more than the noise of 1.00%"


def test_torchs_own_choice_is_the_fastest() -> None:
    winner, reason = verdict((TILED, 1.2), (OTHER, 1.1))
    assert winner == SDPA
    assert reason == "torch's own choice, sdpa, is the fastest of the final"


def test_torchs_own_choice_stays_within_the_noise() -> None:
    winner, reason = verdict((TILED, 0.99), noise=0.02)
    assert winner == SDPA
    assert reason == f"torch's own choice, sdpa, stays: {TILED} is 1.00% faster, within the noise of 2.00%"


def test_what_tuning_won_over_the_default_config_is_a_ratio_of_the_final() -> None:
    final = Final(measurements=(measured(1.0), measured(0.5), measured(0.7)), noise=0.01)
    answer = decide(
        PROBLEM, DEVICE, SOFTWARE, (SDPA, TILED, OTHER), final, standing=None, searched=SEARCHED, defaults=[OTHER]
    )
    assert answer.evidence is not None
    assert [each.default for each in answer.evidence.finalists] == [False, True, False]
    assert answer.default_speedup == pytest.approx(1.4)
    stays = decide(PROBLEM, DEVICE, SOFTWARE, (SDPA, TILED, OTHER), final, standing=SDPA, searched=SEARCHED)
    assert stays.default_speedup is None


def test_only_torchs_own_choice_ran() -> None:
    winner, _ = verdict()
    assert winner == SDPA


def test_torchs_own_choice_need_not_be_what_ratios_are_taken_against() -> None:
    candidates = (OTHER, SDPA, TILED)
    final = Final(measurements=(measured(1.0), measured(0.8), measured(0.4)), noise=0.01)
    then = datetime(2026, 1, 2, tzinfo=UTC)
    answer = decide(
        PROBLEM, DEVICE, SOFTWARE, candidates, final, standing=None, searched=SEARCHED, measured=then
    )  # fmt: skip
    assert (answer.plan.forward, answer.speedup) == (TILED, 2.0)
    assert answer.evidence is not None
    assert (answer.evidence.reference, answer.evidence.measured) == (OTHER, then)
    assert answer.evidence.reason.startswith(f"{TILED} beats torch's own choice, sdpa, by 50.00%")


def test_the_standing_answer_is_replaced() -> None:
    winner, reason = verdict((TILED, 0.5), (OTHER, 0.4), standing=TILED)
    assert winner == OTHER
    assert reason.startswith(f"{OTHER} beats the standing answer, {TILED}, by 20.00%")


def test_the_standing_answer_stays_within_the_noise() -> None:
    winner, reason = verdict((TILED, 0.5), (OTHER, 0.497), standing=TILED)
    assert winner == TILED
    assert reason.startswith(f"the standing answer, {TILED}, stays: {OTHER} is 0.60% faster")


def test_the_standing_answer_is_the_fastest() -> None:
    winner, reason = verdict((TILED, 0.4), (OTHER, 0.5), standing=TILED)
    assert winner == TILED
    assert reason == f"the standing answer, {TILED}, is the fastest of the final"


def test_a_standing_answer_that_got_slower_than_torch_is_replaced_by_it() -> None:
    winner, reason = verdict((TILED, 1.3), standing=TILED)
    assert winner == SDPA
    assert "beats the standing answer" in reason


def test_a_standing_answer_that_did_not_run_does_not_count() -> None:
    winner, reason = verdict((OTHER, 0.5), standing=TILED)
    assert winner == OTHER
    assert "torch's own choice" in reason


def test_a_candidates_own_spread_counts_as_noise() -> None:
    assert verdict((TILED, 0.95), noise=0.0, spread=0.06)[0] == SDPA
    assert verdict((TILED, 0.95), noise=0.0, spread=0.04)[0] == TILED


def test_a_tie_changes_nothing() -> None:
    assert verdict((TILED, 1.0), noise=0.0)[0] == SDPA
    assert verdict((TILED, 0.5), (OTHER, 0.5), noise=0.0, standing=OTHER)[0] == OTHER


def test_the_answer_says_what_it_rests_on() -> None:
    final = Final(measurements=(measured(1.0), measured(0.5), measured(0.7)), noise=0.01)
    answer = decide(PROBLEM, DEVICE, SOFTWARE, (SDPA, TILED, OTHER), final, standing=None, searched=SEARCHED)
    assert (answer.problem, answer.measured, answer.device_key) == (PROBLEM, PROBLEM, DEVICE)
    assert (answer.match, answer.software, answer.regret) == (Match.EXACT, SOFTWARE, 0.0)
    assert (answer.expected_ms, answer.interval, answer.baseline_ms) == (5.0, (9.9 / 2, 10.2 / 2), 10.0)
    assert answer.speedup == 2.0
    assert answer.runner_up == OTHER
    evidence = answer.evidence
    assert evidence is not None
    assert [finalist.candidate for finalist in evidence.finalists] == [TILED, OTHER, SDPA]
    assert (evidence.reference, evidence.noise, evidence.job) == (SDPA, 0.01, "job-1")
    assert (evidence.trials, evidence.failed, evidence.seconds) == (7, 2, 1.5)


def test_what_a_stale_answer_lost_is_kept() -> None:
    ratios = ((TILED, 0.5), (OTHER, 0.4))
    final = Final(measurements=(measured(1.0), *(measured(ratio) for _, ratio in ratios)), noise=0.01)

    def loss(previous: Answer | None, *, standing: Candidate | None = TILED) -> float | None:
        candidates = (SDPA, TILED, OTHER)
        return decide(
            PROBLEM, DEVICE, SOFTWARE, candidates, final, standing=standing, searched=SEARCHED, previous=previous
        ).stale_loss

    old = answer(software=dataclasses.replace(SOFTWARE, torch="1.0"))
    assert loss(old) == pytest.approx(0.25)
    assert loss(dataclasses.replace(old, plan=Plan(OTHER)), standing=OTHER) == 0.0
    gone = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=1, block_k=1, heads_per_chunk=1))
    assert loss(dataclasses.replace(old, plan=Plan(gone)), standing=None) is None  # it was not in the final
    assert loss(dataclasses.replace(answer(), stale_loss=0.1)) == 0.1  # of the same software: what was seen before
    assert loss(None) is None
