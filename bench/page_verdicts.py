"""What must hold of the benchmark page, and what its rows say of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tilewise.domain.problem import Dtype, Pass

from .page_records import BASELINE, EXPLICIT, PageRow, geomean
from .trinix_layers import TRINIX

SPEEDUP = 2.8  # geomean of auto over the plain form
CEILING = 0.9  # of each row
SLOWER = 0.02  # auto against the fastest explicit backend
SAME = 0.05  # the plain form against trinix's
ROWS = 15  # five layers of three models


@dataclass(frozen=True, slots=True, kw_only=True)
class PageVerdict:
    """One claim: what was found, what is wanted, and in which row it is worst; met is None where rows are missing."""

    claim: str
    found: str
    wanted: str
    met: bool | None
    worst: str = ""


def verdicts(rows: Iterable[PageRow]) -> tuple[PageVerdict, ...]:
    """Return the verdicts of each dtype and of causal and full attention, over the rows of the page's own layers."""
    kept = [row for row in rows if not row.spec.sweep and row.spec.layer != "mla"]
    found: list[PageVerdict] = []
    for dtype in Dtype:
        for causal in (True, False):
            group = [row for row in kept if row.spec.dtype is dtype and row.spec.causal is causal]
            if group:
                found += _of(group, f"{dtype}, {'causal' if causal else 'full'}")
    return tuple(found)


def _of(rows: Sequence[PageRow], which: str) -> list[PageVerdict]:
    found = []
    for pass_ in Pass:
        of_pass = [row for row in rows if row.spec.pass_ is pass_]
        if of_pass:
            found.append(_speedup(of_pass, f"auto over PyTorch, {pass_}, {which}"))
    found += [_filled(rows, f"rows with every cell, {which}"), _ceiling(rows, which), _explicit(rows, which)]
    return found + [verdict for verdict in (_same(rows, which), *_against_trinix(rows, which)) if verdict is not None]


def _filled(rows: Sequence[PageRow], claim: str) -> PageVerdict:
    passes = {row.spec.pass_ for row in rows}
    short = [row for row in rows if any(row.timing(name) is None for name in (*EXPLICIT, "auto"))]
    whole, wanted = len(rows) - len(short), ROWS * len(passes)
    worst = short[0].spec.name if short else ""
    return PageVerdict(claim=claim, found=str(whole), wanted=str(wanted), met=whole == wanted, worst=worst)


def _speedup(rows: Sequence[PageRow], claim: str) -> PageVerdict:
    speedups = {row.spec.name: value for row in rows if (value := row.speedup("auto")) is not None}
    middle = geomean(list(speedups.values()))
    worst = min(speedups, key=speedups.__getitem__, default="")
    return PageVerdict(
        claim=f"{claim}: geomean of {len(speedups)} rows",
        found="-" if middle is None else f"{middle:.2f}x",
        wanted=f"{SPEEDUP}x",
        met=None if middle is None or len(speedups) < ROWS else middle >= SPEEDUP,
        worst=f"{worst} ({speedups[worst]:.2f}x)" if worst else "",
    )


def _ceiling(rows: Sequence[PageRow], which: str) -> PageVerdict:
    shares = {row.spec.name: row.of_ceiling for row in rows if row.of_ceiling is not None}
    worst = min(shares, key=shares.__getitem__, default="")
    return PageVerdict(
        claim=f"auto of its ceiling, each row, {which}",
        found=f"{shares[worst]:.0%}" if worst else "-",
        wanted=f"{CEILING:.0%}",
        met=_met([share >= CEILING for share in shares.values()], rows),
        worst=worst,
    )


def _met(held: Sequence[bool], rows: Sequence[PageRow]) -> bool | None:
    """Whether a claim on each row holds: None where it does as far as there are rows, but not all are there."""
    whole = len(held) >= ROWS * len({row.spec.pass_ for row in rows})
    return False if not all(held) else (True if whole else None)


def _explicit(rows: Sequence[PageRow], which: str) -> PageVerdict:
    slower: dict[str, float] = {}
    for row in rows:
        fastest = row.fastest(EXPLICIT)
        share = None if fastest is None else row.speedup(fastest, over="auto")
        if share is not None:
            slower[f"{row.spec.name}, behind {fastest}"] = share - 1
    worst = max(slower, key=slower.__getitem__, default="")
    return PageVerdict(
        claim=f"auto slower than the fastest explicit backend, each row, {which}",
        found=f"{slower[worst]:+.1%}" if worst else "-",
        wanted=f"at most {SLOWER:.0%}",
        met=_met([share <= SLOWER for share in slower.values()], rows),
        worst=worst,
    )


def _same(rows: Sequence[PageRow], which: str) -> PageVerdict | None:
    apart = {row.spec.name: value - 1 for row in rows if (value := row.speedup(BASELINE, "trinix_pytorch")) is not None}
    if not apart:
        return None
    worst = max(apart, key=lambda name: abs(apart[name]))
    return PageVerdict(
        claim=f"trinix's PyTorch against the baseline, each row, {which}",
        found=f"{apart[worst]:+.1%}",
        wanted=f"within {SAME:.0%}",
        met=_met([abs(share) <= SAME for share in apart.values()], rows),
        worst=worst,
    )


def _against_trinix(rows: Sequence[PageRow], which: str) -> list[PageVerdict]:
    """Return auto's speed and memory against the faster, and the smaller, of trinix's own."""
    speeds: dict[str, float] = {}
    memory: dict[str, float] = {}
    for row in rows:
        fastest = row.fastest(tuple(TRINIX))
        speed = None if fastest is None else row.speedup("auto", over=fastest)
        if speed is not None:
            speeds[row.spec.name] = speed
        sizes = [cell.peak_bytes for name in TRINIX if (cell := row.cell(name)) is not None and cell.peak_bytes]
        auto = row.cell("auto")
        if sizes and auto is not None and auto.peak_bytes:
            memory[row.spec.name] = min(sizes) / auto.peak_bytes
    found = []
    for what, values in (("speed", speeds), ("memory", memory)):
        if values:
            worst = min(values, key=values.__getitem__)
            mean = sum(values.values()) / len(values)
            found.append(
                PageVerdict(
                    claim=f"auto against the best of trinix, {what}, each row, {which}",
                    found=f"{values[worst]:.2f}x, {mean:.2f}x on average",
                    wanted="more than 1x",
                    met=_met([value > 1 for value in values.values()], rows),
                    worst=worst,
                )
            )
    return found
