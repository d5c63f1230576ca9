"""What it costs to run a neighbour's plan: landscapes measured here, and the model of domain/near.py fitted on them.

    python -m tilewise.bench.near --output bench/results/near_cpu.json

For each problem every config of a sample of the space runs beside torch's own choice, interleaved call by call, each
ratio the median over rounds. A pair of problems tells what the best plan of one costs on the other. The bounds are
lines at the 95th percentile (least pinball loss), fitted without the problem that they are tested on: the share of
those tests that a bound covers is what the report states.
"""

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.near import MAX_DISTANCE, Line, NearModel, distance, group
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import run

BACKEND = "cpu_tiled"
QUANTILE = 0.95
SDPA = Candidate("sdpa")


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """Ratios to torch's own choice of one problem's configs; `default_ms` is the median of torch's own choice."""

    problem: Problem
    default_ms: float
    ratios: tuple[tuple[Config, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The best plan of one problem on another: its distance, the share of time lost, and the drift of its ratio."""

    measured: Problem
    asked: Problem
    distance: float
    regret: float
    drift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was measured and fitted. Coverages are of problems that the fit had not seen."""

    command: str
    device: Device
    software: Software
    backend: str
    configs: int
    pairs: int
    model: NearModel
    regret_coverage: float
    drift_coverage: float
    landscapes: tuple[Landscape, ...]


def problems() -> list[Problem]:
    """Return families of sliding windows, where the tiled kernel wins, over lengths and heads."""
    found = []
    for window, head_dim in ((64, 64), (256, 64), (128, 128)):
        for heads, length in itertools.product((2, 4, 8, 16), (512, 1024, 2048)):
            if heads * length <= 16_384:
                found.append(
                    Problem(
                        dtype=Dtype.FP32, batch=1, heads=heads, q_len=length, head_dim=head_dim, causal=True,
                        window=(window, 0),
                    )
                )  # fmt: skip
    return found


def sample(device: Device, wanted: int) -> list[Config]:
    """Return configs that every problem's space holds, the same ones for all."""
    common: set[Config] | None = None
    for problem in problems():
        spaces = backend_named(BACKEND).spaces(problem, device)
        configs = set(spaces["forward"])
        common = configs if common is None else common & configs
    ordered = sorted(common or (), key=str)
    return random.Random(0).sample(ordered, min(wanted, len(ordered)))


def landscape(problem: Problem, configs: Sequence[Config], rounds: int) -> Landscape:
    """Measure a problem: every round calls torch's own choice and each config once, in another order."""
    call = random_call(problem, torch.device("cpu"), seed=0)
    candidates = [SDPA, *(Candidate.of(BACKEND, forward=config) for config in configs)]
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
    order = random.Random(0)
    with torch.inference_mode():
        for number in range(rounds + 1):
            for candidate in order.sample(candidates, len(candidates)):
                start = time.perf_counter()
                run(call, candidate)
                if number:  # the first round warms up
                    times[candidate].append(time.perf_counter() - start)
    ratios = tuple(
        (config, statistics.median(a / b for a, b in zip(times[candidate], times[SDPA], strict=True)))
        for config, candidate in zip(configs, candidates[1:], strict=True)
    )
    return Landscape(problem=problem, default_ms=statistics.median(times[SDPA]) * 1e3, ratios=ratios)


def pairs(landscapes: Sequence[Landscape]) -> list[Pair]:
    """Return every ordered pair of a group within the model's distance."""
    found = []
    for near, asked in itertools.permutations(landscapes, 2):
        far = distance(near.problem, asked.problem)
        if group(near.problem) != group(asked.problem) or far > MAX_DISTANCE:
            continue
        config, there = min(near.ratios, key=lambda pair: pair[1])
        here = dict(asked.ratios)
        best = min(1.0, *here.values())
        found.append(
            Pair(
                measured=near.problem, asked=asked.problem, distance=far,
                regret=here[config] / best - 1, drift=math.log(here[config] / there),
            )
        )  # fmt: skip
    return found


def line(points: Sequence[tuple[float, float]]) -> Line:
    """Return the line of least pinball loss at QUANTILE, rising or level, never below 0."""
    high = max(0.0, *(y for _, y in points))
    bases, slopes = ([high * step / 40 for step in range(41)] for _ in range(2))

    def loss(found: Line) -> float:
        gaps = [y - found.at(x) for x, y in points]
        return sum(gap * QUANTILE if gap > 0 else -gap * (1 - QUANTILE) for gap in gaps)

    return min((Line(base, slope) for base in bases for slope in slopes), key=loss)


def fit(found: Sequence[Pair]) -> NearModel:
    return NearModel(
        regret=line([(pair.distance, pair.regret) for pair in found]),
        drift=line([(pair.distance, pair.drift) for pair in found]),
    )


def coverage(found: Sequence[Pair]) -> tuple[float, float]:
    """Return the shares of pairs that the bounds cover, each fitted without any pair of the problem that is asked."""
    regret, drift = 0, 0
    for asked in {pair.asked for pair in found}:
        model = fit([pair for pair in found if asked not in (pair.asked, pair.measured)])
        for pair in found:
            if pair.asked == asked:
                regret += pair.regret <= model.regret.at(pair.distance)
                drift += pair.drift <= model.drift.at(pair.distance)
    return regret / len(found), drift / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--configs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    device = devices.describe(torch.device("cpu"))
    configs = sample(device, given.configs)
    landscapes = []
    for problem in problems():
        landscapes.append(landscape(problem, configs, given.rounds))
        config, ratio = min(landscapes[-1].ratios, key=lambda pair: pair[1])
        print(f"{problem.key}: {landscapes[-1].default_ms:.2f} ms, best {ratio:.3f} with {config}", flush=True)
    found = pairs(landscapes)
    regret, drift = coverage(found)
    report = Report(
        command=f"python -m tilewise.bench.near --output {given.output}", device=device,
        software=devices.software(device.kind), backend=BACKEND, configs=len(configs), pairs=len(found),
        model=fit(found), regret_coverage=regret, drift_coverage=drift, landscapes=tuple(landscapes),
    )  # fmt: skip
    given.output.write_text(json.dumps(codec.to_json(report), indent=1) + "\n")
    print(f"{len(found)} pairs, {report.model}, covered {regret:.3f} and {drift:.3f}")


if __name__ == "__main__":
    main()
