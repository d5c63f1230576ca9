"""Bearer tokens: who may ask the service for what.

A token reads `tw_ID_SECRET`. The ID is public and finds the row; of the secret, 256 random bits, only the SHA-256 is
kept. A slow hash guards passwords that people choose: these need none.
"""

import enum
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from .errors import SettingsError

_FORM = re.compile(r"tw_(?P<id>[0-9a-f]{16})_(?P<secret>[A-Za-z0-9_-]{43})")


class Scope(enum.StrEnum):
    """What a token allows: read answers and lists, report use, queue and cancel jobs, change what others rely on."""

    READ = "read"
    REPORT = "report"
    TUNE = "tune"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What is kept of a token; `digest` is the SHA-256 of its secret. `admin` allows everything."""

    id: str
    name: str
    scopes: tuple[Scope, ...]
    digest: str
    created: datetime
    expires: datetime | None = None
    revoked: datetime | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def stands(self, at: datetime) -> bool:
        """Return whether it is neither revoked nor expired at `at`."""
        return self.revoked is None and (self.expires is None or at < self.expires)

    def valid(self, secret: str, at: datetime) -> bool:
        """Return whether `secret` is this token's and the token stands at `at`. Compares in constant time."""
        return hmac.compare_digest(digest(secret), self.digest) and self.stands(at)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def generate() -> tuple[str, str]:
    """Return the id and the secret of a new token."""
    return secrets.token_hex(8), secrets.token_urlsafe(32)


def written(id_: str, secret: str) -> str:
    """Return the token as its bearer keeps it."""
    return f"tw_{id_}_{secret}"


def split(text: str) -> tuple[str, str] | None:
    """Return id and secret of what a bearer sent; None for what has not the form of a token."""
    found = _FORM.fullmatch(text)
    return None if found is None else (found["id"], found["secret"])


def parse_scopes(names: Iterable[str]) -> tuple[Scope, ...]:
    """Return the scopes of `names` in their order of declaration. Raises SettingsError for an unknown one, or none."""
    wanted = {name.strip() for name in names}
    unknown = sorted(wanted - set(Scope))
    if unknown or not wanted:
        raise SettingsError(f"scopes: expected some of {', '.join(Scope)}, got {', '.join(unknown) or 'none'}")
    return tuple(scope for scope in Scope if scope in wanted)
