"""tilewise bench: the page of layers by itself, core and compile."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out, print_json, print_table, telling_what_is_kept
from ..options import AsJson, Db, DeviceName, database_url
from .bench_page import PageGroup, page
from .commandline import words_given

if TYPE_CHECKING:
    from tilewise.bench.core_report import Report
    from tilewise.domain.config import Candidate
    from tilewise.domain.problem import Problem

app = typer.Typer(cls=PageGroup)
app.callback(invoke_without_command=True)(page)

RESULTS = Path("bench/results")
UNTOLD = ("output", "db", "as_json")  # options that change nothing in what is measured


@app.command()
def core(
    context: typer.Context,
    rows: Annotated[str, typer.Option(help="Some of forward, training, masks, d56, decode; by default all.")] = "",
    only: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Only this problem, of a row or not; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the rows on a GPU: fp16 or bf16.")] = "fp16",
    device: DeviceName = "auto",
    seconds: Annotated[float, typer.Option(min=1, help="Start no row that would probably pass this.")] = 540.0,
    configs: Annotated[int, typer.Option(min=0, help="Best-known configs of ours to try, per role.")] = 8,
    explore: Annotated[int, typer.Option(min=0, help="Configs near those to try besides, per role.")] = 0,
    alternatives: Annotated[int, typer.Option(min=0, help="Configs of FA4 and FlexAttention beside the default.")] = 1,
    backends: Annotated[str, typer.Option(help="Only these peers, comma-separated.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Measure rows again that the report has already.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that compile ahead; by default one per core, none on a CPU.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs and of --explore.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="JSON to write or add to; by default bench/results/core_DEVICE.json.")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Measure nothing: write page and plot of --output again.")
    ] = False,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """Attention cores against every peer: JSON, a Markdown page and a plot, with a verdict on each bar.

    Rows are kept one by one: the same command goes on where it stopped, and others add their rows to the same report.
    """
    from tilewise.domain.errors import SettingsError
    from tilewise.domain.problem import Dtype, Problem

    if dtype not in (Dtype.FP16, Dtype.BF16):
        raise SettingsError(f"--dtype: expected fp16 or bf16, got {dtype!r}")
    problems = tuple(Problem.parse(key) for key in only or ())
    from ..torch import need_torch

    need_torch()
    from tilewise.bench import core as benchmark
    from tilewise.bench.core_report import read, write
    from tilewise.bench.core_row import Options
    from tilewise.kernels import device as devices

    if render:
        if output is None:
            raise SettingsError("--render: name the report with --output")
        report = read(output).judged()
        write(report, output)
        _show(report, output, as_json)
        return
    where = devices.select(device)
    described = devices.describe(where)
    target = output or RESULTS / f"core_{described.key}.json"
    cores = len(os.sched_getaffinity(0)) if where.type == "cuda" else 0
    options = Options(
        groups=_names(rows),
        only=problems,
        dtype=Dtype(dtype),
        seconds=seconds,
        configs=configs,
        explore=explore,
        alternatives=alternatives,
        backends=_names(backends),
        again=again,
        workers=cores if workers is None else workers,
        seed=seed,
    )
    with telling_what_is_kept(target):
        result = benchmark.run(
            options,
            where,
            target,
            command=words_given(context, ["tilewise", "bench", "core"], UNTOLD),
            standing=_standing(described.key, db),
            tell=lambda line: err.print(line, markup=False),
        )
    _show(result.report, target, as_json)
    if result.left:
        err.print(f"{result.left} rows are left: the same command goes on with them")
    for failure in result.failed:
        err.print(f"failed: {failure}", markup=False)
    if result.failed:
        raise typer.Exit(1)


def _names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def _standing(device_key: str, db: str | None) -> "dict[Problem, Candidate]":
    """Return the standing answers of this device; none where nothing was tuned here and no database is named."""
    if db is None:
        if importlib.util.find_spec("sqlalchemy") is None:
            return {}
        from tilewise.client import paths

        if not paths.default_database_file().exists():
            return {}
    from tilewise.db.answers import AnswerRepository
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
        kept = AnswerRepository(session).of_device(device_key).values()
        return {each.problem: each.plan.forward for each in kept}


def _show(report: "Report", target: Path, as_json: bool) -> None:
    """Draw the plot, and print a line per bar."""
    from tilewise.bench.core_report import standing

    written, plot = [target, target.with_suffix(".md")], target.with_suffix(".png")
    if importlib.util.find_spec("matplotlib") is None:
        err.print("no plot: matplotlib is not installed: pip install 'tilewise[bench]', then the same with --render")
    else:
        from tilewise.bench.core_plot import draw

        written += [plot] if draw(report, plot) else []
    if as_json:
        print_json({"report": str(target), "verdicts": report.verdicts})
        return
    lines = [
        (
            verdict.bar,
            f"{len(verdict.shares)}/{len(verdict.shares) + len(verdict.missing)}",
            *(_share(share, bar) for share, bar in
              ((verdict.geomean, verdict.geomean_bar), (verdict.worst, verdict.each_bar))),
            verdict.worst_cell,
            standing(verdict),
        )
        for verdict in report.verdicts
    ]  # fmt: skip
    print_table("", ("bar", "cells", "geomean", "worst", "at", "verdict"), lines)
    out.print(f"written: {', '.join(map(str, written))}", markup=False)


def _share(share: float | None, bar: float | None) -> str:
    return ("-" if share is None else f"{share:.3f}") + ("" if bar is None else f" (bar {bar:g})")


@app.command("compile")
def compile_(
    output: Annotated[Path, typer.Option(metavar="FILE.json", help="The report; a .md of the same name beside it.")],
    arch: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_86, sm_89 or sm_90; repeat. Default: sm_80, sm_90.")
    ] = None,
    problems: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="Problem key; repeat. Default: a fixed set.")
    ] = None,
    models: Annotated[list[str] | None, typer.Option(help="Model, trained; repeat.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Compilations at a time.")] = os.cpu_count() or 1,
    every: Annotated[int | None, typer.Option(min=1, help="Every N-th config of a space.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="N configs of a space, by a fixed seed.")] = None,
    seconds: Annotated[float, typer.Option("--seconds-per-config", min=1, help="Longer is timed_out.")] = 120,
    as_json: AsJson = False,
) -> None:
    """Compile our Triton kernels over their spaces without a GPU: shared memory, registers, spills, failures.

    Corners, defaults and committed winners are always among them. Goes on from FILE.rows.jsonl of an earlier run.
    """
    from tilewise.domain.errors import DeviceError, SettingsError

    from ..torch import need_torch

    if every is not None and limit is not None:
        raise SettingsError("--every and --limit: expected one of them, got both")
    need_torch()
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("triton is not installed, and its compiler is what this runs: pip install 'tilewise[gpu]'")
    from tilewise.bench import compile_report, matrix

    archs = arch or ["sm_80", "sm_90"]
    for name in archs:
        if name not in matrix.DEVICES:
            raise SettingsError(f"--arch: expected one of {', '.join(matrix.DEVICES)}, got {name!r}")
    jobs = matrix.jobs(_compiled(models or [], problems or []), archs, every=every, limit=limit)
    done = 0

    def report(row: matrix.Row) -> None:
        nonlocal done
        done += 1
        if done % 50 == 0 or row.outcome != "ok":
            err.print(f"{done} compiled, {len(jobs)} in all: {row.outcome} {row.message}".rstrip(), markup=False)

    rows = matrix.compile_all(
        jobs, output.with_suffix(".rows.jsonl"), processes=processes, seconds=seconds, report=report
    )
    found = compile_report.summarise(rows, f"tilewise {shlex.join(sys.argv[1:])}")
    compile_report.write(found, output)
    if as_json:
        print_json(found)
    else:
        print_table("", compile_report.COLUMNS, map(compile_report.cells, found.lines))
        out.print(f"{len(rows)} configs, {done} of them compiled now: {output}", markup=False)


def _compiled(models: list[str], keys: list[str]) -> "list[Problem]":
    from tilewise.bench import matrix
    from tilewise.domain.models import model_named
    from tilewise.domain.problem import Pass, Problem

    named = [model_named(name).problem(pass_=Pass.TRAINING) for name in models]
    return [*named, *(Problem.parse(key) for key in keys)] or matrix.problems()
