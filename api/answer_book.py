"""What the routes know about answers: the database's, remembered for as long as the database says they stand."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Answer
from tilewise.domain.matching import match
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.software import Software

MAX_DEVICES = 64


@dataclass(frozen=True)
class _Page:
    """The answers of one device at one moment of the database, which `marker` names."""

    marker: tuple[int, int]
    answers: Mapping[str, Answer]

    @cached_property
    def snapshot(self) -> tuple[str, bytes]:
        """The id and the file form of all answers."""
        made = Snapshot.of(self.answers.values())
        return made.id, made.dumps()


class AnswerBook:
    """Answers by device. Reading thousands of documents takes far longer than asking whether one has changed."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._pages: OrderedDict[str, _Page] = OrderedDict()
        self._lock = threading.Lock()

    def answer(self, device_key: str, problem: Problem, software: Software | None) -> Answer:
        """Return the best answer there is; a device or problem never measured gets the default, marked so."""
        return match(problem, device_key, software, self._page(device_key).answers)

    def snapshot(self, device_key: str) -> tuple[str, bytes]:
        """Return the id and the file form of the snapshot of all answers of a device."""
        return self._page(device_key).snapshot

    def _page(self, device_key: str) -> _Page:
        with self._database.read() as session:
            answers = AnswerRepository(session)
            marker = answers.marker(device_key)
            page = self._pages.get(device_key)
            if page is None or page.marker != marker:
                page = _Page(marker, answers.of_device(device_key))
        if page.answers:  # names that nobody tuned, typed by anybody, are not worth remembering
            with self._lock:
                self._pages[device_key] = page
                self._pages.move_to_end(device_key)
                while len(self._pages) > MAX_DEVICES:
                    self._pages.popitem(last=False)
        return page
