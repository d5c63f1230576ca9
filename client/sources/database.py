"""Answers straight from a tilewise database, SQLite or PostgreSQL.

The one file of client/ that imports tilewise.db, and only when it is asked: the bare client needs no database library.
"""

from urllib.parse import unquote, urlsplit

from tilewise.domain.errors import DatabaseError, SourceError
from tilewise.domain.snapshot import Snapshot

from ..paths import sqlite_file
from ..settings import without_secrets


class DatabaseSource:
    """The database behind a `sqlite:///` or `postgresql://` URL, opened for one read at a time."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = f"database {without_secrets(url)}"
        self.local = url.lower().startswith("sqlite")

    def fetch(self, device_key: str, *, timeout: float) -> Snapshot:  # noqa: ARG002 - the caller keeps the limit
        file = sqlite_file(self._url)
        if file is not None and not file.exists():
            raise SourceError(f"{self.name} does not exist; correct the path, or tune here first with `tilewise tune`")
        try:
            from tilewise.db.answers import AnswerRepository
            from tilewise.db.session import Database

            database = Database.open(self._url, upgrade=False)
            try:
                with database.read() as session:
                    return AnswerRepository(session).snapshot(device_key)
            finally:
                database.close()
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
