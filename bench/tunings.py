"""How well and how fast `tilewise tune` tunes: whole commands from scratch, their winners timed beside what to beat.

python -m tilewise.bench.tunings --problem KEY --budget quick --repeats 5 --output bench/results/NAME.json

Every tuning is a command of its own with empty caches and a database of its own. After those of a problem one
interleaved final for each budget holds all winners, the default of every backend, and the best configs of the recorded
landscapes of the problem: so a winner is compared with the optimum, with the best that needs no tuning, and with the
other winners, and never by milliseconds of different runs. A run adds to the file: what it holds already is not
measured again.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tilewise.domain import codec
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.errors import SettingsError, TuningError
from tilewise.domain.job import BUDGETS
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.backends import supporting
from tilewise.tuner.crew import Crew, Pipeline
from tilewise.tuner.progress import Spent

from . import landscape, report_file
from .bars import OUR_BACKENDS

COMMAND = "python -m tilewise.bench.tunings"
ROUNDS, SECONDS = 120, 60.0
SLOW = 2.0  # times the best: a default that is slower is not in the final
SEED = 0  # of the final's inputs
OPTIMA = 3  # of a landscape, its best configs: the recorded order of near ones is noise
# Where compiled kernels stay: each tuning has folders of its own.
CACHES = (
    "TILEWISE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUTE_DSL_CACHE_DIR",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", "XDG_CACHE_HOME",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """One command: its wall time in seconds, where the tuner says they went, trials by outcome, and what it chose."""

    seed: int
    seconds: float
    spent: Spent
    outcomes: tuple[tuple[str, int], ...]
    winner: Candidate
    noise: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One candidate of the final, and whether it is a backend's default or of the landscape's best."""

    candidate: Candidate
    measurement: Measurement
    default: bool
    optimum: bool

    @property
    def ratio(self) -> float:
        assert self.measurement.ratio is not None, "a final gives every candidate a ratio"
        return self.measurement.ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The tunings of one problem with one budget; `compared` is empty until the final was held."""

    problem: Problem
    budget: str
    software: Software
    tunings: tuple[Tuning, ...]
    compared: tuple[Compared, ...] = ()
    noise: float | None = None

    def _winners(self) -> list[float]:
        ratios = {each.candidate: each.ratio for each in self.compared}
        return [ratios[tuning.winner] for tuning in self.tunings if tuning.winner in ratios]

    @property
    def of_optimum(self) -> float | None:
        """Speed of the slowest winner as a share of the landscape's optimum; None without a landscape."""
        best = min((each.ratio for each in self.compared if each.optimum), default=None)
        winners = self._winners()
        return None if best is None or not winners else best / max(winners)

    @property
    def over_defaults(self) -> float | None:
        """How many times faster the median winner is than the fastest default; None before the final."""
        return self._over(each.ratio for each in self.compared if each.default)

    @property
    def over_others(self) -> float | None:
        """The same of the defaults that are not our own kernels'; None before the final."""
        return self._over(
            each.ratio for each in self.compared if each.default and each.candidate.backend not in OUR_BACKENDS
        )

    def _over(self, ratios: Iterable[float]) -> float | None:
        best, winners = min(ratios, default=None), self._winners()
        return None if best is None or not winners else best / statistics.median(winners)

    @property
    def apart(self) -> float | None:
        """How much longer the slowest winner takes than the fastest, as a share; None before the final."""
        winners = self._winners()
        return max(winners) / min(winners) - 1 if winners else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    command: str
    device_key: str
    rows: tuple[Row, ...] = ()

    def with_row(self, row: Row) -> "Report":
        """Return the report with `row` in the place of an older one of its problem and budget."""
        rows = {(each.problem, each.budget): each for each in (*self.rows, row)}
        return replace(self, rows=tuple(rows.values()))


