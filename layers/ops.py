"""attention and decode as torch.library operators: what torch.compile and torch.export put into their graphs.

    tilewise::attention            (result, LSE), for inference without dropout
    tilewise::attention_forward    (result, LSE, plan), for training
    tilewise::attention_backward   gradients of query, key, value and mask
    tilewise::decode               (result, LSE)

A graph holds the operator and not what it runs: the answer is looked up inside it, at run time, for the sizes that come
then, so that dynamic shapes neither specialise nor compile again. Eager calls do not come here: the autograd.Function
of kernels/run.py costs less.

- Strides: every result is dense in the order (batch, seq, heads, head_dim) or (total, heads, head_dim), whatever a
  backend gives, for the graph was compiled for the strides that the fake kernel promised. Inputs may have any.
- Plan: a backward belongs to the candidate that ran forward, whatever `refresh` or the failure of another call has
  changed since. `plan`, int64 on the CPU, is that candidate's number in a table of this process (`_ran`), and is saved
  like the other tensors: what is recomputed, as under activation checkpointing, brings its own.
- Seed: dropout's seed is an int64 tensor on the CPU that the graph draws outside of the operator, so whatever restores
  torch's CPU generator, in the graph or around it, drops the same weights again.
- CUDA graphs: inference can be captured, and what was looked up then is replayed. Training and dropout are not, for
  `plan` and seed are read on the host; the tag says so.
- A backend without a backward of its own keeps nothing but its inputs: the backward computes its forward again.

A program exported with these operators needs `import tilewise.layers.ops` where it is loaded.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise.kernels import run
from tilewise.kernels.call import Call, check_cache

from . import decode as decoding
from .attention import Found, Options, Packed, check, packed_sizes, prepare, problem_of, run_resolved

# query, key, value, packed, mask, alibi_slopes, seed, softcap, dropout, scale
Given = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    Packed | None,
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    float,
    float,
    float | None,
]
TENSORS = 8  # the first arguments
_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? alibi_slopes, Tensor? cu_q, Tensor? cu_kv, "
    "Tensor? seed"
)
_NUMBERS = "SymInt? max_q, SymInt? max_kv, float softcap, float dropout, float? scale"
_OPTIONS = (
    "bool causal, SymInt[]? window, str layout, str precision, bool deterministic, str backend, bool return_lse, "
    "bool strict"
)
_CALL = f"{_TENSORS}, {_NUMBERS}, {_OPTIONS}"
_TRAINING = f"{_CALL}, bool learns, bool bias_grad"
_PROPER = (torch.Tag.pt2_compliant_tag,)
_ON_HOST = (*_PROPER, torch.Tag.cudagraph_unsafe)  # reads plan or seed on the host
_library = torch.library.Library("tilewise", "DEF")
_library.define(f"attention({_CALL}) -> (Tensor, Tensor)", tags=_PROPER)
_library.define(f"attention_forward({_TRAINING}) -> (Tensor, Tensor, Tensor)", tags=_ON_HOST)
_library.define(
    f"attention_backward(Tensor grad_out, Tensor out, Tensor lse, Tensor plan, bool[4] needs, {_TRAINING})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_ON_HOST,
)
_library.define(
    "decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? lengths, Tensor? block_table, "
    "SymInt[]? window, float softcap, float? scale, bool return_lse, str backend, bool strict) -> (Tensor, Tensor)",
    tags=_PROPER,
)

# What ran in training, by number: as many as this process has tried candidates.
_ran: list[run.Ran] = []
_numbers: dict[run.Ran, int] = {}
_lock = threading.Lock()


# what attention() and decode() call while they are being compiled


def traced_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Packed | None,
    mask: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    seed: int | None,
    softcap: float,
    dropout: float,
    scale: float | None,
    options: Options,
    learns: bool,
) -> run.Result:
    """Return the result and the LSE of an operator, in the shapes of `attention`; without return_lse that is no LSE."""
    (cu_q, cu_kv), max_q, max_kv = packed or ((None, None), None, None)
    drawn = None
    if dropout > 0 and seed is None:
        drawn = torch.randint(1 << 62, (), device="cpu")
    elif dropout > 0:
        drawn = torch.full((), seed or 0, dtype=torch.int64, device="cpu")
    tensors = (query, key, value, mask, alibi_slopes, cu_q, cu_kv, drawn)
    call = (*tensors, max_q, max_kv, softcap, dropout, scale, *options)
    if learns or drawn is not None:
        bias_grad = learns and mask is not None and mask.requires_grad
        out, lse, _ = torch.ops.tilewise.attention_forward(*call, learns, bias_grad)
    else:
        out, lse = torch.ops.tilewise.attention(*call)
    return out, lse


def traced_decode(*call: Any) -> run.Result:
    """Return what `decode.attend` does, for the same arguments."""
    out, lse = torch.ops.tilewise.decode(*call)
    return out, lse


# what runs; `call` is the schema's arguments from query to strict


def _excluded_keys(inference: bool) -> torch._C.DispatchKeySet:
    with torch.inference_mode(inference):
        return torch._C._dispatch_tls_local_exclude_set()


# a new thread is in no mode
with ThreadPoolExecutor(1) as _thread:
    _EXCLUDED = {inference: _thread.submit(_excluded_keys, inference).result() for inference in (False, True)}


def _as_eager(kernel: Callable[..., Found]) -> Callable[..., Found]:
    """Let backends find the dispatcher as an eager call does.

    Behind a TorchDispatchMode, under which AOTAutograd also makes the first call of a graph, autograd and functorch are
    excluded: a backward could not compute the forward again, nor FlexAttention make its block mask.
    """

    @functools.wraps(kernel)
    def run_kernel(*args: Any) -> Found:
        included = torch._C._dispatch_tls_local_include_set()
        with torch._C._ForceDispatchKeyGuard(included, _EXCLUDED[torch.is_inference_mode_enabled()]):
            return kernel(*args)

    return run_kernel


def _unpacked(call: Sequence[Any]) -> tuple[Given, Options]:
    query, key, value, mask, alibi_slopes, cu_q, cu_kv, seed, max_q, max_kv, softcap, dropout, scale, *rest = call
    packed = None if cu_q is None else ((cu_q, cu_kv), max_q, max_kv)
    seed = 0 if seed is None else int(seed)
    causal, window, *others = rest
    options = (causal, None if window is None else tuple(window), *others)
    return (query, key, value, packed, mask, alibi_slopes, seed, softcap, dropout, scale), options


def _attention(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    given, options = _unpacked(call)
    prepared, resolved = prepare(*given, options, False, False)
    *_, return_lse, strict = options
    out, lse = run_resolved(prepared, resolved, run.run, strict=strict)
    return _dense(out), _dense(lse) if lse is not None and return_lse else _no_lse(out)


def _attention_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *call, learns, bias_grad = args
    given, options = _unpacked(call)
    prepared, resolved = prepare(*given, options, learns, bias_grad)
    *_, strict = options
    out, lse, ran = run_resolved(prepared, resolved, run.forward, strict=strict)
    if lse is None:
        lse = out.new_zeros(_lse_shape(out), dtype=torch.float32)
    return _dense(out), _dense(lse), torch.tensor(_number(ran), dtype=torch.int64, device="cpu")


def _attention_backward(
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: torch.Tensor,
    needs: Sequence[bool],
    *args: Any,
) -> tuple[torch.Tensor, ...]:
    *call, learns, bias_grad = args
    given, (causal, window, layout, precision, deterministic, *_) = _unpacked(call)
    query, key, value, packed, mask, alibi_slopes, seed, softcap, dropout, scale = given
    sizes = None if packed is None else packed_sizes(query, key, value, packed, mask, layout)
    problem = problem_of(
        query, key, value, sizes, causal, window, mask, alibi_slopes is not None, softcap > 0, dropout > 0, layout,
        precision, deterministic, learns, bias_grad,
    )  # fmt: skip
    again = Call(
        problem=problem,
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        mask=mask,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        dropout=dropout,
        seed=seed,
        cu_seqlens=None if packed is None else packed[0],
    )
    found = run.backward(again, _ran[int(plan)], out, lse, grad_out, needs)
    gradients = (found.query, found.key, found.value, found.mask)
    return tuple(
        _dense(gradient) if need and gradient is not None else _nothing(grad_out)
        for gradient, need in zip(gradients, needs, strict=True)
    )


def _decode(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key_cache, value_cache, lengths, block_table, window, *rest = call
    window = None if window is None else tuple(window)
    out, lse = decoding.attend(query, key_cache, value_cache, lengths, block_table, window, *rest)
    *_, return_lse, _backend, _strict = rest
    return _dense(out), _dense(lse) if lse is not None and return_lse else _no_lse(out)


def _number(ran: run.Ran) -> int:
    with _lock:
        number = _numbers.setdefault(ran, len(_ran))
        if number == len(_ran):
            _ran.append(ran)
    return number


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` with the strides that a new one has, also along dimensions of size 1."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= max(size, 1)
    return tensor if tensor.stride() == (*reversed(strides),) else tensor.contiguous().view(-1).view(tensor.shape)


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0)


def _no_lse(out: torch.Tensor) -> torch.Tensor:
    return out.new_empty(0, dtype=torch.float32)


# what is promised of it


def _lse_shape(query: torch.Tensor) -> tuple[int, ...]:
    """Return (B, H, Q) of a query or result (B, Q, H, D), or (H, total_q) of packed ones (total_q, H, D)."""
    *batch, rows, heads, _ = query.shape
    return *batch, heads, rows


def _like_result(query: torch.Tensor, value: torch.Tensor, *, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(_lse_shape(query) if return_lse else (0,), dtype=torch.float32)


def _attention_fake(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, mask, alibi_slopes, cu_q, cu_kv, *_ = call
    *_, layout, precision, _deterministic, _backend, return_lse, _strict = call
    packed = None if cu_q is None else ((cu_q, cu_kv), None, None)
    # not the window: its sides may be symbols
    check(query, key, value, packed, mask, alibi_slopes, None, layout, precision)
    return _like_result(query, value, return_lse=return_lse)


def _attention_forward_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *call, _return_lse, strict, _learns, _bias_grad = args
    out, lse = _attention_fake(*call, True, strict)
    return out, lse, torch.empty((), dtype=torch.int64, device="cpu")


def _attention_backward_fake(*args: Any) -> tuple[torch.Tensor, ...]:
    grad_out, _out, _lse, _plan, needs, query, key, value, mask, *_ = args
    return tuple(
        tensor.new_empty(tensor.shape) if need else _nothing(grad_out)
        for tensor, need in zip((query, key, value, mask), needs, strict=True)
    )


def _decode_fake(*call: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query, key_cache, value_cache, lengths, block_table, *_ = call
    *_, return_lse, _backend, _strict = call
    check_cache(query, key_cache, value_cache, lengths, block_table)
    return _like_result(query, value_cache, return_lse=return_lse)


# gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    tensors, ctx.options = inputs[:TENSORS], inputs[TENSORS:]
    out, lse, plan = output
    ctx.save_for_backward(out, lse, plan, *tensors)
    ctx.mark_non_differentiable(lse, plan)


@once_differentiable
def _differentiate(ctx: Any, grad_out: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
    out, lse, plan, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    found = torch.ops.tilewise.attention_backward(grad_out, out, lse, plan, needs, *tensors, *ctx.options)
    gradients = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return *gradients, *(None,) * (TENSORS - 4 + len(ctx.options))


for _name, _kernel, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_forward", _attention_forward, _attention_forward_fake),
    ("attention_backward", _attention_backward, _attention_backward_fake),
    ("decode", _decode, _decode_fake),
):
    _library.impl(_name, _as_eager(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tilewise::{_name}", _fake, lib=_library)
torch.library.register_autograd("tilewise::attention_forward", _differentiate, setup_context=_save, lib=_library)
