"""matmul, softmax, matmul in the input dtype: what the benchmark page calls PyTorch."""

import torch

from tilewise.domain.config import Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem

from .. import reference
from ..backend import Backend
from ..cache import flattened, unsupported_cache
from ..call import Call
from ..packed import on_padded


class Plain(Backend):
    """Every mask and score modification, at the price of the whole score matrix in memory."""

    name = "plain"
    differentiable = True
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return unsupported_cache(problem)

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        return on_padded(flattened(call), _attend)


def _attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = reference.softmax_attention(call, keep=_keep(call) if call.dropout > 0 else None)
    return out, lse.float()


def _keep(call: Call) -> torch.Tensor:
    """Return which weights (B, H, Q, K) dropout leaves, from the call's seed."""
    problem, device = call.problem, call.query.device
    generator = torch.Generator(device).manual_seed(call.seed)
    shape = (problem.batch, problem.heads, problem.q_len, problem.kv_len)
    return torch.rand(shape, generator=generator, device=device) >= call.dropout
