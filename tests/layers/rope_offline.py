"""Compile the kernels of layers/rope_kernel.py for GPUs that are not here; a process in which Triton interprets cannot.

Prints JSON, a line per kernel: a name, bytes of stack, and how wide its loads and stores are.
"""

import json
import re

import torch

from tilewise.kernels.offline import Compiled, compiling
from tilewise.layers import rope_kernel

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def said(name: str, found: Compiled) -> None:
    ptx = re.findall(r"(ld|st)\.global(?:\.v(\d))?\.b(\d+)", found.ptx)
    widths = sorted({int(count or 1) * int(bits) // 8 for _, count, bits in ptx})
    print(json.dumps([f"{found.kernel} {name}", found.stack, widths]))


def turned(name: str, capability: int, heads: torch.Tensor, half: int, *, in_place: bool = False, **how: bool) -> None:
    cos, sin = empty(1, 2048, half), empty(1, 2048, half)
    with compiling(capability) as found:
        rope_kernel.turn(heads, heads if in_place else torch.empty_like(heads), cos, sin, **how)
    said(name, found["turn_heads"])


for capability in (80, 90):
    for dtype in DTYPES:
        where = f"{dtype} sm_{capability}"
        wide, usual = empty(2, 2048, 128, 192, dtype=dtype), empty(2, 2048, 8, 128, dtype=dtype)
        turned(f"pairs {where}", capability, wide, 32, back=False, from_pairs=True, to_pairs=False)
        turned(f"in place {where}", capability, wide, 32, in_place=True, back=False, from_pairs=True, to_pairs=False)
        turned(f"back to pairs {where}", capability, wide, 32, back=True, from_pairs=False, to_pairs=True)
        turned(f"halves {where}", capability, usual, 64, back=False, from_pairs=False, to_pairs=False)
        with compiling(capability) as found:
            rope_kernel.join(empty(2, 2048, 128, 128, dtype=dtype), empty(2, 2048, 576, dtype=dtype)[..., 512:])
        said(where, found["join_heads"])
