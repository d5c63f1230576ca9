"""tilewise tune."""

import enum
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out, print_json, print_table
from ..options import AsJson, Db, DeviceName, database_url, writable_folder

if TYPE_CHECKING:
    from tilewise.domain.problem import Problem


class BudgetName(enum.StrEnum):
    QUICK = "quick"
    NORMAL = "normal"
    FULL = "full"


class PassName(enum.StrEnum):
    INFERENCE = "inference"
    TRAINING = "training"


def tune(
    model: Annotated[list[str] | None, typer.Option(help="Model whose attention to tune; may be repeated.")] = None,
    problem: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Problem key; may be repeated.")] = None,
    pass_: Annotated[PassName, typer.Option("--pass", help="With --model: which pass.")] = PassName.INFERENCE,
    dtype: Annotated[str, typer.Option(help="With --model: fp16, bf16 or fp32.")] = "fp16",
    causal: Annotated[bool, typer.Option("--causal/--full", help="With --model: which mask.")] = True,
    device: DeviceName = "auto",
    budget: Annotated[BudgetName, typer.Option(help="How much to search.")] = BudgetName.NORMAL,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials at most, instead of the budget's.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Seconds of search, instead of the budget's.")] = None,
    backends: Annotated[str, typer.Option(help="Only these, comma-separated, beside torch's own choice.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on from trials of an earlier run.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs and of the search.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Write a picture of the search here; of several problems numbered ones.")
    ] = None,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """Find and keep the fastest way to compute attention here; trials of an interrupted run are taken over.

    A problem that cannot be tuned does not keep the others from it; the exit code is 1 then.
    """
    problems = _problems(model or [], problem or [], pass_, dtype, causal)
    from tilewise.domain.job import budget_named

    limits = budget_named(budget, trials=trials, seconds=seconds)
    chosen = [name.strip() for name in backends.split(",") if name.strip()]
    if plot is not None:
        need_matplotlib(plot)
    from ..torch import need_torch

    need_torch()
    from tilewise.tuner.processes import prestart

    prestart()  # it imports torch beside what is imported here
    from tilewise.domain.collecting import uncollected

    with uncollected():
        from tilewise.kernels import device as devices
        from tilewise.tuner.crew import Crew

    where = devices.select(device)
    with Crew(where) as crew:
        crew.begin(problems[0], seed=seed, backends=chosen)  # beside all that follows
        with uncollected():
            from tilewise.bench.search_plot import plot as draw
            from tilewise.db.session import Database
            from tilewise.domain.errors import TuningError, UnsupportedError
            from tilewise.tuner.progress import process_began
            from tilewise.tuner.tune import tune as run

            from ..progress import watching
            from ..summary import lines
            from ..verdicts import COLUMNS, row

        since = began = process_began()
        verdicts = []
        failed: dict[str, str] = {}
        with Database.open(database_url(db), upgrade=True) as database:
            for number, wanted in enumerate(problems, 1):
                with watching(f"[{number}/{len(problems)}] {wanted.key}") as report:
                    try:
                        verdict = run(
                            wanted,
                            device=where,
                            database=database,
                            budget=limits,
                            backends=chosen,
                            fresh=fresh,
                            seed=seed,
                            report=report,
                            crew=crew,
                            since=since,
                        )
                    except KeyboardInterrupt:
                        report.stop()
                        err.print(
                            f"interrupted: {report.trials} finished trials of {wanted.key} are kept in {database.url}; "
                            "the same command goes on from there",
                            markup=False,
                        )
                        raise typer.Exit(1) from None
                    except (TuningError, UnsupportedError) as error:
                        report.stop()
                        err.print(f"tilewise: {error}", markup=False)
                        failed[wanted.key], since = str(error), time.monotonic()
                        continue
                since = time.monotonic()
                verdicts.append(verdict)
                if not as_json:
                    out.print("\n".join(lines(verdict, chosen)), markup=False)
                if plot is not None:
                    path = plot if len(problems) == 1 else plot.with_stem(f"{plot.stem}-{number}")
                    draw(verdict.answer, verdict.trials, path)
                    err.print(f"written: {path}", markup=False)
    if as_json and verdicts:
        described = devices.describe(where)
        print_json(
            {
                "device": described,
                "device_key": described.key,
                "software": devices.software(described.kind),
                "budget": limits,
                "answers": [verdict.answer for verdict in verdicts],
                "failed": failed,
                "spent": [verdict.spent for verdict in verdicts],
                "seconds": time.monotonic() - began,
                "outcomes": [dict(Counter(trial.outcome for trial in verdict.trials)) for verdict in verdicts],
            }
        )
    elif verdicts:
        print_table("", COLUMNS, [row(verdict.answer) for verdict in verdicts])
    if failed:
        raise typer.Exit(1)


def need_matplotlib(path: Path) -> None:
    """Raise SettingsError where no picture can be written to `path`, before anything is measured."""
    import importlib.util

    from tilewise.domain.errors import SettingsError

    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib: pip install 'tilewise[bench]'")
    if path.suffix not in (".png", ".svg", ".pdf") or not path.absolute().parent.is_dir():
        raise SettingsError(f"--plot: expected a .png, .svg or .pdf file in a folder that exists, got {path}")
    writable_folder(path.absolute().parent, "--plot")


def _problems(models: list[str], keys: list[str], pass_: PassName, dtype: str, causal: bool) -> "list[Problem]":
    from tilewise.domain.errors import SettingsError
    from tilewise.domain.models import model_named
    from tilewise.domain.problem import Dtype, Pass, Problem

    if dtype not in list(Dtype):
        raise SettingsError(f"--dtype: expected one of {', '.join(Dtype)}, got {dtype!r}")
    problems = [model_named(name).problem(pass_=Pass(pass_), dtype=Dtype(dtype), causal=causal) for name in models]
    problems += [Problem.parse(key) for key in keys]
    if not problems:
        raise SettingsError("nothing to tune: give --model NAME or --problem KEY")
    return problems
