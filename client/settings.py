"""Settings: where answers come from. Arguments win over TILEWISE_* variables."""

import base64
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tilewise.domain.errors import SettingsError
from tilewise.domain.snapshot import is_channel_name, is_snapshot_id

DEFAULT_TIMEOUT = 2.0
_TOKEN = re.compile(r"[!-~]+")
_SECRETS = re.compile(r"(?<=://)[^/@\s]*@|\?.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a client gets its answers.

    - source: `http(s)://...`, `sqlite:///...`, `postgresql://...` or the path of a snapshot file; None for the
      embedded snapshot of this machine.
    - snapshot: what this run pins: the 64 hexadecimal digits of a snapshot's id; with a service or a database as the
      source, the name of a channel; else the path of a snapshot file.
    - token: the bearer token for an HTTP source. It is never shown.
    - key: the Ed25519 public key, 32 bytes in base64, that every snapshot must be signed with.
    - timeout: seconds a source has in all, from the connection to the verified answers.

    Raises SettingsError for a value that makes no sense.
    """

    source: str | None = None
    snapshot: str | None = None
    token: str | None = field(default=None, repr=False)
    timeout: float = DEFAULT_TIMEOUT
    key: str | None = None

    def __post_init__(self) -> None:
        check_timeout(self.timeout)
        for name in ("source", "snapshot", "key"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise SettingsError(f"{name}: expected a path, URL or id, got {value!r}; leave it out to use none")
        if self.key is not None and not _is_key(self.key):
            raise SettingsError(
                "key: expected an Ed25519 public key, 32 bytes in base64, as `tilewise snapshot keygen` prints it, "
                f"got {self.key!r}; correct TILEWISE_SNAPSHOT_KEY"
            )
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise SettingsError(
                "token: expected printable ASCII without white space, got something else (it is not shown); "
                "check TILEWISE_TOKEN for a stray line break or quote"
            )

    def __repr__(self) -> str:
        source = None if self.source is None else without_secrets(self.source)
        token = "set" if self.token else None
        return f"Settings(source={source!r}, snapshot={self.snapshot!r}, token={token}, timeout={self.timeout!r})"

    @property
    def pinned_id(self) -> str | None:
        """The id that `snapshot` pins; None where it names a file, or nothing is pinned."""
        lower = (self.snapshot or "").lower()
        return lower if is_snapshot_id(lower) else None

    @property
    def pinned_channel(self) -> str | None:
        """The channel that `snapshot` pins; None where it is an id or a file, or nothing is pinned."""
        kept = "://" in (self.source or "")  # a file of answers has no channels
        return self.snapshot if kept and self.snapshot and is_channel_name(self.snapshot) else None

    @property
    def pinned_path(self) -> str | None:
        """The file that `snapshot` pins; None where it is an id or a channel, or nothing is pinned."""
        return None if self.pinned_id or self.pinned_channel else self.snapshot

    @classmethod
    def from_environment(
        cls,
        *,
        source: str | None = None,
        snapshot: str | None = None,
        token: str | None = None,
        timeout: float | None = None,
    ) -> Self:
        """Return the settings of TILEWISE_SOURCE, _SNAPSHOT, _TOKEN (or the file _TOKEN_FILE), _TIMEOUT and
        _SNAPSHOT_KEY; arguments win."""
        return cls(
            source=source if source is not None else _variable("TILEWISE_SOURCE"),
            snapshot=snapshot if snapshot is not None else _variable("TILEWISE_SNAPSHOT"),
            token=token if token is not None else _variable("TILEWISE_TOKEN") or _secret("TILEWISE_TOKEN_FILE"),
            timeout=timeout if timeout is not None else _seconds("TILEWISE_TIMEOUT"),
            key=_variable("TILEWISE_SNAPSHOT_KEY"),
        )


def check_timeout(seconds: float) -> float:
    """Return `seconds` where it can be waited for, else raise SettingsError."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds) or seconds <= 0:
        raise SettingsError(f"timeout: expected seconds above 0, got {seconds!r}; use for example {DEFAULT_TIMEOUT}")
    return float(seconds)


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == 32
    except ValueError:
        return False


def without_secrets(url: str) -> str:
    """Return `url` without user, password and query, to be shown."""
    return _SECRETS.sub("", url) if "://" in url else url


def _variable(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _secret(name: str) -> str | None:
    """Return what the file named by a variable holds; None without it. Raises SettingsError if it cannot be read."""
    path = _variable(name)
    if path is None:
        return None
    try:
        return Path(path).read_text().strip() or None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise SettingsError(f"{name}: cannot read {path} ({reason}); correct the path or its rights") from error


def _seconds(name: str) -> float:
    text = _variable(name)
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        return check_timeout(float(text))
    except ValueError as error:
        raise SettingsError(f"{name}: expected seconds above 0, got {text!r}; write for example 2.0") from error
