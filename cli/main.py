"""tilewise: the command line.

Exit codes: 0 done, 1 failed, 2 wrong usage (an argument that cannot be).
"""

import atexit
import os
import signal
import sys
from typing import Annotated

import typer

from tilewise import __version__
from tilewise.domain.errors import ConfigError, ProblemError, SettingsError, TilewiseError

from .commands import (
    answer,
    attempt,
    bench,
    database,
    doctor,
    jobs,
    landscape,
    serve,
    show,
    snapshot,
    tokens,
    tune,
    worker,
)
from .console import err, out

USAGE_ERRORS = (ProblemError, SettingsError, ConfigError)

app = typer.Typer(
    name="tilewise",
    help="Which attention kernel, with which tile sizes, is fastest here? Measured once, kept, and told to every job.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"tilewise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.command("doctor")(doctor.doctor)
app.command("tune")(tune.tune)
app.command("try")(attempt.attempt)
app.command("answer")(answer.answer)
app.command("show")(show.show)
app.command("serve")(serve.serve)
app.command("worker")(worker.worker)
app.add_typer(jobs.app, name="jobs")
app.add_typer(snapshot.app, name="snapshot")
app.add_typer(tokens.app, name="tokens")
app.add_typer(bench.app, name="bench")
app.add_typer(landscape.app, name="landscape")
app.add_typer(database.app, name="db")


def main() -> None:
    """Run the command line: an expected error is one line on stderr and an exit code, never a traceback."""
    try:
        app()
    except TilewiseError as error:
        err.print(f"tilewise: {error}", markup=False)
        sys.exit(2 if isinstance(error, USAGE_ERRORS) else 1)
    except KeyboardInterrupt:
        err.print("tilewise: interrupted")
        sys.exit(1)


def program() -> None:
    """What the console script runs: `main` in a process of its own.

    Where torch was imported the process ends without taking it down module by module, for half a second and more.
    """
    code: str | int | None = 1

    def leave() -> None:
        if "torch" in sys.modules and not isinstance(code, str):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)

    atexit.register(leave)  # the first registered is the last called
    try:
        main()
        code = 0
    except SystemExit as done:
        code = done.code
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is kept: another Ctrl-C ends the end, without a traceback


if __name__ == "__main__":
    program()
