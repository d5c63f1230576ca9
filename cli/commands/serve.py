"""tilewise serve."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import Db, database_url, secret_of


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    require_tokens: Annotated[
        bool, typer.Option("--require-tokens", help="Refuse requests without a token, also before one was made.")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let other machines in though there is no token.")
    ] = False,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second of one token or address; 0: any.")] = 500.0,
    burst: Annotated[int, typer.Option(min=1, help="Requests of one token or address at once.")] = 5000,
    sign_with: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sign snapshots with this key: `tilewise snapshot keygen`.")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request, not only changes.")] = False,
    db: Db = None,
) -> None:
    """Serve answers and the dashboard over HTTP."""
    from tilewise.api.server import serve as run
    from tilewise.api.settings import ServiceSettings
    from tilewise.db.session import Database

    settings = ServiceSettings(
        require_tokens=require_tokens,
        rate=rate,
        burst=burst,
        access_log=access_log,
        signing_key=None if sign_with is None else secret_of(sign_with),
    )
    with Database.open(database_url(db), upgrade=db is None) as database:
        run(database, host, port, settings, insecure=insecure)
