"""Compile launches of ours without a GPU: a script for a process in which Triton does not interpret.

Reads a list of [role, problem, config, capability, bytes of shared memory that a block has] from standard
input, the problem as its key, and writes what came of each: sizes, how many bytes the copies into shared memory bring
and how many mbarriers there are, or the outcome that the tuner would keep.
"""

import json
import re
import sys
from collections import Counter
from typing import Any

from tilewise.domain import codec
from tilewise.domain.config import Config
from tilewise.domain.problem import Problem
from tilewise.kernels import offline
from tilewise.tuner.trying import classify


def result(role: str, key: str, config: Any, capability: int, available: int) -> dict[str, Any]:
    chosen = None if config is None else codec.from_json(Config, config)
    try:
        found = offline.compiled(role, Problem.parse(key), chosen, capability, shared_memory=available)
    except Exception as raised:  # every case has its line
        return {"outcome": classify(raised), "message": str(raised)[:500]}
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+)", found.ptx)
    return {
        "outcome": "ok",
        "shared": found.shared_memory,
        "registers": found.registers,
        "stack": found.stack,
        "copies": Counter(str(int(size, 0)) for size in copies),
        "barriers": found.ptx.count("mbarrier.init"),
    }


if __name__ == "__main__":
    json.dump([result(*case) for case in json.load(sys.stdin)], sys.stdout)
