"""Snapshot: a frozen, content-addressed set of answers that a job can pin."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from . import codec
from .answer import Answer, Match
from .errors import SnapshotError

SCHEMA = 1


def path_beside(database_file: Path) -> Path:
    """Return where the embedded database keeps its snapshot: beside it, `tilewise.db` -> `tilewise.snapshot.json`."""
    return database_file.with_name(f"{database_file.stem}.snapshot.json")


@dataclass(frozen=True)
class Snapshot:
    """Answers of one or several devices, sorted by device and problem. Equal sets have equal ids."""

    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Self:
        measured = (replace(answer, match=Match.EXACT, missed="") for answer in answers)
        return cls(tuple(sorted(measured, key=lambda answer: (answer.device_key, answer.problem.key))))

    @cached_property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of the answers."""
        return codec.digest(self._body())

    def _body(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "answers": codec.to_json(self.answers)}

    def dumps(self) -> bytes:
        """Return the file form: canonical JSON with the id beside the body; what was read, where it was read."""
        return self._file

    @cached_property
    def _file(self) -> bytes:
        return codec.canonical({"id": self.id, **self._body()})

    @classmethod
    def loads(cls, data: bytes, *, name: str = "snapshot") -> Self:
        """Read the file form and verify its id. Raises SnapshotError for anything that is not whole.

        The snapshot keeps the id and the bytes that were verified: answers may not encode to the same bytes again (a
        newer writer's fields are dropped, its 10 becomes 10.0), and the id that a job pins is the writer's.
        """
        try:
            document = json.loads(data)
            found, schema = document.pop("id"), document["schema"]
            content = codec.digest(document)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"{name} is not a tilewise snapshot ({error}); export it again") from error
        if schema != SCHEMA:
            raise SnapshotError(f"{name} has schema {schema!r}, this version reads {SCHEMA}; export it again with it")
        if content != found:
            raise SnapshotError(f"{name} is damaged: its content is not what its id {found!r} says; export it again")
        try:
            answers = tuple(codec.from_json(Answer, item) for item in document["answers"])
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise SnapshotError(f"{name}: {error}; export it again") from error
        snapshot = cls(answers)
        snapshot.__dict__.update(id=found, _file=data)
        return snapshot

    def for_device(self, device_key: str) -> Self:
        return type(self)(tuple(answer for answer in self.answers if answer.device_key == device_key))
