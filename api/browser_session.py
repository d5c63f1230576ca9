"""How a person stays signed in: a cookie that stands for a token, for looking only.

The cookie holds the token's id, when the session ends, and a MAC over both. Its key is the hash that the database keeps
of the token's secret: so every process of the service can check it, no table is needed, and the session ends with the
token. It is HttpOnly (no script reads it) and SameSite=Lax (a link from elsewhere opens a page, and nothing else from
there carries it); it is accepted for GET and HEAD alone. What changes something wants the token itself, in the
Authorization header, which a browser never adds by itself: there is nothing that another site could make it do (CSRF).
"""

import hmac
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from http.cookies import CookieError, SimpleCookie

from tilewise.domain.token import Token

NAME = "tilewise-session"
LENGTH = timedelta(hours=12)
_FORM = re.compile(r"(?P<id>[0-9a-f]{16})\.(?P<ends>[0-9]{1,12})\.(?P<mac>[0-9a-f]{64})")


def opened(token: Token, at: datetime) -> str:
    """Return the cookie's value for a session of `token` that begins at `at`."""
    ends = int((at + LENGTH).timestamp())
    return f"{token.id}.{ends}.{_mac(token, ends)}"


def token_of(cookies: bytes, tokens: Mapping[str, Token], at: datetime) -> Token | None:
    """Return the token that the session in a Cookie header stands for, None where there is none that lasts at `at`."""
    try:
        morsel = SimpleCookie(cookies.decode("latin-1")).get(NAME)
    except CookieError:
        return None
    found = _FORM.fullmatch(morsel.value) if morsel else None
    token = tokens.get(found["id"]) if found else None
    if found is None or token is None or not hmac.compare_digest(found["mac"], _mac(token, int(found["ends"]))):
        return None
    return token if token.stands(at) and at < datetime.fromtimestamp(int(found["ends"]), UTC) else None


def _mac(token: Token, ends: int) -> str:
    return hmac.digest(token.digest.encode(), f"session {token.id} {ends}".encode(), "sha256").hex()
