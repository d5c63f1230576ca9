"""Who asks, and what they may: bearer tokens in a table that follows the database, one table of scopes by route."""

import base64
import binascii
import logging
from contextvars import ContextVar
from dataclasses import dataclass

from tilewise.db.session import Database
from tilewise.db.tokens import TokenRepository
from tilewise.domain import token as tokens
from tilewise.domain.errors import DatabaseError
from tilewise.domain.token import Scope, Token
from tilewise.domain.trial import now

from . import browser_session
from .follower import Follower

FOLLOW_SECONDS = 1.0
_log = logging.getLogger("tilewise.api")
# What is no secret: whether the process lives, and what a browser needs to show that a token is wanted.
_OPEN = ("/healthz", "/readyz", "/static/", "/sign-in", "/sign-out")
_ADMINS = ("/v1/audit", "/v1/tokens", "/tokens")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, by the name of its token; `key` is what its rate is limited by."""

    name: str
    key: str
    token: Token | None

    def allows(self, scope: Scope) -> bool:
        return self.token is None or self.token.allows(scope)


class RefusedError(Exception):
    """The request carries no token that stands."""


# Who sent the request that is being answered: what the head of every page says.
current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)


def needed(method: str, path: str) -> Scope | None:
    """Return the scope that a request needs, None for what is open; whatever is not listed here needs `admin`."""
    if path.startswith(_OPEN):
        return None
    if path.startswith(_ADMINS):
        return Scope.ADMIN
    if method in ("GET", "HEAD") or (method == "POST" and path == "/v1/answers"):
        return Scope.READ
    if method == "POST" and path == "/v1/usage":
        return Scope.REPORT
    if (method == "POST" and path == "/v1/jobs") or (method == "DELETE" and path.startswith("/v1/jobs/")):
        return Scope.TUNE
    return Scope.ADMIN


class Callers:
    """The tokens of the database. Once there is one, ended ones too, every request needs one."""

    def __init__(self, database: Database, *, required: bool) -> None:
        self._database, self._required = database, required
        self._tokens: dict[str, Token] = {}
        self._known = False  # whether the tokens were ever read: until then nobody is let in
        self._away = False
        self._behind = True
        # a revoked token ends within a second or so
        self.follower = Follower("tokens", self.refresh, seconds=FOLLOW_SECONDS)
        database.watch(self._fall_behind)

    def _fall_behind(self) -> None:
        self._behind = True

    def identify(
        self, authorization: bytes | None, address: str, *, looks: bool = False, cookies: bytes | None = None
    ) -> Caller:
        """Return who sent a request. Raises RefusedError.

        One that only `looks` may also say it by the password of Basic, or by the session of a browser.
        """
        if self._behind:
            self.refresh()
        if self._known and not self._tokens and not self._required:
            return Caller(f"anonymous@{address}", address, None)
        token = None
        if authorization is None and looks and cookies is not None:
            token = browser_session.token_of(cookies, self._tokens, now())
        else:
            kind, _, sent = (authorization or b"").partition(b" ")
            text = sent.strip().decode("latin-1")
            if kind.lower() == b"bearer":
                token = self.token_of(text)
            elif kind.lower() == b"basic" and looks:
                token = self.token_of(_password(text))
        if token is None:
            raise RefusedError
        return Caller(token.name, token.id, token)

    def token_of(self, text: str) -> Token | None:
        """Return the token that a bearer wrote as `text`; None where there is none that stands."""
        found = tokens.split(text)
        token = self._tokens.get(found[0]) if found else None
        return token if found and token and token.valid(found[1], now()) else None

    def refresh(self) -> None:
        """Read the tokens again; where the database is away, those that stood go on."""
        self._behind = False
        try:
            with self._database.read() as session:
                self._tokens = {token.id: token for token in TokenRepository(session).all()}
            self._known, self._away = True, False
        except DatabaseError as error:
            self._behind = not self._known
            if not self._away:  # said once, not every second
                _log.error("tokens are checked from memory: %s", error)
            self._away = True


def _password(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("latin-1").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
