"""Compile the forward without a GPU: a script for a process in which Triton does not interpret.

Reads a list of [capability, head_dim, causal, config] from standard input and writes the shared memory of each.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewise.kernels.triton_kernels.forward import attention_forward

STRIDES = [f"stride_{tensor}{dim}" for tensor in "qkvo" for dim in "bsh"]
TYPES = {
    **dict.fromkeys(("query", "key", "value", "out"), "*fp16"),
    "lse": "*fp32",
    "scale_log2": "fp32",
    **dict.fromkeys((*STRIDES, "heads", "q_len", "kv_len", "left", "right"), "i32"),
}
# what the launch of an aligned call would see
DIVISIBLE = {"query", "key", "value", "out", "lse", *STRIDES}


def shared_memory(capability: int, head_dim: int, causal: bool, config: dict[str, int]) -> int:
    constants: dict[str, Any] = {
        "GROUP": 1,
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": head_dim,
        "BLOCK_DV": head_dim,
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "LEFT": False,
        "RIGHT": causal,
        "PRECISION": "ieee",
    }
    names = attention_forward.arg_names
    source = ASTSource(
        attention_forward,
        {name: TYPES.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in DIVISIBLE},
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "ptx" in compiled.asm
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    json.dump([shared_memory(*case) for case in json.load(sys.stdin)], sys.stdout)
