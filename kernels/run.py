"""Run a candidate on a call: the one place where a call meets a backend, eager and trainable."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise.domain.config import Candidate
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Pass

from .backend import Gradients
from .backends import backend_named
from .call import Call

Result = tuple[torch.Tensor, torch.Tensor | None]


def run(call: Call, candidate: Candidate) -> Result:
    """Return the result (B, Q, H, Dv) of `candidate` for `call` and its LSE (B, H, Q) where the backend gives one.

    A packed call has the result (total_q, H, Dv) and the LSE (H, total_q).

    Gradients: torch differentiates its own backends, Triton has its own backward, and behind the others the backward
    recomputes through torch (`domain.matching.default_candidate`). The LSE is not differentiable.
    """
    kind = call.query.device.type
    if autocasts(kind):  # the tensors have their dtypes: what is computed is what the problem says
        with torch.autocast(kind, enabled=False):
            return run(call, candidate)
    call = _as_stored(call)
    backend = backend_named(candidate.backend)
    if call.problem.pass_ is Pass.INFERENCE or backend.differentiable:
        out, lse = backend.forward(call, candidate.config())
        return out, None if lse is None else lse.detach()
    out, lse = _Attention.apply(call.query, call.key, call.value, call.mask, call, candidate)
    return out, lse


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of this kind; torch raises where it is asked that of meta."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def _as_stored(call: Call) -> Call:
    """Return `call` with tensors whose memory holds their values: torch may keep a sign as a mere flag of a view."""
    mask, slopes = call.mask, call.alibi_slopes
    negated = call.query.is_neg() or call.key.is_neg() or call.value.is_neg()  # written out: every call comes by
    if not (negated or (mask is not None and mask.is_neg()) or (slopes is not None and slopes.is_neg())):
        return call
    return replace(
        call,
        query=call.query.resolve_neg(),
        key=call.key.resolve_neg(),
        value=call.value.resolve_neg(),
        mask=None if mask is None else mask.resolve_neg(),
        alibi_slopes=None if slopes is None else slopes.resolve_neg(),
    )


@dataclass(frozen=True, slots=True)
class Ran:
    """What ran forward in training: the candidate, and whether its own backward takes the result and the LSE."""

    candidate: Candidate
    saved: bool


def forward(call: Call, candidate: Candidate) -> tuple[torch.Tensor, torch.Tensor | None, Ran]:
    """Return the result and LSE without a graph, and what `backward` needs to know besides."""
    backend = backend_named(candidate.backend).pinned(call)
    if backend.name != candidate.backend:
        candidate = Candidate(backend.name)
    ran = Ran(candidate, backend.saves(call))
    # what is computed again drops the weights that were dropped only if it is the same kernel, and SDPA chooses one by
    # whether gradients are wanted
    again = call.dropout > 0 and not ran.saved and call.problem.pass_ is Pass.TRAINING
    if again:
        call = _with_leaves(call, (True, True, True, call.problem.bias_grad))
    with torch.set_grad_enabled(again), _own_dtypes(call):
        out, lse = (backend.saving_forward if ran.saved else backend.forward)(call, candidate.config())
    return out.detach(), None if lse is None else lse.detach(), ran


def backward(
    call: Call, ran: Ran, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor, needs: Sequence[bool]
) -> Gradients:
    """Return the gradients of query, key, value and mask; those that `needs` leaves out are not gradients.

    Where nothing was saved, out and lse are not looked at, and the forward is computed again.
    """
    with _own_dtypes(call):
        if not ran.saved:
            return _recomputed(call, ran.candidate, grad_out, needs)
        backend = backend_named(ran.candidate.backend)
        return backend.backward(call, out, lse, grad_out.resolve_neg(), ran.candidate)


def _own_dtypes(call: Call) -> contextlib.AbstractContextManager[object]:
    kind = call.query.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


class _Attention(torch.autograd.Function):
    """Forward by a backend that torch cannot differentiate."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        call: Call,
        candidate: Candidate,
    ) -> Result:
        backend = backend_named(candidate.backend)
        out, lse = backend.forward(call, candidate.config())
        # all tensors, and nothing that holds them: checkpointing and offloading replace what is saved here
        results = (out, lse) if backend.has_backward else (None, None)
        ctx.save_for_backward(query, key, value, mask, call.alibi_slopes, *(call.cu_seqlens or (None, None)), *results)
        ctx.problem, ctx.candidate = call.problem, candidate
        ctx.scalars = {"scale": call.scale, "softcap": call.softcap, "dropout": call.dropout, "seed": call.seed}
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, slopes, cu_q, cu_kv, out, lse = ctx.saved_tensors
        cu_seqlens = None if cu_q is None else (cu_q, cu_kv)
        call = Call(
            ctx.problem, query, key, value, mask=mask, alibi_slopes=slopes, cu_seqlens=cu_seqlens, **ctx.scalars
        )
        needs = ctx.needs_input_grad
        found = backward(call, Ran(ctx.candidate, saved=out is not None), out, lse, grad_out, needs)
        gradients = (found.query, found.key, found.value, found.mask)
        return (*(grad if need else None for grad, need in zip(gradients, needs, strict=False)), None, None)


def _recomputed(call: Call, candidate: Candidate, grad_out: torch.Tensor, needs: Sequence[bool]) -> Gradients:
    """Return the gradients through `candidate` where torch can differentiate it, else through torch's own choice."""
    if not backend_named(candidate.backend).differentiable:
        candidate = default_candidate(call.problem)
    again = _with_leaves(call, needs)
    with torch.enable_grad():
        out, _ = backend_named(candidate.backend).forward(again, candidate.config())
    inputs = (again.query, again.key, again.value, again.mask)
    wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
    found = dict(zip(map(id, wanted), torch.autograd.grad(out, wanted, grad_out), strict=True))
    grads = [None if tensor is None else found.get(id(tensor)) for tensor in inputs]
    d_query, d_key, d_value = (
        tensor if grad is None else grad for tensor, grad in zip(inputs[:3], grads[:3], strict=True)
    )
    return Gradients(d_query, d_key, d_value, mask=grads[3])


def _with_leaves(call: Call, needs: Sequence[bool]) -> Call:
    """Return `call` with tensors of its own, of which those that `needs` says ask for gradients."""
    query, key, value = (
        tensor.detach().requires_grad_(need)
        for tensor, need in zip((call.query, call.key, call.value), needs, strict=False)
    )
    mask = None if call.mask is None else call.mask.detach().requires_grad_(needs[3])
    return replace(call, query=query, key=key, value=value, mask=mask)
