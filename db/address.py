"""The address of a database: which are understood, and how one is shown without its password."""

from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tilewise.domain.errors import DatabaseError

_FORMS = "sqlite:///FILE (sqlite:////ABSOLUTE/FILE) or postgresql://USER:PASSWORD@HOST:PORT/NAME"
_SECRETS = {"password", "sslpassword"}


def parse(text: str) -> URL:
    """Return `text` as a URL with the driver this package uses. Raises DatabaseError for any other kind."""
    scheme = text.partition("://")[0] if "://" in text else ""
    try:
        url = make_url(text)
        url.render_as_string()
    except (ArgumentError, ValueError):
        # Not chained, not shown: what cannot be parsed may have its password anywhere.
        raise DatabaseError(
            f"not a database URL (scheme {scheme or 'missing'}): expected {_FORMS}; "
            "write special characters of a password as %XX"
        ) from None
    kind = url.get_backend_name()
    if kind in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg")
    if kind != "sqlite":
        raise DatabaseError(f"tilewise keeps its data in SQLite or PostgreSQL, not in {kind!r}: expected {_FORMS}")
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise DatabaseError(
            f"{shown(url)} names no file, and a database in memory is lost at once: expected sqlite:///FILE"
        )
    return url.set(drivername="sqlite")


def shown(url: URL) -> str:
    """Return `url` as a user would write it, every password as ***."""
    plain = url.set(drivername=url.get_backend_name())
    hidden = {name: "***" for name in plain.query if name in _SECRETS}
    return plain.update_query_dict(hidden).render_as_string(hide_password=True)


def without_secrets(text: str, url: URL) -> str:
    """Return the first line of `text` with the passwords of `url` blotted out."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    secrets = [url.password, *(value for name, value in url.query.items() if name in _SECRETS)]
    for secret in secrets:
        if isinstance(secret, str) and secret:
            line = line.replace(secret, "***")
    return line


def file_of(url: URL) -> Path | None:
    """Return the file of a SQLite URL, None for a server."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
