"""The snapshot file beside the embedded database: what a client reads that has no database library."""

import contextlib
import gzip
import os
import uuid
from pathlib import Path

from tilewise.domain.errors import DatabaseError
from tilewise.domain.snapshot import path_beside

from .answers import AnswerRepository
from .session import Database
from .snapshots import SnapshotRepository


def refresh_snapshot(database: Database) -> Path | None:
    """Write the standing answers beside a SQLite database and return where; None for a server, which has no file.

    Call it after every verdict, outside of any transaction. Readers see the old file or the new one, never a part.
    Raises DatabaseError when the file cannot be written; the verdict itself is kept by then.
    """
    if database.file is None:
        return None
    path = path_beside(database.file)
    # The write lock orders refreshes: no process can read, be overtaken, and put its older answers over newer ones.
    with database.write() as session:
        snapshot = AnswerRepository(session).snapshot()
        data = snapshot.dumps()
        # a job that ran with this file can pin it when the next verdict has replaced it
        SnapshotRepository(session).keep_sent(snapshot.id, gzip.compress(data, mtime=0))
        try:
            _write(path, data)
        except OSError as error:
            raise DatabaseError(f"cannot write {path}: {error.strerror}; make its folder writable") from error
    return path


def _write(path: Path, data: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    try:
        with new.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
