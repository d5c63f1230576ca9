"""What interleaving buys: how far verdicts from timings in turn, and from interleaved ones, lie behind the best.

python -m tilewise.bench.regret --problem KEY --output bench/results/NAME.json

The nearly fastest candidates of a problem are judged again and again in both ways. How fast each really is, is what the
interleaved runs of the other repeats say: none judges itself. Nothing is kept in a database.
"""

import argparse
import itertools
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
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import TuningError
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends import supporting
from tilewise.kernels.compilers import share_caches
from tilewise.tuner.correctness import Checker
from tilewise.tuner.steps import Step
from tilewise.tuner.timing import Clock, clock_for, final
from tilewise.tuner.trying import Bench

from .ahead import compile_ahead
from .portfolio import candidates

CLOSE = 1.05  # times as slow as the best, at most: with others nobody errs
FURTHEST, ENOUGH = 1.15, 4  # where so few are close, as many of these
ROUNDS, SECONDS = 60, 20.0
AHEAD_SECONDS = 60.0  # for compiling on all cores before


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """How two candidates compare, the second's time over the first's, over the repeats."""

    first: Candidate
    second: Candidate
    lowest: float
    median: float
    highest: float

    @property
    def spread(self) -> float:
        """By what share the highest ratio exceeds the lowest."""
        return self.highest / self.lowest - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to judge: by repeat what it chose and by how much that is slower than the best, as a share; all pairs."""

    chosen: tuple[Candidate, ...]
    regrets: tuple[float, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    problem: Problem
    candidates: tuple[Candidate, ...]
    sequential: Way
    interleaved: Way
    seconds: float

    @property
    def bias(self) -> float:
        """By what share timing in turn moves a pair's median ratio away from interleaving's, in the worst pair."""
        both = zip(self.sequential.pairs, self.interleaved.pairs, strict=True)
        return max(abs(one.median / other.median - 1) for one, other in both)


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
    if device.kind is DeviceKind.CUDA:
        compile_ahead([(problem, candidate) for candidate in wanted], device, seconds=AHEAD_SECONDS)
    trials: list[Trial] = []
    for candidate in wanted:
        trials.append(bench.attempt(candidate, best_ratio=min(map(_ratio, trials), default=math.inf)))
    right = sorted((trial for trial in trials if trial.outcome is Outcome.OK), key=_ratio)
    close = [trial.candidate for trial in right if _ratio(trial) <= CLOSE * _ratio(right[0])]
    if len(close) < ENOUGH:
        close = [trial.candidate for trial in right[:ENOUGH] if _ratio(trial) <= FURTHEST * _ratio(right[0])]
    if len(close) < 2:
        raise TuningError(
            f"{problem.key}: no other candidate is within {FURTHEST:g} times of the best; take another problem"
        )
    return tuple(close[:most])


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
    pairs = []
    for first, second in itertools.combinations(range(len(contenders)), 2):
        ratios = [row[second] / row[first] for row in judged]
        pairs.append(
            Pair(
                first=contenders[first], second=contenders[second], lowest=min(ratios),
                median=statistics.median(ratios), highest=max(ratios),
            )
        )  # fmt: skip
    return Way(chosen=tuple(chosen), regrets=tuple(regrets), pairs=tuple(pairs))


def _ratio(trial: Trial) -> float:
    measured = trial.measurement
    return math.inf if measured is None or measured.ratio is None else measured.ratio


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table, a line per problem and way, and what its columns are."""
    lines = [
        "| problem | candidates | judged | regret, median | worst | winners | spread, median | worst | bias |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        for name, way in (("in turn", result.sequential), ("interleaved", result.interleaved)):
            spreads = [pair.spread for pair in way.pairs]
            lines.append(
                f"| {result.problem.key} | {len(result.candidates)} | {name} | {statistics.median(way.regrets):.2%} "
                f"| {max(way.regrets):.2%} | {len(set(way.chosen))} | {statistics.median(spreads):.2%} "
                f"| {max(spreads):.2%} | {f'{result.bias:.2%}' if way is result.sequential else '-'} |"
            )
    return "\n".join([
        *lines,
        "",
        "Winners: how many different ones were chosen. Regret: by how much the chosen one is slower than the best, by "
        "the interleaved runs of the other repeats. "
        "Spread: how far the ratio of two candidates differs between repeats; bias: how far its median in turn is from "
        "its median interleaved; both over all pairs.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problem", action="append", required=True, metavar="KEY")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=10, help="at least 3")
    parser.add_argument("--candidates", type=int, default=8, help="of the nearly fastest, at most")
    parser.add_argument("--configs", type=int, default=8, help="of each kernel of ours to look for them among")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    share_caches()
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
