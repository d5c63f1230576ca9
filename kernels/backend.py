"""What a backend is: the one small interface between attention implementations and everything that uses them."""

import abc
from typing import ClassVar

import torch

from tilewise.domain.config import Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace

from .call import Call


class Backend(abc.ABC):
    """An implementation of attention.

    - name: as it stands in candidates and the database.
    - differentiable: torch can differentiate through `forward` by itself; otherwise `kernels.run` supplies a backward.
    - gives_lse: `forward` returns the LSE.
    - compile_seconds: about what it costs to compile one config for the checker's three cases; a tuning whose budget
      cannot afford that skips the backend.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False
    gives_lse: ClassVar[bool] = False
    compile_seconds: ClassVar[float] = 0.0

    @abc.abstractmethod
    def supports(self, problem: Problem, device: Device) -> str | None:
        """Return None when this backend computes `problem` on `device`, else the reason why not."""

    def space(self, problem: Problem, device: Device) -> SearchSpace | None:  # noqa: ARG002
        """Return the configs of this backend's forward for a problem it supports; None when it has no parameters."""
        return None

    @abc.abstractmethod
    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the result (B, Q, H, Dv) and, where the backend gives it, the LSE (B, H, Q) float32."""


def unsupported_feature(problem: Problem, *features: str) -> str | None:
    """Return why a backend that has none of `features` (fields of Problem) cannot compute `problem`."""
    for feature in features:
        if getattr(problem, feature) not in (False, 0, "none", None):
            return f"no {feature.replace('_', ' ')}"
    return None
