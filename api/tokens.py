"""/v1/tokens: make, list and revoke tokens."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from tilewise.db.tokens import AuditRepository, TokenRepository
from tilewise.domain import codec
from tilewise.domain.codec import Json
from tilewise.domain.token import Token, parse_scopes
from tilewise.domain.trial import now

from . import documents
from .dependencies import Actor, DatabaseOfApp
from .errors import responses

router = APIRouter(prefix="/v1/tokens", tags=["tokens"])
TokenId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
_PRIVATE = {"Cache-Control": "no-store"}


@router.get("", response_model=documents.Tokens, responses=responses(500, 503), summary="All tokens")
def list_tokens(database: DatabaseOfApp) -> Response:
    """Every token without its secret, the oldest first, ended ones too."""
    with database.read() as session:
        found = TokenRepository(session).all()
    return documents.written({"items": [_public(token) for token in found]}, headers=_PRIVATE)


@router.post(
    "", status_code=201, response_model=documents.MadeToken, responses=responses(422, 500, 503), summary="Make a token"
)
def create(wanted: documents.NewToken, database: DatabaseOfApp, actor: Actor) -> Response:
    """The secret is in this response alone: only its hash is kept. Once there is one, all requests need it."""
    scopes = parse_scopes(wanted.scopes)
    expires = None if wanted.days is None else now() + timedelta(days=wanted.days)
    with database.write() as session:
        token, secret = TokenRepository(session).create(wanted.name, scopes, expires=expires)
        AuditRepository(session).add(actor, "token.create", token.id, f"{token.name}: {', '.join(token.scopes)}")
    return documents.written({"token": _public(token), "secret": secret}, status=201, headers=_PRIVATE)


@router.delete(
    "/{token_id}",
    response_model=documents.TokenDocument,
    responses=responses(404, 422, 500, 503),
    summary="Revoke a token",
)
def revoke(token_id: TokenId, database: DatabaseOfApp, actor: Actor) -> Response:
    """It ends within about a second, on every process, with the sessions of browsers that signed in with it."""
    with database.write() as session:
        tokens = TokenRepository(session)
        tokens.revoke(token_id)
        AuditRepository(session).add(actor, "token.revoke", token_id)
        (token,) = (each for each in tokens.all() if each.id == token_id)
    return documents.written(_public(token), headers=_PRIVATE)


def _public(token: Token) -> Json:
    return {name: value for name, value in codec.to_json(token).items() if name != "digest"}
