"""Where tilewise keeps its files: one data folder per user, which TILEWISE_HOME moves.

    <data>/tilewise.db               the embedded database (TILEWISE_DB names another)
    <data>/tilewise.snapshot.json    the snapshot of its answers, refreshed with every verdict
    <data>/cache/                    the last good download of each remote source

Nothing here touches the disk.
"""

import os
from pathlib import Path

import platformdirs

from tilewise.domain import snapshot


def data_dir() -> Path:
    """Return the folder of the user's data: TILEWISE_HOME, or what the platform suggests."""
    home = os.environ.get("TILEWISE_HOME")
    return Path(home).expanduser() if home else Path(platformdirs.user_data_dir("tilewise", appauthor=False))


def default_database_file() -> Path:
    return data_dir() / "tilewise.db"


def default_database_url() -> str:
    """Return TILEWISE_DB, or the URL of the SQLite file in the data folder."""
    return os.environ.get("TILEWISE_DB") or f"sqlite:///{default_database_file()}"


def embedded_snapshot_path() -> Path:
    """Return the snapshot beside the embedded database: TILEWISE_DB's file where that names one, else the default."""
    return snapshot.path_beside(sqlite_file(default_database_url()) or default_database_file())


def cache_dir() -> Path:
    return data_dir() / "cache"


def sqlite_file(url: str) -> Path | None:
    """Return the file of a `sqlite:///path` URL; None for another database and for one in memory."""
    scheme, _, rest = url.partition("://")
    if scheme.partition("+")[0] != "sqlite":
        return None
    path = rest.partition("?")[0].removeprefix("/")
    return None if path in ("", ":memory:") or path.startswith("file:") else Path(path)
