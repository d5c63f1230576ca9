"""Measures attention cores against every peer: `tilewise bench core`.

A row is one problem: every candidate is checked against float64 and screened as a tuning does it, and the best of ours
meet the best of each peer in one interleaved final (`core_row`). What the kernels need is compiled before, on all
cores, in processes of their own (`vet`). The report is written after every row, and a later invocation adds to it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import SettingsError, TuningError
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Dtype, Problem
from tilewise.domain.trial import Outcome, now
from tilewise.kernels import device as devices
from tilewise.kernels.ahead import compiles_ahead
from tilewise.kernels.backends import backend_named
from tilewise.kernels.compilers import share_caches
from tilewise.tuner.timing import clock_for

from . import ahead, decode
from .bars import Cell, bars, judge, named
from .core_report import Report, opened, write
from .core_row import MESSAGE_LIMIT, BrokenError, Options, Shared, Table, decoding, ours, rivals
from .records import Row, Run
from .report_file import check_target
from .rows import measure_each
from .vet import Job, Vetted, vet

AHEAD_SHARE = 0.5  # of the soft limit, at most, for compiling ahead
SHOWN_FAILURES = 20

Tell = Callable[[str], None]
Known = Mapping[Problem, Sequence[Candidate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The report as it stands, the rows that failed as a whole, and how many the time did not suffice for."""

    report: Report
    failed: tuple[str, ...]
    left: int


def run(
    options: Options,
    device: torch.device,
    output: Path,
    *,
    command: str,
    standing: Mapping[Problem, Candidate] | None = None,
    tell: Tell = print,
) -> Result:
    """Measure the chosen rows that are open, and write the report to `output` and its page beside it after each.

    A row is open that the report lacks or has of other kernels or libraries. `standing` holds candidates that other
    measurements found best. Raises SettingsError for groups or a file that do not fit, ConfigError for an unknown
    backend, and TuningError where a candidate spoilt the device: the same command then goes on without it.
    """
    start = time.monotonic()
    share_caches()
    for name in options.backends:
        backend_named(name)
    described = devices.describe(device)
    this = Run(
        device=described,
        device_key=described.key,
        software=devices.software(described.kind),
        command=command,
        started=now(),
    )
    cells = chosen(options, described.kind)
    check_target(output)
    report = opened(output, this)
    waiting = [cell for cell in cells if options.again or not _stands(report.row(cell.problem), this)]
    tell(f"{len(waiting)} of {len(cells)} rows to measure on {described.name}")
    known = {cell.problem: _known(report.row(cell.problem), (standing or {}).get(cell.problem)) for cell in waiting}
    broken = Vetted(Outcome.WORKER_DIED, "it left the device unusable")
    shared = Shared(
        device=device,
        run=this,
        options=options,
        clock=clock_for(device),
        vetted={
            **(_vet(waiting, known, options, device, this, tell) if options.workers else {}),
            **{Job(each.problem, each.candidate, whole): broken for each in report.broken for whole in (True, False)},
        },
        until=start + options.seconds,
    )
    copy_gbps = 0.0

    def measure(cell: Cell) -> Row:
        nonlocal copy_gbps
        if _is_decoding(cell.problem, described.kind):
            copy_gbps = copy_gbps or decode.copy_gbps(shared.clock, device)
            return decoding(cell, shared, copy_gbps)
        return Table(cell.problem, shared, known[cell.problem]).row()

    def keep(row: Row) -> str:
        nonlocal report
        report = report.with_row(row)
        write(report, output)
        return f"{_found(row)}; {row.seconds:.0f} s, {time.monotonic() - start:.0f} s in all"

    try:
        failed, left = measure_each(
            waiting,
            measure,
            keep,
            title=lambda cell: cell.name,
            key=lambda cell: cell.problem.key,
            device=device,
            until=shared.until,
            tell=tell,
            fatal=BrokenError,
        )
    except BrokenError as error:
        write(report.with_broken(error.broken), output)
        raise TuningError(
            f"{error.broken.candidate} left {described.name} unusable on {error.broken.problem.key} "
            f"({error.broken.message}); run the same command again: it goes on without that candidate"
        ) from error
    return Result(report=report, failed=failed, left=left)


