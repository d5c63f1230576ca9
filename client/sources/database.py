"""Answers straight from a tilewise database, SQLite or PostgreSQL.

The one file of client/ that imports tilewise.db, and only when it is asked: the bare client needs no database library.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from tilewise.domain.errors import DatabaseError, NotFoundError, SourceError
from tilewise.domain.snapshot import Snapshot, is_snapshot_id
from tilewise.domain.usage import Usage

from ..paths import sqlite_file
from ..settings import without_secrets

if TYPE_CHECKING:
    from tilewise.db.session import Database


class DatabaseSource:
    """The database behind a `sqlite:///` or `postgresql://` URL, opened for one read at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = f"database {without_secrets(url)}"
        self.local = url.lower().startswith("sqlite")

    def fetch(
        self,
        device_key: str,
        *,
        timeout: float,  # noqa: ARG002 - the caller keeps the limit
        pin: str | None = None,
        known: Snapshot | None = None,  # noqa: ARG002 - the database is asked once a run
    ) -> Snapshot:
        with self._opened() as database, database.read() as session:
            from tilewise.db.answers import AnswerRepository
            from tilewise.db.snapshots import ChannelRepository, SnapshotRepository

            if pin is None:
                return AnswerRepository(session).snapshot(device_key)
            target = pin if is_snapshot_id(pin) else ChannelRepository(session).get(pin)
            if target is None:
                raise SourceError(f"{self.name} has no channel {pin!r}; `tilewise snapshot list` shows those it has")
            try:
                return SnapshotRepository(session).load(target)
            except NotFoundError:
                return AnswerRepository(session).snapshot(device_key)  # the caller compares its id

    def report(self, usage: Usage, *, timeout: float) -> None:  # noqa: ARG002 - off every calling thread
        with self._opened() as database, database.write() as session:
            from tilewise.db.demand import DemandRepository

            DemandRepository(session).add(usage)

    @contextlib.contextmanager
    def _opened(self) -> Iterator["Database"]:
        file = sqlite_file(self._url)
        if file is not None and not file.exists():
            raise SourceError(f"{self.name} does not exist; correct the path, or tune here first with `tilewise tune`")
        try:
            from tilewise.db.session import Database

            with Database.open(self._url, upgrade=False) as database:
                yield database
        except ModuleNotFoundError as error:
            raise SourceError(
                f"{self.name} needs {error.name}, which is not installed; run `pip install tilewise[server]`, "
                "or name a snapshot file or an http:// source"
            ) from error
        except DatabaseError as error:
            raise SourceError(f"{self.name}: {self._without_password(str(error))}") from error

    def _without_password(self, message: str) -> str:
        password = urlsplit(self._url).password
        for secret in (self._url, password, unquote(password or "")):
            if secret:
                message = message.replace(secret, "***")
        return " ".join(message.split())
