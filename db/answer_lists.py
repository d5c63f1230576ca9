"""Lists of standing answers for people: searched, filtered, sorted, page by page; and what of them is stale.

An answer is stale where the software of its device, taken from the answer that was measured last, would run other code
for its plan. That is decided once per kernel and software, not once per answer, so that the database can filter by it.
"""

import enum
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select, tuple_
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.software import Software

from .models import AnswerRow, ProblemRow, SoftwareRow

WON = 1.005  # a speed-up from here on is shown as one


class Sort(enum.StrEnum):
    """What a list of answers can be sorted by."""

    PROBLEM = "problem"
    DEVICE = "device"
    BACKEND = "backend"
    EXPECTED = "expected"
    BASELINE = "baseline"
    SPEEDUP = "speedup"
    DEFAULT = "default"
    TFLOPS = "tflops"
    TRIALS = "trials"
    MEASURED = "measured"


_COLUMNS: dict[Sort, ColumnElement[Any]] = {
    Sort.PROBLEM: AnswerRow.problem_key.expression,
    Sort.DEVICE: AnswerRow.device_key.expression,
    Sort.BACKEND: AnswerRow.backend.expression,
    Sort.EXPECTED: AnswerRow.expected_ms.expression,
    Sort.BASELINE: AnswerRow.baseline_ms.expression,
    Sort.SPEEDUP: AnswerRow.baseline_ms / AnswerRow.expected_ms,
    Sort.DEFAULT: AnswerRow.default_speedup.expression,
    Sort.TFLOPS: ProblemRow.forward_flops / AnswerRow.expected_ms,
    Sort.TRIALS: AnswerRow.trials.expression,
    Sort.MEASURED: AnswerRow.measured.expression,
}


class Masking(enum.StrEnum):
    """What hides keys from queries; a problem may be of several kinds."""

    FULL = "full"
    CAUSAL = "causal"
    WINDOW = "window"
    BOOL = "bool"
    BIAS = "bias"
    ALIBI = "alibi"


