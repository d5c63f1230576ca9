"""Caches of decoding as plain tensors: what backends that know neither lengths nor pages compute on."""

import functools
from dataclasses import replace

import torch

from tilewise.domain.problem import MAX_DECODE_Q_LEN, Pass, Problem

from .backend import unsupported_varlen
from .call import Call


def unsupported_cache(problem: Problem) -> str | None:
    """Return why a backend that computes `flattened` calls cannot compute a problem with lengths or pages."""
    if problem.packed or not (problem.varlen or problem.page_size):
        return unsupported_varlen(problem)
    what = "varlen" if problem.varlen else "pages"
    if problem.q_len > MAX_DECODE_Q_LEN:
        return f"{what} only in decoding (q_len up to {MAX_DECODE_Q_LEN})"
    if problem.mask != "none" or problem.alibi or problem.dropout or problem.pass_ is Pass.TRAINING:
        return f"{what} only without mask, ALiBi, dropout and gradients"
    return None


def flattened(call: Call) -> Call:
    """Return `call` with key and value (B, K, Hkv, D or Dv) and a bool mask instead of lengths, pages and window.

    A copy, in which keys that no query of their row attends are 0: whatever lies there must not reach the result, not
    even as 0 * NaN. `call` itself where it has neither lengths nor pages.
    """
    if call.kv_lengths is None and call.block_table is None:
        return call
    batch, q_len = call.query.shape[:2]
    kv_len, device = call.problem.kv_len, call.query.device
    columns = torch.arange(kv_len, device=device)
    lengths = torch.full((batch,), kv_len, device=device) if call.kv_lengths is None else call.kv_lengths
    reach = _reach(columns, lengths.long(), q_len, call.window)  # (B, Q, K)
    attended = reach.any(1)  # (B, K)
    key, value = call.key, call.value
    if call.block_table is not None:
        page_size = key.shape[1]
        pages = call.block_table.long()[:, columns // page_size].masked_fill(~attended, 0)
        slots = pages * page_size + columns % page_size
        key, value = key.flatten(0, 1)[slots], value.flatten(0, 1)[slots]
    unread = ~attended[:, :, None, None]
    return replace(
        call,
        problem=_masked(call.problem),
        key=key.masked_fill(unread, 0),
        value=value.masked_fill(unread, 0),
        mask=reach[:, None],
        kv_lengths=None,
        block_table=None,
    )


def _reach(columns: torch.Tensor, lengths: torch.Tensor, q_len: int, window: tuple[int, int]) -> torch.Tensor:
    """Return which keys each query attends, bool (B, Q, K): the diagonal counts from the end of each row's keys."""
    left, right = window
    diagonal = torch.arange(q_len, device=columns.device) - q_len + lengths[:, None]
    distance = columns - diagonal[:, :, None]
    reach = (columns < lengths[:, None])[:, None].expand_as(distance)
    if right != -1:
        reach = reach & (distance <= right)
    return reach if left == -1 else reach & (distance >= -left)


@functools.lru_cache(maxsize=1024)
def _masked(problem: Problem) -> Problem:
    return replace(problem, causal=False, window=None, mask="bool.h1", varlen=False, page_size=0)
