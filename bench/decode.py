"""How close decoding comes to the memory bandwidth of a GPU, and to cuDNN.

python -m tilewise.bench.decode --output bench/results/NAME.json

Measures the bandwidth of a large copy, then per cell searches the space of the decoding kernel: every tile with the
default number of splits, then the best few with the others. The best, our default, cuDNN and torch's own choice meet in
an interleaved final. A cell with pages is compared with torch's backends on contiguous caches of the same size.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tilewise.domain import codec
from tilewise.domain.answer import Finalist
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends.triton_decode import KERNEL, TritonDecode, in_flight
from tilewise.kernels.inputs import random_call
from tilewise.tuner.correctness import Checker
from tilewise.tuner.steps import Step, make_step
from tilewise.tuner.timing import Clock, clock_for, final
from tilewise.tuner.trying import Bench

from .ahead import Job, compile_ahead

COPY_BYTES = 2 << 30
COPY_ROUNDS = 15
RIVALS = (Candidate("sdpa_cudnn"), Candidate("sdpa"))  # the first is what ratios are taken against
BEST_TILES = 3  # that are tried with every number of splits
LEAST_IN_FLIGHT, MOST_IN_FLIGHT = 16 << 10, 160 << 10  # bytes of keys and values on their way per program
SCREEN_SECONDS = 4.0
FINAL_SECONDS, FINAL_ROUNDS = 1.0, 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One decoding problem of the benchmark."""

    name: str
    problem: Problem

    @property
    def rival(self) -> Problem:
        """The problem as torch's own backends can compute it: contiguous."""
        return replace(self.problem, page_size=0)

    @property
    def bytes_read(self) -> int:
        """Bytes of all keys and values, which are read once."""
        p = self.problem
        return p.batch * p.kv_len * p.kv_heads * (p.head_dim + p.v_head_dim) * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The final of one cell; finalists[0] is what the ratios are taken against, `best` the best config of ours."""

    name: str
    problem: Problem
    bytes_read: int
    best: Candidate
    finalists: tuple[Finalist, ...]
    noise: float
    trials: tuple[Trial, ...]
    seconds: float

    def finalist(self, candidate: Candidate) -> Finalist | None:
        return next((each for each in self.finalists if each.candidate == candidate), None)

    def gbps(self, finalist: Finalist) -> float:
        """Keys and values read per second, in 10^9 bytes."""
        return self.bytes_read / finalist.measurement.median_ms / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the benchmark writes: copy_gbps counts bytes read and written, in 10^9 per second."""

    device: Device
    software: Software
    copy_gbps: float
    results: tuple[Result, ...]
    failed: tuple[str, ...]
    seconds: float


def cells() -> list[Cell]:
    """Return the cells of issue 3: 64/8 heads, head_dim 128, fp16, and one each with pages, head_dim 64 and MQA."""
    base = Problem(batch=32, heads=64, kv_heads=8, q_len=1, kv_len=8192, head_dim=128)
    sizes = [(1, 8192), (8, 8192), (32, 8192), (1, 131072), (8, 131072)]
    found = [Cell(name=f"batch {b}, {k} keys", problem=replace(base, batch=b, kv_len=k)) for b, k in sizes]
    return [
        *found,
        Cell(name="batch 32, pages of 64", problem=replace(base, page_size=64)),
        Cell(name="batch 32, head_dim 64", problem=replace(base, head_dim=64, v_head_dim=64)),
        Cell(name="batch 32, MQA 64/1", problem=replace(base, kv_heads=1, kv_len=65536)),
    ]


