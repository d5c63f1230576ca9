"""tilewise serve."""

from typing import Annotated

import typer

from ..options import Db, database_url


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    db: Db = None,
) -> None:
    """Serve answers and the dashboard over HTTP."""
    from tilewise.api.server import serve as run
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=db is None) as database:
        run(database, host, port)
