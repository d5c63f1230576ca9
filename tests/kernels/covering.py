"""The table of kernels as a covering array: few cells in which each two values of different factors meet at least once.

{feature} x {dtype} x {how heads share keys} x {head_dim} has a thousand cells, and a fault of a kernel comes from one
value or from two that meet. What is left open (lengths, layout, how a mask broadcasts) changes from cell to cell.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tilewise.domain.problem import Dtype, Layout, Pass, Problem

FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (0, 0)},  # as wide as the lengths allow: see problem_of
    "bool": {"mask": "bool"},
    "bias": {"mask": "bias"},
    "bias gradient": {"mask": "bias", "bias_grad": True},
    "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": True},
    "dropout": {"dropout": True},
    "varlen": {"varlen": True, "causal": True},
    "everything": {"mask": "bias", "bias_grad": True, "alibi": True, "softcap": True, "causal": True, "dropout": True},
}
SHARING: dict[str, dict[str, Any]] = {
    "mha": {"heads": 2, "kv_heads": 2},
    "gqa": {"heads": 4, "kv_heads": 2},
    "mqa": {"heads": 3, "kv_heads": 1},
    "mla": {"heads": 2, "kv_heads": 2},
}
LATENT = (192, 128)  # head_dim and v_head_dim of multi-head latent attention
HEAD_DIMS = ((16, 16), (40, 40), (56, 56), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (160, 160), (256, 256))
BROADCAST = ("", ".b1", ".h1", ".b1h1", ".h1q1", ".q1")


Values = tuple[str, Dtype, str, tuple[int, int]]


class Cell(NamedTuple):
    """One cell; `number` decides what no factor does."""

    feature: str
    dtype: Dtype
    sharing: str
    head_dims: tuple[int, int]
    number: int

    def __str__(self) -> str:
        dims = "x".join(map(str, dict.fromkeys(self.head_dims)))
        return f"{self.feature}-{self.dtype}-{self.sharing}-{dims}"


def pairs(values: tuple[Any, ...]) -> list[tuple[int, Any, int, Any]]:
    """Return each two values of `values` with the factors they belong to."""
    return [(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)]


def covering(cells: Iterable[tuple[Any, ...]], expensive: Callable[[tuple[Any, ...]], bool]) -> list[tuple[Any, ...]]:
    """Return some of `cells` in which every pair occurs that occurs in any.

    Greedy: the next is the one with most new pairs; of these a cheap one, whose values are in fewest cells so far.
    """
    candidates = list(cells)
    missing = {pair for cell in candidates for pair in pairs(cell)}
    used: Counter[tuple[int, Any]] = Counter()
    chosen = []
    while missing:
        best = min(
            candidates,
            key=lambda cell: (
                -len(missing.intersection(pairs(cell))),
                expensive(cell),
                sum(used[place] for place in enumerate(cell)),
            ),
        )
        missing.difference_update(pairs(best))
        used.update(enumerate(best))
        chosen.append(best)
    return chosen


def every() -> list[Values]:
    """Return the whole product: latent attention has its own head_dims, and they are nobody else's."""
    dims = [(sharing, each) for sharing in SHARING for each in (*HEAD_DIMS, LATENT)]
    return [
        (feature, dtype, sharing, each)
        for feature in FEATURES
        for dtype in Dtype
        for sharing, each in dims
        if (sharing == "mla") == (each == LATENT)
    ]


# float32 has no tensor cores: what it compiles to is long
CELLS = [
    Cell._make((*cell, number)) for number, cell in enumerate(covering(every(), lambda cell: cell[1] is Dtype.FP32))
]


def problem_of(cell: Cell, *, unit: int, batch: int) -> Problem:
    """Return a training problem of a cell: lengths around `unit`, of which more, fewer or as many are queries."""
    fewer, more = unit - unit // 5, unit + unit // 9
    lengths = [(fewer, more), (more, unit // 2), (unit, unit)]
    q_len, kv_len = lengths[cell.number % (2 if cell.feature == "causal" else 3)]
    fields = dict(FEATURES[cell.feature])
    if "mask" in fields:
        fields["mask"] += BROADCAST[cell.number % len(BROADCAST)]
    if "window" in fields:
        fields["window"] = ((unit // 4, 0), (unit // 7, unit // 9), (-1, unit // 6), (unit // 5, -1))[cell.number % 4]
    return Problem(
        pass_=Pass.TRAINING,
        dtype=cell.dtype,
        batch=batch,
        **SHARING[cell.sharing],
        q_len=q_len,
        kv_len=kv_len,
        head_dim=cell.head_dims[0],
        v_head_dim=cell.head_dims[1],
        layout=(Layout.BSHD, Layout.BHSD)[cell.number // 2 % 2 and "varlen" not in fields],
        **fields,
    )
