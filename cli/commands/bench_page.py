"""tilewise bench without a subcommand: the page of layers."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tilewise.domain.errors import SettingsError

from ..console import err, out, print_json, print_table, telling_what_is_kept
from ..options import AsJson, DeviceName
from .commandline import words_given

if TYPE_CHECKING:
    from tilewise.bench.page_report import PageReport

RESULTS = Path("bench/results")
MANY = ("--models", "--layers", "--backends", "--pass", "--sweep")  # take several values behind one name
UNTOLD = (
    "output",
    "as_json",
    "seconds",
    "workers",
    "render",
    "print_cores",
)  # options that change nothing in what is measured
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


class PageGroup(TyperGroup):
    """A group whose own options may have several values: --models a b stands for --models a --models b."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """Return the arguments with the name of an option of MANY before each of its values.

    Raises SettingsError for such an option without any.
    """
    found: list[str] = []
    name = ""
    for place, word in enumerate(args):
        if not word.startswith("-"):
            found += [name, word] if name else [word]
            continue
        head, equals, value = word.partition("=")
        name = head if head in MANY else ""
        if not name:
            found.append(word)
        elif equals and value:
            found += [name, value]
        elif equals or place + 1 == len(args) or args[place + 1].startswith("-"):
            raise SettingsError(f"{name}: expected one value or more behind it, got none")
    return found


def page(
    context: typer.Context,
    models: Annotated[
        list[str] | None, typer.Option(help="deepseek_v3, llama3_70b, llama3_405b; by default all three.")
    ] = None,
    layers: Annotated[list[str] | None, typer.Option(help="mha, self, gqa, mqa, latent, mla; by default all.")] = None,
    backends: Annotated[
        list[str] | None, typer.Option(help="pytorch, triton, flash, sdpa, triton_default, auto; by default all.")
    ] = None,
    pass_: Annotated[list[str] | None, typer.Option("--pass", help="inference or training; by default both.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float16, bfloat16 or float32; by default float16, on a CPU float32.")
    ] = "",
    num_runs: Annotated[int, typer.Option("--num_runs", min=1, help="Rounds that are timed.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before.")] = 10,
    row_seconds: Annotated[
        float | None,
        typer.Option("--row_seconds", min=0, help="For the timed rounds of a row: fewer, but at least 30."),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="seq_len or hidden: rows of growing size instead of the table.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal/--full", help="Causal attention, or all of it.")] = True,
    batch: Annotated[int | None, typer.Option(min=1, help="Instead of the models' own.")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq_len", min=1, help="Instead of the models' own.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Instead of the models' own.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Instead of the models' own.")] = None,
    device: DeviceName = "auto",
    seconds: Annotated[float, typer.Option(min=1, help="Start no row that would probably pass this.")] = 540.0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that compile ahead; by default one per core, none on a CPU.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure rows again that the report has already.")] = False,
    cores: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="A report of `tilewise bench core`: this run's answers.")
    ] = None,
    trinix: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="An unpacked wheel of trinix, measured beside.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON to write or add to; by default bench/results/layers_DEVICE.json.")
    ] = None,
    render: Annotated[
        bool, typer.Option("--render", help="Measure nothing: write page and plots of --output again.")
    ] = False,
    print_cores: Annotated[
        bool, typer.Option("--print-cores", help="Measure nothing: print the problems of the chosen rows' cores.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what this project claims, and write it down.

    Without a subcommand: attention layers of three models, every backend beside the plain form, as JSON, a Markdown
    page and plots. Rows are kept one by one: the same command goes on where it stopped. What auto and Triton run is
    what was tuned here; --cores takes it from the finals of `tilewise bench core --only KEY`, with the keys that
    --print-cores prints.
    """
    if context.invoked_subcommand is not None:
        given = words_given(context, (), ())
        if given:
            raise SettingsError(f"{given}: expected options of {context.invoked_subcommand} behind its name")
        return
    if dtype and dtype not in DTYPES:
        raise SettingsError(f"--dtype: expected float16, bfloat16 or float32, got {dtype!r}")
    for name in pass_ or ():
        if name not in ("inference", "training"):
            raise SettingsError(f"--pass: expected inference or training, got {name!r}")
    from ..torch import need_torch

    need_torch()
    from tilewise.bench import page as benchmark
    from tilewise.bench.page_report import read, write
    from tilewise.bench.page_specs import Chosen, specs
    from tilewise.domain.problem import Dtype, Pass
    from tilewise.kernels import device as devices

    if render:
        if output is None:
            raise SettingsError("--render: name the report with --output")
        report = read(output).judged()
        write(report, output)
        _show(report, output, as_json)
        return
    where = devices.select(device)
    chosen = Chosen(
        models=tuple(models or ()),
        layers=tuple(layers or ()),
        passes=tuple(Pass(name) for name in pass_ or Pass),
        dtype=Dtype(DTYPES[dtype or ("float16" if where.type == "cuda" else "float32")]),
        causal=causal,
        sweeps=tuple(sweep or ()),
        batch=batch,
        seq_len=seq_len,
        hidden=hidden,
        heads=heads,
    )
    if print_cores:
        for key in dict.fromkeys(spec.problem.key for spec in specs(chosen)):
            out.print(key, markup=False)
        return
    processes = len(os.sched_getaffinity(0)) if where.type == "cuda" else 0
    target = output or RESULTS / f"layers_{devices.describe(where).key}.json"
    options = benchmark.Options(
        chosen=chosen,
        backends=tuple(backends or ()),
        num_runs=num_runs,
        warmup=warmup,
        row_seconds=row_seconds,
        seconds=seconds,
        workers=processes if workers is None else workers,
        again=again,
        trinix=trinix,
        cores=cores,
    )
    command = words_given(context, ["tilewise", "bench"], UNTOLD)
    with telling_what_is_kept(target):
        result = benchmark.run(options, where, target, command=command, tell=lambda line: err.print(line, markup=False))
    _show(result.report, target, as_json)
    if result.left:
        err.print(f"{result.left} rows are left: the same command goes on with them")
    for failure in result.failed:
        err.print(f"failed: {failure}", markup=False)
    if result.failed:
        raise typer.Exit(1)


def _show(report: "PageReport", target: Path, as_json: bool) -> None:
    """Draw the plots, and print a line per claim."""
    written = [target, target.with_suffix(".md")]
    if importlib.util.find_spec("matplotlib") is None:
        err.print("no plots: matplotlib is not installed: pip install 'tilewise[bench]', then the same with --render")
    else:
        from tilewise.bench.page_plot import draw

        written += draw(report, target.with_suffix(".png"))
    if as_json:
        print_json({"report": str(target), "verdicts": report.verdicts})
        return
    words = {True: "met", False: "not met", None: "open"}
    lines = [(each.claim, each.found, each.wanted, words[each.met], each.worst) for each in report.verdicts]
    if lines:
        print_table("", ("claim", "found", "wanted", "", "worst row"), lines)
    out.print(f"written: {', '.join(map(str, written))}", markup=False)
