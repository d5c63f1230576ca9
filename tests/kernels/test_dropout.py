"""Dropout masks: recovered from what backends compute, and told apart from masks that only look random."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Layout, Pass, Problem
from tilewise.kernels import reference
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.backends.plain import _keep
from tilewise.kernels.call import Call
from tilewise.kernels.dropout import attended, departures, recovered
from tilewise.kernels.inputs import DROPOUT, random_call

from .cells import CPU

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL: dict[str, Any] = {"batch": 2, "heads": 2, "q_len": 40, "kv_len": 37, "head_dim": 16, "dtype": Dtype.FP32}
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (9, 3)},
    "bool": {"mask": "bool"},
    "bias": {"mask": "bias.b1"},
    "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": True},
    "gqa": {"heads": 4, "kv_heads": 1},
    "narrow values": {"v_head_dim": 8, "layout": Layout.BHSD},
    "more values than keys": {"v_head_dim": 48},
    "packed": {"varlen": True, "batch": 5, "causal": True, "kv_heads": 1},
}


def dropped(feature: str, device: torch.device = CPU, **changes: Any) -> Call:
    problem = Problem(**{**SMALL, **FEATURES[feature], "dropout": True, **changes})
    return random_call(problem, device, seed=0, empty=True)


def cases() -> list[tuple[str, str]]:
    refuses = {"sdpa": ("softcap",), "sdpa_math": ("softcap",), "plain": ()}
    return [(name, feature) for name, without in refuses.items() for feature in FEATURES if feature not in without]


def test_the_share_that_is_checked_and_timed() -> None:
    call = dropped("full")
    assert call.dropout == DROPOUT == 0.1
    assert call.seed >= 1 << 32
    assert random_call(call.problem, CPU, seed=1).seed != call.seed
    assert random_call(replace(call.problem, dropout=False), CPU, seed=0).dropout == 0


@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize(("name", "feature"), cases())
def test_the_recovered_mask_is_the_one_that_was_used(name: str, feature: str, pass_: Pass) -> None:
    call = dropped(feature, pass_=pass_, bias_grad=feature == "bias" and pass_ is Pass.TRAINING)
    keep = BACKENDS[name].kept_weights(call, None)
    assert keep.shape == (call.problem.batch, call.problem.heads, 40, 37)
    out, _ = BACKENDS[name].forward(call, None)
    expected, _ = reference.attention(call, keep=keep)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    without, _ = reference.attention(call)
    assert not torch.allclose(out.double(), without, atol=1e-2)


@pytest.mark.parametrize(
    "feature", [feature for feature in FEATURES if feature != "packed"]
)  # plain draws for a padded batch
def test_what_is_recovered_is_the_mask_that_a_backend_knows(feature: str) -> None:
    call = dropped(feature)
    keep = BACKENDS["plain"].kept_weights(call, None)
    seen = attended(call).expand_as(keep)
    assert torch.equal(keep & seen, _keep(call) & seen)
    assert not bool((keep & ~seen).any())


@pytest.mark.parametrize("feature", FEATURES)
def test_tritons_forward_drops_what_its_mask_says(feature: str) -> None:
    """Recovered from the kernel itself, in Triton's interpreter where there is no GPU."""
    call = dropped(feature, HERE)
    known = BACKENDS["triton"].kept_weights(call, None)
    found = Backend.kept_weights(BACKENDS["triton"], call, None)
    seen = attended(call).expand_as(known)
    assert torch.equal(known & seen, found & seen)


def test_the_callers_random_numbers_stay_what_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for name in ("sdpa", "plain"):
        BACKENDS[name].kept_weights(dropped("full"), None)
    assert torch.equal(torch.rand(4), expected)


def test_wholly_masked_rows_and_attended_pairs() -> None:
    call = dropped("bias", causal=True)
    assert call.mask is not None
    scores = torch.where(attended(call), 0.0, -torch.inf).expand(2, 2, 40, 37)
    _, lse = reference.attention(call)
    assert torch.equal(scores.isfinite().any(-1), lse.isfinite())
    assert attended(dropped("full")).shape == (40, 37)
    assert bool(attended(dropped("full")).all())


def unseeded(call: Call) -> torch.Tensor:
    keep = torch.rand(2, 2, 40, 37) >= call.dropout
    return reference.softmax_attention(call, keep=keep)[0]


def by_the_values(call: Call) -> torch.Tensor:
    """A mask that depends on what the values are."""
    changed = replace(call, seed=call.seed + int(call.value[0, 0, 0, 0]))
    return reference.softmax_attention(changed, keep=_keep(changed))[0]


