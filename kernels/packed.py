"""Packed sequences (cu_seqlens): what they must be, and the same as single sequences or as one padded batch."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewise.domain.errors import InputError
from tilewise.domain.problem import Problem

from .call import Call, check_tensors

Cumulative = tuple[torch.Tensor, torch.Tensor]
_SIDES = ("query", "key and value")


def check_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: object) -> None:
    """Raise InputError unless the tensors of a packed call fit together; the values of cu_seqlens are not looked at.

    query (total_q, H, D), key (total_kv, Hkv, D), value (total_kv, Hkv, Dv); cu_seqlens two int32 (B + 1,).
    """
    check_tensors(query, key, value, packed=True)
    if not (
        isinstance(cu_seqlens, tuple)
        and len(cu_seqlens) == 2
        and all(isinstance(cu, torch.Tensor) for cu in cu_seqlens)
    ):
        raise InputError(f"cu_seqlens: expected a tuple of two tensors (cu_q, cu_kv), got {cu_seqlens!r}")
    shapes = [tuple(cu.shape) for cu in cu_seqlens]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or shapes[0][0] < 2:
        raise InputError(
            f"cu_seqlens: expected one shape (batch + 1,) for both, at least (2,), got {shapes[0]} and {shapes[1]}"
        )
    for cu in cu_seqlens:
        if cu.dtype is not torch.int32 or cu.device != query.device:
            raise InputError(f"cu_seqlens: expected int32 on {query.device} like query, got {cu.dtype} on {cu.device}")


def check_lengths(
    cu_seqlens: Cumulative, totals: tuple[int, int], most: tuple[int | None, int | None]
) -> tuple[int, int]:
    """Return the longest lengths of queries and keys. Raises InputError where cu_seqlens does not say what lies where.

    - totals: the rows of query and of key.
    - most: max_q and max_kv, which no sequence may exceed; None for no limit.

    Copies the values to the host: on a GPU this waits for the device.
    """
    longest = []
    for cu, total, limit, side, name in zip(cu_seqlens, totals, most, _SIDES, ("max_q", "max_kv"), strict=True):
        values = cu.cpu().long()
        lengths = values.diff()
        if int(values[0]) != 0 or int(values[-1]) != total or bool((lengths < 0).any()):
            raise InputError(
                f"cu_seqlens of {side}: expected values that start at 0, never fall and end at {total}, the rows of "
                f"{side}, got {_shortened(values)}"
            )
        longest.append(int(lengths.max()))
        if limit is not None and longest[-1] > limit:
            raise InputError(
                f"cu_seqlens of {side}: expected no sequence longer than {name} = {limit}, got one of {longest[-1]}; "
                f"pass a larger {name}"
            )
    return longest[0], longest[1]


def _shortened(values: torch.Tensor) -> str:
    numbers = [str(value) for value in values.tolist()]
    return f"[{', '.join(numbers if len(numbers) <= 12 else [*numbers[:6], '...', *numbers[-5:]])}]"


def flash_arguments(call: Call) -> dict[str, Any]:
    """Return what the flash_attn packages' functions for packed sequences take beyond query, key and value."""
    if call.cu_seqlens is None:
        return {}
    cu_q, cu_kv = call.cu_seqlens
    return {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_kv,
        "max_seqlen_q": call.problem.q_len,
        "max_seqlen_k": call.problem.kv_len,
    }


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a packed call: its entry in the batch, its rows of the result, and itself as a batch of one."""

    entry: int
    rows: slice
    call: Call


def sequences(call: Call) -> Iterator[Sequence]:
    """Yield the sequences of a packed call that have queries and keys, as views. Copies cu_seqlens to the host."""
    assert call.cu_seqlens is not None, "only a packed call has sequences"
    (q_edges, kv_edges), slopes = (cu.tolist() for cu in call.cu_seqlens), call.alibi_slopes
    for entry in range(len(q_edges) - 1):
        rows, columns = slice(*q_edges[entry : entry + 2]), slice(*kv_edges[entry : entry + 2])
        query, key, value = call.query[None, rows], call.key[None, columns], call.value[None, columns]
        if 0 in (query.shape[1], key.shape[1]):
            continue
        problem = replace(call.problem, batch=1, q_len=query.shape[1], kv_len=key.shape[1], varlen=False)
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[entry : entry + 1]
        yield Sequence(
            entry,
            rows,
            replace(call, problem=problem, query=query, key=key, value=value, alibi_slopes=own, cu_seqlens=None),
        )


def on_padded(
    call: Call, compute: Callable[[Call], tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `compute` of a packed call as one padded batch, its results packed again; of any other call as it is.

    The padded call is (B, q_len, H, D) and (B, kv_len, Hkv, D or Dv) with a bool mask (B, 1, 1, kv_len). Sequences lie
    at the end of their rows, behind zeros: so the diagonal of each is the batch's own. Nothing waits for the device.
    """
    if call.cu_seqlens is None:
        return compute(call)
    problem = call.problem
    cu_q, cu_kv = call.cu_seqlens
    q_places = _places(cu_q, call.query.shape[0], problem.q_len)
    kv_places = _places(cu_kv, call.key.shape[0], problem.kv_len)

    def spread(tensor: torch.Tensor, places: torch.Tensor, length: int) -> torch.Tensor:
        room = tensor.new_zeros(problem.batch * length, *tensor.shape[1:]).index_copy(0, places, tensor)
        return room.view(problem.batch, length, *tensor.shape[1:])

    columns = torch.arange(problem.kv_len, device=cu_kv.device)
    out, lse = compute(
        replace(
            call,
            problem=_padded(problem),
            query=spread(call.query, q_places, problem.q_len),
            key=spread(call.key, kv_places, problem.kv_len),
            value=spread(call.value, kv_places, problem.kv_len),
            mask=(columns >= problem.kv_len - cu_kv.diff()[:, None])[:, None, None],
            cu_seqlens=None,
        )
    )
    out = out.flatten(0, 1).index_select(0, q_places)
    return out, None if lse is None else lse.transpose(0, 1).flatten(1).index_select(1, q_places)


def _places(cu: torch.Tensor, total: int, length: int) -> torch.Tensor:
    """Return where each packed row lies among batch * length padded ones, int64 (total,)."""
    rows = torch.arange(total, device=cu.device, dtype=cu.dtype)
    following: torch.Tensor = torch.searchsorted(cu[1:], rows, right=True) + 1
    return following * length - (cu[following] - rows)


@functools.lru_cache(maxsize=1024)
def _padded(problem: Problem) -> Problem:
    return replace(problem, mask="bool.h1q1", varlen=False)
