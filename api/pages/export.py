"""The list of tuned problems as files: every row that the filters leave, sent while it is read."""

import csv as csv_files
import io
import json as json_text
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC

from starlette.responses import StreamingResponse

from tilewise.db.answer_lists import AnswerFilter, AnswerListRepository, ListedAnswer, Sort
from tilewise.db.session import Database
from tilewise.domain import codec

from .. import describe

_BATCH = 200  # answers read in one transaction
# A spreadsheet takes a text that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One row. Times in milliseconds, `measured` in UTC, speed-ups as factors; empty where nothing is known."""

    device: str
    problem: str
    forward: str
    backward: str
    expected_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    torch_ms: float | None
    tflops: float | None
    speedup_over_torch: float | None
    speedup_over_default: float | None
    match: str
    outdated: str
    noise: float | None
    trials: int | None
    failed: int | None
    measured: str
    version: int
    software: str


def csv(database: Database, wanted: AnswerFilter, *, sort: Sort, descending: bool) -> StreamingResponse:
    """Return the rows as CSV with a line of names."""
    names = [field.name for field in fields(Exported)]

    def lines() -> Iterator[str]:
        yield _line(names)
        for row in _rows(database, wanted, sort=sort, descending=descending):
            yield _line([_cell(getattr(row, name)) for name in names])

    return _sent(lines(), "text/csv", "csv")


def json(database: Database, wanted: AnswerFilter, *, sort: Sort, descending: bool) -> StreamingResponse:
    """Return the rows as a JSON list of objects."""

    def parts() -> Iterator[str]:
        before = "[\n"
        for row in _rows(database, wanted, sort=sort, descending=descending):
            yield before + json_text.dumps(codec.to_json(row), ensure_ascii=False)
            before = ",\n"
        yield "[]\n" if before == "[\n" else "\n]\n"

    return _sent(parts(), "application/json", "json")


def _sent(content: Iterator[str], media_type: str, ending: str) -> StreamingResponse:
    headers = {
        "Content-Disposition": f'attachment; filename="tilewise-problems.{ending}"',
        "Cache-Control": "no-cache",
    }
    return StreamingResponse(content, media_type=media_type, headers=headers)


def _rows(database: Database, wanted: AnswerFilter, *, sort: Sort, descending: bool) -> Iterator[Exported]:
    """Yield the rows, read a batch at a time: whoever reads slowly holds no transaction open."""
    with database.read() as session:
        keys = AnswerListRepository(session).keys(wanted, sort=sort, descending=descending)
    for start in range(0, len(keys), _BATCH):
        with database.read() as session:
            found = AnswerListRepository(session).some(keys[start : start + _BATCH])
        yield from map(_exported, found)


def _exported(listed: ListedAnswer) -> Exported:
    answer, evidence = listed.answer, listed.answer.evidence
    low, high = answer.interval or (None, None)
    measured = evidence.measured if evidence else listed.updated
    return Exported(
        device=answer.device_key,
        problem=answer.problem.key,
        forward=str(answer.plan.forward),
        backward=str(answer.plan.backward or ""),
        expected_ms=answer.expected_ms,
        p20_ms=low,
        p80_ms=high,
        torch_ms=answer.baseline_ms,
        tflops=describe.tflops(answer.problem, listed.forward_flops, answer.expected_ms),
        speedup_over_torch=answer.speedup,
        speedup_over_default=answer.default_speedup,
        match="stale" if listed.outdated else str(answer.match),
        outdated="; ".join(listed.outdated),
        noise=evidence.noise if evidence else None,
        trials=evidence.trials if evidence else None,
        failed=evidence.failed if evidence else None,
        measured=measured.astimezone(UTC).isoformat(timespec="seconds"),
        version=answer.version,
        software=answer.software.key,
    )


def _line(cells: list[str]) -> str:
    text = io.StringIO()
    csv_files.writer(text).writerow(cells)
    return text.getvalue()


def _cell(value: str | float | int | None) -> str:
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return "" if value is None else str(value)
