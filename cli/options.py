"""Options that several commands share."""

import getpass
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

Db = Annotated[
    str | None,
    typer.Option("--db", metavar="URL", envvar="TILEWISE_DB", help="Database; by default SQLite in the data folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")]
DeviceName = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]


def database_url(given: str | None) -> str:
    """Return the database to use: given, that of the file TILEWISE_DB_FILE, or the default, whose folder is made."""
    from tilewise.client import paths
    from tilewise.domain.errors import DatabaseError

    if given is not None:
        return given
    file = os.environ.get("TILEWISE_DB_FILE")
    if file:
        return secret_of(Path(file))
    folder = paths.data_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseError(
            f"cannot make the data folder {folder} ({error.strerror}); name a database with --db, or a folder that "
            "can be written in TILEWISE_HOME"
        ) from error
    return paths.default_database_url()


def writable_folder(folder: Path, option: str) -> None:
    """Make `folder` where it is not there. Raises SettingsError where nothing can be written in it.

    For commands that write at their end what they measured for minutes.
    """
    from tilewise.domain.errors import SettingsError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(f"{option}: nothing can be written in {folder}: {error.strerror}") from error


def user_name() -> str:
    """Return who runs this command, for the audit trail."""
    try:
        return f"{getpass.getuser()} (command line)"
    except (KeyError, OSError):  # a container's user may have no name
        return "command line"


def secret_of(file: Path) -> str:
    """Return the one line that a file of a secret holds. Raises SettingsError where it cannot be read."""
    from tilewise.domain.errors import SettingsError

    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
