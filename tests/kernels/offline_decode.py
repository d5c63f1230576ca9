"""Compile the decoding kernels without a GPU: a script for a process in which Triton does not interpret.

Reads a list of cases from standard input and writes, for each, the shared memory in bytes, the number of 16-byte
copies into shared memory and of narrower ones.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewise.kernels.triton_kernels.combine import combine_splits
from tilewise.kernels.triton_kernels.decode import LAZY_ROWS, attention_decode

STRIDES = [f"stride_{tensor}{dim}" for tensor in "qkv" for dim in "bsh"]
NUMBERS = ("stride_table", "kv_heads", "q_len", "kv_len", "left", "right", "num_splits")


def decode(
    capability: int, dtype: str, dims: tuple[int, int], rows: tuple[int, int], page: int, window: bool,
    config: dict[str, int], strides: int,
) -> list[int]:  # fmt: skip
    """`rows`: q_len and heads per key head; `strides`: what those of the caches divide by."""
    (head_dim, v_head_dim), (q_len, group) = dims, rows
    split = config["num_splits"] > 1
    block_m = max(16, triton.next_power_of_2(q_len * group))
    types = {
        **dict.fromkeys(("query", "key", "value"), f"*{dtype}"),
        "out": "*fp32" if split else f"*{dtype}",
        "lse": "*fp32",
        **dict.fromkeys(("kv_lengths", "block_table"), "*i32"),
        **dict.fromkeys(("scale", "cap_log2"), "fp32"),
        **dict.fromkeys((*STRIDES, *NUMBERS), "i32"),
    }
    constants: dict[str, Any] = {
        "GROUP": group,
        "D": head_dim,
        "DV": v_head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_DV": triton.next_power_of_2(v_head_dim),
        "BLOCK_M": block_m,
        "BLOCK_N": config["block_n"],
        "PAGE": page,
        "LENGTHS": True,
        "LEFT": window,
        "SOFTCAP": window,
        "SPLIT": split,
        "LAZY": block_m <= LAZY_ROWS,
        "ALIGN": 4 if dtype == "fp32" else 8,
        "STAGES": config["num_stages"],
        "PRECISION": "ieee",
    }
    names = attention_decode.arg_names
    source = ASTSource(
        attention_decode,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*") or (name in STRIDES and strides % 16 == 0)
        },
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+)", found.asm["ptx"])]
    return [int(found.metadata.shared), copies.count(16), len(copies) - copies.count(16)]


def combine(capability: int, dtype: str, v_head_dim: int, num_splits: int) -> list[int]:
    types = {
        **dict.fromkeys(("part_out", "part_lse", "lse"), "*fp32"),
        "out": f"*{dtype}",
        **dict.fromkeys(("kv_heads", "q_len", "num_splits"), "i32"),
    }
    names = combine_splits.arg_names
    constants = {
        "GROUP": 8,
        "DV": v_head_dim,
        "BLOCK_DV": triton.next_power_of_2(v_head_dim),
        "BLOCK_S": min(16, num_splits),
        "BLOCK_SPLITS": num_splits,
    }
    source = ASTSource(
        combine_splits,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
    )
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    return [int(found.metadata.shared), 0, 0]


if __name__ == "__main__":
    kinds: dict[str, Callable[..., list[int]]] = {"decode": decode, "combine": combine}
    json.dump([kinds[kind](*case) for kind, *case in json.load(sys.stdin)], sys.stdout)
