"""Backends that are wrong, slow or broken in one way, and a problem small enough to tune in a test."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch

from tilewise.domain.config import Config
from tilewise.domain.device import Device
from tilewise.domain.job import Budget
from tilewise.domain.problem import Dtype, Problem
from tilewise.kernels import reference
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call

CPU = torch.device("cpu")
TINY = Problem(batch=1, heads=2, q_len=64, head_dim=16, dtype=Dtype.FP32, causal=True, window=(16, 0))
BUDGET = Budget(name="test", trials=9, seconds=60, patience=9, finalists=2, rounds=15)

Computes = Callable[[Call], tuple[torch.Tensor, torch.Tensor | None]]


def right(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the reference gives, in the dtypes that a backend returns."""
    out, lse = reference.attention(call, dtype=torch.float32, needs_grad=True)
    return out.to(call.query.dtype), lse


class Fake(Backend):
    """Computes what it is given."""

    name: ClassVar[str] = "fake"
    differentiable = True
    gives_lse = True

    def __init__(self, computes: Computes, refuses: str | None = None, name: str = "fake") -> None:
        self.name = name  # type: ignore[misc]  # a fake may stand in for any backend
        self.computes, self.refuses = computes, refuses
        self.calls = 0

    def supports(self, problem: Problem, device: Device) -> str | None:  # noqa: ARG002
        return self.refuses

    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ARG002
        self.calls += 1
        return self.computes(call)


def register(
    monkeypatch: pytest.MonkeyPatch, computes: Computes, refuses: str | None = None, name: str = "fake"
) -> Fake:
    """Add a backend called `fake`, or let one stand in for the backend of that name, for the length of a test."""
    backend = Fake(computes, refuses, name)
    monkeypatch.setitem(BACKENDS, name, backend)
    return backend
