"""What `tilewise bench compile` says of the configs that matrix.py compiled.

Per kernel, architecture and kind of problem: how many configs the space has, how many of them were compiled, what
failed, shared memory, registers, spills, and how well the spaces' own prediction of shared memory held.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewise.domain import codec
from tilewise.domain.trial import Outcome

from .matrix import DEVICES, Row, grid, kind, predicted, spaces, versions

Counts = tuple[tuple[str, int], ...]  # the most frequent first
SPILLING = 64  # bytes of stack per thread from which a config is counted as spilling


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """All rows of one role, architecture and kind of problem.

    - kind: dtype, head dims and what else the kernel compiles in.
    - grid, space: combinations of parameters, and those of them that keep the space's constraints, over all problems.
    - refused: how many of the grid a constraint refuses, by its reason; one that breaks several counts for the first.
    - tried, compiled: distinct configs of the space that were compiled, and those for which that went well.
    - too_large: compiled configs of the space that need more shared memory than the device has.
    - refused_tried, refused_wrongly: configs refused for their shared memory that were compiled, and that would fit.
    - exact, under: compiled configs, refused ones too, of which the space predicts the very bytes, and too few.
    - shared_memory, registers: least and most of the compiled configs of the space, bytes and per thread.
    - spilling, stack: how many of them have SPILLING bytes of stack per thread or more, and the most.
    - overwritten: how many of them are wrong by kernels.sass: their results are, and no search takes them.
    """

    role: str
    arch: str
    kind: str
    problems: int
    grid: int
    space: int
    refused: Counts
    tried: int
    compiled: int
    failed: Counts
    too_large: int
    refused_tried: int
    refused_wrongly: int
    exact: int
    under: int
    shared_memory: tuple[int, int]
    registers: tuple[int, int]
    spilling: int
    stack: int
    overwritten: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the command writes. `special`: the rows of defaults, corners and winners, and of everything that failed."""

    torch: str
    triton: str
    command: str
    lines: tuple[Line, ...]
    special: tuple[Row, ...]
    seconds: float


