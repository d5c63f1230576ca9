"""What interleaving buys: how far verdicts from timings in turn, and from interleaved ones, lie behind the best.

python -m tilewise.bench.regret --problem KEY --output bench/results/NAME.json

The nearly fastest candidates of a problem are judged again and again in both ways. How fast each really is, is what the
interleaved runs of the other repeats say: none judges itself. Nothing is kept in a database.
"""

import argparse
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.errors import TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends import supporting
from tilewise.tuner.correctness import Checker
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import Clock, clock_for, final
from tilewise.tuner.trying import Bench

from .portfolio import candidates

CLOSE = 1.15  # times as slow as the best, at most: with others nobody errs
ROUNDS, SECONDS = 60, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to judge: by repeat what it chose and by how much that is slower than the best, as a share.

    - lowest, highest: over the repeats, of the ratio between the first two candidates.
    """

    chosen: tuple[Candidate, ...]
    regrets: tuple[float, ...]
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    problem: Problem
    candidates: tuple[Candidate, ...]
    sequential: Way
    interleaved: Way
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    command: str
    device: Device
    device_key: str
    software: Software
    results: tuple[Result, ...]


def compare(problem: Problem, device: torch.device, clock: Clock, *, repeats: int, most: int, configs: int) -> Result:
    """Judge the nearly fastest candidates `repeats` times in both ways. Raises TuningError where fewer than two are."""
    start = time.monotonic()
    reference = default_candidate(problem)
    bench = Bench(Checker(problem, device, seed=0), clock, reference, job="", attempt=1)
    contenders = _contenders(bench, problem, devices.describe(device), most, configs)
    steps = [bench.step(candidate) for candidate in contenders]
    in_turn: list[list[float]] = []
    interleaved: list[list[float]] = []
    for _ in range(repeats):
        in_turn.append([_alone(clock, step) for step in steps])
        held = final(clock, [bench.step(reference), *steps], rounds=ROUNDS, seconds=SECONDS, device=device)
        interleaved.append([measured.ratio or math.inf for measured in held.measurements[1:]])
    return Result(
        problem=problem,
        candidates=contenders,
        sequential=_judged(in_turn, interleaved, contenders),
        interleaved=_judged(interleaved, interleaved, contenders),
        seconds=round(time.monotonic() - start, 1),
    )


def _contenders(bench: Bench, problem: Problem, device: Device, most: int, configs: int) -> tuple[Candidate, ...]:
    wanted = [
        candidate
        for backend in supporting(problem, device)
        for candidate in candidates(problem, device, backend.name, configs=configs)
    ]
    trials: list[Trial] = []
    for candidate in wanted:
        trials.append(bench.attempt(candidate, best_ratio=min(map(_ratio, trials), default=math.inf)))
    right = sorted((trial for trial in trials if trial.outcome is Outcome.OK), key=_ratio)
    close = [trial.candidate for trial in right if _ratio(trial) <= CLOSE * _ratio(right[0])][:most]
    if len(close) < 2:
        raise TuningError(
            f"{problem.key}: no other candidate is within {CLOSE:g} times of the best; take another problem"
        )
    return tuple(close)


def _alone(clock: Clock, step: Step) -> float:
    """Return the median of some calls, one right after the other, as most benchmarks do."""
    step()
    (times,) = clock.interleave([step], ROUNDS)
    return statistics.median(times)


def _judged(
    judged: Sequence[Sequence[float]], interleaved: Sequence[Sequence[float]], contenders: Sequence[Candidate]
) -> Way:
    chosen, regrets = [], []
    for repeat, found in enumerate(judged):
        others = [row for number, row in enumerate(interleaved) if number != repeat]
        truth = [statistics.median(column) for column in zip(*others, strict=True)]
        winner = min(range(len(found)), key=found.__getitem__)
        chosen.append(contenders[winner])
        regrets.append(truth[winner] / min(truth) - 1)
    ratios = [row[1] / row[0] for row in judged]
    return Way(chosen=tuple(chosen), regrets=tuple(regrets), lowest=min(ratios), highest=max(ratios))


def _ratio(trial: Trial) -> float:
    measured = trial.measurement
    return math.inf if measured is None or measured.ratio is None else measured.ratio


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table, a line per problem and way."""
    lines = [
        "| problem | candidates | judged | regret, median | worst | different winners | ratio of the first two |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for name, way in (("in turn", result.sequential), ("interleaved", result.interleaved)):
            lines.append(
                f"| {result.problem.key} | {len(result.candidates)} | {name} | {statistics.median(way.regrets):.2%} "
                f"| {max(way.regrets):.2%} | {len(set(way.chosen))} | {way.lowest:.3f} to {way.highest:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problem", action="append", required=True, metavar="KEY")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=10, help="at least 3")
    parser.add_argument("--candidates", type=int, default=8, help="of the nearly fastest, at most")
    parser.add_argument("--configs", type=int, default=8, help="of each kernel of ours to look for them among")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    device = devices.select(given.device)
    described, clock = devices.describe(device), clock_for(device)
    results = [
        compare(
            Problem.parse(key),
            device,
            clock,
            repeats=max(3, given.repeats),
            most=given.candidates,
            configs=given.configs,
        )
        for key in given.problem
    ]
    report = Report(
        command=shlex.join(["python", "-m", "tilewise.bench.regret", *sys.argv[1:]]),
        device=described,
        device_key=described.key,
        software=devices.software(described.kind),
        results=tuple(results),
    )
    given.output.write_bytes(codec.canonical(report) + b"\n")
    print(table(results))


if __name__ == "__main__":
    main()
