"""Checks a candidate against float64 before it may be timed."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import NumericError
from tilewise.kernels import device as devices
from tilewise.kernels import dropout, reference
from tilewise.kernels.backends import backend_named
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call

from .steps import GRADIENTS, results

RAGGED_Q_LEN, RAGGED_KV_LEN = 211, 173
PACKED_BATCH = 6  # the longest, three that lack queries, keys or both, and two more
HOPELESS = 1e30  # times the bound; not infinity, which JSON does not have and the database refuses
HALF = 0.5  # dropout of one small case, beside the share that is timed
SIGMAS = 5.0  # that a dropout mask may depart from independent draws


@dataclass(frozen=True, slots=True)
class Bound:
    """A reference tensor with the largest errors allowed to it."""

    reference: torch.Tensor
    max_error: float
    rms_error: float

    def share(self, tensor: torch.Tensor) -> float:
        """Return the errors of `tensor` as a share of the allowed ones; HOPELESS for NaN or a misplaced infinity."""
        if tensor.shape != self.reference.shape:
            return HOPELESS
        finite = self.reference.isfinite()
        found = tensor.double()
        # where the reference is -inf nothing else will do: neither +inf nor NaN, which are not finite either
        if not (torch.equal(found.isfinite(), finite) and torch.equal(found[~finite], self.reference[~finite])):
            return HOPELESS
        difference = (found - self.reference).masked_fill(~finite, 0)
        largest, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
        return min(max(largest / self.max_error, rms / self.rms_error), HOPELESS)


@dataclass(frozen=True, slots=True)
class Case:
    """One call to check. `bounds` is empty with dropout: what is right depends on the mask that a backend draws."""

    name: str
    call: Call
    grad_out: torch.Tensor | None
    bounds: dict[str, Bound]


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A dropout mask of a case (B, H, Q, K), its departures from independent draws, and what is right with it."""

    keep: torch.Tensor
    departures: dict[str, float]
    bounds: dict[str, Bound]


