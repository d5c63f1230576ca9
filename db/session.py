"""Database: opens a database, and the only place where a transaction begins and ends."""

import contextlib
import errno
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, exc
from sqlalchemy.orm import Session

from tilewise.domain.errors import DatabaseError, SchemaVersionError

from . import address, schema

BUSY_TIMEOUT_MS = 10_000
CONNECT_TIMEOUT_S = 5
_WRITES = "tilewise_writes"
# What goes wrong with a database rather than with a statement; the rest are our own mistakes and stay what they are.
_TROUBLE = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)


class Database:
    """One SQLite file or PostgreSQL database that holds tilewise's tables.

        with Database.open("sqlite:///tilewise.db", upgrade=True) as database:
            with database.write() as session:
                AnswerRepository(session).replace(answer, expected_version=0, reason="first verdict")
            with database.read() as session:
                kept = AnswerRepository(session).of_device(device_key)

    Threads may share one. A process that forks must open its own.
    """

    def __init__(self, url: URL, engine: Engine) -> None:
        self._url = url
        self._writer = engine.execution_options(**{_WRITES: True})
        self._watchers: list[Callable[[], None]] = []
        # A reader sees one moment of the database for as long as it reads; SQLite in WAL does so by itself.
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True} if self.file is None else {}
        self._reader = engine.execution_options(**options)

    @classmethod
    def open(cls, url: str, *, upgrade: bool) -> Self:
        """Open the database at `url`.

        With `upgrade` a missing SQLite file (never a folder) and the schema are made, an older schema is upgraded.
        Without it nothing is written and the schema must be this code's.

        Raises SchemaVersionError for an older schema (only without `upgrade`) or a newer one, and DatabaseError for
        anything that cannot be opened; no message holds a password, and nothing half-made stays behind.
        """
        parsed = address.parse(url)
        file = address.file_of(parsed)
        with _explained(parsed, opening=True):
            if file is not None:
                _check_place(file, parsed, create=upgrade)
                if upgrade and not file.exists():
                    _create_file(file, parsed)
            database = cls(parsed, _engine(parsed))
            try:
                if upgrade:
                    database._upgrade()
                else:
                    database.check()
            except BaseException:
                database.close()
                raise
            return database

    @property
    def url(self) -> str:
        """The URL without its password, fit to be shown."""
        return address.shown(self._url)

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database; None for a server."""
        return address.file_of(self._url)

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session whose changes are committed when the block ends, and undone when it raises.

        On SQLite the transaction begins IMMEDIATE: a writer waits its turn at the start, and never finds in the middle
        that what it read is out of date. Raises DatabaseError when the database cannot be used, or its file is gone.
        """
        with _explained(self._url), Session(self._writer, expire_on_commit=False) as session, session.begin():
            session.connection()
            yield session
        if self.file is not None and not self.file.exists():  # a connection goes on writing into nothing
            raise DatabaseError(f"{self.file} was removed while it was in use: what was kept since then is lost")
        for watcher in self._watchers:
            watcher()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` after every commit of a `write` through this object; it must be quick and not raise."""
        self._watchers.append(watcher)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one moment of the database and cannot write.

        Raises DatabaseError when the database cannot be used.
        """
        with _explained(self._url), Session(self._reader, expire_on_commit=False) as session:
            yield session

    def check(self) -> None:
        """Return if the database answers and has this code's schema; raises DatabaseError or SchemaVersionError."""
        with _explained(self._url), self._reader.connect() as connection:
            schema.check(connection, self.url)

    def close(self) -> None:
        """Close the connections that are not in use."""
        self._writer.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _upgrade(self) -> None:
        with contextlib.suppress(SchemaVersionError):
            self.check()
            return
        with self._writer.begin() as connection:
            schema.upgrade(connection, self.url)
        if self.file is not None:  # an empty file that somebody else made is not in WAL yet
            with contextlib.closing(_connect(self.file)) as plain:
                plain.execute("PRAGMA journal_mode = WAL")
            self.close()  # connections from before it believe that the file is not


def _engine(url: URL, **options: Any) -> Engine:
    common = {"json_serializer": _dumps, **options}
    file = address.file_of(url)
    if file is not None:
        engine = create_engine(url, creator=lambda: _connect(file), **common)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    arguments = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_TIMEOUT_S}
    return create_engine(url, pool_pre_ping=True, connect_args=arguments, **common)


def _dumps(document: Any) -> str:
    # NaN is not JSON: PostgreSQL refuses it, and SQLite would keep what no other reader can read.
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _connect(file: Path, mode: str = "rw") -> sqlite3.Connection:
    # mode=rw: an open by itself never makes a file. isolation_level=None: BEGIN is ours, see _begin_sqlite.
    connection = sqlite3.connect(
        f"file:{quote(str(file.absolute()))}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql(f"PRAGMA query_only = {'OFF' if writes else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _check_place(file: Path, url: URL, *, create: bool) -> None:
    shown, folder = address.shown(url), file.absolute().parent
    try:
        if file.is_dir():
            raise DatabaseError(f"{file} is a folder; name a file in it: {shown.rstrip('/')}/tilewise.db")
        if file.exists():
            return
        if not create:
            raise DatabaseError(f"there is no database at {file}; create it: `tilewise db upgrade --db {shown}`")
        if not folder.is_dir():
            found = "is not a folder" if folder.exists() else "does not exist"
            raise DatabaseError(f"cannot create {file}: {folder} {found}; make the folder or name another file")
    except OSError as error:
        raise DatabaseError(f"cannot use {file}: {error.strerror}") from error


def _create_file(file: Path, url: URL) -> None:
    """Make a whole database beside `file` and give it its name in one step: others see all of it or nothing."""
    made = file.with_name(f".{file.name}.{uuid.uuid4().hex}.new")
    try:
        try:
            with contextlib.closing(_connect(made, "rwc")) as connection:
                # Lasts in the file, and cannot be set while others use it: so before it has a name.
                connection.execute("PRAGMA journal_mode = WAL")
            engine = _engine(url.set(database=str(made)), poolclass=NullPool)
            with engine.execution_options(**{_WRITES: True}).begin() as connection:
                schema.upgrade(connection, address.shown(url))
        except (sqlite3.Error, exc.SQLAlchemyError) as error:
            raise DatabaseError(f"cannot create {file}: {_reason(error, url)}; is the folder writable?") from error
        _give_name(made, file)
    finally:
        for left in (made, *(made.with_name(made.name + end) for end in ("-wal", "-shm", "-journal"))):
            left.unlink(missing_ok=True)


def _give_name(made: Path, file: Path) -> None:
    try:
        os.link(made, file)
    except FileExistsError:
        pass  # another process was first, and its file is as whole as ours
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise DatabaseError(f"cannot create {file}: {error.strerror}") from error
        made.rename(file)  # a file system without hard links


@contextlib.contextmanager
def _explained(url: URL, *, opening: bool = False) -> Iterator[None]:
    """Turn trouble with the database into one DatabaseError that names it; while `opening`, everything is trouble."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        # sqlite3.DatabaseError itself, not a subclass, is what a damaged file or one that is no database gives
        if opening or isinstance(error, _TROUBLE) or type(error) is exc.DatabaseError:
            raise DatabaseError(_line(error, url)) from error
        raise


def _line(error: Exception, url: URL) -> str:
    shown, reason = address.shown(url), _reason(error, url)
    if "file is not a database" in reason:
        return f"{address.file_of(url)} is not a SQLite database; name another file, or move this one away"
    if "database is locked" in reason:
        return f"{shown} was kept locked for {BUSY_TIMEOUT_MS // 1000} s by another writer; try again when it is done"
    hint = (
        "is the file whole and its folder writable?" if address.file_of(url) else "is the server up and the URL right?"
    )
    return f"cannot use the database {shown}: {reason}; {hint}"


def _reason(error: Exception, url: URL) -> str:
    return address.without_secrets(str(getattr(error, "orig", None) or error), url)
