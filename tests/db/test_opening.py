"""Opening a database: what is made, what is refused, and in which words."""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from tests.domain.examples import answer

from tilewise.db import address, schema
from tilewise.db import session as session_module
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import BUSY_TIMEOUT_MS, Database
from tilewise.domain.errors import DatabaseError, SchemaVersionError

HEAD = schema.head()


def refusal(url: str, *, upgrade: bool) -> str:
    with pytest.raises(DatabaseError) as caught:
        Database.open(url, upgrade=upgrade)
    return str(caught.value)


def set_revision(url: str, revision: str | None) -> None:
    engine = create_engine(address.parse(url))
    with engine.begin() as connection:
        connection.execute(text(f"DELETE FROM {schema.VERSION_TABLE}"))
        if revision is not None:
            connection.execute(text(f"INSERT INTO {schema.VERSION_TABLE} VALUES (:value)"), {"value": revision})
    engine.dispose()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_upgrade_makes_one_whole_file_in_wal(tmp_path: Path) -> None:
    with Database.open(f"sqlite:///{tmp_path / 'new.db'}", upgrade=True) as database:
        assert database.file == tmp_path / "new.db"
        with database.write() as session:
            asked = {
                name: session.scalar(text(f"PRAGMA {name}"))
                for name in ("journal_mode", "foreign_keys", "busy_timeout")
            }
        assert asked == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": BUSY_TIMEOUT_MS}
    assert names(tmp_path) == ["new.db"]


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    with Database.open(f"sqlite:///{tmp_path / 'empty.db'}", upgrade=True) as database, database.read() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"


def test_without_upgrade_nothing_is_made(tmp_path: Path) -> None:
    file = tmp_path / "none.db"
    assert refusal(f"sqlite:///{file}", upgrade=False) == (
        f"there is no database at {file}; create it: `tilewise db upgrade --db sqlite:///{file}`"
    )
    assert names(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "none" / "tilewise.db"
    assert refusal(f"sqlite:///{file}", upgrade=True) == (
        f"cannot create {file}: {file.parent} does not exist; make the folder or name another file"
    )
    assert names(tmp_path) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = tmp_path / "file" / "tilewise.db"
    assert refusal(f"sqlite:///{file}", upgrade=True) == (
        f"cannot create {file}: {file.parent} is not a folder; make the folder or name another file"
    )


def test_a_folder_is_not_a_database(tmp_path: Path) -> None:
    assert refusal(f"sqlite:///{tmp_path}", upgrade=True) == (
        f"{tmp_path} is a folder; name a file in it: sqlite:///{tmp_path}/tilewise.db"
    )


def test_a_folder_that_takes_no_file_is_named() -> None:
    # the tests may run as root, whom file modes do not stop; /proc takes files from nobody
    assert refusal("sqlite:////proc/tilewise.db", upgrade=True) == (
        "cannot create /proc/tilewise.db: unable to open database file; is the folder writable?"
    )


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path, upgrade: bool) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("dear diary, " * 100)
    assert refusal(f"sqlite:///{file}", upgrade=upgrade) == (
        f"{file} is not a SQLite database; name another file, or move this one away"
    )
    assert file.read_text() == "dear diary, " * 100
    assert names(tmp_path) == ["notes.txt"]


def test_a_database_of_somebody_else_is_left_alone(database_url: str) -> None:
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE trials (trial_id INTEGER)"))
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
    engine.dispose()
    shown = address.shown(address.parse(database_url))
    assert refusal(database_url, upgrade=True) == (
        f"{shown} already holds tables of another program (trials); give tilewise a database of its own"
    )
    assert refusal(database_url, upgrade=False) == (
        f"{shown} holds no tilewise tables; create them: `tilewise db upgrade --db {shown}`"
    )


def test_an_alembic_version_of_somebody_else_does_no_harm(database_url: str) -> None:
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('v3.0.0.d')"))
    Database.open(database_url, upgrade=True).close()
    with engine.begin() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "v3.0.0.d"
    engine.dispose()


NEXT = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "next", "{head}"


def upgrade():
    op.add_column("devices", sa.Column("more", sa.Integer()))