def summarise(rows: Sequence[Row], command: str) -> Report:
    """Return the report of all `rows`, a line per role, architecture and kind of problem."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.job.role, row.job.arch, kind(row.job.problem, row.job.role)), []).append(row)
    found = versions()
    special = [row for row in rows if row.job.why not in ("space", "refused") or row.outcome is not Outcome.OK]
    return Report(
        torch=str(found["torch"]),
        triton=str(found["triton"]),
        command=command,
        lines=tuple(_line(*group, rows) for group, rows in groups.items()),
        special=tuple(special),
        seconds=round(sum(row.seconds for row in rows), 1),
    )


def _line(role: str, arch: str, what: str, rows: Sequence[Row]) -> Line:
    device = DEVICES[arch]
    of_space = [row for row in rows if row.job.why != "refused"]
    refused = [row for row in rows if row.job.why == "refused" and row.outcome is Outcome.OK]
    good = [row for row in of_space if row.outcome is Outcome.OK]
    counted = [
        (row, predicted(row.job.problem, role, device, row.job.config))
        for row in (*good, *refused)
        if row.job.config is not None and role != "combine"
    ]
    searched = [
        found
        for problem in dict.fromkeys(row.job.problem for row in rows)
        if (found := spaces(problem, device)[role]) is not None and role != "combine"
    ]
    reasons: Counter[str] = Counter()
    for space in searched:
        reasons.update(space.why_not(config) or "" for config in grid(space))
    inside = reasons.pop("", 0)
    failed = Counter(f"{row.outcome}: {row.message}" for row in of_space if row.outcome is not Outcome.OK)
    return Line(
        role=role,
        arch=arch,
        kind=what,
        problems=len({row.job.problem for row in rows}),
        grid=inside + reasons.total(),
        space=inside,
        refused=tuple(reasons.most_common()),
        tried=len(of_space),
        compiled=len(good),
        failed=tuple(failed.most_common()),
        too_large=sum(not row.fits for row in good),
        refused_tried=len(refused),
        refused_wrongly=sum(row.fits for row in refused),
        exact=sum(row.shared_memory == count for row, count in counted),
        under=sum(row.shared_memory > count for row, count in counted),
        shared_memory=_extremes(row.shared_memory for row in good),
        registers=_extremes(row.registers for row in good),
        spilling=sum(row.stack >= SPILLING for row in good),
        stack=max((row.stack for row in good), default=0),
        overwritten=sum(row.overwritten > 0 for row in good),
        seconds=round(sum(row.seconds for row in rows), 1),
    )


def _extremes(numbers: Iterable[int]) -> tuple[int, int]:
    found = list(numbers)
    return (min(found), max(found)) if found else (0, 0)


COLUMNS = (
    "kernel",
    "arch",
    "kind",
    "grid",
    "space",
    "tried",
    "compiled",
    "failed",
    "too large",
    "refused wrongly",
    "predicted exactly",
    "shared memory KiB",
    "registers",
    "spilling",
    "stack B",
    "overwritten",
)


def cells(line: Line) -> list[str]:
    """Return a line in the order of COLUMNS."""
    low, high = line.shared_memory
    return [
        line.role,
        line.arch,
        line.kind,
        str(line.grid or "-"),
        str(line.space or "-"),
        str(line.tried),
        str(line.compiled),
        str(line.tried - line.compiled),
        str(line.too_large),
        f"{line.refused_wrongly} of {line.refused_tried}",
        str(line.exact),
        f"{low / 1024:.1f} to {high / 1024:.1f}",
        "{} to {}".format(*line.registers),
        str(line.spilling),
        str(line.stack),
        str(line.overwritten),
    ]


def markdown(report: Report) -> str:
    """Return the report for readers."""
    total = Counter[str]()
    for line in report.lines:
        total.update(
            tried=line.tried,
            compiled=line.compiled,
            space=line.space,
            too_large=line.too_large,
            refused_tried=line.refused_tried,
            refused_wrongly=line.refused_wrongly,
            exact=line.exact,
            under=line.under,
            overwritten=line.overwritten,
        )
    failures = Counter[str]()
    for line in report.lines:
        failures.update({f"{line.role} {line.arch} {reason}": count for reason, count in line.failed})
    rows = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *map(cells, report.lines))]
    return "\n".join(
        [
            "# What our kernels compile to, without a GPU",
            "",
            f"Triton {report.triton}, torch {report.torch}; {report.seconds:.0f} s of compiling.",
            "",
            f"    {report.command}",
            "",
            f"Of {total['space']} configs in the spaces {total['tried']} were tried (kernels without parameters among "
            f"them): {total['compiled']} compiled, {total['tried'] - total['compiled']} failed, "
            f"{total['too_large']} need more shared memory than the device has. Of {total['refused_tried']} tried that "
            f"the spaces refuse for their shared memory alone, {total['refused_wrongly']} would fit. The prediction is "
            f"the very number for {total['exact']} and too low for {total['under']}. In "
            f"{total['overwritten']} ptxas overwrites operands (docs/notes/triton.md): a search rejects their results.",
            "",
            f"grid: combinations of parameters over all problems of a kind; space: those that keep the constraints; "
            f"spilling: {SPILLING} bytes of stack per thread or more. A line is one kernel (code for one kind of "
            "problem) on one architecture.",
            "",
            *rows,
            "",
            "## What failed",
            "",
            *([f"- {count}: {reason}" for reason, count in failures.most_common()] or ["Nothing."]),
            "",
        ]
    )


def write(report: Report, output: Path) -> None:
    """Write the report as `output`, JSON, and as Markdown beside it."""
    output.write_text(json.dumps(codec.to_json(report), separators=(",", ":")) + "\n")
    output.with_suffix(".md").write_text(markdown(report))