def copy_gbps(clock: Clock, device: torch.device, size: int = COPY_BYTES) -> float:
    """Return 10^9 bytes per second, read and written, of the median copy of `size` bytes on the device."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    step: Step = lambda: target.copy_(source)  # noqa: E731
    clock.interleave([step], 3)
    (times,) = clock.interleave([step], COPY_ROUNDS)
    return 2 * size / sorted(times)[len(times) // 2] / 1e6


def tiles(problem: Problem, space: SearchSpace) -> list[Config]:
    """Return the configs with the default number of splits and neither too little nor too much in flight."""
    splits = space.default["num_splits"]

    def serious(config: Config) -> bool:
        return (
            config["num_splits"] == splits
            and config["num_stages"] > 1
            and config["num_warps"] > 1
            and LEAST_IN_FLIGHT <= in_flight(problem, config.as_dict()) <= MOST_IN_FLIGHT
            and 32 <= config["block_n"] <= 128
        )

    return list(dict.fromkeys([space.default, *filter(serious, space)]))


def with_splits(tile: Config, space: SearchSpace) -> list[Config]:
    """Return `tile` with every other number of splits."""
    (splits,) = (parameter.values for parameter in space.parameters if parameter.name == "num_splits")
    found = [Config.of(tile.kernel, **{**tile.as_dict(), "num_splits": number}) for number in splits]
    return [config for config in found if config != tile and config in space]


def configs_of(cell: Cell, device: Device) -> list[Config]:
    """Return every config that a cell may try."""
    space = _space(cell.problem, device)
    found = tiles(cell.problem, space)
    return [config for tile in found for config in (tile, *with_splits(tile, space))]


def jobs_of(chosen: Sequence[Cell], device: Device) -> list[Job]:
    """Return what to compile ahead for all that the cells may try: each distinct kernel once."""
    wanted: dict[object, Job] = {}
    for cell in chosen:
        for config in configs_of(cell, device):
            job = (cell.problem, Candidate.of(KERNEL, forward=config))
            wanted.setdefault(kernel_of(cell.problem, config), job)
            wanted.setdefault(combination_of(cell.problem, config), job)
    return list(dict.fromkeys(wanted.values()))


def kernel_of(problem: Problem, config: Config) -> tuple[object, ...]:
    """Return what tells compiled kernels apart: of the splits only whether there are any."""
    tile = tuple(config[name] for name in ("block_n", "num_warps", "num_stages"))
    return _kind(problem), tile, config["num_splits"] > 1


def combination_of(problem: Problem, config: Config) -> tuple[object, ...]:
    """Return what tells the second kernels apart."""
    return _kind(problem), config["num_splits"]


def _kind(problem: Problem) -> Problem:
    """Return what a kernel knows of a problem: not its batch and lengths."""
    return replace(problem, batch=1, heads=problem.heads // problem.kv_heads, kv_heads=1, kv_len=problem.q_len)


class _Against(Bench):
    """Screens against a rival that may compute another problem: the contiguous one."""

    rival_step: Step

    def step(self, candidate: Candidate) -> Step:
        return self.rival_step if candidate == self.reference else super().step(candidate)


def measure(
    cell: Cell,
    device: torch.device,
    described: Device,
    clock: Clock,
    *,
    rivals: Sequence[Candidate] = RIVALS,
    chosen: Callable[[Problem, SearchSpace], list[Config]] = tiles,
    screen_seconds: float = SCREEN_SECONDS,
    final_seconds: float = FINAL_SECONDS,
) -> Result:
    """Search the kernel's space for `cell` in about `screen_seconds`, and hold the final.

    A config is screened only if it passed the check against float64. The default is always tried and in the final.
    """
    start = time.monotonic()
    space = _space(cell.problem, described)
    checker = Checker(cell.problem, device, seed=0)
    call = checker.main.call
    rival_call = call if cell.rival == cell.problem else random_call(cell.rival, device, seed=0)
    rival_steps = {rival: step for rival in rivals if _runs(step := make_step(rival_call, rival))}
    bench = _Against(checker, clock, next(iter(rival_steps)), job="", attempt=1)
    bench.rival_step = rival_steps[bench.reference]
    trials: dict[Config, Trial] = {}

    def ratio(config: Config) -> float:
        measurement = trials[config].measurement
        return float("inf") if measurement is None or measurement.ratio is None else measurement.ratio

    def attempt(configs: Sequence[Config], until: float) -> list[Config]:
        for config in configs:
            if config in trials or (trials and time.monotonic() > until):
                continue
            best_ratio = min(map(ratio, trials), default=float("inf"))
            trials[config] = bench.attempt(Candidate.of(KERNEL, forward=config), best_ratio=best_ratio)
        return sorted(trials, key=ratio)

    screened = time.monotonic()
    ranked = attempt([space.default, *chosen(cell.problem, space)], screened + 0.6 * screen_seconds)
    others = [config for tile in ranked[:BEST_TILES] for config in with_splits(tile, space)]
    ranked = attempt(others, screened + screen_seconds)
    ours = [Candidate.of(KERNEL, forward=config) for config in dict.fromkeys((ranked[0], space.default))]
    ours = [each for each in ours if trials[_forward(each)].outcome is Outcome.OK]
    entrants = {**rival_steps, **{each: bench.step(each) for each in ours}}
    held = final(clock, list(entrants.values()), rounds=FINAL_ROUNDS, seconds=final_seconds, device=device)
    finalists = tuple(Finalist(candidate=c, measurement=m) for c, m in zip(entrants, held.measurements, strict=True))
    won = min((each for each in finalists if each.candidate in ours), key=_ratio, default=finalists[0])
    return Result(
        name=cell.name,
        problem=cell.problem,
        bytes_read=cell.bytes_read,
        best=won.candidate,
        finalists=finalists,
        noise=held.noise,
        trials=tuple(trials.values()),
        seconds=time.monotonic() - start,
    )


def table(report: Report) -> str:
    """Return a line per cell: times, bandwidth and its share of a copy's, and how we compare."""
    lines = [
        f"{report.device.name}: a copy moves {report.copy_gbps:.0f} GB/s; {report.seconds:.0f} s in all",
        f"{'cell':24} {'ours ms':>9} {'GB/s':>6} {'copy':>6} {'cuDNN ms':>9} {'copy':>6} {'cuDNN/ours':>10} "
        f"{'sdpa/ours':>9} {'default':>8}  best config",
    ]
    for result in report.results:
        best = result.finalist(result.best)
        assert best is not None
        cudnn, sdpa = (result.finalist(rival) for rival in RIVALS)
        default = result.finalists[-1]
        lines.append(
            f"{result.name:24} {best.measurement.median_ms:9.4f} {result.gbps(best):6.0f} "
            f"{result.gbps(best) / report.copy_gbps:6.1%} {_ms(cudnn):>9} "
            f"{'-' if cudnn is None else f'{result.gbps(cudnn) / report.copy_gbps:.1%}':>6} "
            f"{_over(cudnn, best):>10} {_over(sdpa, best):>9} {_over(best, default):>8}  {result.best}"
        )
    return "\n".join(lines)