@pytest.mark.parametrize("forward", [unseeded, by_the_values])
def test_a_mask_that_cannot_be_recovered(forward: Callable[[Call], torch.Tensor]) -> None:
    with pytest.raises(UnsupportedError, match="the same seed drops other weights in a second call"):
        recovered(dropped("full"), forward)


# independent draws


def draws(share: float, seed: int, shape: tuple[int, ...] = (2, 3, 50, 70)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= share


EVERYTHING = torch.ones(1, 1, dtype=torch.bool)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seen", [EVERYTHING, torch.ones(50, 70, dtype=torch.bool).tril(20), draws(0.4, 99)])
def test_fair_draws_depart_by_little(share: float, seen: torch.Tensor) -> None:
    """Over 20 seeds no departure reaches 5 standard deviations, and the mean square of some is near 1."""
    found = [departures(draws(share, 2 * n), draws(share, 2 * n + 1), seen, share) for n in range(20)]
    assert found[0].keys() == {"share", "seed", "batch", "head", "query", "key"}
    squares = {name: torch.tensor([each[name] for each in found]).square() for name in found[0]}
    assert all(float(each.max()) < 25 for each in squares.values())
    assert 0.5 < float(torch.stack([squares[name] for name in ("seed", "query", "key")]).mean()) < 2


REPEATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "batch": lambda keep: keep[:1].expand_as(keep),
    "head": lambda keep: keep[:, :1].expand_as(keep),
    "query": lambda keep: keep[:, :, ::2].repeat_interleave(2, 2),
    "key": lambda keep: keep[..., ::2].repeat_interleave(2, 3),
}


@pytest.mark.parametrize("dimension", REPEATED)
@pytest.mark.parametrize("seen", [EVERYTHING, torch.ones(50, 70, dtype=torch.bool).tril(20)])
def test_a_mask_that_repeats_itself_scatters_too_much(dimension: str, seen: torch.Tensor) -> None:
    found = departures(REPEATED[dimension](draws(0.1, 0)), draws(0.1, 1), seen, 0.1)
    assert found[dimension] > 5
    assert abs(found["seed"]) < 5


def test_a_fixed_number_of_each_row_scatters_too_little() -> None:
    order = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0)).argsort(-1)
    assert departures(order >= 7, draws(0.1, 1), EVERYTHING, 0.1)["key"] < -5


def test_another_share_and_a_mask_that_no_seed_changes() -> None:
    assert departures(draws(0.13, 0), draws(0.13, 1), EVERYTHING, 0.1)["share"] < -5
    assert departures(draws(0.1, 0), draws(0.1, 0), EVERYTHING, 0.1)["seed"] > 5
    assert departures(draws(0.1, 0), ~draws(0.1, 0), EVERYTHING, 0.1)["seed"] < -5


def test_draws_of_bytes_are_fair() -> None:
    """FlashAttention 2 keeps a weight where a random byte is at most floor(0.9 * 255): 230 of 256, not 0.9."""
    generator = torch.Generator().manual_seed(0)
    keep, other = (torch.randint(256, (2, 4, 700, 900), generator=generator) <= 229 for _ in range(2))
    found = departures(keep, other, EVERYTHING, 0.1)
    assert max(map(abs, found.values())) < 5
    assert departures(keep & draws(0.01, 0, keep.shape), other, EVERYTHING, 0.1)["share"] < -5


@pytest.mark.parametrize("keeps", [True, False])
def test_all_or_nothing(keeps: bool) -> None:
    keep = torch.full((2, 3, 50, 70), keeps)
    found = departures(keep, keep, EVERYTHING, 0.1)
    assert found.keys() == {"share"}
    assert abs(found["share"]) > 5


def test_few_draws_say_nothing() -> None:
    few = (1, 1, 50, 70)
    assert departures(draws(0.1, 0, few), draws(0.1, 0, few), EVERYTHING, 0.1) == {}


def test_of_large_masks_the_last_queries_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewise.kernels.dropout.MOST_DRAWS", 2 * 3 * 20 * 70)
    keep = draws(0.1, 0)
    keep[:, :, :30] = True
    assert abs(departures(keep, draws(0.1, 1), EVERYTHING, 0.1)["share"]) < 5
    keep[:, :, 30:40] = True
    assert departures(keep, draws(0.1, 1), EVERYTHING, 0.1)["share"] > 5
