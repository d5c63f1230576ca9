"""The finals of each device, kept until an answer changes: reading thousands takes seconds, comparing them does not."""

import threading
from typing import Annotated

from fastapi import Depends, Request

from tilewise.db.answers import AnswerRepository
from tilewise.db.finals import Final, FinalRepository
from tilewise.db.session import Database

MOST_KEPT = 8  # lists of finals


class FinalBook:
    """Finals by device, as the database has them now: those of its standing answers, and of all that it ever had."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, bool], tuple[int, tuple[Final, ...]]] = {}

    def standing(self, device_key: str) -> tuple[Final, ...]:
        """Return the finals of the standing answers of a device, by problem key."""
        return self._finals(device_key, every=False)

    def every(self, device_key: str) -> tuple[Final, ...]:
        """Return the finals of all answers that a device ever had, in the order in which they were kept."""
        return self._finals(device_key, every=True)

    def _finals(self, device_key: str, *, every: bool) -> tuple[Final, ...]:
        key = device_key, every
        with self._database.read() as session:
            newest = AnswerRepository(session).newest()
            with self._lock:
                number, finals = self._kept.get(key, (-1, ()))
            if number != newest:
                repository = FinalRepository(session)
                finals = repository.every(device_key) if every else repository.standing(device_key)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = newest, finals
            while len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
        return finals


def _book(request: Request) -> FinalBook:
    found: FinalBook = request.app.state.final_book
    return found


FinalBookOfApp = Annotated[FinalBook, Depends(_book)]
