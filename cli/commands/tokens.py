"""tilewise tokens create, list, revoke."""

from datetime import timedelta
from typing import Annotated

import typer

from ..console import err, out, print_json, print_table
from ..options import AsJson, Db, database_url, user_name

app = typer.Typer(help="Bearer tokens of the service.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose it is; shown in logs and in the audit trail.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="read, report, tune or admin; may be repeated. Default: read, report.")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, max=36500, help="Ends after so many days.")] = None,
    db: Db = None,
) -> None:
    """Make a token and print it, once: only its hash is kept."""
    from tilewise.db.session import Database
    from tilewise.db.tokens import AuditRepository, TokenRepository
    from tilewise.domain.token import Scope, parse_scopes
    from tilewise.domain.trial import now

    scopes = parse_scopes(scope or (Scope.READ, Scope.REPORT))
    expires = None if days is None else now() + timedelta(days=days)
    with Database.open(database_url(db), upgrade=db is None) as database, database.write() as session:
        kept, written = TokenRepository(session).create(name, scopes, expires=expires)
        AuditRepository(session).add(user_name(), "token.create", kept.id, f"{kept.name}: {', '.join(kept.scopes)}")
    err.print(f"token {kept.id} of {kept.name}: {', '.join(scopes)}. It is not shown again:", markup=False)
    out.print(written, markup=False)


@app.command("list")
def list_(db: Db = None, as_json: AsJson = False) -> None:
    """All tokens, ended ones too."""
    from tilewise.db.session import Database
    from tilewise.db.tokens import TokenRepository

    with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
        found = TokenRepository(session).all()
    if as_json:
        print_json({"tokens": found})
        return
    rows = [
        (token.id, token.name, ", ".join(token.scopes), f"{token.created:%Y-%m-%d}",
         "never" if token.expires is None else f"{token.expires:%Y-%m-%d}",
         "" if token.revoked is None else f"{token.revoked:%Y-%m-%d}")
        for token in found
    ]  # fmt: skip
    print_table("", ("id", "name", "scopes", "created", "expires", "revoked"), rows)


@app.command()
def revoke(token_id: Annotated[str, typer.Argument(help="Id of the token.")], db: Db = None) -> None:
    """End a token; a running service knows within a second or so."""
    from tilewise.db.session import Database
    from tilewise.db.tokens import AuditRepository, TokenRepository

    with Database.open(database_url(db), upgrade=False) as database, database.write() as session:
        TokenRepository(session).revoke(token_id)
        AuditRepository(session).add(user_name(), "token.revoke", token_id)
    out.print(f"token {token_id} is revoked", markup=False)
