"""Measures attention layers, the page that the project started from with every cell filled: `tilewise bench`.

A row is one layer of one model: every backend is checked against float64, then the calls of all alternate (`page_row`).
The report is written after every row, and a later invocation adds to it.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.domain.errors import SettingsError, TuningError
from tilewise.domain.trial import now
from tilewise.kernels import device as devices
from tilewise.kernels.compilers import share_caches
from tilewise.layers import session
from tilewise.tuner.timing import clock_for

from . import core_report
from .ahead import compilable, compile_ahead
from .core_answers import answers_of
from .page_records import BACKENDS, PageRow
from .page_report import PageReport, Spoilt, opened, write
from .page_row import (
    MESSAGE_LIMIT,
    Shared,
    SpoiltError,
    candidates,
    free_bytes,
    gib,
    measure,
    needed_bytes,
    without_room,
)
from .page_specs import Chosen, Spec, specs
from .records import Run
from .report_file import check_target
from .rows import measure_each
from .trinix_layers import TRINIX, Trinix

AHEAD_SHARE = 0.5  # of the soft limit, at most, for compiling ahead

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one invocation does.

    - backends: columns, empty for all of ours; those of trinix come with `trinix`, the folder of its wheel.
    - num_runs, warmup: rounds that are timed, and rounds before; every round calls every step once.
    - row_seconds: of the timed rounds of a row's layers: fewer rounds than num_runs, but not fewer than 30.
    - seconds: soft limit of wall time: no row starts that would probably pass it.
    - workers: processes that compile ahead what can be compiled without running it; 0 for none.
    - again: measure rows that the report has already.
    - cores: a report of `tilewise bench core`, whose finals are the answers of this run.
    """

    chosen: Chosen
    backends: tuple[str, ...] = ()
    num_runs: int = 100
    warmup: int = 10
    row_seconds: float | None = None
    seconds: float = 540.0
    workers: int = 0
    again: bool = False
    trinix: Path | None = None
    cores: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The report as it stands, the rows that failed as a whole, and how many the time did not suffice for."""

    report: PageReport
    failed: tuple[str, ...]
    left: int


def run(options: Options, device: torch.device, output: Path, *, command: str, tell: Tell = print) -> Result:
    """Measure the chosen rows that are open, and write the report to `output` and its page beside it after each.

    A row is open that the report lacks, lacks columns of, or has of other kernels or libraries. Raises SettingsError
    for names, sizes or files that do not fit, and TuningError where a backend spoilt the device: the same command then
    goes on without it.
    """
    start = time.monotonic()
    share_caches()
    wanted, columns = specs(options.chosen), _columns(options)
    described = devices.describe(device)
    this = Run(
        device=described,
        device_key=described.key,
        software=devices.software(described.kind),
        command=command,
        started=now(),
    )
    check_target(output)
    report = opened(output, this)
    if options.cores is not None:
        _answer_from(options.cores, this, output.with_suffix(".answers.json"))
    session.ready(device=device)
    shared = Shared(
        device=device,
        run=this,
        clock=clock_for(device),
        backends=columns,
        num_runs=options.num_runs,
        warmup=options.warmup,
        row_seconds=options.row_seconds,
        trinix=None if options.trinix is None else Trinix(options.trinix),
    )
    waiting = [spec for spec in wanted if options.again or not _stands(report.row(spec), this, columns)]
    tell(f"{len(waiting)} of {len(wanted)} rows to measure on {described.name}")
    if device.type == "cuda":
        _wake(device)
    if options.workers:
        _compile_ahead(waiting, shared, options, tell)

    def keep(row: PageRow) -> str:
        nonlocal report
        report = report.with_row(row)
        write(report, output)
        return f"{_found(row)}; {_seconds(row)}, {time.monotonic() - start:.0f} s in all"

    try:
        failed, left = measure_each(
            waiting,
            lambda spec: _row(spec, shared, report),
            keep,
            title=lambda spec: spec.name,
            key=lambda spec: spec.name,
            device=device,
            until=start + options.seconds,
            tell=tell,
            fatal=SpoiltError,
        )
    except SpoiltError as error:
        write(report.with_spoilt(Spoilt(error.spec, error.backend, str(error))), output)
        raise TuningError(
            f"{error.backend} left {described.name} unusable on {error.spec.name} ({error}); run the same command "
            "again: it goes on without that cell"
        ) from error
    return Result(report=report, failed=failed, left=left)


def _columns(options: Options) -> tuple[str, ...]:
    theirs = tuple(TRINIX) if options.trinix is not None else ()
    ours = tuple(name for name in BACKENDS if name not in TRINIX)
    unknown = [name for name in options.backends if name not in ours]
    if unknown:
        raise SettingsError(f"--backends: expected some of {', '.join(ours)}, got {', '.join(unknown)}")
    return (*(name for name in ours if name in (options.backends or ours)), *theirs)


def _answer_from(path: Path, this: Run, kept: Path) -> None:
    """Let the finals of a report of cores be this run's answers."""
    report = core_report.read(path)
    if report.device_key != this.device_key:
        raise SettingsError(f"--cores {path}: expected a report of {this.device_key}, got one of {report.device_key}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(answers_of(report).dumps())
    session.configure(snapshot=str(kept))


def _row(spec: Spec, shared: Shared, report: PageReport) -> PageRow:
    needed, free = needed_bytes(spec), free_bytes(shared.device)
    if needed > free:
        reason = f"the layer and its check need about {gib(needed)}, of which {gib(free)} are free"
        return without_room(spec, shared, reason, needed)
    spoilt = {each.backend: each.message for each in report.spoilt if each.spec == spec}
    try:
        return measure(spec, shared, spoilt)
    except torch.OutOfMemoryError as error:
        return without_room(spec, shared, str(error).partition("\n")[0][:MESSAGE_LIMIT], needed)


def _wake(device: torch.device) -> None:
    """Let autograd's thread meet the device: were its first call one of cuBLAS, torch would warn of that.

    What the CuTe DSL says of an argument that flash-attn-4 leaves at its default helps nobody either.
    """
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted")
    torch.zeros(1, device=device, requires_grad=True).sum().backward()  # type: ignore[no-untyped-call]


def _compile_ahead(waiting: Sequence[Spec], shared: Shared, options: Options, tell: Tell) -> None:
    """Compile what the waiting rows will run, on all cores, where that is possible without running it."""
    start, limit = time.monotonic(), AHEAD_SHARE * options.seconds
    jobs = compilable((spec.problem, candidate) for spec in waiting for candidate in candidates(spec, shared))
    if not jobs:
        return
    failed = compile_ahead(jobs, shared.run.device, workers=options.workers, seconds=limit)
    tell(f"compiled ahead: {len(jobs) - len(failed)} of {len(jobs)} in {time.monotonic() - start:.0f} s")
    for line in failed:
        tell(f"  {line[:MESSAGE_LIMIT]}")


def _seconds(row: PageRow) -> str:
    spent = row.spent
    parts = "" if spent is None else f" (checks {spent.checks:.1f}, layers {spent.layers:.1f}, cores {spent.cores:.1f})"
    return f"{row.seconds:.1f} s{parts}"


def _stands(row: PageRow | None, this: Run, columns: tuple[str, ...]) -> bool:
    """Whether a row of the report has these columns, of the kernels and libraries that are here now."""
    if row is None or any(row.cell(name) is None for name in columns):
        return False
    return row.run.software == this.software


def _found(row: PageRow) -> str:
    auto, speedup = row.timing("auto"), row.speedup("auto")
    if auto is None:
        return next((cell.message for cell in row.cells if cell.message), "auto was not asked for")
    parts = [f"auto {auto.mean_ms:.4g} ms"]
    parts += [f"{speedup:.2f}x"] if speedup is not None else []
    parts += [f"{row.of_ceiling:.0%} of the ceiling"] if row.of_ceiling is not None else []
    return ", ".join(parts)
