"""The finals of each device, kept until an answer changes: reading thousands takes seconds, comparing them does not."""

import threading
from typing import Annotated

from fastapi import Depends, Request

from tilewise.db.answers import AnswerRepository
from tilewise.db.finals import Final, FinalRepository
from tilewise.db.session import Database

DEVICES = 8  # whose finals are kept


class FinalBook:
    """Finals of standing answers by device, as the database has them now."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[int, tuple[Final, ...]]] = {}

    def standing(self, device_key: str) -> tuple[Final, ...]:
        """Return the finals of the standing answers of a device, by problem key."""
        with self._database.read() as session:
            newest = AnswerRepository(session).newest()
            with self._lock:
                number, finals = self._kept.get(device_key, (-1, ()))
            if number != newest:
                finals = FinalRepository(session).standing(device_key)
        with self._lock:
            self._kept.pop(device_key, None)
            self._kept[device_key] = newest, finals
            while len(self._kept) > DEVICES:
                del self._kept[next(iter(self._kept))]
        return finals


def _book(request: Request) -> FinalBook:
    found: FinalBook = request.app.state.final_book
    return found


FinalBookOfApp = Annotated[FinalBook, Depends(_book)]
