"""tilewise db upgrade, tilewise db check."""

import typer

from ..console import out
from ..options import Db, database_url

app = typer.Typer(help="Upgrade or check the database.", no_args_is_help=True)


@app.command()
def upgrade(db: Db = None) -> None:
    """Make the database, or bring its schema up to this version."""
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=True) as database:
        out.print(f"{database.url} is up to date")


@app.command()
def check(db: Db = None) -> None:
    """Say whether the database answers and its schema is this version's; changes nothing."""
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=False) as database:
        out.print(f"{database.url} is up to date")
