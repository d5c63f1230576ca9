"""Which weights dropout leaves: recovered from what a backend computes, and compared with independent draws.

A backend draws its mask in its own way, so no two backends keep the same weights for one seed. What can be checked is
that each is a fair draw, and that results and gradients are those of the mask that was drawn.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Pass

from .call import Call, allowed

LEAST_DRAWS = 4000  # of fewer, binomials have longer tails than the normal distribution
MOST_DRAWS = 1 << 26
GRAIN = 1 / 256


def recovered(call: Call, forward: Callable[[Call], torch.Tensor]) -> torch.Tensor:
    """Return which weights (B, H, Q, K), bool, `forward` keeps for the dropout and seed of `call`.

    Queries, slopes and biases are 0, so that the weights of a row are equal, and the values are columns of the identity
    matrix, v_head_dim keys at a time: column c of the result is then the weight of key first + c, and 0 where it was
    dropped. Shapes, strides, dtypes and gradients that are asked for stay as they are, for a backend may choose its
    kernel, and a kernel its order of draws, by these. Pairs that do not attend come out False. Holds one byte a weight.
    A packed call gives a sequence's weights as the first rows and columns of its entry, as `reference.attention` takes
    them.

    Raises UnsupportedError where the same seed drops other weights for other values: such a mask cannot be known.
    """
    problem, probe, width = call.problem, _equal_weights(call), call.value.shape[-1]
    keep = torch.zeros(
        problem.batch, problem.heads, problem.q_len, problem.kv_len, dtype=torch.bool, device=call.query.device
    )
    for first in range(0, problem.kv_len, width):
        keys = range(first, min(first + width, problem.kv_len))
        keep[..., keys.start : keys.stop] = _kept(probe, forward, keys)
    again = range(min(width, problem.kv_len) - 1, -1, -1)  # the first keys in the other order
    if not torch.equal(_kept(probe, forward, again).flip(-1), keep[..., : len(again)]):
        raise UnsupportedError(
            "the same seed drops other weights in a second call: the mask cannot be recovered, so dropout cannot be "
            "checked"
        )
    return keep


def attended(call: Call) -> torch.Tensor:
    """Return which pairs attend, bool, of a shape that broadcasts to (B, H, Q, K)."""
    q_len, kv_len, device = call.problem.q_len, call.problem.kv_len, call.query.device
    rows, columns = torch.arange(q_len, device=device), torch.arange(kv_len, device=device)
    if call.cu_seqlens is not None:
        parts = []
        for q_length, kv_length in zip(*(cu.diff().tolist() for cu in call.cu_seqlens), strict=True):
            part = (rows < q_length)[:, None] & (columns < kv_length)
            reach = allowed(rows, columns, kv_length - q_length, call.window)
            parts.append(part if reach is None else part & reach)
        return torch.stack(parts)[:, None]
    reach = allowed(rows, columns, kv_len - q_len, call.window)
    if reach is None:
        reach = torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    if call.mask is None:
        return reach
    return reach & (call.mask if call.mask_is_bool else call.mask > -torch.inf)


def departures(keep: torch.Tensor, other: torch.Tensor, drawn: torch.Tensor, dropout: float) -> dict[str, float]:
    """Return by how many standard deviations a mask departs from independent draws, by what was looked at.

    - keep, other: the masks (B, H, Q, K) of two seeds. drawn: which weights count, broadcastable to them.
    - "share": how many weights were kept; 1/256 of all may be too many or too few, for some kernels draw bytes.
      "seed": how much the masks of the two seeds have in common. "batch", "head", "query", "key": how much the sums
      along that dimension scatter: what repeats along it makes them scatter too much.

    Of large masks only the last queries are looked at. Empty for fewer than 4000 weights.
    """
    rows = max(1, MOST_DRAWS * keep.shape[2] // keep.numel())
    drawn = drawn.expand_as(keep)[:, :, -rows:]
    keep, other = keep[:, :, -rows:] & drawn, other[:, :, -rows:] & drawn
    count = int(drawn.sum())
    if count < LEAST_DRAWS:
        return {}
    kept, of_other = int(keep.sum()), int(other.sum())
    excess = kept - (1 - dropout) * count
    beyond = math.copysign(max(0.0, abs(excess) - GRAIN * count), excess)
    found = {"share": beyond / math.sqrt(dropout * (1 - dropout) * count)}
    if 0 < kept < count and 0 < of_other < count:
        covariance = int((keep & other).sum()) - kept * of_other / count
        found["seed"] = covariance / math.sqrt(kept * (1 - kept / count) * of_other * (1 - of_other / count) / count)
    for dimension, name in enumerate(("batch", "head", "query", "key")):
        if keep.shape[dimension] > 1 and 0 < kept < count:
            found[name] = _scatter(keep.sum(dimension), drawn.sum(dimension), kept / count)
    return found


def _scatter(kept: torch.Tensor, drawn: torch.Tensor, share: float) -> float:
    """Return by how many standard deviations binomial sums scatter more (+) or less (-) than independent ones.

    Pearson's chi-squared, its degrees of freedom those that give the variance it has for binomials, made normal by
    Wilson and Hilferty's cube root (1931).
    """
    several = drawn > 1
    kept, drawn = kept[several].double(), drawn[several].double()
    if not len(drawn):
        return 0.0
    variance = share * (1 - share)
    squares = float(((kept - drawn * share).square() / (drawn * variance)).mean())
    freedom = 2 * len(drawn) ** 2 / float((2 + (1 - 6 * variance) / (drawn * variance)).sum())
    return (math.cbrt(squares) - (1 - 2 / (9 * freedom))) * math.sqrt(9 * freedom / 2)


def _equal_weights(call: Call) -> Call:
    """Return `call` with the same pairs attending, all of them with the same score."""
    mask, slopes = call.mask, call.alibi_slopes
    learns = call.problem.pass_ is Pass.TRAINING
    if mask is not None and not call.mask_is_bool:
        mask = torch.zeros_like(mask).masked_fill_(mask.detach() == -torch.inf, -torch.inf)
        mask.requires_grad_(call.problem.bias_grad)
    return replace(
        call,
        query=torch.zeros_like(call.query).requires_grad_(learns),
        key=call.key.detach().requires_grad_(learns),
        mask=mask,
        alibi_slopes=None if slopes is None else torch.zeros_like(slopes),
    )


def _kept(probe: Call, forward: Callable[[Call], torch.Tensor], keys: range) -> torch.Tensor:
    """Return which weights (B, H, Q, len(keys)) of `keys`, in their order, `forward` keeps."""
    learns = probe.problem.pass_ is Pass.TRAINING
    value = torch.zeros_like(probe.value)
    wanted = torch.tensor(keys, device=value.device)
    if probe.cu_seqlens is None:
        value[:, wanted, :, torch.arange(len(keys), device=value.device)] = 1
    else:
        _, places = _within(probe.cu_seqlens[1], value.shape[0])
        value[..., : len(keys)] = (places[:, None] == wanted)[:, None]
    with torch.set_grad_enabled(learns):
        out = forward(replace(probe, value=value.requires_grad_(learns)))
    found = out.detach()[..., : len(keys)] > 0
    if probe.cu_seqlens is None:
        return found.transpose(1, 2)
    keep = found.new_zeros(probe.problem.batch, probe.problem.q_len, *found.shape[1:])
    keep[_within(probe.cu_seqlens[0], found.shape[0])] = found
    return keep.transpose(1, 2)


def _within(cu: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequence of each packed row, and its place within it, both int64 (total,)."""
    rows = torch.arange(total, device=cu.device)
    entries = torch.searchsorted(cu[1:].long(), rows, right=True)
    return entries, rows - cu[entries]