_MASKED: dict[Masking, ColumnElement[bool]] = {
    Masking.FULL: ~ProblemRow.causal & (ProblemRow.mask == "none") & ~ProblemRow.key.contains(".window"),
    Masking.CAUSAL: ProblemRow.causal.expression,
    Masking.WINDOW: ProblemRow.key.contains(".window"),
    Masking.BOOL: ProblemRow.mask.startswith("bool"),
    Masking.BIAS: ProblemRow.mask.startswith("bias"),
    Masking.ALIBI: ProblemRow.key.contains(".alibi"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFilter:
    """Which answers a list holds; each value that is not None, and each word of `search`, narrows it.

    A word of `search` must be in the problem's key, the device's key or the backend. `stale`: only stale answers, or
    only those that are not.
    """

    search: str = ""
    device_key: str | None = None
    backend: str | None = None
    pass_: str | None = None
    dtype: str | None = None
    masking: Masking | None = None
    head_dim: int | None = None
    stale: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedAnswer:
    """A standing answer in a list.

    - forward_flops: those of its problem.
    - updated: when this version came.
    - outdated: what of its software is another by now, `triton 3.5.0 -> 3.6.0`; nothing unless it is stale.
    """

    answer: Answer
    forward_flops: float
    updated: datetime
    outdated: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPage:
    """Some of the answers that a list asked for; `total` counts all of them."""

    answers: tuple[ListedAnswer, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Facets:
    """The values that standing answers can be filtered by, each with how many answers have it, the most first."""

    devices: tuple[tuple[str, int], ...]
    backends: tuple[tuple[str, int], ...]
    passes: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, int], ...]
    head_dims: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How many answers there are, on how many devices; how many beat torch's own choice, and how many are stale."""

    answers: int
    devices: int
    faster: int
    stale: int


class AnswerListRepository:
    """Lists of standing answers, in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def page(
        self,
        wanted: AnswerFilter | None = None,
        *,
        sort: Sort = Sort.MEASURED,
        descending: bool = True,
        offset: int = 0,
        limit: int = 50,
    ) -> AnswerPage:
        """Return a sorted stretch of the answers that `wanted` lets through.

        Answers without the value sorted by come last in either direction.
        """
        current = self.current()
        matching = self._matching(wanted or AnswerFilter(), current)
        ordered = matching.order_by(*_order(sort, descending=descending)).offset(offset).limit(limit)
        found = self._read(ordered, current, sort, descending=descending)
        return AnswerPage(answers=found, total=self._count(matching))

    def keys(self, wanted: AnswerFilter, *, sort: Sort, descending: bool) -> tuple[tuple[str, str], ...]:
        """Return device and problem key of every answer that `wanted` lets through, to be read by `some` in parts."""
        ordered = self._matching(wanted, self.current()).order_by(*_order(sort, descending=descending))
        return tuple((device_key, problem_key) for device_key, problem_key in self._session.execute(ordered))

    def some(self, keys: Sequence[tuple[str, str]]) -> tuple[ListedAnswer, ...]:
        """Return the answers of a few hundred keys in their order; what is gone meanwhile is left out."""
        chosen = select(AnswerRow.device_key, AnswerRow.problem_key).where(
            tuple_(AnswerRow.device_key, AnswerRow.problem_key).in_(keys)
        )
        found = self._read(chosen, self.current(), Sort.PROBLEM, descending=False)
        places = {key: place for place, key in enumerate(keys)}
        return tuple(sorted(found, key=lambda one: places[one.answer.device_key, one.answer.problem.key]))

    def facets(self) -> Facets:
        """Return what there is to filter by."""
        columns = AnswerRow.device_key, AnswerRow.backend, ProblemRow.pass_, ProblemRow.dtype, ProblemRow.head_dim
        query = (
            select(*columns, func.count())
            .select_from(AnswerRow)
            .join(ProblemRow, ProblemRow.key == AnswerRow.problem_key)
            .group_by(*columns)
        )
        counts: tuple[Counter[Any], ...] = tuple(Counter() for _ in columns)
        for *values, number in self._session.execute(query):
            for counter, value in zip(counts, values, strict=True):
                counter[value] += number
        found = [tuple(sorted(counter.items(), key=lambda pair: (-pair[1], pair[0]))) for counter in counts]
        return Facets(*found)

    def summary(self) -> Summary:
        """Return how things stand over all answers."""
        answers, devices = self._session.execute(
            select(func.count(), func.count(AnswerRow.device_key.distinct()))
        ).one()
        faster = select(func.count()).where(AnswerRow.baseline_ms > WON * AnswerRow.expected_ms)
        return Summary(
            answers=answers,
            devices=devices,
            faster=self._session.scalar(faster) or 0,
            stale=self._count(self._matching(AnswerFilter(stale=True), self.current())),
        )

    def current(self) -> dict[str, Software]:
        """Return the software of each device that has answers: that of its answer that was measured last."""
        measured = func.max(func.coalesce(AnswerRow.measured, AnswerRow.updated))
        kinds = AnswerRow.device_key, AnswerRow.software_digest
        newest = select(*kinds, measured.label("measured")).group_by(*kinds).subquery()
        query = (
            select(newest.c.device_key, SoftwareRow.document)
            .join(SoftwareRow, SoftwareRow.digest == newest.c.software_digest)
            .order_by(newest.c.measured, SoftwareRow.digest)
        )
        latest = {row[0]: row[1] for row in self._session.execute(query)}  # the last one of a device stays
        return {key: codec.from_json(Software, document) for key, document in latest.items()}

    def _matching(self, wanted: AnswerFilter, current: dict[str, Software]) -> Select[str, str]:
        query = select(AnswerRow.device_key, AnswerRow.problem_key).join(
            ProblemRow, ProblemRow.key == AnswerRow.problem_key
        )
        text = func.lower(AnswerRow.problem_key + " " + AnswerRow.device_key + " " + AnswerRow.backend)
        # control characters (PostgreSQL refuses NUL) separate words like spaces do
        for word in re.split(r"[\s\x00-\x1f]+", wanted.search.lower()):
            if word:
                query = query.where(text.contains(word, autoescape=True))
        columns = {
            AnswerRow.device_key: wanted.device_key,
            AnswerRow.backend: wanted.backend,
            ProblemRow.pass_: wanted.pass_,
            ProblemRow.dtype: wanted.dtype,
            ProblemRow.head_dim: wanted.head_dim,
        }
        for column, value in columns.items():
            if value is not None:
                query = query.where(column == value)
        if wanted.masking is not None:
            query = query.where(_MASKED[wanted.masking])
        if wanted.stale is not None:
            stale = tuple_(AnswerRow.device_key, AnswerRow.software_digest, AnswerRow.kernels).in_(self._stale(current))
            query = query.where(stale if wanted.stale else ~stale)
        return query

    def _count(self, matching: Select[str, str]) -> int:
        return self._session.scalar(select(func.count()).select_from(matching.subquery())) or 0

    def _stale(self, current: dict[str, Software]) -> list[tuple[str, str, str]]:
        """Return device, digest of the software, and kernels of all answers that are stale."""
        groups = select(AnswerRow.device_key, AnswerRow.software_digest, AnswerRow.kernels).distinct().subquery()
        query = select(groups, SoftwareRow.document).join(SoftwareRow, SoftwareRow.digest == groups.c.software_digest)
        return [
            (device_key, digest, kernels)
            for device_key, digest, kernels, document in self._session.execute(query)
            if _outdated(_candidates(kernels), codec.from_json(Software, document), current[device_key])
        ]

    def _read(
        self, chosen: Select[str, str], current: dict[str, Software], sort: Sort, *, descending: bool
    ) -> tuple[ListedAnswer, ...]:
        # by their keys first: sorting whole documents takes ten times as long
        keys = chosen.subquery()
        rows = self._session.execute(
            select(AnswerRow.document, AnswerRow.updated, ProblemRow.forward_flops)
            .join(keys, (keys.c.device_key == AnswerRow.device_key) & (keys.c.problem_key == AnswerRow.problem_key))
            .join(ProblemRow, ProblemRow.key == AnswerRow.problem_key)
            .order_by(*_order(sort, descending=descending))
        )
        return tuple(_listed(row, current) for row in rows)


def kernels_of(plan: Plan) -> str:
    """Return the kernels that a plan runs, in one text: `triton:hopper_forward triton:triton_dq`, `sdpa`."""
    names = set()
    for candidate in plan.candidates:
        kernels = {f"{candidate.backend}:{config.kernel}" for _, config in candidate.configs}
        names |= kernels or {candidate.backend}
    return " ".join(sorted(names))


def _candidates(kernels: str) -> tuple[Candidate, ...]:
    """Return candidates that depend on the same software as a plan of these kernels does."""
    named = (name.partition(":") for name in kernels.split())
    return tuple(Candidate(backend, (("forward", Config(kernel)),) if kernel else ()) for backend, _, kernel in named)


def _outdated(candidates: tuple[Candidate, ...], then: Software, today: Software) -> tuple[str, ...]:
    return then.for_candidates(*candidates).differences(today.for_candidates(*candidates))


def _order(sort: Sort, *, descending: bool) -> tuple[ColumnElement[Any], ...]:
    column = _COLUMNS[sort]
    ordered = (column.desc() if descending else column.asc()).nulls_last()
    return ordered, AnswerRow.device_key.expression, AnswerRow.problem_key.expression


def _listed(row: Any, current: dict[str, Software]) -> ListedAnswer:
    answer = codec.from_json(Answer, row.document)
    return ListedAnswer(
        answer=answer,
        forward_flops=row.forward_flops,
        updated=row.updated,
        outdated=_outdated(answer.plan.candidates, answer.software, current[answer.device_key]),
    )
