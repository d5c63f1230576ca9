"""tilewise.attention: scaled dot-product attention by the fastest known way on this device."""

import os
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeVar

import torch
from torch.utils.checkpoint import _StopRecomputationError

from tilewise.domain.config import Candidate
from tilewise.domain.errors import InputError
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Dtype, Layout, Pass, Precision, Problem
from tilewise.kernels.call import DTYPES, FLOATING, Call, check_mask, check_tensors, mask_pattern
from tilewise.kernels.packed import Cumulative, check_lengths, check_packed
from tilewise.kernels.run import run

from . import session
from .checks import check_choice, check_dense, check_learning, check_numbers, check_window
from .resolve import Resolved, demote, resolve, warn_of_transforms

MEMO_LIMIT = 65_536
Found = TypeVar("Found")
# causal, window, layout, precision, deterministic, backend, return_lse, strict: a plain tuple, for every call makes one
Options = tuple[bool, tuple[int, int] | None, str, str, bool, str | Candidate, bool, bool]
Packed = tuple[Cumulative, int | None, int | None]  # cu_seqlens, max_q, max_kv
_resolved: dict[Hashable, Resolved] = {}
_resolved_before: dict[Hashable, Resolved] = {}  # what stood before the answers changed
_resolved_under = 0


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: int | None = None,
    scale: float | None = None,
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_q: int | None = None,
    max_kv: int | None = None,
    layout: str = "bshd",
    return_lse: bool = False,
    precision: str = "ieee",
    deterministic: bool = False,
    backend: str | Candidate = "auto",
    strict: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return softmax(scale * query @ key.T + ...) @ value.

    - query (B, Q, H, D), key (B, K, Hkv, D), value (B, K, Hkv, Dv), fp16, bf16 or fp32, H a multiple of Hkv; with
      layout="bhsd" sequence and heads change places, in the result too. The result is (B, Q, H, Dv).
    - causal: query i sees key j when j <= i + K - Q. window: (left, right) from the same diagonal, -1 unbounded.
    - mask: bool (True = attend) or additive float, any shape that broadcasts to (B, H, Q, K); a float mask that
      requires grad gets one.
    - alibi_slopes: (H,) or (B, H); adds -slope * |i + K - Q - j|. softcap: 0 for none. scale: D ** -0.5 by default.
    - dropout: share of the weights set to 0, the rest scaled by 1 / (1 - dropout). seed: 0 to 2**63 - 1, the same seed
      drops the same weights; by default drawn from torch's CPU generator, which activation checkpointing restores.
    - cu_seqlens: (cu_q, cu_kv), int32 (B + 1,) on the same device, of B sequences packed one behind the other: query
      (total_q, H, D), key (total_kv, Hkv, D), value (total_kv, Hkv, Dv), the result (total_q, H, Dv). Sequence b has
      the queries cu_q[b]..cu_q[b + 1] and the keys cu_kv[b]..cu_kv[b + 1], perhaps none; Q and K above are its own.
      Goes with everything but a mask and layout="bhsd".
    - max_q, max_kv: with cu_seqlens, lengths that no sequence exceeds (the same ones for the same dropout). Without
      them the longest are looked up, which on a GPU waits for the device.
    - precision: "ieee", or "tf32" for float32 products on tensor cores. deterministic: the same bits every time.
    - return_lse: return (result, LSE), LSE (B, H, Q) or (H, total_q) float32, natural log, without a gradient.
    - backend: "auto", the name of one, or a Candidate, one with its configs (not while a graph is compiled); strict:
      raise instead of falling back where it cannot run.

    Rows with nothing to attend give 0 and LSE -inf. Where the chosen backend has no backward of its own (the tiled CPU
    kernel has none), the backward recomputes through torch. What cu_seqlens holds is looked at on the CPU, and on a GPU
    only where max_q or max_kv is left out or the variable TILEWISE_DEBUG is 1, for that waits for the device.

    torch.compile and torch.export keep the call as an operator that looks the answer up at run time: `layers.ops`.

    Raises InputError, naming the shapes, for tensors that do not fit together or are not dense and plain, for numbers
    out of range, and for a head_dim above what the kernels of a named backend have; ConfigError for an unknown backend;
    and with strict=True UnsupportedError and whatever the backend raises. While a graph is compiled, torch raises an
    error of its own with that message in it.
    """
    check_numbers(softcap, dropout, scale, seed, window)
    check_dense("query", query)
    check_dense("key", key)
    check_dense("value", value)
    if mask is not None:
        check_dense("mask", mask)
    if alibi_slopes is not None:
        check_dense("alibi_slopes", alibi_slopes)
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"alibi_slopes: {tuple(alibi_slopes.shape)} get no gradient; give alibi_slopes.detach(), or a mask of "
                "biases that requires grad"
            )
    if cu_seqlens is None and (max_q is not None or max_kv is not None):
        raise InputError(f"max_q and max_kv belong to cu_seqlens, got {max_q} and {max_kv} without; leave them out")
    packed = None if cu_seqlens is None else (cu_seqlens, max_q, max_kv)
    swap = layout == "bhsd" and packed is None
    if swap:
        if not query.dim() == key.dim() == value.dim() == 4:
            check_tensors(query, key, value)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    learns = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (mask is not None and mask.requires_grad)
    )
    if learns:
        check_learning(query=query, key=key, value=value, mask=mask, alibi_slopes=alibi_slopes)
    options = (causal, window, layout, precision, deterministic, backend, return_lse, strict)
    if torch.compiler.is_compiling():
        if isinstance(backend, Candidate):
            raise InputError(f"backend: expected a name while a graph is compiled, got {backend}; answers hold configs")
        from . import ops  # which needs this module

        out, lse = ops.traced_attention(
            query, key, value, packed, mask, alibi_slopes, seed, softcap, dropout, scale, options, learns
        )
    else:
        if dropout > 0 and query.is_meta:  # there are no weights to drop, and no generator to draw from
            dropout = 0.0
        elif dropout > 0 and seed is None:
            seed = _drawn_seed()
        bias_grad = learns and mask is not None and mask.requires_grad
        call, resolved = prepare(
            query,
            key,
            value,
            packed,
            mask,
            alibi_slopes,
            seed or 0,
            softcap,
            dropout,
            scale,
            options,
            learns,
            bias_grad,
        )
        out, lse = run_resolved(call, resolved, run, strict=strict)
    if swap:
        out = out.transpose(1, 2)
    if not return_lse:
        return out
    assert lse is not None, "resolve chose a backend that gives the LSE"
    return out, lse


def _drawn_seed() -> int:
    drawn = torch.randint(1 << 62, (), device="cpu")
    if torch._C._functorch.is_batchedtensor(drawn):
        raise InputError(
            "dropout: expected one seed for a call, got one for every entry of torch.vmap(randomness='different'); use "
            "randomness='same', or give the seed"
        )
    return int(drawn)


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed | None,
    mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: int,
    softcap: float,
    dropout: float,
    scale: float | None,
    options: Options,
    learns: bool,
    bias_grad: bool,
) -> tuple[Call, Resolved]:
    """Return the call, its tensors BSHD or packed, and what runs for it; remembered per shapes and options.

    `learns`: gradients are wanted of the result; `bias_grad`: of the mask too. Raises what `attention` raises.
    """
    mask_key = None if mask is None else (mask.shape, mask.dtype, mask.device, bias_grad)
    slopes_key = None if alibi_slopes is None else (alibi_slopes.shape, alibi_slopes.dtype, alibi_slopes.device)
    cu_seqlens = sizes = None
    shapes: Hashable = (query.shape, key.shape, value.shape)
    if packed is not None:  # of packed tensors every total is the same problem, so they are checked at every call
        cu_seqlens, sizes = packed[0], packed_sizes(query, key, value, packed, mask, options[2])
        shapes = (sizes, query.shape[1:], key.shape[1:], value.shape[1:])
    memo_key = (
        shapes, query.dtype, key.dtype, value.dtype, query.device, key.device, value.device, mask_key, slopes_key,
        softcap > 0, dropout > 0, options, learns,
    )  # fmt: skip
    try:
        resolved = _resolved.get(memo_key) if _resolved_under == session.generation else None
        if resolved is None:
            resolved = _as_forward(memo_key)
    except TypeError:  # an option that has no hash; the checks say which
        resolved = None
    if resolved is None:
        if torch._C._is_tracing():
            raise InputError("expected a plain call, got one inside torch.jit.trace; use torch.export or torch.compile")
        causal, window, layout, precision, deterministic, backend, return_lse, strict = options
        check(query, key, value, packed, mask, alibi_slopes, window, layout, precision)
        check_choice(
            backend, query, value, causal=causal, return_lse=return_lse, deterministic=deterministic, strict=strict
        )
        problem = problem_of(
            query, key, value, sizes, causal, window, mask, alibi_slopes is not None, softcap > 0, dropout > 0, layout,
            precision, deterministic, learns, bias_grad,
        )  # fmt: skip
        resolved = resolve(problem, query.device, backend, return_lse=return_lse, strict=strict)
        if backend == "auto":
            resolved.used = session.used(problem, query.device)
        _remember(memo_key, resolved)
    if scale is None:
        scale = resolved.problem.head_dim**-0.5
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens[0].contiguous(), cu_seqlens[1].contiguous()
    call = Call(  # by position, which is a microsecond faster
        resolved.problem, query, key, value, scale, mask, alibi_slopes, softcap, dropout, seed, None, None, cu_seqlens
    )
    return call, resolved


def run_resolved(call: Call, resolved: Resolved, runner: Callable[[Call, Candidate], Found], *, strict: bool) -> Found:
    """Return what `runner` finds for the resolved candidate; where that raises, demote it and run the fallback."""
    resolved.used.calls += 1
    try:
        return runner(call, resolved.candidate)
    except (torch.OutOfMemoryError, _StopRecomputationError):
        raise  # the caller's to handle: another backend would need as much, and checkpointing ends recomputation so
    except Exception as error:  # a plan that fails here must not stop a training step
        if strict or resolved.candidate == resolved.fallback:
            raise
        if torch._C._are_functorch_transforms_active():
            warn_of_transforms(resolved.candidate, error)
        else:
            demote(resolved, call.query.device, error)
        return runner(call, resolved.fallback)


def _as_forward(memo_key: Hashable) -> Resolved | None:
    """Return what ran before the answers changed, where this call is the recomputation of a forward from before.

    Activation checkpointing computes a forward again inside of the backward, and the same must run there.
    """
    if torch._C._current_graph_task_id() == -1:
        return None
    return _resolved.get(memo_key) or _resolved_before.get(memo_key)


def _remember(memo_key: Hashable, resolved: Resolved) -> None:
    global _resolved_under, _resolved_before, _resolved
    if _resolved_under != session.generation or len(_resolved) >= MEMO_LIMIT:
        _resolved_before, _resolved = _resolved, {}
        _resolved_under = session.generation
    _resolved[memo_key] = resolved


def looks_at_values(device: torch.device) -> bool:
    """Whether lengths and pages on `device` are looked at: on a GPU that waits, so only with TILEWISE_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("TILEWISE_DEBUG") == "1"