def tuned(problem: Problem, budget: str, seed: int, options: Sequence[str]) -> tuple[Tuning, str, Software]:
    """Run the command once from scratch; return what came, the device's key and the software.

    Raises TuningError with the end of what it printed where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="tilewise-tunings-") as folder:
        caches = {name: str(Path(folder, name.lower())) for name in CACHES}
        command = ["tune", "--problem", problem.key, "--budget", budget, "--seed", str(seed), *options]
        command += ["--json", "--db", f"sqlite:///{folder}/tuning.db"]
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tilewise.cli.main", *command],
            env=os.environ | caches,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - start
    if done.returncode:
        raise TuningError(f"{shlex.join(command)} failed: {done.stderr.strip()[-1000:]}")
    said = json.loads(done.stdout)
    answer = codec.from_json(Answer, said["answers"][0])
    assert answer.evidence is not None, "a tuning gives its evidence"
    tuning = Tuning(
        seed=seed,
        seconds=round(seconds, 1),
        spent=codec.from_json(Spent, said["spent"][0]),
        outcomes=tuple(sorted(said["outcomes"][0].items())),
        winner=answer.plan.forward,
        noise=answer.evidence.noise,
        reason=answer.evidence.reason,
    )
    return tuning, said["device_key"], codec.from_json(Software, said["software"])


def compared(row: Row, crew: Crew, optima: Sequence[Candidate]) -> Row:
    """Return `row` with the final of its winners, of every backend's default and of `optima`.

    Raises TuningError where the reference fails. Others that fail are not in it.
    """
    described = devices.describe(crew.device)
    reference = default_candidate(row.problem)
    pipeline = Pipeline(crew, crew.preparation(row.problem, reference, seed=SEED))
    defaults = [backend.default(row.problem, described) for backend in supporting(row.problem, described)]
    must = {reference, *(tuning.winner for tuning in row.tunings)}
    right: dict[Candidate, float] = {}
    try:
        for candidate in dict.fromkeys([reference, *must, *defaults, *optima]):
            pipeline.submit(candidate)
        while pipeline.pending:
            trial = pipeline.take(best_ratio=min(right.values(), default=math.inf)).trial
            if trial.outcome is Outcome.OK and trial.measurement is not None and trial.measurement.ratio is not None:
                right[trial.candidate] = trial.measurement.ratio
            elif trial.candidate in must:
                print(f"{row.problem.key}: {trial.candidate} fails: {trial.message}", file=sys.stderr, flush=True)
        best = min(right.values(), default=math.inf)
        finalists = tuple(each for each in right if each in must or each in optima or right[each] <= SLOW * best)
        finalists = tuple(dict.fromkeys([reference, *finalists]))
        while (judged := pipeline.judge(finalists, rounds=ROUNDS, seconds=SECONDS)).final is None:
            out = {trial.candidate: trial.message for trial in judged.failures}
            if reference in out:
                raise TuningError(f"{row.problem.key}: the reference fails: {out[reference]}")
            for each in out.items():
                print(f"{row.problem.key}: %s is out of the final: %s" % each, file=sys.stderr, flush=True)
            finalists = tuple(each for each in finalists if each not in out)
    finally:
        pipeline.abandon()
    return replace(
        row,
        noise=judged.final.noise,
        compared=tuple(
            Compared(candidate=each, measurement=measured, default=each in defaults, optimum=each in optima)
            for each, measured in zip(finalists, judged.final.measurements, strict=True)
        ),
    )


def optima_of(problem: Problem, device_key: str, landscapes: Iterable[landscape.Landscape]) -> tuple[Candidate, ...]:
    """Return the best recorded candidates of each landscape of `problem` on that device."""
    found: list[Candidate] = []
    for each in landscapes:
        if (each.header.problem, each.header.device_key) == (problem, device_key):
            right = sorted((point for point in each.points if point.ratio is not None), key=lambda p: p.ratio or 0.0)
            found += [each.header.base.with_config(each.header.role, point.config) for point in right[:OPTIMA]]
    return tuple(dict.fromkeys(found))


def page(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [
        f"# Tunings from scratch on {report.device_key}",
        "",
        f"    {report.command}",
        "",
        "Wall time is that of the whole command with empty caches; the seconds behind it are of the median command:",
        "until the tuning began, until torch's own choice was measured, search, final, and the end of the process. The",
        "other columns are of one interleaved final of each problem: the slowest winner's speed as a share of the",
        "landscape's best, how many times faster the median winner is than the fastest default of any backend and than",
        "the fastest that is not of our own kernels, and how far the winners lie apart.",
        "",
        "| problem | budget | tunings | wall s, median | longest | start, prepare, search, final, end s "
        "| of the optimum | over the best default | over others' | apart | noise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report.rows:
        ordered = sorted(row.tunings, key=lambda tuning: tuning.seconds)
        median = ordered[len(ordered) // 2]
        phases = median.spent.start, median.spent.prepare, median.spent.search, median.spent.final
        spent = ", ".join(f"{each:.1f}" for each in (*phases, median.seconds - sum(phases)))
        lines.append(
            f"| {row.problem.key} | {row.budget} | {len(ordered)} | {median.seconds:.1f} | {ordered[-1].seconds:.1f} "
            f"| {spent} | {_share(row.of_optimum)} | {_times(row.over_defaults)} | {_times(row.over_others)} "
            f"| {_share(row.apart)} | {_share(row.noise)} |"
        )
    for pass_, budget in dict.fromkeys((row.problem.pass_, row.budget) for row in report.rows):
        rows = [row for row in report.rows if (row.problem.pass_, row.budget) == (pass_, budget)]
        over = [row.over_defaults for row in rows if row.over_defaults is not None]
        others = [row.over_others for row in rows if row.over_others is not None]
        if over and others:
            lines += [
                "",
                f"{pass_.capitalize()}, {budget}, {len(over)} of {len(rows)} problems, over the best default: "
                f"geometric mean {statistics.geometric_mean(over):.3f}, worst {min(over):.3f}; over the others' best "
                f"default: {statistics.geometric_mean(others):.3f}, worst {min(others):.3f}.",
            ]
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _row(report: Report | None, problem: Problem, budget: str) -> Row | None:
    rows = report.rows if report else ()
    return next((row for row in rows if (row.problem, row.budget) == (problem, budget)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problem", action="append", required=True, metavar="KEY")
    parser.add_argument("--budget", action="append", choices=list(BUDGETS), help="may be repeated (normal)")
    parser.add_argument("--repeats", type=int, default=1, help="tunings of each problem, each with a seed of its own")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--landscapes", type=Path, default=landscape.FOLDER, help="folder of the recorded ones")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no tuning and no final starts later")
    parser.add_argument("--tune", default="", metavar="OPTIONS", help="more options of `tilewise tune`")
    parser.add_argument("--again", action="store_true", help="tune what the file has too")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    command = shlex.join([*COMMAND.split(), *sys.argv[1:]])
    budgets, options = given.budget or ["normal"], ["--device", given.device, *shlex.split(given.tune)]
    report = report_file.load(Report, given.output, command=COMMAND) if given.output.exists() else None
    landscapes = landscape.load_all([given.landscapes]) if any(given.landscapes.glob(f"*{landscape.SUFFIX}")) else ()
    for problem in map(Problem.parse, given.problem):
        # its tunings come before its finals: this process must not hold the device while another measures on it
        for budget in budgets:
            row = None if given.again else _row(report, problem, budget)
            for seed in range(len(row.tunings) if row else 0, given.repeats):
                if time.monotonic() > until:
                    break
                tuning, device_key, software = tuned(problem, budget, seed, options)
                report = report or Report(command=command, device_key=device_key)
                report_file.check_device(given.output, report.device_key, device_key)
                tunings = (*row.tunings, tuning) if row else (tuning,)
                row = Row(problem=problem, budget=budget, software=software, tunings=tunings)
                report = replace(report.with_row(row), command=command)
                report_file.save(report, page(report), given.output)
                print(f"{problem.key} {budget} {seed}: {tuning.seconds:.1f} s, {tuning.winner}", flush=True)
        open_rows = [row for budget in budgets if (row := _row(report, problem, budget)) and not row.compared]
        if report is None or not open_rows:
            continue
        with Crew(devices.select(given.device)) as crew:
            crew.begin(problem, seed=SEED)
            for row in open_rows:
                if time.monotonic() > until:
                    break
                report = report.with_row(compared(row, crew, optima_of(problem, report.device_key, landscapes)))
                report_file.save(report, page(report), given.output)
    if report is None:
        raise SettingsError("nothing was tuned: raise --seconds")
    print(page(report), end="")


if __name__ == "__main__":
    main()
