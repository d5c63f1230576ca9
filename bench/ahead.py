"""Compiles decoding kernels in parallel on the CPU, ahead of the GPU that will run them."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch

from tilewise.domain.config import Config
from tilewise.domain.problem import Problem
from tilewise.kernels.call import TORCH_DTYPES

Job = tuple[Problem, Config]
WORKERS = 16


def compile_ahead(jobs: Iterable[Job]) -> list[str]:
    """Compile every distinct kernel that `jobs` need into Triton's cache; return what failed, a line each.

    One process per core. A failure is only reported: whoever runs that config meets it again.
    """
    wanted: dict[object, Job] = {}
    for job in jobs:
        wanted.setdefault(_kernel(*job), job)
        wanted.setdefault(_combination(*job), job)
    distinct = list(dict.fromkeys(wanted.values()))
    workers = min(WORKERS, os.cpu_count() or 1, len(distinct))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [line for line in pool.map(compile_one, distinct) if line]


def compile_one(job: Job) -> str:
    """Compile for tensors that have shapes and strides but no memory; return the error, empty where there is none."""
    from tilewise.kernels.triton_kernels.decode import launch

    problem, config = job
    dtype = TORCH_DTYPES[problem.dtype]
    pages = -(-problem.kv_len // problem.page_size) if problem.page_size else 0

    def cache(dim: int) -> torch.Tensor:
        rows = (problem.batch * pages, problem.page_size) if pages else (problem.batch, problem.kv_len)
        return torch.empty(*rows, problem.kv_heads, dim, dtype=dtype, device="meta")

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    try:
        launch(
            torch.empty(problem.batch, problem.q_len, problem.heads, problem.head_dim, dtype=dtype, device="meta"),
            cache(problem.head_dim),
            cache(problem.v_head_dim),
            numbers(problem.batch) if problem.varlen else None,
            numbers(problem.batch, pages) if pages else None,
            kv_len=problem.kv_len,
            scale=problem.head_dim**-0.5,
            window=problem.window or (-1, 0 if problem.causal else -1),
            softcap=1.0 if problem.softcap else 0.0,
            precision=str(problem.precision),
            block_n=config["block_n"],
            num_splits=config["num_splits"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
            compile_only=True,
        )
    except Exception as error:  # a compiler's assertion is one config's failure
        return f"{problem.key} {config}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def _kernel(problem: Problem, config: Config) -> tuple[object, ...]:
    """Return what tells compiled kernels apart: of the splits only whether there are any."""
    tile = tuple(config[name] for name in ("block_n", "num_warps", "num_stages"))
    return _kind(problem), tile, config["num_splits"] > 1


def _combination(problem: Problem, config: Config) -> tuple[object, ...]:
    """Return what tells the second kernels apart."""
    return _kind(problem), config["num_splits"]


def _kind(problem: Problem) -> Problem:
    """Return what a kernel knows of a problem: not its batch and lengths."""
    return replace(problem, batch=1, heads=problem.heads // problem.kv_heads, kv_heads=1, kv_len=problem.q_len)