class Sizes(NamedTuple):
    """The sizes of a problem that packed tensors do not show: sequences, and their longest lengths."""

    batch: int
    q_len: int
    kv_len: int


def packed_sizes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed,
    mask: torch.Tensor | None,
    layout: str,
) -> Sizes:
    """Return the sizes of a packed call. Raises InputError for one that cannot be."""
    cu_seqlens, max_q, max_kv = packed
    _check_packed(query, key, value, cu_seqlens, mask, layout)
    batch, totals = cu_seqlens[0].shape[0] - 1, (query.shape[0], key.shape[0])
    for name, most, total in zip(("max_q", "max_kv"), (max_q, max_kv), totals, strict=True):
        if most is not None and (type(most) is not int or most * batch < total):
            raise InputError(
                f"{name}: expected the longest length of {batch} sequences with {total} rows in all, got {most!r}"
            )
    if max_q is None or max_kv is None or looks_at_values(query.device):
        longest = check_lengths(cu_seqlens, totals, (max_q, max_kv))
        max_q, max_kv = longest[0] if max_q is None else max_q, longest[1] if max_kv is None else max_kv
    return Sizes(batch, max(max_q, MAX_DECODE_Q_LEN + 1), max(max_kv, 1))  # Problem.packed says why 17


def check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed | None,
    mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    window: tuple[int, int] | None,
    layout: str,
    precision: str,
) -> None:
    """Raise InputError for tensors, BSHD or packed, and options that do not fit together, by shapes and dtypes."""
    if layout not in list(Layout):
        raise InputError(f"layout: expected 'bshd' or 'bhsd', got {layout!r}")
    if precision not in list(Precision):
        raise InputError(f"precision: expected 'ieee' or 'tf32', got {precision!r}")
    if window is not None:
        check_window(window)
    if packed is None:
        check_tensors(query, key, value)
        batch = query.shape[0]
    else:
        _check_packed(query, key, value, packed[0], mask, layout)
        batch = packed[0][0].shape[0] - 1
    if mask is not None:
        check_mask(mask, query, key)
    if alibi_slopes is not None:
        _check_slopes(alibi_slopes, query, batch)


