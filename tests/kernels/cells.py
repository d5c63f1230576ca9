"""The cells of docs/architecture.md's table of kernels at small sizes, and how results are compared."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Layout, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call

CPU = torch.device("cpu")
# Where torch could lie: flex_cpu refuses where the tests themselves run in a folder that inductor cannot link from.
PLAIN_FILE = "/usr/lib/python3/torch/__init__.py"
# What a result may be off by at most, for standard normal inputs: a few units in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}

CELLS: dict[str, dict[str, Any]] = {
    "full": {},
    "one key": {"q_len": 5, "kv_len": 1},
    "one query": {"q_len": 1, "kv_len": 33, "causal": True},
    "one query of a group": {"q_len": 1, "kv_len": 70, "heads": 4, "kv_heads": 1, "causal": True},
    "lengths of one": {"q_len": 1, "kv_len": 1, "causal": True},
    "causal": {"causal": True},
    "causal, fewer queries": {"q_len": 9, "kv_len": 23, "causal": True},
    "causal, more queries": {"q_len": 23, "kv_len": 9, "causal": True},
    "gqa": {"heads": 6, "kv_heads": 2, "causal": True},
    "mqa": {"heads": 4, "kv_heads": 1},
    "other value head_dim": {"v_head_dim": 24, "causal": True},
    "window": {"window": (5, 0)},
    "window, more queries": {"q_len": 23, "kv_len": 9, "window": (4, 0)},
    "window to both sides": {"window": (3, 2)},
    "window to both sides, more queries": {"q_len": 23, "kv_len": 9, "window": (3, 2)},
    "window of the diagonal": {"window": (0, 0)},
    "window, open to the right": {"window": (4, -1), "q_len": 9, "kv_len": 23},
    "window, open to the left": {"window": (-1, 3), "q_len": 23, "kv_len": 9},
    "strided bhsd": {"layout": Layout.BHSD, "causal": True, "kv_heads": 1},
    "alibi": {"alibi": True, "causal": True},
    "alibi, more queries": {"alibi": True, "causal": True, "q_len": 23, "kv_len": 9},
    "softcap": {"softcap": True},
    "softcap, causal, more queries": {"softcap": True, "causal": True, "q_len": 23, "kv_len": 9, "kv_heads": 1},
    "bool": {"mask": "bool"},
    "bool, more queries, causal": {"mask": "bool", "causal": True, "q_len": 23, "kv_len": 9},
    "bool and alibi": {"mask": "bool", "alibi": True},
    "bias": {"mask": "bias"},
    "bias, more queries, causal": {"mask": "bias", "causal": True, "q_len": 23, "kv_len": 9},
    "bias and alibi and window": {"mask": "bias", "alibi": True, "window": (6, 2)},
    "everything": {"mask": "bias", "alibi": True, "softcap": True, "window": (6, 2), "heads": 4, "kv_heads": 2},
}
for kind in ("bool", "bias"):
    for broadcast in ("b1", "h1", "q1", "k1", "b1h1", "b1h1q1", "b1h1k1", "b1h1q1k1", "h1q1"):
        CELLS[f"{kind}.{broadcast}"] = {"mask": f"{kind}.{broadcast}"}


def problem_of(cell: str, **changes: Any) -> Problem:
    """Return the problem of a cell, two heads and head_dim 16 where it says nothing else."""
    sizes = {"batch": 2, "heads": 2, "q_len": 19, "head_dim": 16, "dtype": Dtype.FP32}
    return Problem(**{**sizes, **CELLS[cell], **changes})


def call_of(problem: Problem, *, seed: int = 0) -> Call:
    return random_call(problem, CPU, seed=seed)


def doubled(call: Call) -> Call:
    """Return `call` with float64 tensors, for comparisons that see every mistake."""
    mask = call.mask if call.mask is None or call.mask.dtype is torch.bool else call.mask.double()
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.double()
    return replace(
        call,
        query=call.query.double(),
        key=call.key.double(),
        value=call.value.double(),
        mask=mask,
        alibi_slopes=slopes,
    )


def this_cpu() -> Device:
    return devices.describe(CPU)


def assert_right(call: Call, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Compare with the float64 reference, the infinities of wholly masked rows exactly."""
    expected, expected_lse = reference.attention(call)
    allowed = TOLERANCE[call.query.dtype]
    assert out.dtype is call.query.dtype
    torch.testing.assert_close(out.double(), expected, rtol=allowed, atol=allowed)
    wholly_masked = expected_lse.transpose(-1, -2) == -torch.inf
    assert bool((out[wholly_masked] == 0).all()), "rows with nothing to attend give 0"
    if lse is not None:
        assert lse.dtype is torch.float32
        torch.testing.assert_close(lse.double(), expected_lse, rtol=allowed, atol=allowed)


def cells(*without: str) -> pytest.MarkDecorator:
    """Parametrize over the cells whose description has none of the fields in `without`."""
    names = [name for name, fields in CELLS.items() if not set(without) & fields.keys()]
    return pytest.mark.parametrize("cell", names)
