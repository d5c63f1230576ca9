"""Answers: the standing answer of every tuned problem, its history, and snapshots of all; answer_lists.py for lists."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Text, cast, func, insert, select, update
from sqlalchemy.orm import Session

from tilewise.domain import codec, transfer
from tilewise.domain.answer import Answer, Evidence
from tilewise.domain.device_gap import device_gap
from tilewise.domain.errors import ConflictError
from tilewise.domain.matching import KeptAnswers, predictors
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.trial import now

from . import references
from .answer_lists import kernels_of
from .models import AnswerChangeRow, AnswerRow

# "answers!" in ASCII: any constant that is the same in every process.
_CHANGES_LOCK = int.from_bytes(b"answers!")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerChange:
    """One version of an answer and why it replaced the one before."""

    answer: Answer
    reason: str
    changed: datetime


@dataclass(frozen=True)
class StoredAnswer:
    """A standing answer whose text is read when it is first looked at: reading thousands takes seconds."""

    device_key: str
    problem_key: str
    text: str

    @cached_property
    def bare(self) -> Answer:
        """The answer without its evidence, which is most of the work of reading it."""
        return codec.from_json(Answer, {**json.loads(self.text), "evidence": None})

    @cached_property
    def evidence(self) -> Evidence | None:
        document = json.loads(self.text).get("evidence")
        return None if document is None else codec.from_json(Evidence, document)


class AnswerRepository:
    """Standing answers by device and problem, in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def get(self, device_key: str, problem: Problem) -> Answer | None:
        """Return the standing answer kept for exactly this problem, without any matching; None where there is none."""
        document = self._session.scalar(select(AnswerRow.document).where(*_about(device_key, problem)))
        return None if document is None else codec.from_json(Answer, document)

    def of_device(self, device_key: str, *, backends: Iterable[str] | None = None) -> dict[str, Answer]:
        """Return the standing answers of a device, all or those of some backends, by problem key."""
        query = select(AnswerRow.problem_key, AnswerRow.document).where(AnswerRow.device_key == device_key)
        if backends is not None:
            query = query.where(AnswerRow.backend.in_(backends))
        return {key: codec.from_json(Answer, document) for key, document in self._session.execute(query)}

    def newest(self) -> int:
        """Return a number that grows with every change of any answer; 0 where there is none."""
        return self._session.scalar(select(func.max(AnswerChangeRow.id))) or 0

    def changed_since(self, number: int) -> tuple[StoredAnswer, ...]:
        """Return the answers that changed since `newest` was `number`, each as it stands now."""
        query = (
            select(AnswerRow.device_key, AnswerRow.problem_key, cast(AnswerRow.document, Text))
            .join(
                AnswerChangeRow,
                (AnswerChangeRow.device_key == AnswerRow.device_key)
                & (AnswerChangeRow.problem_key == AnswerRow.problem_key)
                & (AnswerChangeRow.version == AnswerRow.version),
            )
            .where(AnswerChangeRow.id > number)
        )
        return tuple(StoredAnswer(*row) for row in self._session.execute(query))

    def replace(self, answer: Answer, *, expected_version: int, reason: str) -> bool:
        """Make `answer` the standing one if the standing version is `expected_version` (0: there is none yet).

        A compare-and-swap in one statement: of several writers that expect the same version exactly one gets True,
        the others get False and have changed nothing. The kept answer has version `expected_version + 1`, whatever
        `answer.version` says; `reason` goes into its history.

        Raises ConflictError where the final that `answer` rests on held the standing answer and found it no slower,
        and DeviceError where the device key is none.
        """
        self._order_changes()
        if expected_version:
            _check_justified(answer, self.get(answer.device_key, answer.problem))
        kept = dataclasses.replace(answer, version=expected_version + 1)
        document = codec.to_json(kept)
        values = {
            "version": kept.version,
            "software_digest": references.software(self._session, kept.software),
            "updated": now(),
            "document": document,
            "backend": kept.plan.forward.backend,
            "kernels": kernels_of(kept.plan),
            "expected_ms": kept.expected_ms,
            "baseline_ms": kept.baseline_ms,
            "default_speedup": kept.default_speedup,
            "trials": kept.evidence.trials if kept.evidence else 0,
            "measured": kept.evidence.measured if kept.evidence else None,
        }
        keys = {
            "device_key": references.device(self._session, kept.device_key),
            "problem_key": references.problem(self._session, kept.problem),
        }
        if not self._swap(keys, values, expected_version):
            return False
        change = {"version": kept.version, "reason": references.clean(reason), "changed": values["updated"]}
        self._session.execute(insert(AnswerChangeRow).values(**keys, **change, document=document))
        return True

    def _order_changes(self) -> None:
        """Let the numbers of changes become visible in their order, so that who follows them misses none.

        SQLite has one writer at a time anyway.
        """
        if self._session.get_bind().dialect.name == "postgresql":
            self._session.execute(select(func.pg_advisory_xact_lock(_CHANGES_LOCK)))

    def _swap(self, keys: dict[str, str], values: dict[str, Any], expected_version: int) -> bool:
        if expected_version == 0:
            statement = references.insert_new(self._session, AnswerRow, keys | values)
            return self._session.scalar(statement.returning(AnswerRow.version)) is not None
        changed = (
            update(AnswerRow)
            .where(
                AnswerRow.device_key == keys["device_key"],
                AnswerRow.problem_key == keys["problem_key"],
                AnswerRow.version == expected_version,
            )
            .values(values)
            .returning(AnswerRow.version)
        )
        return self._session.scalar(changed) is not None

    def history(self, device_key: str, problem: Problem) -> tuple[AnswerChange, ...]:
        """Return every version of an answer, the newest first."""
        query = (
            select(AnswerChangeRow.document, AnswerChangeRow.reason, AnswerChangeRow.changed)
            .where(AnswerChangeRow.device_key == device_key, AnswerChangeRow.problem_key == problem.key)
            .order_by(AnswerChangeRow.version.desc())
        )
        return tuple(
            AnswerChange(answer=codec.from_json(Answer, document), reason=reason, changed=changed)
            for document, reason, changed in self._session.execute(query)
        )

    def newest_changes(self, limit: int) -> tuple[AnswerChange, ...]:
        """Return what changed last of all answers, the newest first."""
        query = select(AnswerChangeRow.document, AnswerChangeRow.reason, AnswerChangeRow.changed)
        return tuple(
            AnswerChange(answer=codec.from_json(Answer, document), reason=reason, changed=changed)
            for document, reason, changed in self._session.execute(
                query.order_by(AnswerChangeRow.id.desc()).limit(limit)
            )
        )

    def snapshot(self, device_key: str | None = None) -> Snapshot:
        """Return the standing answers of all devices as a snapshot; or of one, with those of others that predict it.

        What the service sends as all answers of a device is the same.
        """
        if device_key is None:
            every = self._session.scalars(select(AnswerRow.document))
            return Snapshot.of(codec.from_json(Answer, document) for document in every)
        keys = self._session.scalars(select(AnswerRow.device_key).distinct())
        alike = [key for key in keys if key != device_key and device_gap(key, device_key) is not None]
        able = transfer.predicted_backends()
        devices = {key: KeptAnswers(self.of_device(key, backends=able)) for key in alike}
        foreign = [other.kept[key] for other in predictors(device_key, devices) for key in other.useful()]
        return Snapshot.of([*self.of_device(device_key).values(), *foreign])


def _check_justified(new: Answer, standing: Answer | None) -> None:
    """Milliseconds of two runs are never compared: the ratios inside the new answer's own final decide."""
    if standing is None or new.evidence is None or new.plan == standing.plan:
        return
    ratios = {found.candidate: found.measurement.ratio for found in new.evidence.finalists}
    won, stood = ratios.get(new.plan.forward), ratios.get(standing.plan.forward)
    if won is not None and stood is not None and won >= stood:
        raise ConflictError(
            f"{new.plan} does not replace {standing.plan} for {new.problem.key}: in its final the standing answer "
            f"had the ratio {stood:.4f}, the new one {won:.4f}"
        )


def _about(device_key: str, problem: Problem) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return AnswerRow.device_key == device_key, AnswerRow.problem_key == problem.key