class Checker:
    """Fresh random inputs of one seed, their float64 results, and the errors a candidate may have.

    The problem itself is computed twice: with values (and gradient of the result) of the other sign first, of which
    result and gradient of the values must have the other sign. Both are looked at when both are there. So a candidate
    that gives what an earlier call gave, or whose calls share a buffer, is wrong.

    The cases are the problem itself and small ones of the same kind: lengths that divide by nothing, and, where the
    problem is causal or has a window, first rows that have nothing to attend; of packed sequences, some without
    queries, keys or both. The bound per tensor: RMS and maximum
    error at most twice those of matmul, softmax, matmul in the input dtype, plus a floor of two units in the last
    place of max|reference| (one of its RMS) and ten (five) of float32.

    With dropout (0.1, and 0.5 in one more small case) every backend draws a mask of its own. It is recovered; how many
    weights it keeps, its sums along each dimension and what it has in common with another seed's may depart by 5
    standard deviations from independent draws; and result and gradients are compared with float64's for this mask.
    """

    def __init__(self, problem: Problem, device: torch.device, *, seed: int) -> None:
        self.device = device
        self._described = devices.describe(device)
        calls = {
            name: random_call(of_case, device, seed=seed, empty=of_case is not problem)
            for name, of_case in cases_of(problem).items()
        }
        if problem.dropout:
            calls["half dropped"] = replace([*calls.values()][-1], dropout=HALF)
        self.cases = tuple(_case(name, call, seed) for name, call in calls.items())
        self._drawn: dict[tuple[str, str], _Drawn] = {}
        self._inputs = self._fingerprints()

    def main_only(self) -> "Checker":
        """Return a checker of the problem itself alone, on the same tensors."""
        alone = copy.copy(self)
        alone.cases, alone._inputs = self.cases[:1], self._inputs[:1]
        return alone

    @property
    def main(self) -> Case:
        """The case of the problem itself: what is timed runs on its tensors."""
        return self.cases[0]

    def check(self, candidate: Candidate) -> NumericError:
        """Return the largest error over all cases and tensors as a share of its bound: at most 1 is right.

        Small cases that the backend says it does not support are left out: unequal lengths, for some.
        """
        return self._worst(candidate, self.cases)

    def recheck(self, candidate: Candidate) -> NumericError:
        """Return the largest error of another two calls on the problem itself."""
        return self._worst(candidate, self.cases[:1])

    def intact(self) -> bool:
        """Return whether the inputs are still what they were: a candidate may have written over them."""
        return self._fingerprints() == self._inputs

    def _worst(self, candidate: Candidate, cases: tuple[Case, ...]) -> NumericError:
        backend = backend_named(candidate.backend)
        worst = NumericError(worst=-1.0, tensor="", case="")
        for case in cases:
            if case is not self.main and backend.supports(case.call.problem, self._described) is not None:
                continue
            drawn = self._draw(case, candidate) if case.call.dropout > 0 else None
            with poisoned_empty():
                mirrored = _mirrored(case, candidate) if case is self.main else {}
                found = results(case.call, candidate, case.grad_out)
            bounds = case.bounds if drawn is None else drawn.bounds
            shares = {name: bounds[name].share(tensor) for name, tensor in found.items()}
            if found["out"].dtype is not case.call.query.dtype:
                shares["dtype of out"] = HOPELESS
            for name, tensor in mirrored.items():
                back = -tensor if name in _NEGATED else tensor
                shares[f"{name} of negated values"] = bounds[name].share(back)
            if drawn is not None:
                shares |= {f"dropout by {name}": abs(off) / SIGMAS for name, off in drawn.departures.items()}
            for name, share in shares.items():
                if not share <= worst.worst:
                    worst = NumericError(worst=share, tensor=name, case=case.name)
        return worst

    def _fingerprints(self) -> tuple[tuple[int, ...], ...]:
        """Return sums over the bits of the tensors that candidates are given, by case."""
        return tuple(
            tuple(
                int(_bits(tensor).sum(dtype=torch.int64))
                for tensor in (case.call.query, case.call.key, case.call.value, case.call.mask, case.grad_out)
                if tensor is not None
            )
            for case in self.cases
        )

    def _draw(self, case: Case, candidate: Candidate) -> _Drawn:
        """Return the mask that `candidate` draws for `case`; what is right with it is computed once per mask."""
        backend, config, call = backend_named(candidate.backend), candidate.config(), case.call
        keep = backend.kept_weights(call, config)
        drawn = self._drawn.get((case.name, candidate.backend))
        if drawn is None or not torch.equal(drawn.keep, keep):
            other = backend.kept_weights(replace(call, seed=call.seed + 1), config)
            departures = dropout.departures(keep, other, dropout.attended(call), call.dropout)
            drawn = _Drawn(keep, departures, _bounds(call, case.grad_out, keep))
            self._drawn[case.name, candidate.backend] = drawn
        return drawn


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within, torch.empty is full of NaN: an element that a kernel forgets to write shows.

    torch fills it where algorithms are to be deterministic. torch.use_deterministic_algorithms would also import all of
    inductor, for seconds, and make it compile another kernel than the one that is timed.
    """
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(mode[0], warn_only=mode[1])
            filling.fill_uninitialized_memory = fills


_NEGATED = ("out", "d_value")


def _mirrored(case: Case, candidate: Candidate) -> dict[str, torch.Tensor]:
    """Return the results for values and gradient of the other sign: attention is linear in the values.

    Those of _NEGATED have the other sign; with both negated, the gradients of query, key and mask stay what they are.
    The tensors are the same ones: who takes them for what they were gives that again.
    """
    changed = [case.call.value, *([] if case.grad_out is None else [case.grad_out])]
    for tensor in changed:
        tensor.neg_()
    try:
        return results(case.call, candidate, case.grad_out)
    finally:
        for tensor in changed:
            tensor.neg_()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is torch.bool:
        return tensor
    return tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def cases_of(problem: Problem) -> dict[str, Problem]:
    """Return the problem and small ones of its kind by name, each only once."""
    q_len, kv_len = min(problem.q_len, RAGGED_Q_LEN), min(problem.kv_len, RAGGED_KV_LEN)
    cases = {"problem": problem, "ragged": _small(problem, q_len, kv_len)}
    if problem.q_len == problem.kv_len:
        cases["equal"] = _small(problem, kv_len, kv_len)
    if (problem.causal or problem.window is not None) and 1 < q_len <= kv_len:
        cases["masked rows"] = _small(problem, q_len, max(1, q_len * 4 // 5))
    distinct: dict[Problem, str] = {}
    for name, case in cases.items():
        distinct.setdefault(case, name)
    return {name: case for case, name in distinct.items()}


def _small(problem: Problem, q_len: int, kv_len: int) -> Problem:
    group, kv_heads = problem.heads // problem.kv_heads, min(problem.kv_heads, 2)
    batch = min(problem.batch, 2)
    if problem.packed:  # another than the problem's, which has no empty sequences
        batch = PACKED_BATCH + (problem.batch == PACKED_BATCH)
    return replace(
        problem,
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
    )


def _case(name: str, call: Call, seed: int) -> Case:
    grad_out = None
    if call.problem.pass_ is Pass.TRAINING:
        generator = torch.Generator(call.query.device).manual_seed(seed + 1)
        shape = (*call.query.shape[:-1], call.problem.v_head_dim)
        grad_out = torch.randn(shape, generator=generator, device=call.query.device, dtype=call.query.dtype)
    return Case(name, call, grad_out, _bounds(call, grad_out, None) if call.dropout == 0 else {})


def _bounds(call: Call, grad_out: torch.Tensor | None, keep: torch.Tensor | None) -> dict[str, Bound]:
    """Return what is right by tensor name, with the weights that dropout keeps where there is dropout."""
    exact, plain = _expected(call, torch.float64, grad_out, keep), _expected(call, call.query.dtype, grad_out, keep)
    return {name: bound_of(exact[name], plain[name], call.query.dtype) for name in exact}


def _expected(
    call: Call, dtype: torch.dtype, grad_out: torch.Tensor | None, keep: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    out, lse = reference.attention(call, dtype=dtype, keep=keep)
    found = {"out": out, "lse": lse}
    if grad_out is not None:
        found.update(zip(GRADIENTS, reference.gradients(call, grad_out, dtype=dtype, keep=keep), strict=False))
    return found


def bound_of(exact: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> Bound:
    """Return the errors that are allowed where plain products in `dtype` gave `plain` for `exact`."""
    known = exact.isfinite()
    finite = exact.masked_fill(~known, 0)
    error = (plain.double() - finite).masked_fill(~known, 0)
    ulp = torch.finfo(dtype).eps
    # fused kernels recompute weights from an LSE that float32 rounds (2e-7 of every weight of a row), and use faster
    # exponentials: SDPA on a CPU, and SDPA's and our float32 backward on an H200 exceeded the first term by so much
    single = torch.finfo(torch.float32).eps
    largest_ulp, rms_ulp = 2 * ulp + 10 * single, ulp + 5 * single
    return Bound(
        reference=exact,
        max_error=2 * float(error.abs().max()) + largest_ulp * float(finite.abs().max()) + torch.finfo(dtype).tiny,
        rms_error=2 * float(error.square().mean().sqrt())
        + rms_ulp * float(finite.square().mean().sqrt())
        + torch.finfo(dtype).tiny,
    )
