"""Copies as wide as a tile, in Triton's interpreter."""

import pytest
import torch

from tilewise.kernels.triton_kernels.padding import pad_columns


@pytest.mark.parametrize("columns", [16, 40, 56, 64, 72, 200])
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "rows"])
def test_columns_are_padded_with_zeros(columns: int, layout: str) -> None:
    if layout == "rows":  # of a wider tensor
        tensor = torch.randn(2, 19, 3, columns + 8)[..., :columns]
    elif layout == "bhsd":
        tensor = torch.randn(2, 3, 19, columns).transpose(1, 2)
    else:
        tensor = torch.randn(2, 19, 3, columns)
    width = 1 << (columns - 1).bit_length()
    padded = pad_columns(tensor.half())
    assert padded.is_contiguous()
    torch.testing.assert_close(padded, torch.nn.functional.pad(tensor.half(), (0, width - columns)), rtol=0, atol=0)