"""


def test_an_older_schema_needs_the_upgrade(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database.open(database_url, upgrade=True) as database:
        shown = database.url
    shutil.copytree(schema.MIGRATIONS, tmp_path / "migrations")
    (tmp_path / "migrations" / "versions" / "next.py").write_text(NEXT.format(head=HEAD))
    monkeypatch.setattr(schema, "MIGRATIONS", tmp_path / "migrations")
    with pytest.raises(SchemaVersionError) as caught:
        Database.open(database_url, upgrade=False)
    assert str(caught.value) == (
        f"{shown} has the older schema {HEAD}, this tilewise needs next; upgrade it: `tilewise db upgrade --db {shown}`"
    )
    Database.open(database_url, upgrade=True).close()
    Database.open(database_url, upgrade=False).close()


@pytest.mark.parametrize("upgrade", [False, True])
def test_a_newer_schema_is_refused_and_left_as_it_is(database_url: str, upgrade: bool) -> None:
    with Database.open(database_url, upgrade=True) as database:
        shown = database.url
    set_revision(database_url, "9999")
    with pytest.raises(SchemaVersionError) as caught:
        Database.open(database_url, upgrade=upgrade)
    assert str(caught.value) == (
        f"{shown} was written by a newer tilewise (revision 9999, this one knows {HEAD}); upgrade tilewise"
    )
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        assert connection.scalar(text(f"SELECT version_num FROM {schema.VERSION_TABLE}")) == "9999"
    engine.dispose()


def test_a_failed_migration_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("alembic.command.upgrade", fail)
    file = tmp_path / "tilewise.db"
    assert refusal(f"sqlite:///{file}", upgrade=True) == (
        f"cannot create {file}: database or disk is full; is the folder writable?"
    )
    assert names(tmp_path) == []


OPEN = """
import sys
from tilewise.db.session import Database
with Database.open(sys.argv[1], upgrade=True) as database:
    database.check()
"""


def test_processes_that_open_at_once_make_one_database(database_url: str) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", OPEN, database_url],
            env={"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")},
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    assert [(process.communicate()[1], process.returncode) for process in started] == [(b"", 0)] * 4
    Database.open(database_url, upgrade=False).close()


def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    message = refusal("postgresql://tilewise:top%20secret@127.0.0.1:1/tilewise", upgrade=False)
    assert message.startswith("cannot use the database postgresql://tilewise:***@127.0.0.1:1/tilewise: connection")
    assert message.endswith("is the server up and the URL right?")
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://user:secret@host/name", "not in 'mysql'"),
        ("postgresql://user:secret/@host:secret/name", "not a database URL (scheme postgresql)"),
        ("/home/secret.db", "not a database URL (scheme missing)"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("postgresql://user@127.0.0.1:1/name?password=secret&color=red", 'invalid connection option "color"'),
    ],
)
def test_what_cannot_be_used_is_refused_without_secrets(url: str, words: str) -> None:
    message = refusal(url, upgrade=True)
    assert words in message
    assert "secret" not in message


def test_a_damaged_database_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "tilewise.db"
    Database.open(f"sqlite:///{file}", upgrade=True).close()
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    with pytest.raises(DatabaseError, match=r"^cannot use the database sqlite:////.*is the file whole"):
        Database.open(f"sqlite:///{file}", upgrade=False)


def test_a_reader_cannot_write(database: Database) -> None:
    with pytest.raises(DatabaseError, match="read"), database.read() as session:
        AnswerRepository(session).replace(answer(), expected_version=0, reason="test")


def test_a_reader_sees_one_moment(database: Database) -> None:
    with database.read() as session:
        before = AnswerRepository(session).newest()
        with database.write() as other:
            AnswerRepository(other).replace(answer(), expected_version=0, reason="test")
        assert AnswerRepository(session).newest() == before
    with database.read() as session:
        assert AnswerRepository(session).newest() == 1


def test_a_lock_held_too_long_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "BUSY_TIMEOUT_MS", 1000)
    with (
        Database.open(f"sqlite:///{tmp_path / 'tilewise.db'}", upgrade=True) as database,
        contextlib.closing(sqlite3.connect(tmp_path / "tilewise.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseError, match="was kept locked for 1 s by another writer"), database.write():
            pass


def test_a_file_that_was_removed_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "tilewise.db"
    with Database.open(f"sqlite:///{file}", upgrade=True) as database:
        with database.write():
            pass
        file.unlink()
        with pytest.raises(DatabaseError, match="was removed while it was in use"), database.write():
            pass
