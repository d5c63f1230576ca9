"""Sources of answers: a snapshot file, the HTTP service, a database. `open_source` chooses by the form of a string."""

from pathlib import Path
from typing import Protocol

from tilewise.domain.errors import SettingsError
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.usage import Usage

from .database import DatabaseSource
from .http import HttpSource
from .snapshot_file import SnapshotFile

__all__ = ["DatabaseSource", "HttpSource", "SnapshotFile", "Source", "open_source"]


class Source(Protocol):
    """Where the answers of a device come from."""

    @property
    def name(self) -> str:
        """What log lines call it: never with a token or a password."""

    @property
    def local(self) -> bool:
        """Whether fetching stays on this machine."""

    def fetch(
        self, device_key: str, *, timeout: float, pin: str | None = None, known: Snapshot | None = None
    ) -> Snapshot:
        """Return the verified answers of (at least) `device_key`, or the snapshot whose id or channel `pin` names.

        `known` is what the asker has already: where that is still right it need not be sent again. Raises SourceError
        and SnapshotError only.
        """

    def report(self, usage: Usage, *, timeout: float) -> None:
        """Tell what was used and missed. Raises SourceError; a source that keeps no such thing does nothing."""


def open_source(text: str, *, token: str | None = None) -> Source:
    """Return the source that `text` names, without touching it. Raises SettingsError for an unknown form."""
    scheme, found, _ = text.partition("://")
    kind = scheme.lower().partition("+")[0]
    if not found:
        return SnapshotFile(Path(text).expanduser())
    if kind in ("http", "https"):
        return HttpSource(text, token=token)
    if kind in ("sqlite", "postgresql", "postgres"):
        return DatabaseSource(text)
    raise SettingsError(
        f"source: expected http(s)://, sqlite:///, postgresql:// or the path of a snapshot file, got {scheme}://...; "
        "correct TILEWISE_SOURCE"
    )
