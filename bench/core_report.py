"""The report of `tilewise bench core`: one JSON document that invocations add rows to, and a Markdown page of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome, now

from . import report_file
from .bars import COPY, Share, Verdict, judge, named
from .records import Row, Run


@dataclass(frozen=True, slots=True)
class Broken:
    """A candidate that left the device unusable for its process: it is not tried on that problem again."""

    problem: Problem
    candidate: Candidate
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows of one device, and what they say of the bars. command and software are those of the last invocation."""

    command: str
    device: Device
    device_key: str
    software: Software
    updated: datetime
    verdicts: tuple[Verdict, ...] = ()
    rows: tuple[Row, ...] = ()
    broken: tuple[Broken, ...] = field(default=())

    def row(self, problem: Problem) -> Row | None:
        return next((row for row in self.rows if row.problem == problem), None)

    def with_row(self, row: Row) -> "Report":
        """Return the report with `row` in the place of an older one of its problem."""
        rows = {each.problem: each for each in self.rows} | {row.problem: row}
        return replace(self, rows=tuple(rows.values()), verdicts=judge(rows.values()), updated=now())

    def judged(self) -> "Report":
        """Return the report with the verdicts that today's bars give its rows."""
        return replace(self, verdicts=judge(self.rows))

    def with_broken(self, broken: Broken) -> "Report":
        return replace(self, broken=(*self.broken, broken), updated=now())


def opened(path: Path, run: Run) -> Report:
    """Return the report at `path` for `run` to add to, an empty one where there is no file.

    Raises SettingsError for a file that is no such report, or one of another device.
    """
    empty = Report(
        command=run.command, device=run.device, device_key=run.device_key, software=run.software, updated=now()
    )
    if not path.exists():
        return empty
    found = read(path)
    report_file.check_device(path, found.device_key, run.device_key)
    return replace(empty, rows=found.rows, broken=found.broken, verdicts=judge(found.rows))


def read(path: Path) -> Report:
    """Return the report at `path`. Raises SettingsError where there is none."""
    return report_file.load(Report, path, command="tilewise bench core")


def write(report: Report, path: Path) -> None:
    """Write the JSON to `path` and the page beside it."""
    report_file.save(report, page(report), path)


# the page


def summary(verdict: Verdict, *, where: bool = True) -> str:
    """Return the one line that says how a bar stands; `where`: and in which cell it is worst."""
    if verdict.geomean is None or verdict.worst is None:
        return f"nothing to compare in any of {len(verdict.missing)} cells"
    if len(verdict.shares) == 1:
        return f"{verdict.worst:.3f}{_bar(verdict.each_bar)}: {standing(verdict)}"
    place = f" at {verdict.worst_cell}" if where else ""
    return (
        f"geomean {verdict.geomean:.3f}{_bar(verdict.geomean_bar)}, "
        f"worst {verdict.worst:.3f}{place}{_bar(verdict.each_bar)}: {standing(verdict)}"
    )


def standing(verdict: Verdict) -> str:
    """Return in words whether a bar is met, and what is not in that yet."""
    if verdict.geomean_bar is None and verdict.each_bar is None:
        said = "no bar"
    elif verdict.met is None:
        said = "open"
    else:
        said = "met" if verdict.met else "not met"
    if verdict.missing:
        said += f", {len(verdict.missing)} of {len(verdict.missing) + len(verdict.shares)} cells missing"
    return f"{said}, some rivals absent" if verdict.without else said


def _bar(least: float | None) -> str:
    return "" if least is None else f" (bar {least:g})"


def page(report: Report) -> str:
    """Return the Markdown page: how it was measured, a table per bar, and what was refused or failed."""
    lines = [
        f"# Attention cores on {report.device.name}",
        "",
        f"{report.device.name} (`{report.device_key}`); {_versions(report.software)}. Measured by",
        "",
        "```sh",
        *dict.fromkeys(row.run.command for row in report.rows),
        "```",
        "",
        "Each row is one final: the calls of all its candidates alternate, with the cache cleared before each. A share "
        "is the rival's time over ours, from their ratios to the final's reference: above 1 ours is faster. Behind ± "
        "is the sum of the half-widths of both times' 95% intervals.",
    ]
    stale = {row.run.software.key for row in report.rows} - {report.software.key}
    if stale:
        lines += ["", "Rows are of more than one version of the software; each names its own in the JSON."]
    for verdict in report.verdicts:
        lines += ["", *_section(verdict, report)]
    lines += ["", *_failures(report.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _versions(software: Software) -> str:
    names = ("torch", "triton", "cuda", "driver", "cudnn", "flash_attn")
    return ", ".join(f"{name} {getattr(software, name)}" for name in names if getattr(software, name))


def _section(verdict: Verdict, report: Report) -> list[str]:
    found = [(share, row) for share in verdict.shares if (row := report.row(share.cell.problem)) is not None]
    unit = "GB/s" if any(share.rival == COPY for share, _ in found) else "TFLOP/s"
    others = list(dict.fromkeys(name for _, row in found for name in row.others))
    columns = ["cell", "ours ms", unit, *(f"{named(name)} ms" for name in others)]
    columns += ["share", "of", "noise", "measured", "our config"]
    lines = [f"## {verdict.title}", "", f"**{summary(verdict)}.**"]
    if found:
        lines += ["", _line(columns), _line(["---"] * len(columns))]
    lines += [_line(_cells(share, row, others)) for share, row in found]
    for each in verdict.against:
        over = f"{named(each.backend)}: geomean {each.geomean:.3f}, worst {each.worst:.3f} over {each.cells} cells"
        lines += ["", f"Against {over}."] if each == verdict.against[0] else [f"Against {over}."]
    for what, reasons in (("Not measured", verdict.missing), ("Without", verdict.without)):
        if reasons:
            lines += ["", f"{what}:", "", *(f"- {reason}" for reason in reasons)]
    return lines


def _cells(share: Share, row: Row, others: Iterable[str]) -> list[str]:
    ours = row.best(row.ours)
    assert ours is not None, "a row with a share has an entry of ours"
    times = [f"{entry.measurement.median_ms:.4f}" if (entry := row.best(name)) else "-" for name in others]
    return [
        share.cell.name,
        f"{share.ours_ms:.4f}",
        f"{ours.rate:.0f}" if ours.rate >= 10 else f"{ours.rate:.2g}",
        *times,
        f"{share.share:.3f} ± {share.spread:.3f}",
        named(share.rival),
        f"{row.noise:.2%}",
        f"{row.run.started:%Y-%m-%d %H:%M}",
        str(ours.candidate).replace("|", "\\|"),
    ]


def _failures(rows: Iterable[Row]) -> list[str]:
    """Return what has no right result: a line for all whose reasons differ in numbers only, with the first of them."""
    alike: dict[tuple[str, str, str], list[tuple[str, Problem]]] = {}
    for row in rows:
        for trial in row.trials:
            if trial.outcome is not Outcome.OK:
                kind = re.sub(r"[0-9][0-9.e+-]*", "0", trial.message)
                key = trial.candidate.backend, str(trial.outcome), kind
                alike.setdefault(key, []).append((trial.message.replace("|", "\\|"), row.problem))
    if not alike:
        return []
    lines = ["## Refused or failed", "", _line(["backend", "outcome", "reason", "candidates", "rows"])]
    lines.append(_line(["---"] * 5))
    for (backend, outcome, _), found in alike.items():
        problems = {problem for _, problem in found}
        lines.append(_line([backend, outcome, found[0][0], str(len(found)), str(len(problems))]))
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
