"""tilewise show."""

from typing import Annotated

import typer

from ..console import err, print_json, print_table
from ..options import AsJson, Db, database_url


def show(
    search: Annotated[str, typer.Argument(help="Words that problem, device or backend must hold.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 50,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """The tuned problems in a table."""
    from tilewise.db.answer_lists import AnswerFilter, AnswerListRepository
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
        page = AnswerListRepository(session).page(AnswerFilter(search=search), limit=limit)
    answers = [listed.answer for listed in page.answers]
    if as_json:
        print_json({"answers": answers, "total": page.total})
        return
    from ..verdicts import COLUMNS, row

    if not answers:
        err.print(
            "nothing tuned yet: tilewise tune --model llama3_70b" if not search else f"nothing matches {search!r}"
        )
        return
    print_table(f"{len(answers)} of {page.total} tuned problems", COLUMNS, map(row, answers))
