"""Random tensors for a problem: what checks, timings and benchmarks run on."""

import torch

from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Layout, Problem

from .call import TORCH_DTYPES, Call

SOFTCAP = 30.0


def random_call(problem: Problem, device: torch.device, *, seed: int) -> Call:
    """Return a Call for `problem` with standard normal tensors, the same for the same seed and device.

    A bool mask leaves 4 of 5 pairs, masks every eighth row of queries wholly and the first half of the keys for
    another; slopes are those of the ALiBi paper
    (Press et al. 2022, section 3); softcap is 30. Raises UnsupportedError for paged, varlen and dropout problems.
    """
    if problem.varlen or problem.page_size or problem.dropout:
        raise UnsupportedError(
            f"{problem.key}: varlen, paged and dropout problems cannot be tuned yet; tune the same problem without"
        )
    generator = torch.Generator(device).manual_seed(seed)
    dtype = TORCH_DTYPES[problem.dtype]

    def normal(length: int, heads: int, dim: int) -> torch.Tensor:
        if problem.layout is Layout.BHSD:
            shape = (problem.batch, heads, length, dim)
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        return torch.randn((problem.batch, length, heads, dim), generator=generator, device=device, dtype=dtype)

    return Call(
        problem=problem,
        query=normal(problem.q_len, problem.heads, problem.head_dim),
        key=normal(problem.kv_len, problem.kv_heads, problem.head_dim),
        value=normal(problem.kv_len, problem.kv_heads, problem.v_head_dim),
        scale=problem.head_dim**-0.5,
        mask=_mask(problem, generator, device),
        alibi_slopes=_slopes(problem.heads, device) if problem.alibi else None,
        softcap=SOFTCAP if problem.softcap else 0.0,
    )


def _mask(problem: Problem, generator: torch.Generator, device: torch.device) -> torch.Tensor | None:
    if problem.mask == "none":
        return None
    kind, _, broadcast = problem.mask.partition(".")
    full = (("b1", problem.batch), ("h1", problem.heads), ("q1", problem.q_len), ("k1", problem.kv_len))
    shape = [1 if name in broadcast else size for name, size in full]
    if kind == "bias":
        return torch.randn(shape, generator=generator, device=device, dtype=TORCH_DTYPES[problem.dtype])
    mask = torch.rand(shape, generator=generator, device=device) < 0.8
    mask[:, :, 7::8] = False
    mask[:, :, 3::8, : shape[3] // 2] = False
    return mask


def _slopes(heads: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([2.0 ** (-8.0 * (head + 1) / heads) for head in range(heads)], device=device)