def _check_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: Cumulative,
    mask: torch.Tensor | None,
    layout: str,
) -> None:
    check_packed(query, key, value, cu_seqlens)
    if mask is not None:
        raise InputError(
            f"mask: expected none with cu_seqlens, got {tuple(mask.shape)}; use causal, window and alibi_slopes, which "
            "count within each sequence, or pad the sequences to one length and pass no cu_seqlens"
        )
    if layout != "bshd":
        raise InputError(f"layout: expected 'bshd' with cu_seqlens, whose tensors have no batch, got {layout!r}")


def _check_slopes(alibi_slopes: torch.Tensor, query: torch.Tensor, batch: int) -> None:
    heads, shape = query.shape[-2], tuple(alibi_slopes.shape)
    if shape not in ((heads,), (batch, heads)):
        raise InputError(f"alibi_slopes: expected shape ({heads},) or ({batch}, {heads}), got {shape}")
    if alibi_slopes.dtype not in FLOATING or alibi_slopes.device != query.device:
        raise InputError(
            f"alibi_slopes: expected floating point on {query.device} like query, "
            f"got {alibi_slopes.dtype} {shape} on {alibi_slopes.device}"
        )


def problem_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: Sizes | None,
    causal: bool,
    window: tuple[int, int] | None,
    mask: torch.Tensor | None,
    alibi: bool,
    softcap: bool,
    dropout: bool,
    layout: str,
    precision: str,
    deterministic: bool,
    learns: bool,
    bias_grad: bool,
) -> Problem:
    """Return the problem of checked tensors, BSHD or with their `sizes` packed, and options."""
    dtype = DTYPES[query.dtype]
    batch, q_len, kv_len = sizes or (query.shape[0], query.shape[1], key.shape[1])
    return Problem(
        pass_=Pass.TRAINING if learns else Pass.INFERENCE,
        dtype=dtype,
        batch=batch,
        heads=query.shape[-2],
        kv_heads=key.shape[-2],
        q_len=q_len,
        kv_len=kv_len,
        head_dim=query.shape[-1],
        v_head_dim=value.shape[-1],
        causal=causal,
        window=window,
        mask=mask_pattern(mask),
        bias_grad=bias_grad,
        alibi=alibi,
        softcap=softcap,
        dropout=dropout,
        varlen=sizes is not None,
        deterministic=deterministic,
        precision=Precision(precision) if dtype is Dtype.FP32 else Precision.IEEE,
        layout=Layout(layout),
    )
