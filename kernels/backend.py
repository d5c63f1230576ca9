"""What a backend is: the one small interface between attention implementations and everything that uses them."""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Problem
from tilewise.domain.space import SearchSpace

from . import dropout
from .call import Call


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients in the shapes of the tensors; that of an additive mask only where the problem has bias_grad."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None


class Backend(abc.ABC):
    """An implementation of attention.

    - name: as it stands in candidates and the database.
    - differentiable: torch can differentiate through `forward` by itself.
    - has_backward: its gradients are those of its own `backward`; where neither holds, `kernels.run` recomputes through
      torch.
    - gives_lse: `forward` returns the LSE.
    - max_head_dim: the largest head_dim and v_head_dim that its kernels have on any device.
    - compile_seconds: about what it costs to compile one config for the checker's cases, in a fresh process; a tuning
      whose budget cannot afford that skips the backend.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False
    has_backward: ClassVar[bool] = False
    gives_lse: ClassVar[bool] = False
    max_head_dim: ClassVar[int | None] = None
    compile_seconds: ClassVar[float] = 0.0

    @abc.abstractmethod
    def supports(self, problem: Problem, device: Device) -> str | None:
        """Return None when this backend computes `problem` on `device`, else the reason why not."""

    def spaces(self, problem: Problem, device: Device) -> Mapping[str, SearchSpace]:  # noqa: ARG002
        """Return the configs of each role (forward, dkdv, dq) for a problem it supports; none without parameters."""
        return {}

    @abc.abstractmethod
    def forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the result (B, Q, H, Dv) and, where the backend gives it, the LSE (B, H, Q) float32.

        Of a packed call (total_q, H, Dv) and (H, total_q).
        """

    def load(self) -> None:  # noqa: B027
        """Import what the first call would import, where that takes seconds: whoever measures has them to spare."""

    def pinned(self, call: Call) -> "Backend":  # noqa: ARG002
        """Return the backend that `forward` would run for `call` in training: itself, unless it only chooses one.

        One that computes a forward again must drop the weights that the forward dropped.
        """
        return self

    def saves(self, call: Call) -> bool:  # noqa: ARG002
        """Return whether `backward` computes the gradients of `call` from what `saving_forward` gives."""
        return self.has_backward

    def saving_forward(self, call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the result and the LSE, as `backward` takes them, where no graph is kept; only where it `saves`."""
        return self.forward(call, config)

    def backward(
        self,
        call: Call,
        out: torch.Tensor,  # noqa: ARG002
        lse: torch.Tensor,  # noqa: ARG002
        grad_out: torch.Tensor,  # noqa: ARG002
        candidate: Candidate,
    ) -> Gradients:
        """Return the gradients, for the result and LSE that `saving_forward` gave; only where it `saves`."""
        raise UnsupportedError(f"{candidate} has no backward of its own; kernels.run recomputes {call.problem.key}")

    def kept_weights(self, call: Call, config: Config | None) -> torch.Tensor:
        """Return which weights (B, H, Q, K), bool, the forward keeps for the dropout and seed of `call`.

        Recovered from the forward unless a backend knows its mask (`kernels.dropout.recovered`); raises
        UnsupportedError where it cannot be.
        """
        return dropout.recovered(call, lambda probe: self.forward(probe, config)[0])

    def default(self, problem: Problem, device: Device) -> Candidate:
        """Return this backend with the default config of every role."""
        return Candidate.of(self.name, **{role: space.default for role, space in self.spaces(problem, device).items()})


def unsupported_varlen(problem: Problem) -> str | None:
    """Return why a backend that takes packed sequences, but no cache with lengths or pages, cannot compute it."""
    if not problem.packed:
        return unsupported_feature(problem, "varlen", "page_size")
    return "varlen only without a mask" if problem.mask != "none" else unsupported_feature(problem, "page_size")


def unsupported_feature(problem: Problem, *features: str) -> str | None:
    """Return why a backend that has none of `features` (fields of Problem) cannot compute `problem`."""
    for feature in features:
        if getattr(problem, feature) not in (False, 0, "none", None):
            return f"no {feature.replace('_', ' ')}"
    return None
