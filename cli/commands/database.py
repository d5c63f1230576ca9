"""tilewise db upgrade, check, import."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import out, print_json, print_table
from ..options import AsJson, Db, database_url

app = typer.Typer(help="Upgrade, check or fill the database.", no_args_is_help=True)


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


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A report that `tilewise bench core` wrote, as JSON.")],
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """Keep the trials and finals of a core benchmark, under the device that they were measured on."""
    from tilewise.bench.core_import import import_report, judgeable
    from tilewise.db.session import Database

    report = judgeable(file)
    url = database_url(db)
    with Database.open(url, upgrade=url.startswith("sqlite")) as database:
        found = import_report(report, database)
    if as_json:
        print_json(found)
        return
    out.print(
        f"{found.device_key}: {found.rows} rows, {found.trials} new trials, {found.answers} new answers", markup=False
    )
    if found.left:
        print_table("left as they were:", ("problem", "why"), ((each.problem.key, each.reason) for each in found.left))
