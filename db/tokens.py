"""Bearer tokens and the audit trail."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tilewise.domain import token as tokens
from tilewise.domain.errors import NotFoundError, SettingsError
from tilewise.domain.token import Scope, Token
from tilewise.domain.trial import now

from . import paging, references
from .models import AuditRow, TokenRow
from .paging import Page, Position


class TokenRepository:
    """Tokens in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, name: str, scopes: tuple[Scope, ...], *, expires: datetime | None = None) -> tuple[Token, str]:
        """Return a new token and what its bearer sends, which is shown now and never again."""
        name = references.clean(name).strip()
        if not name or len(name) > 200:
            raise SettingsError(f"name: expected up to 200 characters that say whose token it is, got {name!r}")
        id_, secret = tokens.generate()
        made = Token(
            id=id_, name=name, scopes=scopes, digest=tokens.digest(secret), created=now(), expires=expires, revoked=None
        )
        self._session.add(
            TokenRow(
                id=made.id,
                name=made.name,
                scopes=",".join(scopes),
                digest=made.digest,
                created=made.created,
                expires=expires,
                revoked=None,
            )
        )
        self._session.flush()
        return made, tokens.written(id_, secret)

    def revoke(self, token_id: str) -> None:
        """End a token now; once ended it stays so. Raises NotFoundError for an unknown id."""
        ended = update(TokenRow).where(TokenRow.id == token_id, TokenRow.revoked.is_(None)).values(revoked=now())
        self._session.execute(ended)
        if self._session.scalar(select(TokenRow.id).where(TokenRow.id == token_id)) is None:
            raise NotFoundError(f"no token {token_id!r}; `tilewise tokens list` shows those that there are")

    def all(self) -> tuple[Token, ...]:
        """Return every token, the oldest first, ended ones too."""
        query = select(TokenRow).order_by(TokenRow.created, TokenRow.id)
        return tuple(_token(row) for row in self._session.scalars(query))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Who did what to what, and when."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: str


class AuditRepository:
    """The audit trail in one session: entries are added, in the transaction of what they tell of, and never changed."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, actor: str, action: str, subject: str, detail: str = "") -> None:
        """Note that `actor` did `action` to `subject`."""
        actor, action, subject = (references.clean(text)[:255] for text in (actor, action, subject))
        row = AuditRow(at=now(), actor=actor, action=action, subject=subject, detail=references.clean(detail))
        self._session.add(row)
        self._session.flush()

    def page(self, *, after: Position | None = None, limit: int = 50) -> Page[AuditEntry]:
        """Return a page of the trail, the newest first."""
        columns = (AuditRow.id, AuditRow.at, AuditRow.actor, AuditRow.action, AuditRow.subject, AuditRow.detail)
        return paging.page(
            self._session,
            select(*columns),
            (AuditRow.id.expression,),
            lambda row: AuditEntry(id=row[0], at=row[1], actor=row[2], action=row[3], subject=row[4], detail=row[5]),
            descending=True,
            after=after,
            limit=limit,
        )


def _token(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        name=row.name,
        scopes=tuple(Scope(name) for name in row.scopes.split(",")),
        digest=row.digest,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
    )
