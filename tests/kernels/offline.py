"""Compile the Triton kernels without a GPU: a script for a process in which Triton does not interpret.

Reads a list of [capability, role, head_dim, causal, mask, config, varlen] from standard input and writes the shared
memory of each.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tilewise.kernels.tiles import padded
from tilewise.kernels.triton_kernels.backward import dkdv_kernel, dq_kernel
from tilewise.kernels.triton_kernels.forward import attention_forward

KERNELS = {"forward": attention_forward, "dkdv": dkdv_kernel, "dq": dq_kernel}
TILED = {"query": "block_m", "grad_out": "block_m", "key": "block_n", "value": "block_n"}
SCALARS = {"scale": "fp32", "softcap": "fp32", "dropout": "fp32", "seed": "i64"}
FLOATS = ("lse", "lse2", "delta")


def signature(name: str, constants: dict[str, Any], config: dict[str, int], columns: int) -> str:
    if name in constants:
        return "constexpr"
    if name in TILED and config["tma"]:
        return f"tensordesc<fp16[1, {config[TILED[name]]}, 1, {columns}]>"
    if name in FLOATS:
        return "*fp32"
    if name in TILED or name in ("out", "mask", "slopes") or name.startswith("grad_"):
        return "*fp16"
    if name in ("cu_q", "cu_kv"):
        return "*i32"
    return SCALARS.get(name, "i32")


def shared_memory(
    capability: int, role: str, head_dim: int, causal: bool, mask: int, config: dict[str, int], varlen: bool = False
) -> int:
    kernel = KERNELS[role]
    names = kernel.arg_names
    everything = {
        "GROUP": 1,
        "D": head_dim,
        "DV": head_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_DV": padded(head_dim),
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"],
        "LEFT": False,
        "RIGHT": causal,
        "MASK": mask,
        "ALIBI": False,
        "SOFTCAP": False,
        "DROPOUT": False,
        "FOLD": mask == 0,
        "TMA": bool(config["tma"]),
        "PRECISION": "ieee",
        "slopes": None,
        "VARLEN": varlen,
    }
    if mask == 0:
        everything["mask"] = None
    if not varlen:
        everything |= {"cu_q": None, "cu_kv": None}
    constants = {name: value for name, value in everything.items() if name in names}
    types = {name: signature(name, constants, config, padded(head_dim)) for name in names}
    # what the launch of an aligned call would see
    divisible = [name for name, kind in types.items() if kind.startswith("*") or name.startswith("stride_")]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {"num_warps": config["num_warps"], "num_stages": config["num_stages"]}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "ptx" in compiled.asm
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    json.dump([shared_memory(*case) for case in json.load(sys.stdin)], sys.stdout)
