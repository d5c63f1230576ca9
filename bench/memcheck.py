"""Runs one small case per kernel, at lengths and head_dims that divide by nothing, and checks what comes out.

    make memcheck

runs it under compute-sanitizer, which reports every access outside an allocation. PYTORCH_NO_CUDA_MEMORY_CACHING=1
gives every tensor an allocation of its own; torch's caching allocator would hide a read behind its end. By itself,
python -m tilewise.bench.memcheck, it only compares with the reference.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import hopper_spaces
from tilewise.kernels.backends.triton import ROLES
from tilewise.kernels.inputs import random_call
from tilewise.kernels.triton_kernels.common import dropout_mask
from tilewise.layers import rotation
from tilewise.tuner.steps import GRADIENTS, results

TOLERANCE = 1e-2  # of the largest element, at least of 1: float16 after sums over 50 keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A candidate on one problem, and the kernels that it runs."""

    kernels: str
    problem: Problem
    candidate: Candidate


def cases(device: torch.device) -> Iterator[Case]:
    """Yield the cases that a device can run: TMA needs sm_90 or Triton's interpreter, the Gluon kernels need sm_90."""
    described = devices.describe(device)
    small = Problem(pass_=Pass.TRAINING, batch=2, heads=4, kv_heads=2, q_len=37, kv_len=53, head_dim=40, causal=True)
    for tma in (False, True) if described.capability == 0 or described.capability >= 90 else (False,):
        path, full = "TMA" if tma else "pointers", replace(small, causal=False)
        ours = _ours(tma, dkdv_tma=tma)
        yield Case(kernels=f"forward, delta, dkdv, dq by {path}", problem=small, candidate=ours)
        yield Case(kernels=f"packed by {path}", problem=replace(small, batch=5, varlen=True), candidate=ours)
        yield Case(kernels=f"keep_mask, dropout by {path}", problem=replace(full, dropout=True), candidate=ours)
        for mask in ("bool", "bias.b1h1", "bias.h1q1", "bias.b1k1"):
            problem = replace(full, window=(20, 7), mask=mask, bias_grad=mask != "bool")
            kernels = f"{'mask' if mask == 'bool' else 'dbias'}: {mask} by {path}"
            # with a mask, dkdv has only the pointer path: backends.triton.tiles_of
            yield Case(kernels=kernels, problem=problem, candidate=_ours(tma, dkdv_tma=False))
    wide = replace(small, q_len=137, kv_len=211, head_dim=128, v_head_dim=128)
    masked = replace(wide, causal=False, kv_len=208, window=(90, 40))  # whose masks come through a ring
    for problem, changes in (
        (wide, {}),
        (replace(wide, head_dim=40, v_head_dim=40), {}),
        (replace(wide, head_dim=40, v_head_dim=40), {"padded": True}),
        (replace(masked, mask="bool.h1"), {"mask_stages": 2}),
        (replace(masked, mask="bias.b1", bias_grad=True), {"mask_stages": 1, "dbias": True}),
        (replace(masked, mask="bias.b1", bias_grad=True), {"mask_stages": 0, "dbias": False}),
    ):
        hopper = {role: hopper_spaces.space(role, problem, described) for role in ROLES}
        configs = {role: _changed(space.default, changes) for role, space in hopper.items() if space is not None}
        if configs:
            kernels = ", ".join([*hopper_spaces.KERNELS, *(f"{name}={value}" for name, value in changes.items())])
            yield Case(kernels=kernels, problem=problem, candidate=Candidate.of("triton", **configs))
    decoding = Problem(batch=3, heads=4, kv_heads=2, q_len=3, kv_len=173, head_dim=40, varlen=True)
    for page_size, splits in itertools.product((0, 16, 64), (1, 3)):
        config = Config.of("triton_decode", block_n=32, num_splits=splits, num_warps=2, num_stages=3)
        cache = f"pages of {page_size}" if page_size else "contiguous"
        yield Case(
            kernels=f"decode{', combine' if splits > 1 else ''}: {cache}",
            problem=replace(decoding, page_size=page_size),
            candidate=Candidate.of("triton_decode", forward=config),
        )


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    """Return `config` with those of `changes` that are among its parameters."""
    values = config.as_dict()
    return Config.of(config.kernel, **{name: changes.get(name, value) for name, value in values.items()})


def _ours(tma: bool, *, dkdv_tma: bool) -> Candidate:
    values: dict[str, Any] = {"block_m": 32, "block_n": 32, "num_warps": 2, "num_stages": 2}
    paths = {"forward": tma, "dkdv": dkdv_tma, "dq": tma}
    return Candidate.of(
        "triton", **{role: Config.of(f"triton_{role}", **values, tma=path) for role, path in paths.items()}
    )


def worst(case: Case, device: torch.device) -> float:
    """Run a case; return its largest error as a share of the largest element (at least 1), infinity for NaN."""
    call = random_call(case.problem, device, seed=0, empty=case.problem.packed)
    generator = torch.Generator(device).manual_seed(1)
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    grad_out = torch.randn(shape, generator=generator, device=device, dtype=call.query.dtype)
    keep = dropout_mask(call) if case.problem.dropout else None
    out, lse = reference.attention(call, keep=keep)
    expected = {"out": out, "lse": lse}
    if case.problem.pass_ is Pass.TRAINING:
        expected |= zip(GRADIENTS, reference.gradients(call, grad_out, keep=keep), strict=False)
    found = results(call, case.candidate, grad_out)
    return max(_error(found[name], expected[name]) for name in expected)


def of_layers(device: torch.device) -> Iterator[tuple[str, float]]:
    """Yield each kernel of the layers with its largest error against torch's operators on a CPU, as `worst` has it."""
    for heads, rest, half in ((3, 5, 7), (5, 0, 28)):
        generator = torch.Generator().manual_seed(heads)
        given = torch.randn(2, 37, heads, rest + 2 * half, generator=generator)
        angles = torch.randn(1, 37, half, generator=generator)
        for pairs in (False, True):
            expected = rotation.turned_by_torch(given, angles.cos(), angles.sin(), pairs=pairs)
            here = [each.to(device, copy=True) for each in (given, angles.cos(), angles.sin())]
            for in_place in (False, True):
                found = rotation.turned(*here, pairs=pairs, in_place=in_place)
                where = "in place" if in_place else "elsewhere"
                yield f"turn_heads {where}: {heads} heads, {rest} + {2 * half}", _error(found.cpu(), expected.double())
        shared = given[:, :, 0]
        expected = torch.cat((given, shared[:, :, None].expand_as(given)), -1)
        found = rotation.joined(given.to(device), shared.to(device))
        yield f"join_heads: {heads} heads", _error(found.cpu(), expected.double())


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    difference = (found.double() - expected).masked_fill(~finite, 0).abs().max()
    return float(difference / expected.masked_fill(~finite, 0).abs().max().clamp(min=1))


def errors(device: torch.device) -> Iterator[tuple[str, float]]:
    """Yield every case by name, with its largest error."""
    for case in cases(device):
        yield f"{case.kernels}  {case.problem.key}", worst(case, device)
    yield from of_layers(device)


def main() -> None:
    failed = 0
    for name, error in errors(devices.select()):
        failed += not error <= TOLERANCE
        print(f"{'ok' if error <= TOLERANCE else 'WRONG'}  {error:.1e}  {name}", flush=True)
    if failed:
        sys.exit(f"{failed} cases are off by more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
