"""tilewise.decode: a few new queries against a cache of keys and values, by the fastest known way on this device."""

from collections.abc import Hashable

import torch

from tilewise.domain.errors import InputError
from tilewise.domain.problem import Problem
from tilewise.kernels.call import DTYPES, Call, check_cache, check_cache_values
from tilewise.kernels.run import Result, run

from . import session
from .attention import MEMO_LIMIT, looks_at_values, run_resolved
from .checks import check_choice, check_dense, check_numbers
from .resolve import Resolved, resolve

_resolved: dict[Hashable, Resolved] = {}


def decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    strict: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale * query @ key.T + ...) @ value of the last Q tokens of each row of a batch.

    - query (B, Q, H, D), Q from 1 to 16, fp16, bf16 or fp32: the last Q tokens of the row, their keys in the cache.
    - key_cache (B, K, Hkv, D), value_cache (B, K, Hkv, Dv), H a multiple of Hkv; with a block_table
      (pages, page_size, Hkv, D or Dv). The result is (B, Q, H, Dv).
    - lengths: (B,) int32 on the same device: row b's keys are its first lengths[b], 0 for none; what lies behind is
      never read. None where every row fills its cache.
    - block_table: (B, max_pages) int32 on the same device: the pages of each row in order. Entries of pages without a
      key in reach may hold anything.
    - window: (left, right) from the diagonal, which ends at the row's last key, -1 unbounded; None is causal, (-1, 0).
    - softcap: 0 for none. scale: D ** -0.5 by default.
    - return_lse: return (result, LSE), LSE (B, H, Q) float32, natural log.
    - backend: "auto", or the name of one; strict: raise instead of falling back where it cannot run.

    Queries with nothing to attend give 0 and LSE -inf. There are no gradients. Nothing waits for the device: values of
    lengths and block_table on a GPU are looked at only where the variable TILEWISE_DEBUG is 1. Where nothing was
    measured, torch's SDPA computes it on a cleaned copy of a contiguous cache, and its plain form the rest.

    Raises InputError, naming the shapes, for tensors that do not fit together or are not dense and plain, for numbers
    out of range, and for a head_dim above what the kernels of a named backend have; ConfigError for an unknown backend;
    and with strict=True UnsupportedError and whatever the backend raises.
    """
    check_numbers(softcap, 0.0, scale, None, window)
    check_dense("query", query)
    check_dense("key_cache", key_cache)
    check_dense("value_cache", value_cache)
    if lengths is not None:
        check_dense("lengths", lengths)
    if block_table is not None:
        check_dense("block_table", block_table)
    if torch.is_grad_enabled() and (query.requires_grad or key_cache.requires_grad or value_cache.requires_grad):
        raise InputError("decode has no gradients: call it under torch.no_grad(), or use tilewise.attention")
    given = (query, key_cache, value_cache, lengths, block_table, window, softcap, scale, return_lse, backend, strict)
    if torch.compiler.is_compiling():
        from . import ops  # which needs this module

        out, lse = ops.traced_decode(*given)
    else:
        out, lse = attend(*given)
    if not return_lse:
        return out
    assert lse is not None, "resolve chose a backend that gives the LSE"
    return out, lse


def attend(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
    scale: float | None,
    return_lse: bool,
    backend: str,
    strict: bool,
) -> Result:
    """Return the result and the LSE, None where nobody asked for it and the backend gives none; raises as `decode`."""
    memo_key = (
        session.generation, query.shape, key_cache.shape, value_cache.shape, query.dtype, key_cache.dtype,
        value_cache.dtype, query.device, key_cache.device, value_cache.device, _looks(lengths), _looks(block_table),
        window, softcap > 0, return_lse, backend, strict,
    )  # fmt: skip
    try:
        resolved = _resolved.get(memo_key)
    except TypeError:  # an option that has no hash; the checks say which
        resolved = None
    if resolved is None:
        check_cache(query, key_cache, value_cache, lengths, block_table)
        check_choice(backend, query, value_cache, return_lse=return_lse, strict=strict)
        problem = _problem(query, key_cache, value_cache, lengths, block_table, window, softcap > 0)
        resolved = resolve(problem, query.device, backend, return_lse=return_lse, strict=strict)
        if backend == "auto":
            resolved.used = session.used(problem, query.device)
        if len(_resolved) >= MEMO_LIMIT:
            _resolved.clear()
        _resolved[memo_key] = resolved
    call = Call(
        problem=resolved.problem,
        query=query,
        key=key_cache,
        value=value_cache,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        kv_lengths=lengths,
        block_table=block_table,
    )
    if looks_at_values(query.device):
        check_cache_values(call)
    return run_resolved(call, resolved, run, strict=strict)


def _looks(tensor: torch.Tensor | None) -> Hashable:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _problem(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    window: tuple[int, int] | None,
    softcap: bool,
) -> Problem:
    """Return the problem of a call. One query has nothing to its right: causal or not, it is written without."""
    batch, q_len, heads, head_dim = query.shape
    if q_len == 1:
        window = None if window is None or window[0] == -1 else (window[0], 0)
    return Problem(
        dtype=DTYPES[query.dtype],
        batch=batch,
        heads=heads,
        kv_heads=key_cache.shape[2],
        q_len=q_len,
        kv_len=key_cache.shape[1] * (1 if block_table is None else block_table.shape[1]),
        head_dim=head_dim,
        v_head_dim=value_cache.shape[3],
        causal=window is None and q_len > 1,
        window=window,
        softcap=softcap,
        varlen=lengths is not None,
        page_size=0 if block_table is None else key_cache.shape[1],
    )
