"""What the tests of kernels share."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter products of bfloat16: it multiplies their bit patterns (triton-lang/triton#11584)."""
    if torch.cuda.is_available():
        return
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def with_bfloat16(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            interpreter.TensorHandle(
                interpreter._convert_float(x.data, bfloat16, float32, None).view("float32"), float32
            )
            if x.dtype.scalar == bfloat16
            else x
            for x in (a, b)
        ]
        return create_dot(builder, *wide, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", with_bfloat16)
