"""Finals at a glance: how each backend did in the final of each answer, read without building whole answers.

A page that compares thousands of finals needs a few numbers of each; to read an answer with all its evidence takes many
times as long.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software

from .models import AnswerChangeRow, AnswerRow, SoftwareRow


@dataclass(frozen=True, slots=True)
class Standing:
    """The best of one backend in a final: its median in ms, its ratio to the final's reference, and the half-width of
    the 95% interval of that ratio, as a share of it."""

    backend: str
    median_ms: float
    ratio: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Final:
    """One final of one problem on one device: the best of each backend, fastest first, and which one the plan runs."""

    problem_key: str
    device_key: str
    software: str  # digest
    measured: datetime
    reference: str
    noise: float
    winner: str  # backend of the plan
    winner_ms: float
    standings: tuple[Standing, ...]

    @cached_property
    def problem(self) -> Problem:
        return Problem.parse(self.problem_key)

    def of(self, backend: str) -> Standing | None:
        return next((each for each in self.standings if each.backend == backend), None)

    @cached_property
    def baseline(self) -> Standing | None:
        """Torch's own choice, or where that is wrong what stood in for it."""
        return self.of(default_candidate(self.problem).backend) or self.of(self.reference)

    def speedup(self, backend: str) -> float | None:
        """Return how many times faster than torch's own choice a backend was; None where it was not in the final."""
        found = self.of(backend)
        return self.baseline.ratio / found.ratio if found and self.baseline else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftwareUse:
    """A software that finals of a device were held with: how many, of which problems, when the first and the last."""

    digest: str
    software: Software
    finals: int
    problems: frozenset[str]
    first: datetime
    last: datetime


class FinalRepository:
    """Finals in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def standing(self, device_key: str) -> tuple[Final, ...]:
        """Return the finals of the standing answers of a device, by problem key."""
        query = select(AnswerRow.problem_key, AnswerRow.document).where(AnswerRow.device_key == device_key)
        rows = self._session.execute(query.order_by(AnswerRow.problem_key))
        return tuple(_finals((key, document) for key, document in rows))

    def every(self, device_key: str) -> tuple[Final, ...]:
        """Return the finals of all answers that a device ever had, in the order in which they were kept."""
        query = select(AnswerChangeRow.problem_key, AnswerChangeRow.document)
        query = query.where(AnswerChangeRow.device_key == device_key).order_by(AnswerChangeRow.id)
        return tuple(_finals((key, document) for key, document in self._session.execute(query)))

    def softwares(self, finals: Iterable[Final]) -> tuple[SoftwareUse, ...]:
        """Return what software finals were held with, the latest used first."""
        moments: dict[str, set[tuple[str, datetime]]] = {}
        for final in finals:
            moments.setdefault(final.software, set()).add((final.problem_key, final.measured))
        rows = select(SoftwareRow.digest, SoftwareRow.document).where(SoftwareRow.digest.in_(moments))
        found = [
            SoftwareUse(
                digest=digest,
                software=codec.from_json(Software, document),
                finals=len(moments[digest]),
                problems=frozenset(key for key, _ in moments[digest]),
                first=min(moment for _, moment in moments[digest]),
                last=max(moment for _, moment in moments[digest]),
            )
            for digest, document in self._session.execute(rows)
        ]
        return tuple(sorted(found, key=lambda use: (use.last, use.digest), reverse=True))


def with_software(finals: Iterable[Final], digest: str) -> tuple[Final, ...]:
    """Return of finals in the order in which they were kept the last of each problem with this software, by problem."""
    newest = {final.problem_key: final for final in finals if final.software == digest}
    return tuple(newest[key] for key in sorted(newest))


def _finals(rows: Iterable[tuple[str, Any]]) -> Iterator[Final]:
    digests: dict[str, str] = {}
    for key, document in rows:
        evidence = document.get("evidence")
        if not evidence:
            continue
        software = document["software"]
        spelled = repr(software)
        if spelled not in digests:
            digests[spelled] = codec.digest(software)
        best: dict[str, Standing] = {}
        for finalist in evidence["finalists"]:
            measurement, backend = finalist["measurement"], finalist["candidate"]["backend"]
            ratio = measurement["ratio"] or 1.0
            if backend not in best or ratio < best[backend].ratio:
                best[backend] = Standing(backend, measurement["median_ms"], ratio, measurement["spread"] or 0.0)
        yield Final(
            problem_key=key,
            device_key=document["device_key"],
            software=digests[spelled],
            measured=datetime.fromisoformat(evidence["measured"]),
            reference=evidence["reference"]["backend"],
            noise=evidence["noise"],
            winner=document["plan"]["forward"]["backend"],
            winner_ms=document["expected_ms"],
            standings=tuple(sorted(best.values(), key=lambda each: each.ratio)),
        )
