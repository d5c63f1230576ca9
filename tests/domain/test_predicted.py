"""What other devices' answers say of one: how far devices are apart, and what is served on what terms."""

import math
from dataclasses import replace

import pytest

from tilewise.domain import experience, transfer
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Plan
from tilewise.domain.device_gap import DeviceGap, device_gap
from tilewise.domain.matching import by_device, match, predictors
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.software import Software
from tilewise.domain.transfer import Bound, CostModel, Models

from .examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer

NEVER = "amd-epyc-9b14.avx2.2t"
FAR = "amd-epyc-9b14.sse2.2t"
FARTHER = "amd-epyc-9b14.avx512.4t"


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio may double with each doubling of the vectors or the problem, threads are within reach once."""
    bound = Bound(base=0.0, problem=math.log(2), device=math.log(2))
    made = CostModel(regret=Bound(base=0.05, problem=0.1, device=0.2), drift=bound, reach=DeviceGap(arch=2, size=1))
    models = {"cpu_tiled.cpu_tiled.inference": Models(predicted=made)}
    monkeypatch.setattr(transfer, "shipped", lambda: models)


def asked(problem: Problem, *answers: Answer, device_key: str = NEVER, software: Software = SOFTWARE) -> Answer:
    kept = by_device(answers)
    return match(problem, device_key, software, kept.get(device_key, {}), predictors(device_key, kept))


class TestGap:
    @pytest.mark.parametrize(
        ("one", "other", "gap"),
        [
            (DEVICE, DEVICE, DeviceGap()),
            (DEVICE, FAR, DeviceGap(arch=2)),
            (DEVICE, FARTHER, DeviceGap(size=1)),
            (DEVICE, "intel-xeon.avx2.16t", DeviceGap(model=1, arch=1, size=3)),
            ("neoverse.sve.2t", "neoverse.sve.8t", DeviceGap(size=2)),
            ("nvidia-h200.sm90.141g.700w", "nvidia-h200.sm90.141g.350w", DeviceGap(power=1)),
            ("nvidia-a100.sm80.40g.400w", "nvidia-a100.sm80.80g.400w", DeviceGap(size=1)),
            ("nvidia-a100.sm80.80g.400w", "nvidia-h100.sm90.80g.400w", DeviceGap(model=1, arch=1)),
            ("nvidia-a100.sm80.5g.mig-1g-5gb.400w", "nvidia-a100.sm80.5g.mig-1g-5gb.400w", DeviceGap()),
        ],
    )
    def test_what_keys_tell(self, one: str, other: str, gap: DeviceGap) -> None:
        assert device_gap(one, other) == device_gap(other, one) == gap

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (DEVICE, "nvidia-h200.sm90.141g.700w"),
            (DEVICE, "neoverse.sve.2t"),
            ("neoverse.sve.2t", "neoverse.neon.2t"),
            ("nvidia-a100.sm80.5g.mig-1g-5gb.400w", "nvidia-a100.sm80.40g.400w"),
            ("nvidia-a100.sm80.40g", "nvidia-a100.sm80.40g.400w"),
            ("nobody-knows.this", "nobody-knows.this"),
            ("nobody-knows.this", DEVICE),
            (DEVICE, f"amd-epyc-9b14.avx512.{'2' * 5000}t"),
            ("nvidia-a100.sm80.40g", f"nvidia-a100.sm80.{'4' * 5000}g"),
        ],
    )
    def test_what_is_not_comparable(self, one: str, other: str) -> None:
        assert device_gap(one, other) is None
        assert device_gap(other, one) is None

    def test_reach(self) -> None:
        one, two = DeviceGap(arch=2, size=1), DeviceGap(model=1)
        assert one.widened(two) == DeviceGap(model=1, arch=2, size=1)
        assert one.within(one)
        assert not two.within(one)
        assert DeviceGap(model=1, arch=2, size=1, power=3).distance == 7


class TestMatch:
    def test_a_device_never_measured_is_told_what_another_would_run(self) -> None:
        found = asked(PROBLEM, answer())
        assert (found.match, found.device_key, found.measured_on) == (Match.PREDICTED, NEVER, DEVICE)
        assert (found.problem, found.measured, found.plan) == (PROBLEM, PROBLEM, Plan(TILED))
        assert found.regret == pytest.approx(0.25)
        assert found.missed == (f"device: {PROBLEM.key} was not measured on {NEVER}; {PROBLEM.key} was on {DEVICE}")
        assert (found.expected_ms, found.baseline_ms, found.interval) == (None, None, None)  # of another device
        assert found.evidence == answer().evidence

    def test_the_worst_case_of_both_distances_must_win(self) -> None:
        # a third of torch's time, twice that on NEVER, four thirds where the problem is twice as large too
        assert asked(replace(PROBLEM, batch=2), answer()).match is Match.DEFAULT
        faster = replace(answer(), expected_ms=7.0)
        near = asked(replace(PROBLEM, batch=2), faster)
        assert (near.match, near.measured) == (Match.PREDICTED, PROBLEM)
        assert near.regret == pytest.approx(0.35)
        assert asked(PROBLEM, answer(), device_key=FAR).match is Match.DEFAULT
        assert asked(PROBLEM, replace(answer(), expected_ms=29.0)).match is Match.DEFAULT
        assert asked(PROBLEM, replace(answer(), expected_ms=None)).match is Match.DEFAULT

    def test_beyond_what_was_fitted_nothing_is_served(self) -> None:
        tiny = replace(answer(), expected_ms=0.001)
        assert asked(PROBLEM, tiny, device_key=FARTHER).match is Match.PREDICTED
        assert asked(PROBLEM, tiny, device_key="amd-epyc-9b14.avx512.8t").match is Match.DEFAULT
        assert asked(PROBLEM, tiny, device_key="amd-epyc-7b13.avx512.2t").match is Match.DEFAULT  # another name

    def test_other_software_and_kernels_without_a_model_say_nothing(self) -> None:
        assert asked(PROBLEM, answer(), software=replace(SOFTWARE, torch="9")).match is Match.DEFAULT
        assert asked(PROBLEM, replace(answer(), plan=Plan(SDPA))).match is Match.DEFAULT

    def test_the_nearest_device_says_and_what_is_measured_here_comes_first(self) -> None:
        nearer, farther = answer(version=2, device_key="amd-epyc-9b14.avx2.4t"), answer(device_key=FAR)
        found = asked(PROBLEM, farther, nearer, replace(answer(), expected_ms=1.0))
        assert found.measured_on == "amd-epyc-9b14.avx2.4t"  # as far as DEVICE, but before it in the order of keys
        own = answer(device_key=NEVER, software=replace(SOFTWARE, torch="1"))
        assert asked(PROBLEM, answer(), own).match is Match.STALE
        assert asked(PROBLEM, answer(), answer(device_key=NEVER)).match is Match.EXACT

    def test_near_comes_before_predicted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sure = CostModel(regret=Bound(base=0, problem=0), drift=Bound(base=0, problem=0), reach=DeviceGap(arch=2))
        models = {"cpu_tiled.cpu_tiled.inference": Models(near=sure, predicted=sure)}
        monkeypatch.setattr(transfer, "shipped", lambda: models)
        twice = replace(PROBLEM, batch=2)
        own = answer(twice, device_key=NEVER)
        assert asked(PROBLEM, answer(), own).match is Match.NEAR
        assert asked(replace(PROBLEM, head_dim=32), answer(), own).match is Match.DEFAULT

    def test_what_is_useful_elsewhere_is_what_may_be_served(self) -> None:
        slow, other = replace(answer(replace(PROBLEM, batch=4)), expected_ms=20.0), replace(PROBLEM, batch=8)
        kept = by_device([answer(), slow, replace(answer(other), plan=Plan(SDPA))])
        (one,) = predictors(NEVER, kept)
        assert list(one.useful()) == [PROBLEM.key]
        (far,) = predictors(FAR, kept)
        assert list(far.useful()) == []


class TestExperience:
    def test_nine_in_ten_is_an_order_statistic(self) -> None:
        assert experience.upper_bound(range(8)) is None
        assert experience.upper_bound(range(9)) == 8
        assert experience.upper_bound(range(18)) == 17
        assert experience.upper_bound(range(19)) == 17
        assert experience.upper_bound(range(99)) == 89

    def test_it_covers_what_comes_next_nine_times_in_ten(self) -> None:
        values = [((7919 * n) % 1000) / 1000 for n in range(1000)]
        covered = [values[at] <= (experience.upper_bound(values[at - 19 : at]) or 0.0) for at in range(19, len(values))]
        assert sum(covered) / len(covered) >= 0.9

    def test_the_default_says_what_it_cost_of_the_devices_tuned_problems(self) -> None:
        tuned = [
            replace(answer(replace(PROBLEM, batch=batch), device_key=NEVER), expected_ms=30.0 / (1 + batch / 10))
            for batch in range(1, 10)
        ]
        other = replace(PROBLEM, head_dim=32)
        found = asked(other, *tuned)
        assert found.match is Match.DEFAULT
        assert found.regret == pytest.approx(0.9)
        assert asked(other, *tuned[1:]).regret is None
        assert asked(replace(other, pass_=Pass.TRAINING), *tuned).regret is None

    def test_a_stale_answer_says_what_others_lost_that_were_measured_again(self) -> None:
        again = [
            replace(answer(replace(PROBLEM, batch=1 + n), device_key=NEVER), stale_loss=n / 100) for n in range(1, 10)
        ]
        old = answer(device_key=NEVER, software=replace(SOFTWARE, torch="1"))
        found = asked(PROBLEM, old, *again)
        assert found.match is Match.STALE
        assert found.regret == pytest.approx(0.09)
        assert asked(PROBLEM, old, *again[1:]).regret is None
