"""The slow, readable reference that every kernel is compared with."""

from dataclasses import replace

import torch

from .cache import flattened
from .call import Call, allowed
from .packed import Sequence, sequences

_ALL = slice(None)


def attention(
    call: Call, *, dtype: torch.dtype = torch.float64, needs_grad: bool = False, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result (B, Q, H, Dv) and the LSE (B, H, Q), natural log, computed in `dtype`.

    One batch entry and one key head at a time, so that the scores in memory are (H / Hkv, Q, K). Rows with nothing to
    attend give 0 and LSE -inf. With needs_grad the result can be differentiated. `keep`, bool (B, H, Q, K), says which
    weights dropout leaves. A packed call gives (total_q, H, Dv) and (H, total_q); a sequence's weights are the first
    rows and columns of its entry in `keep`.
    """
    if call.cu_seqlens is not None:
        return _of_sequences(call, dtype, needs_grad, keep)
    call = flattened(call)
    batch, _, heads, _ = call.query.shape
    kv_heads = call.key.shape[2]
    group = heads // kv_heads
    with torch.set_grad_enabled(needs_grad):
        parts = [
            [
                softmax_attention(
                    call, slice(b, b + 1), slice(h * group, (h + 1) * group), slice(h, h + 1), dtype, keep
                )
                for h in range(kv_heads)
            ]
            for b in range(batch)
        ]
        outs = [torch.cat([out for out, _ in row], 2) for row in parts]
        lses = [torch.cat([lse for _, lse in row], 1) for row in parts]
        return torch.cat(outs), torch.cat(lses)


def _of_sequences(
    call: Call, dtype: torch.dtype, needs_grad: bool, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    total, heads = call.query.shape[:2]
    out = call.query.new_zeros(total, heads, call.value.shape[2], dtype=dtype)
    lse = call.query.new_full((heads, total), -torch.inf, dtype=dtype)
    with torch.set_grad_enabled(needs_grad):
        for one in sequences(call):
            part, part_lse = attention(one.call, dtype=dtype, needs_grad=needs_grad, keep=_kept(keep, one))
            out[one.rows], lse[:, one.rows] = part[0], part_lse[0]
    return out, lse


def _kept(keep: torch.Tensor | None, one: Sequence) -> torch.Tensor | None:
    return None if keep is None else keep[one.entry, None, :, : one.call.query.shape[1], : one.call.key.shape[1]]


def gradients(
    call: Call, grad_out: torch.Tensor, *, dtype: torch.dtype = torch.float64, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of query, key and value in `dtype` for the result's gradient, in their shapes.

    With `bias_grad` the mask's is the fourth. Like `attention`, one batch entry and one key head at a time.
    """
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (call.query, call.key, call.value)]
    detached = call.with_tensors(*leaves)
    if call.problem.bias_grad and call.mask is not None:
        leaves.append(call.mask.detach().to(dtype).requires_grad_())
        detached = replace(detached, mask=leaves[-1])
    with torch.enable_grad():
        if call.cu_seqlens is None:
            _backward(detached, grad_out, dtype, keep)
        else:
            for one in sequences(detached):
                _backward(one.call, grad_out[None, one.rows], dtype, _kept(keep, one))
    return tuple(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)


def _backward(call: Call, grad_out: torch.Tensor, dtype: torch.dtype, keep: torch.Tensor | None) -> None:
    batch, _, heads, _ = call.query.shape
    kv_heads = call.key.shape[2]
    group = heads // kv_heads
    for b in range(batch):
        for h in range(kv_heads):
            which = slice(b, b + 1), slice(h * group, (h + 1) * group), slice(h, h + 1)
            out, _ = softmax_attention(call, *which, dtype, keep)
            out.backward(grad_out[b : b + 1, :, which[1]].to(dtype))


def softmax_attention(
    call: Call,
    batch: slice = _ALL,
    heads: slice = _ALL,
    kv_heads: slice = _ALL,
    dtype: torch.dtype | None = None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matmul, softmax, matmul over the named batch entries and heads, in `dtype` or the input's own.

    `keep`, bool (B, H, Q, K), says which weights dropout leaves; they are scaled by 1 / (1 - dropout).
    """
    query, key, value = (
        tensor[batch, :, which].to(dtype or tensor.dtype).transpose(1, 2)
        for tensor, which in ((call.query, heads), (call.key, kv_heads), (call.value, kv_heads))
    )
    groups = (key.shape[1], query.shape[1] // key.shape[1])
    raw = query.unflatten(1, groups) @ key.unsqueeze(2).transpose(-1, -2)
    scores = _modified(call, raw.flatten(1, 2), batch, heads)
    weights, lse = _softmax(scores)
    if keep is not None:
        weights = weights * keep[batch, heads] / (1 - call.dropout)
    out = weights.unflatten(1, groups) @ value.unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2), lse


def _modified(call: Call, raw: torch.Tensor, batch: slice, heads: slice) -> torch.Tensor:
    """Return scale, softcap, ALiBi, mask and window applied to query @ key.T (b, h, Q, K), in this order."""
    q_len, kv_len = raw.shape[-2:]
    scores = raw * call.scale
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    rows = torch.arange(q_len, device=raw.device)
    columns = torch.arange(kv_len, device=raw.device)
    if call.alibi_slopes is not None:
        # at least in the slopes' own float32: distances above 256 are no bfloat16 numbers
        slopes = call.alibi_slopes.to(torch.promote_types(call.alibi_slopes.dtype, scores.dtype))
        slopes = slopes.expand(call.query.shape[0], -1)[batch, heads, None, None]
        scores = scores - (slopes * (rows[:, None] + kv_len - q_len - columns).abs()).to(scores.dtype)
    if call.mask is not None:
        mask = call.mask.expand(call.query.shape[0], call.query.shape[2], q_len, kv_len)[batch, heads]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.to(scores.dtype)
    reach = allowed(rows, columns, kv_len - q_len, call.window)
    return scores if reach is None else scores.masked_fill(~reach, -torch.inf)


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax over the last dimension and its logsumexp; a row of -inf gives zeros and -inf, never NaN."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    return weights, torch.logsumexp(scores, -1)