def _space(problem: Problem, device: Device) -> SearchSpace:
    space = TritonDecode().spaces(problem, device)["forward"]
    assert space is not None
    return space


def _forward(candidate: Candidate) -> Config:
    config = candidate.config()
    assert config is not None
    return config


def _runs(step: Step) -> bool:
    try:
        step()
    except (RuntimeError, NotImplementedError):  # a path of SDPA that has no kernel for this
        return False
    return True


def _ratio(finalist: Finalist) -> float:
    return finalist.measurement.ratio or float("inf")


def _ms(finalist: Finalist | None) -> str:
    return "-" if finalist is None else f"{finalist.measurement.median_ms:.4f}"


def _over(slower: Finalist | None, faster: Finalist | None) -> str:
    return "-" if slower is None or faster is None else f"{_ratio(slower) / _ratio(faster):.3f}x"


def run(output: Path, chosen: Sequence[Cell]) -> Report:
    """Measure `chosen` on this process's GPU, and write what is known to `output` after every cell."""
    output.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    device = devices.select("cuda")
    described = devices.describe(device)
    failed = compile_ahead(jobs_of(chosen, described), described)
    print(f"compiled ahead in {time.monotonic() - start:.0f} s, {len(failed)} failed", flush=True)
    clock = clock_for(device)
    report = Report(
        device=described,
        software=devices.software(described.kind).for_candidates(Candidate(KERNEL), Candidate("sdpa_cudnn")),
        copy_gbps=copy_gbps(clock, device),
        results=(),
        failed=tuple(failed),
        seconds=0.0,
    )
    for cell in chosen:
        result = measure(cell, device, described, clock)
        report = replace(report, results=(*report.results, result), seconds=time.monotonic() - start)
        output.write_text(json.dumps(codec.to_json(report), indent=1) + "\n")
        outcomes = Counter(str(trial.outcome) for trial in result.trials)
        print(f"{cell.name}: {dict(outcomes)} in {result.seconds:.0f} s", flush=True)
        torch.cuda.empty_cache()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--cells", nargs="*", type=int, help="numbers of the cells to measure, from 0; all by default")
    arguments = parser.parse_args()
    every = cells()
    chosen = every if arguments.cells is None else [every[number] for number in arguments.cells]
    print(table(run(arguments.output, chosen)))


if __name__ == "__main__":
    main()
