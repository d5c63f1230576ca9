"""tilewise bench compile."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out, print_json, print_table
from ..options import AsJson

if TYPE_CHECKING:
    from tilewise.domain.problem import Problem

app = typer.Typer(help="Benchmarks and reports.", no_args_is_help=True)


@app.callback()
def _group() -> None: ...


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
    jobs = matrix.jobs(_problems(models or [], problems or []), archs, every=every, limit=limit)
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


def _problems(models: list[str], keys: list[str]) -> "list[Problem]":
    from tilewise.bench import matrix
    from tilewise.domain.models import model_named
    from tilewise.domain.problem import Pass, Problem

    named = [model_named(name).problem(pass_=Pass.TRAINING) for name in models]
    return [*named, *(Problem.parse(key) for key in keys)] or matrix.problems()
