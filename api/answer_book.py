"""What the routes know about answers: a table in this process that follows the database.

A lookup touches no SQL. The table is brought up to date by a thread that asks the database a few times a second whether
anything changed, and at once after a write of this process. While the database is away the table goes on as it was.
"""

import gzip
import json
import logging
import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from starlette.types import Scope

from tilewise.db.answers import AnswerRepository, StoredAnswer
from tilewise.db.session import Database
from tilewise.db.snapshots import SnapshotRepository
from tilewise.domain import codec
from tilewise.domain.answer import Answer
from tilewise.domain.device_gap import device_gap
from tilewise.domain.errors import DatabaseError
from tilewise.domain.matching import KeptAnswers, Predictor, match, predictors
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import file_of
from tilewise.domain.software import Software

from .follower import Follower

FOLLOW_SECONDS = 0.25
MAX_REPLIES = 20_000
MAX_ASKED = 100
MAX_HANDED_OUT = 100
MAX_KNOWN_IDS = 10_000
RequestKey = tuple[bytes, bytes, bool]  # path, query, and whether gzip is taken
PieceKey = tuple[str, str | None, bool, str]  # device, software, whether with evidence, problem
K = TypeVar("K", bound=Hashable)
_NOTHING = KeptAnswers({})
_log = logging.getLogger("tilewise.api")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a route of answers sends, kept as bytes: the ETag, the body, and how the one answer in it was matched."""

    etag: bytes
    body: bytes
    match: str
    gzipped: bool = False


class _Bare(Mapping[str, Answer]):
    """Stored answers by problem key without their evidence, each read when it is first looked at."""

    def __init__(self, stored: Mapping[str, StoredAnswer]) -> None:
        self._stored = stored

    def __getitem__(self, key: str) -> Answer:
        return self._stored[key].bare

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """All answers of a device in the form of a snapshot file: its id, and the file gzipped."""

    id: str
    gzipped: bytes


@dataclass(frozen=True)
class _Asked:
    """What was made for those who ask about a device; forgotten when its answers or those that predict it change."""

    others: tuple[Predictor, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    made: list[DeviceSnapshot] = field(default_factory=list)


@dataclass(frozen=True)
class _State:
    """All answers at one moment, as they are stored and as they are matched, and what was made of them.

    replies: what went out by the request; pieces: what went out in longer responses. Replaced as a whole.
    """

    newest: int = 0
    stored: Mapping[str, Mapping[str, StoredAnswer]] = field(default_factory=dict)
    kept: Mapping[str, KeptAnswers] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    replies: dict[RequestKey, Reply] = field(default_factory=dict)
    pieces: dict[PieceKey, Reply] = field(default_factory=dict)

    def about(self, device_key: str) -> _Asked:
        found = self.asked.get(device_key)
        if found is None:
            if len(self.asked) >= MAX_ASKED:
                self.asked.clear()
            found = self.asked.setdefault(device_key, _Asked(predictors(device_key, self.kept)))
        return found

    def changed(self, answers: tuple[StoredAnswer, ...], newest: int) -> "_State":
        """Return the state after a change: what no changed answer bears on stays."""
        by_device: dict[str, dict[str, StoredAnswer]] = {}
        for found in answers:
            by_device.setdefault(found.device_key, {})[found.problem_key] = found
        stored, kept = dict(self.stored), dict(self.kept)
        for key, new in by_device.items():
            stored[key] = {**stored.get(key, {}), **new}
            kept[key] = KeptAnswers(_Bare(stored[key]))
        asked = {
            key: found
            for key, found in list(self.asked.items())
            if key not in by_device and all(device_gap(key, changed) is None for changed in by_device)
        }
        pieces = {key: piece for key, piece in list(self.pieces.items()) if key[0] in asked}
        return _State(newest, stored, kept, asked, {}, pieces)


class AnswerBook:
    """Answers by device, and what went out as bytes until an answer that bears on it changes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._state = _State()
        self._refreshing = threading.Lock()
        self._behind = True
        self._trouble = ""
        self._read_ahead = 0
        self.follower = Follower("answers", self._keep_up, seconds=FOLLOW_SECONDS)
        self._handed_out: deque[DeviceSnapshot] = deque(maxlen=MAX_HANDED_OUT)
        self._known_ids = {file_of(())[0]}  # the empty snapshot is nothing to keep
        self._unkept = ""
        database.watch(self._fall_behind)

    def _fall_behind(self) -> None:
        self._behind = True

    def _now(self) -> _State:
        if self._behind:
            self.refresh()
        return self._state

    def answer(self, device_key: str, problem: Problem, software: Software | None) -> Answer:
        """Return the best answer there is; a device or problem never measured gets the default, marked so."""
        return _answer(self._now(), device_key, problem, software, evidence=True)

    def snapshot(self, device_key: str) -> DeviceSnapshot:
        """Return the snapshot of all answers of a device and of what predicts it.

        It is made once, whoever asks at the same time, and kept in the database soon after, so that a job can pin it.
        """
        state = self._now()
        asked = state.about(device_key)
        with asked.lock:
            if not asked.made:
                own = state.stored.get(device_key, {})
                foreign = (state.stored[other.device_key][key] for other in asked.others for key in other.useful())
                id_, file = file_of(json.loads(found.text) for found in (*own.values(), *foreign))
                asked.made.append(DeviceSnapshot(id_, gzip.compress(file, 6, mtime=0)))
                self._hand_out(asked.made[0])
            return asked.made[0]

    def _hand_out(self, sent: DeviceSnapshot) -> None:
        """Have the follower keep what is sent; once, however many devices it is sent to."""
        if sent.id not in self._known_ids:
            if len(self._known_ids) >= MAX_KNOWN_IDS:
                self._known_ids.clear()
            self._known_ids.add(sent.id)
            self._handed_out.append(sent)

    def snapshot_with_id(self, snapshot_id: str) -> DeviceSnapshot | None:
        """Return the snapshot of that id where it is what a device was last sent."""
        made = (each.made[0] for each in list(self._state.asked.values()) if each.made)
        return next((found for found in (*made, *list(self._handed_out)) if found.id == snapshot_id), None)

    def reply(self, key: RequestKey) -> Reply | None:
        """Return what went out for a request before, if it is still right."""
        return self._now().replies.get(key)

    @staticmethod
    def key_of(scope: Scope, accept_encoding: bytes) -> RequestKey:
        """Return what a request to a route of answers is remembered by."""
        return scope.get("raw_path") or scope["path"].encode(), scope["query_string"], b"gzip" in accept_encoding

    def remember(self, key: RequestKey, reply: Reply, seen: int) -> None:
        """Keep what goes out for a request, unless an answer changed since `version` was `seen`."""
        state = self._state
        if seen == state.newest:
            _put(state.replies, key, reply)

    def pieces(
        self, device_key: str, problems: Sequence[str], software_key: str | None, *, evidence: bool
    ) -> list[Reply | None]:
        """Return those answers of a longer response that are at hand as bytes."""
        if self._behind:
            return [None] * len(problems)
        known = self._state.pieces
        return [known.get((device_key, software_key, evidence, key)) for key in problems]

    def make_pieces(
        self,
        device_key: str,
        problems: Iterable[Problem],
        software: Software | None,
        software_key: str | None,
        *,
        evidence: bool,
    ) -> list[Reply]:
        """Return the answers of a longer response as bytes, all of one moment; without evidence they are a tenth."""
        state = self._now()
        found = []
        for problem in problems:
            key = (device_key, software_key, evidence, problem.key)
            piece = state.pieces.get(key)
            if piece is None:
                answer = _answer(state, device_key, problem, software, evidence=evidence)
                piece = Reply(b"", codec.canonical(answer), answer.match)
                _put(state.pieces, key, piece)
            found.append(piece)
        return found

    @property
    def version(self) -> int:
        """A number that changes with every answer."""
        return self._now().newest

    def refresh(self) -> None:
        """Bring the table up to what the database holds; where that is away, say so once and stay as we are."""
        with self._refreshing:
            self._behind = False
            state = self._state
            try:
                with self._database.read() as session:
                    answers = AnswerRepository(session)
                    newest = answers.newest()
                    if newest < state.newest:  # an older state of the database was put back
                        state = _State()
                    changed = answers.changed_since(state.newest) if newest != state.newest else ()
            except DatabaseError as error:
                if not self._trouble:
                    _log.error("answers are served from memory: %s", error)
                self._trouble = str(error)
                return
            if self._trouble:
                _log.warning("the database is back")
                self._trouble = ""
            if newest != self._state.newest:
                self._state = state.changed(changed, newest)

    def _keep_up(self) -> None:
        self.refresh()
        state = self._state
        if state.newest != self._read_ahead:
            for stored in state.stored.values():
                for found in stored.values():
                    _ = found.bare  # read here, so that no request waits for it
            self._read_ahead = state.newest
        self._keep_handed_out()

    def _keep_handed_out(self) -> None:
        """Keep what was sent, so that a job can pin it when other answers stand."""
        while self._handed_out:
            sent = self._handed_out[0]
            try:
                with self._database.write() as session:
                    SnapshotRepository(session).keep_sent(sent.id, sent.gzipped)
            except DatabaseError as error:
                if not self._unkept:
                    _log.warning("what is sent cannot be pinned later, for it is not kept: %s", error)
                self._unkept = str(error)
                return
            self._unkept = ""
            self._handed_out.popleft()


def _answer(state: _State, device_key: str, problem: Problem, software: Software | None, *, evidence: bool) -> Answer:
    others = state.about(device_key).others
    found = match(problem, device_key, software, state.kept.get(device_key, _NOTHING), others)
    if not evidence or found.measured is None:
        return found
    stored = state.stored[found.measured_on or device_key].get(found.measured.key)
    return found if stored is None else replace(found, evidence=stored.evidence)


def _put(kept: dict[K, Reply], key: K, reply: Reply) -> None:
    if len(kept) >= MAX_REPLIES:
        kept.clear()
    kept[key] = reply
