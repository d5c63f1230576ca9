"""Step: one call of a candidate on ready tensors, as it is checked and timed."""

from collections.abc import Callable
from dataclasses import replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.problem import Pass
from tilewise.kernels.call import Call
from tilewise.kernels.run import run

Step = Callable[[], object]
GRADIENTS = ("d_query", "d_key", "d_value", "d_mask")  # the last only where the problem has bias_grad


def make_step(call: Call, candidate: Candidate, grad_out: torch.Tensor | None = None) -> Step:
    """Return what to time: the forward without gradients, or forward and backward for a training problem."""
    if call.problem.pass_ is Pass.TRAINING:
        assert grad_out is not None, "a training step needs the gradient of the result"
        return lambda: results(call, candidate, grad_out)

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return run(call, candidate)[0]

    return forward


def results(call: Call, candidate: Candidate, grad_out: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Run `candidate` once and return its tensors by name: out, lse where given, and for training all gradients."""
    if call.problem.pass_ is Pass.INFERENCE:
        with torch.inference_mode():
            out, lse = run(call, candidate)
        return {"out": out} if lse is None else {"out": out, "lse": lse}
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    call = call.with_tensors(*leaves)
    if call.problem.bias_grad:
        assert call.mask is not None, "a problem with bias_grad has a mask"
        leaves.append(call.mask.detach().requires_grad_())
        call = replace(call, mask=leaves[-1])
    out, lse = run(call, candidate)
    gradients = torch.autograd.grad(out, leaves, grad_out)
    found = {"out": out.detach(), **dict(zip(GRADIENTS, gradients, strict=False))}
    return found if lse is None else {**found, "lse": lse.detach()}
