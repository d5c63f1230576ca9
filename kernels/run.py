"""Run a Plan: the one place where a call meets a backend, eager and trainable."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tilewise.domain.config import Candidate
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Pass

from .backend import Backend
from .backends import backend_named
from .call import Call

Result = tuple[torch.Tensor, torch.Tensor | None]


def run(call: Call, candidate: Candidate) -> Result:
    """Return the result (B, Q, H, Dv) of `candidate` for `call` and its LSE (B, H, Q) where the backend gives one.

    Gradients: torch differentiates its own backends; behind the others, which have a forward only, the backward
    recomputes through torch (`domain.matching.default_candidate`), from the saved query, key and value. The LSE is
    not differentiable.
    """
    kind = call.query.device.type
    if torch.is_autocast_enabled(kind):  # the tensors have their dtypes: what is computed is what the problem says
        with torch.autocast(kind, enabled=False):
            return run(call, candidate)
    backend = backend_named(candidate.backend)
    config = candidate.config()
    if call.problem.pass_ is Pass.INFERENCE or backend.differentiable:
        out, lse = backend.forward(call, config)
        return out, None if lse is None else lse.detach()
    out, lse = _Recomputed.apply(call.query, call.key, call.value, call, backend, candidate)
    return out, lse


class _Recomputed(torch.autograd.Function):
    """Forward by a backend without a backward of its own; backward through torch."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
        backend: Backend,
        candidate: Candidate,
    ) -> Result:
        out, lse = backend.forward(call.with_tensors(query, key, value), candidate.config())
        # all tensors, and nothing that holds them: checkpointing and offloading replace what is saved here
        ctx.save_for_backward(query, key, value, call.mask, call.alibi_slopes)
        ctx.problem, ctx.scale, ctx.softcap = call.problem, call.scale, call.softcap
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, _: object) -> tuple[torch.Tensor | None, ...]:
        *saved, mask, slopes = ctx.saved_tensors
        query, key, value = inputs = [
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(saved, ctx.needs_input_grad, strict=False)
        ]
        call = Call(ctx.problem, query, key, value, ctx.scale, mask, slopes, ctx.softcap)
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            out, _ = backend_named(default_candidate(ctx.problem).backend).forward(call, None)
        needed = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(out, needed, grad_out))
        return (*(next(found) if needs else None for needs in ctx.needs_input_grad[:3]), None, None, None)