def chosen(options: Options, kind: DeviceKind) -> tuple[Cell, ...]:
    """Return the cells to measure, each problem once. Raises SettingsError for a group that the device has not."""
    groups = {bar.name.removesuffix(f"_{options.dtype}"): bar.cells for bar in bars(kind, options.dtype)}
    unknown = [name for name in options.groups if name not in groups]
    if unknown:
        raise SettingsError(f"no rows {', '.join(unknown)} on a {kind} device; expected some of {', '.join(groups)}")
    found: dict[Problem, Cell] = {}
    for name in options.groups or groups:
        for cell in groups[name]:
            found.setdefault(cell.problem, cell)
    if not options.only:
        return tuple(found.values())
    every = {cell.problem: cell for dtype in Dtype for bar in bars(kind, dtype) for cell in bar.cells}
    return tuple(every.get(problem, Cell(problem.key, "", problem)) for problem in dict.fromkeys(options.only))


def _is_decoding(problem: Problem, kind: DeviceKind) -> bool:
    return kind is DeviceKind.CUDA and problem.q_len <= MAX_DECODE_Q_LEN < problem.kv_len


def _stands(row: Row | None, this: Run) -> bool:
    """Whether a row of the report was measured with the kernels and libraries that it would be measured with now."""
    if row is None:
        return False
    candidates = [entry.candidate for entry in row.entries]
    then, today = (each.software.for_candidates(*candidates) for each in (row.run, this))
    return then == today


def _known(row: Row | None, standing: Candidate | None) -> tuple[Candidate, ...]:
    """Return the standing answer, and ours of an earlier final, fastest first."""
    entries = row.entries if row is not None else ()
    mine = [entry.candidate for entry in entries if row is not None and entry.candidate.backend == row.ours]
    return tuple(dict.fromkeys([*([standing] if standing is not None else []), *mine]))


def _cached(backend: str) -> bool:
    """Whether what a peer compiles as it runs lies on disk afterwards, so that another process can do it."""
    return backend == "flex"


def _supported(job: Job, this: Run) -> bool:
    return backend_named(job.candidate.backend).supports(job.problem, this.device) is None


def _found(row: Row) -> str:
    mine, other = row.best(row.ours), row.best(*row.others)
    parts = [
        f"{named(entry.candidate.backend)} {entry.measurement.median_ms:.4g} ms" for entry in (mine, other) if entry
    ]
    shares = [f"{share.share:.3f} of {named(share.rival)}" for verdict in judge([row]) for share in verdict.shares]
    return ", ".join([*parts, *dict.fromkeys(shares)])


def _vet(
    cells: Sequence[Cell], known: Known, options: Options, device: torch.device, this: Run, tell: Tell
) -> dict[Job, Vetted]:
    """Compile ahead: peers, which take longest, then ours, one of each problem before the next of any.

    What can be compiled where it does not run is not tried here, if it is not ours.
    """
    start = time.monotonic()
    ranks: dict[Job, int] = {}
    compiled: list[ahead.Job] = []
    for cell in cells:
        if _is_decoding(cell.problem, this.device.kind):
            compiled += decode.jobs_of([decode.Cell(name=cell.name, problem=cell.problem)], this.device)
            continue
        for candidate in rivals(cell.problem, options, this):
            job = Job(cell.problem, candidate, whole=True)
            if compiles_ahead(candidate.backend):
                compiled += [(cell.problem, candidate)] if _supported(job, this) else []
            elif _cached(candidate.backend):
                ranks[job] = -1
        for rank, candidate in enumerate(ours(cell.problem, known[cell.problem], options, this)):
            ranks[Job(cell.problem, candidate)] = rank
    ranks = {job: rank for job, rank in ranks.items() if _supported(job, this)}
    jobs = sorted(ranks, key=ranks.__getitem__)
    workers, seconds = options.workers, AHEAD_SHARE * options.seconds
    with ThreadPoolExecutor(1) as beside:
        compiling = beside.submit(ahead.compile_ahead, compiled, this.device, workers=workers, seconds=seconds)
        found = vet(jobs, device, workers=workers, seconds=seconds)
        failures = compiling.result()
    bad = {job: each for job, each in found.items() if each.outcome is not Outcome.OK}
    right, every = len(found) - len(bad) + len(compiled) - len(failures), len(found) + len(compiled)
    tell(f"compiled ahead: {right} of {every} in {time.monotonic() - start:.0f} s")
    for line in failures:
        tell(f"  {line}")
    for job, each in list(bad.items())[:SHOWN_FAILURES]:
        tell(f"  {each.outcome}: {job.candidate} of {job.problem.key}: {each.message[:MESSAGE_LIMIT]}")
    if bad and len(bad) == len(found):
        tell("nothing ran in other processes: each candidate is compiled where it is measured")
        return {}
    return found
