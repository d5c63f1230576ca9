"""What the tests of rotary positions share: tensors, tables, and the same call by torch's operators.

Without a GPU the kernels run in Triton's interpreter, which cuts what it rounds to bfloat16.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewise.layers import rotation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-12}
Turns = list[bool]  # for each turn by a kernel whether it was in place


def in_torch(call: Callable[[], Any]) -> Any:
    """Return what a call gives with torch's operators instead of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "_runs_on", lambda _: False)
        return call()


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def table(batch: int, seq: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = 3 * normal(batch, seq, half, seed=1)
    return angles.cos(), angles.sin()


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    within = min(ULP[dtype], ULP[torch.float32])  # of the products, which may cancel
    torch.testing.assert_close(found, wanted, rtol=ULP[dtype], atol=within)
