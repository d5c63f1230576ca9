"""matmul, softmax, matmul in the input dtype: what the benchmark page calls PyTorch."""

import torch

from tilewise.domain.config import Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem

from .. import reference
from ..backend import Backend, unsupported_feature
from ..cache import flattened, unsupported_cache
from ..call import Call


class Plain(Backend):
    """Every mask and score modification, at the price of the whole score matrix in memory."""

    name = "plain"
    differentiable = True
    gives_lse = True

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return unsupported_feature(problem, "dropout") or unsupported_cache(problem)

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        out, lse = reference.softmax_attention(flattened(call))
        return out, lse.float()
