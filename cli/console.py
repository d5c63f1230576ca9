"""The two consoles that print: results to stdout, everything else to stderr."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from tilewise.domain import codec

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Print `value` as one line of canonical JSON."""
    sys.stdout.write(codec.canonical(value).decode() + "\n")


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table, numbers to the right. Cells are never broken: a narrow terminal wraps whole lines."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        number = column in ("speed-up", "trials", "version") or column.endswith(("ms", "%"))
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=10_000, highlight=False)
    with wide.capture() as captured:
        wide.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    out.print("\n".join([title, *lines] if title else lines), markup=False)


@contextmanager
def telling_what_is_kept(report: Path) -> Iterator[None]:
    """On a Ctrl-C say what `report` has of a benchmark, and exit with code 1."""
    try:
        yield
    except KeyboardInterrupt:
        kept = f"finished rows are kept in {report}; the same command goes on with the rest"
        err.print(f"interrupted: {kept if report.exists() else 'no row was finished'}", markup=False)
        raise typer.Exit(1) from None
