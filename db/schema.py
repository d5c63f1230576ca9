"""Which schema a database has, and bringing it to the one this code knows."""

import functools
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from tilewise.domain.errors import DatabaseError, SchemaVersionError

from .models import Base

# Its own name: Optuna keeps an `alembic_version` and may share the database.
VERSION_TABLE = "tilewise_version"
MIGRATIONS = Path(__file__).with_name("migrations")
# "tilewise" in ASCII, any constant that is the same in every process.
_ADVISORY_LOCK = int.from_bytes(b"tilewise")


def config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration for the migrations shipped in this package; no alembic.ini is needed."""
    made = Config()
    made.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    made.attributes.update(connection=connection, metadata=Base.metadata, version_table=VERSION_TABLE)
    return made


def head() -> str:
    """Return the revision that this code knows."""
    return _revisions(MIGRATIONS)[0]


@functools.cache
def _revisions(folder: Path) -> tuple[str, ...]:
    """Return the revisions in `folder`, the newest first."""
    return tuple(script.revision for script in ScriptDirectory(str(folder)).walk_revisions())


def revision(connection: Connection) -> str | None:
    """Return the revision of the database, None where tilewise was never installed."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def check(connection: Connection, shown: str) -> None:
    """Return if the database has exactly the schema that this code knows.

    Raises SchemaVersionError for an older or a newer one; `shown` is the database's URL without its password.
    """
    found = revision(connection)
    _refuse_newer(found, shown)
    if found is None:
        raise SchemaVersionError(f"{shown} holds no tilewise tables; create them: `tilewise db upgrade --db {shown}`")
    if found != head():
        raise SchemaVersionError(
            f"{shown} has the older schema {found}, this tilewise needs {head()}; "
            f"upgrade it: `tilewise db upgrade --db {shown}`"
        )


def upgrade(connection: Connection, shown: str) -> None:
    """Bring the database to this code's schema, inside the caller's transaction.

    Safe against other processes doing the same: SQLite's transaction began IMMEDIATE, PostgreSQL takes an advisory
    lock, and only then the revision is read. Raises SchemaVersionError for a newer schema, and DatabaseError where
    somebody else's tables have our names.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ADVISORY_LOCK})
    found = revision(connection)
    _refuse_newer(found, shown)
    if found == head():
        return
    if found is None:
        taken = sorted(set(inspect(connection).get_table_names()) & set(Base.metadata.tables))
        if taken:
            raise DatabaseError(
                f"{shown} already holds tables of another program ({', '.join(taken)}); "
                "give tilewise a database of its own"
            )
    command.upgrade(config(connection), "head")


def _refuse_newer(found: str | None, shown: str) -> None:
    if found is not None and found not in _revisions(MIGRATIONS):
        raise SchemaVersionError(
            f"{shown} was written by a newer tilewise (revision {found}, this one knows {head()}); upgrade tilewise"
        )
