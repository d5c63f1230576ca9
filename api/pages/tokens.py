"""/tokens: who may do what, and who did what."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from tilewise.db.tokens import AuditRepository, TokenRepository
from tilewise.domain.token import Scope
from tilewise.domain.trial import now

from .. import documents
from ..dependencies import DatabaseOfApp
from ..errors import ParameterError, responses
from .listing import address
from .templating import page

PATH = "/tokens"
PAGE_SIZE = 50
SCOPES = {
    Scope.READ: "look at everything, and ask for answers",
    Scope.REPORT: "report what was used and missed",
    Scope.TUNE: "queue and cancel jobs",
    Scope.ADMIN: "everything: freeze snapshots, move channels, make tokens",
}

router = APIRouter(include_in_schema=False)


@router.get(PATH, response_class=HTMLResponse, responses=responses(500, 503))
def tokens(request: Request, database: DatabaseOfApp) -> HTMLResponse:
    """The tokens, the newest first, and the audit trail."""
    at = address(PATH, request, ("after",))
    with database.read() as session:
        found = TokenRepository(session).all()
        trail = AuditRepository(session).page(after=_position(at.get("after")), limit=PAGE_SIZE)
    moment = now()
    reply = page(
        "tokens.html",
        path=PATH,
        at=at,
        tokens=[(token, token.stands(moment)) for token in reversed(found)],
        scopes=SCOPES,
        trail=trail.items,
        next=documents.cursor_behind(trail),
    )
    reply.headers["Cache-Control"] = "no-store"
    return reply


def _position(cursor: str) -> tuple[object, ...] | None:
    try:
        return documents.read_cursor(cursor or None, (int,))
    except ParameterError:
        return None
