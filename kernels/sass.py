"""What to look for in machine code: operands of wgmma that ptxas overwrites while a loop still needs them.

ptxas 12.8, of Triton 3.6 and 3.7, does this to the left side of a product that a loop takes from registers, where it
came before the loop: in dkdv (keys and values) a product's result lands there, in a forward of one loop (queries) the
weights do (docs/notes/triton.md). From the second iteration on, the product is of something else. A search rejects such
a config, whose results are wrong; a default is not checked where it runs.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from triton import knobs

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?(.*?) ;")
_LABEL = re.compile(r"^(\.L\w+):")
_PRODUCT = re.compile(
    r"HGMMA\.64x(?P<columns>\d+)x\d+\.(?P<to>F32|F16)\S* R(?P<to_first>\d+), "
    r"(?:R(?P<left>\d+)|gdesc\[UR\d+\]\S*), (?:gdesc\[UR\d+\]\S*, )?(?P<start>RZ|R\d+)"
)
_RESULT = re.compile(r"([A-Z0-9_]+)((?:\.\w+)*) (?:P\w+, )?R(\d+)")
_NO_RESULT = ("ST", "RED", "LDGSTS", "SYNCS", "BAR", "BRA", "R2UR", "UTMA", "WARPGROUP")
_LOADS = ("LDSM", "LDS", "LDG", "LDL")
_LEFT_REGISTERS = 4  # of a thread, of 64 x 16 half-precision elements


@dataclass(frozen=True, slots=True)
class _Product:
    result: frozenset[int]
    left: frozenset[int]  # empty where it comes from shared memory
    fresh: bool  # nothing is added to: the result overwrites what was there


def overwritten(cubin: bytes) -> frozenset[int]:
    """Return the registers that hold the left side of a product from before a loop, and something else from in it.

    Empty for code without wgmma. Raises subprocess.CalledProcessError where nvdisasm cannot read `cubin`.
    """
    lines = _disassembled(cubin)
    return frozenset(register for loop in _loops(lines) for register in _overwritten_in(loop))


def _disassembled(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _loops(lines: list[str]) -> Iterator[list[str]]:
    """Yield the instructions from a label to each branch back to it, but for those of waits behind the end."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in lines:
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(instruction[2])
            target = re.match(r"BRA `\((\.L\w+)\)", instruction[2])
            if target and target[1] in labels and "EXIT" not in found[labels[target[1]] :]:
                yield found[labels[target[1]] :]


def _overwritten_in(loop: list[str]) -> frozenset[int]:
    """Return what a fresh product takes from before the loop, and the loop writes though it does not load it anew."""
    written: set[int] = set()
    before: set[int] = set()
    loaded: set[int] = set()
    scores: frozenset[int] = frozenset()  # the result of the last fresh product, to which more may be added
    for line in loop:
        product = _product(line)
        if product is None:
            results = _results(line)
            written.update(results)
            loaded.update(results if line.startswith(_LOADS) else ())
            continue
        scores = product.result if product.fresh else scores
        # what is added to other results may come from the iteration before, as weights of a pipelined loop do
        before |= product.left - written if product.result == scores else frozenset()
        written |= product.result
    return frozenset(before & written - loaded)


def _product(line: str) -> _Product | None:
    found = _PRODUCT.match(line)
    if found is None:
        return None
    first, registers = int(found["to_first"]), int(found["columns"]) // (2 if found["to"] == "F32" else 4)
    left = () if found["left"] is None else range(int(found["left"]), int(found["left"]) + _LEFT_REGISTERS)
    return _Product(frozenset(range(first, first + registers)), frozenset(left), found["start"] == "RZ")


def _results(line: str) -> range:
    found = _RESULT.match(line)
    if found is None or found[1].startswith(_NO_RESULT):
        return range(0)
    width = 4 if found[1] == "LDSM" or ".128" in found[2] else 2 if ".64" in found[2] or "WIDE" in found[2] else 1
    return range(int(found[3]), int(found[3]) + width)
