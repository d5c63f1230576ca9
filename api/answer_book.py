"""What the routes know about answers: a table in this process that follows the database.

A lookup touches no SQL. The table is brought up to date by a thread that asks the database a few times a second whether
anything changed, and at once after a write of this process. While the database is away the table goes on as it was.
"""

import gzip
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from starlette.types import Scope

from tilewise.db.answers import AnswerRepository, StoredAnswer
from tilewise.db.session import Database
from tilewise.domain import codec
from tilewise.domain.answer import Answer
from tilewise.domain.errors import DatabaseError
from tilewise.domain.matching import KeptAnswers, match
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import file_of
from tilewise.domain.software import Software

FOLLOW_SECONDS = 0.25
MAX_REPLIES = 20_000
RequestKey = tuple[bytes, bytes, bool]  # path, query, and whether gzip is taken
_log = logging.getLogger("tilewise.api")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a route of answers sends, kept as bytes: the ETag, the body, and how the one answer in it was matched."""

    etag: bytes
    body: bytes
    match: str
    gzipped: bool = False


class _Stored(Mapping[str, Answer]):
    """Stored answers by problem key, each read when it is first looked at."""

    def __init__(self, stored: Mapping[str, StoredAnswer]) -> None:
        self.stored = stored

    def __getitem__(self, key: str) -> Answer:
        return self.stored[key].answer

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True)
class _Device:
    """One device's answers and what was made of them; replaced as a whole when one of them changes."""

    stored: Mapping[str, StoredAnswer]
    answers: KeptAnswers
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: list["DeviceSnapshot"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """All answers of a device in the form of a snapshot file: its id, and the file gzipped."""

    id: str
    gzipped: bytes


def _device(stored: Mapping[str, StoredAnswer]) -> _Device:
    return _Device(stored, KeptAnswers(_Stored(stored)))


_NOTHING = _device({})


class AnswerBook:
    """Answers by device.

    Until any answer changes, `replies` keeps what went out by the request, and `pieces` what went out
    in longer responses by device, software, whether with evidence, and problem.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._devices: dict[str, _Device] = {}
        self._newest = 0
        self._refreshing = threading.Lock()
        self._behind = True
        self._trouble = ""
        self._stop = threading.Event()
        self.replies: dict[RequestKey, Reply] = {}
        self.pieces: dict[tuple[str, str | None, bool, str], Reply] = {}
        database.watch(self._fall_behind)

    def _fall_behind(self) -> None:
        self._behind = True

    def answer(self, device_key: str, problem: Problem, software: Software | None) -> Answer:
        """Return the best answer there is; a device or problem never measured gets the default, marked so."""
        return match(problem, device_key, software, self._device(device_key).answers)

    def snapshot(self, device_key: str) -> DeviceSnapshot:
        """Return the snapshot of all answers of a device; it is made once, whoever asks at the same time."""
        device = self._device(device_key)
        with device.lock:
            if not device.made:
                id_, file = file_of(json.loads(stored.text) for stored in device.stored.values())
                device.made.append(DeviceSnapshot(id_, gzip.compress(file, 6, mtime=0)))
            return device.made[0]

    def snapshot_with_id(self, snapshot_id: str) -> DeviceSnapshot | None:
        """Return the snapshot of that id where it is what a device was last sent."""
        made = (each.made[0] for each in list(self._devices.values()) if each.made)
        return next((found for found in made if found.id == snapshot_id), None)

    def reply(self, key: RequestKey) -> Reply | None:
        """Return what went out for a request before, if it is still right."""
        if self._behind:
            self.refresh()
        return self.replies.get(key)

    @staticmethod
    def key_of(scope: Scope, accept_encoding: bytes) -> RequestKey:
        """Return what a request to a route of answers is remembered by."""
        return scope.get("raw_path") or scope["path"].encode(), scope["query_string"], b"gzip" in accept_encoding

    def remember(self, key: RequestKey, reply: Reply, seen: int) -> None:
        """Keep what goes out for a request, unless an answer changed since `version` was `seen`."""
        if seen == self._newest and not self._behind:
            if len(self.replies) >= MAX_REPLIES:
                self.replies.clear()
            self.replies[key] = reply

    def piece(
        self, device_key: str, problem: Problem, software: Software | None, software_key: str | None, *, evidence: bool
    ) -> Reply:
        """Return one answer of a longer response as bytes; without evidence they are a tenth."""
        seen, key = self.version, (device_key, software_key, evidence, problem.key)
        found = self.pieces.get(key)
        if found is None:
            answer = self.answer(device_key, problem, software)
            body = codec.canonical(answer if evidence else replace(answer, evidence=None))
            found = Reply(b"", body, answer.match)
            if seen == self._newest and not self._behind:
                if len(self.pieces) >= MAX_REPLIES:
                    self.pieces.clear()
                self.pieces[key] = found
        return found

    @property
    def behind(self) -> bool:
        """Whether this process wrote something that the table does not hold yet."""
        return self._behind

    @property
    def version(self) -> int:
        """A number that changes with every answer."""
        if self._behind:
            self.refresh()
        return self._newest

    def _device(self, device_key: str) -> _Device:
        if self._behind:
            self.refresh()
        return self._devices.get(device_key, _NOTHING)

    def refresh(self) -> None:
        """Bring the table up to what the database holds; where that is away, say so once and stay as we are."""
        with self._refreshing:
            self._behind = False
            try:
                with self._database.read() as session:
                    answers = AnswerRepository(session)
                    newest = answers.newest()
                    anew = newest < self._newest  # an older state of the database was put back
                    changed = answers.changed_since(0 if anew else self._newest) if newest != self._newest else ()
            except DatabaseError as error:
                if not self._trouble:
                    _log.error("answers are served from memory: %s", error)
                self._trouble = str(error)
                return
            if self._trouble:
                _log.warning("the database is back")
                self._trouble = ""
            if newest != self._newest:
                self._take(changed, newest, {} if anew else self._devices)

    def _take(self, changed: tuple[StoredAnswer, ...], newest: int, before: Mapping[str, _Device]) -> None:
        by_device: dict[str, dict[str, StoredAnswer]] = {}
        for found in changed:
            by_device.setdefault(found.device_key, {})[found.problem_key] = found
        devices = dict(before)
        for key, stored in by_device.items():
            devices[key] = _device({**devices.get(key, _NOTHING).stored, **stored})
        self._devices, self._newest, self.replies, self.pieces = devices, newest, {}, {}

    def start(self) -> None:
        """Follow the database on a daemon thread until `stop`."""
        threading.Thread(target=self._follow, name="tilewise-answers", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _follow(self) -> None:
        while not self._stop.wait(FOLLOW_SECONDS):
            try:
                self.refresh()
            except Exception:  # a mistake here must not leave the service with old answers for ever
                _log.exception("the answers could not be refreshed")
