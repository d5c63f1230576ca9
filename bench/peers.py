"""Checks and times the backends beside ours at five shapes, and tunes two of them at one.

python -m tilewise.bench.peers --output bench/results/h200_peers_causal.json

Needs a CUDA device, and for flash_cute the package flash-attn-4; a backend that is absent is listed with its reason.
Every time is of an interleaved final. A search stops when its share of --seconds is spent, most promising configs
first, so that all ends within --seconds and one candidate more.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, NumericError, Outcome, Stage, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named
from tilewise.tuner.correctness import Case, Checker
from tilewise.tuner.steps import make_step, results
from tilewise.tuner.timing import Clock, clock_for, final, screen
from tilewise.tuner.trying import classify

SHAPES = {
    "dsv3": Problem(batch=2, heads=128, q_len=2048, head_dim=56, causal=True),
    "dsv3_64": Problem(batch=2, heads=128, q_len=2048, head_dim=64, causal=True),
    "llama70": Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True),
    "llama405": Problem(batch=1, heads=128, kv_heads=8, q_len=2048, head_dim=128, causal=True),
    "long": Problem(batch=1, heads=32, kv_heads=8, q_len=16384, head_dim=128, causal=True),
}
REFERENCE = Candidate("sdpa")
PEERS = ("sdpa", "sdpa_cudnn", "sdpa_flash", "flex", "flash_cute")
TUNED_SHAPE = "llama70"
FINAL_SECONDS, FINAL_ROUNDS, SCREEN_SECONDS, FINALISTS = 4.0, 60, 0.2, 3
# block_m, block_n, num_warps, num_stages, tma
FLEX = (
    (64, 64, 4, 3, False), (128, 128, 8, 2, True), (128, 64, 8, 3, True), (64, 64, 4, 3, True), (64, 64, 4, 2, False),
    (128, 128, 8, 3, True), (128, 64, 4, 3, False), (128, 128, 8, 2, False), (128, 64, 8, 2, False),
    (64, 128, 4, 2, False), (128, 64, 4, 2, True), (128, 64, 8, 4, True), (64, 64, 4, 4, False), (64, 128, 4, 3, True),
    (128, 32, 4, 3, False), (64, 32, 4, 3, False), (128, 64, 4, 2, False), (128, 128, 8, 3, False),
    (64, 32, 4, 4, False), (128, 32, 8, 3, False),
)  # fmt: skip
# tile_m, tile_n, mma_pv_is_rs, intra_wg_overlap, pack_gqa
FLASH_CUTE = (
    (192, 112, False, True, True), (192, 80, True, True, True), (192, 128, False, True, True),
    (192, 96, False, True, True), (192, 112, False, True, False), (128, 112, True, True, True),
    (128, 144, True, True, True), (0, 0, True, True, False), (192, 128, False, True, False),
    (192, 80, True, True, False), (128, 128, True, True, False), (128, 160, True, True, True),
    (192, 112, False, False, True), (128, 128, True, False, True), (128, 176, True, True, True),
    (128, 128, False, True, True), (192, 80, False, True, True), (128, 96, True, True, True),
    (192, 128, False, False, True), (128, 144, True, True, False),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Candidates tried on one problem. A measurement in the state `settled` is the final's, another the screening's."""

    name: str
    problem: Problem
    trials: tuple[Trial, ...]
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of one run: each backend's default at every shape, and the two searches, each with its final."""

    device: Device
    device_key: str
    software: Software
    defaults: tuple[Held, ...]
    searches: tuple[Held, ...]
    seconds: float


class Table:
    """One problem's tensors and exact results, and the clock its candidates share."""

    def __init__(self, name: str, device: torch.device, clock: Clock) -> None:
        self.name, self.problem, self._torch_device, self._clock = name, SHAPES[name], device, clock
        self.device = devices.describe(device)
        self._case: Case = Checker(self.problem, device, seed=0).main

    def default(self, backend: str) -> Trial:
        """Check a backend's default config."""
        reason = backend_named(backend).supports(self.problem, self.device)
        if reason is not None:
            return Trial(candidate=Candidate(backend), stage=Stage.FORWARD, outcome=Outcome.UNSUPPORTED, message=reason)
        return self.attempt(Candidate(backend))

    def attempt(self, candidate: Candidate, *, best_ratio: float | None = None) -> Trial:
        """Check `candidate` on the problem itself, and screen it where `best_ratio` is given."""
        start = time.perf_counter()
        measurement: Measurement | None = None
        error: NumericError | None = None
        try:
            error = self._error(candidate)
            outcome, message = (Outcome.OK, "") if error.worst <= 1 else (Outcome.WRONG_RESULT, "beyond the bound")
            if outcome is Outcome.OK and best_ratio is not None:
                steps = (make_step(self._case.call, each) for each in (candidate, REFERENCE))
                measurement = screen(self._clock, *steps, best_ratio=best_ratio, seconds=SCREEN_SECONDS)
        except Exception as raised:  # a backend that fails is a row of the table
            outcome, message = classify(raised), f"{type(raised).__name__}: {raised}"[:1000]
        return Trial(
            candidate=candidate,
            stage=Stage.FORWARD,
            outcome=outcome,
            measurement=measurement,
            error=error,
            message=message,
            seconds=time.perf_counter() - start,
        )

    def hold(self, name: str, trials: Sequence[Trial], finalists: Sequence[Candidate]) -> Held:
        """Time `finalists` call by call in turn, torch's own choice first."""
        chosen = list(dict.fromkeys([REFERENCE, *finalists]))
        steps = [make_step(self._case.call, candidate) for candidate in chosen]
        found = final(self._clock, steps, rounds=FINAL_ROUNDS, seconds=FINAL_SECONDS, device=self._torch_device)
        times = dict(zip(chosen, found.measurements, strict=True))
        timed = (replace(trial, measurement=times.get(trial.candidate, trial.measurement)) for trial in trials)
        return Held(name=name, problem=self.problem, trials=tuple(timed), noise=found.noise)

    def _error(self, candidate: Candidate) -> NumericError:
        found = results(self._case.call, candidate, None)
        shares = {tensor: self._case.bounds[tensor].share(value) for tensor, value in found.items()}
        worst = max(shares, key=shares.__getitem__)
        return NumericError(worst=shares[worst], tensor=worst, case="problem")


def configs(backend: str) -> Iterator[Config]:
    if backend == "flex":
        for block_m, block_n, num_warps, num_stages, tma in FLEX:
            yield Config.of(
                "flex_forward", block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, tma=tma
            )
    else:
        for tile_m, tile_n, in_registers, overlap, pack_gqa in FLASH_CUTE:
            yield Config.of(
                "flash_cute_forward",
                tile_m=tile_m,
                tile_n=tile_n,
                mma_pv_is_rs=in_registers,
                intra_wg_overlap=overlap,
                pack_gqa=pack_gqa,
                num_splits=1,
            )


def search(table: Table, backend: str, until: float) -> Held | None:
    """Try the backend's configs until the clock says `until`; None where it does not run here."""
    default = table.default(backend)
    space = (
        backend_named(backend).spaces(table.problem, table.device).get("forward")
        if default.outcome is Outcome.OK
        else None
    )
    if space is None:
        return None
    own = table.attempt(Candidate.of(backend, forward=space.default), best_ratio=float("inf"))
    trials = [table.attempt(REFERENCE), table.default("sdpa_cudnn"), own]
    for config in configs(backend):
        if time.monotonic() > until:
            break
        if config in space:
            trials.append(table.attempt(Candidate.of(backend, forward=config), best_ratio=min(map(_ratio, trials))))
    best = [trial.candidate for trial in sorted(trials[3:], key=_ratio)[:FINALISTS] if trial.outcome is Outcome.OK]
    right = [trial.candidate for trial in trials[:3] if trial.outcome is Outcome.OK]
    return table.hold(f"{backend} at {table.name}", trials, [*right, *best])


def _ratio(trial: Trial) -> float:
    return trial.measurement.ratio or float("inf") if trial.measurement else float("inf")


def measure(device: torch.device, seconds: float) -> Report:
    start = time.monotonic()
    clock = clock_for(device)
    defaults: list[Held] = []
    searches: list[Held] = []
    for name in SHAPES:
        table = Table(name, device, clock)
        trials = [table.default(backend) for backend in PEERS]
        defaults.append(table.hold(name, trials, [t.candidate for t in trials if t.outcome is Outcome.OK]))
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
        del table
    table = Table(TUNED_SHAPE, device, clock)
    for index, backend in enumerate(("flash_cute", "flex")):
        now = time.monotonic()
        # 8 s of each share are for its final
        until = now + (start + seconds - now) / (2 - index) - 8
        held = search(table, backend, until)
        searches += [held] if held is not None else []
        print(f"{time.monotonic() - start:6.1f} s  {backend} tuned", flush=True)
    described = devices.describe(device)
    return Report(
        device=described,
        device_key=described.key,
        software=devices.software(described.kind),
        defaults=tuple(defaults),
        searches=tuple(searches),
        seconds=time.monotonic() - start,
    )


def lines(held: Held) -> Iterator[str]:
    """Yield a line for each candidate of the final, fastest first, then one for each that failed and why."""
    for trial in sorted(held.trials, key=_ratio):
        m = trial.measurement
        if m is None or m.power_state != "settled":
            continue
        rate = held.problem.forward_flops / m.median_ms / 1e9
        error = trial.error.worst if trial.error else float("nan")
        yield f"  {m.median_ms:8.4f} ms {rate:4.0f} TFLOP/s {m.ratio:6.3f}  error {error:.2f}  {trial.candidate}"
    for trial in held.trials:
        if trial.outcome is not Outcome.OK:
            yield f"  {trial.outcome}: {trial.candidate}: {trial.message[:140]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--seconds", type=float, default=200, help="wall time for all of it (200)")
    arguments = parser.parse_args()
    report = measure(devices.select("cuda"), arguments.seconds)
    arguments.output.write_text(json.dumps(codec.to_json(report), indent=1) + "\n")
    print(f"\n{report.device_key}: median ms, rate, ratio to torch's own choice, error as a share of its bound")
    for held in (*report.defaults, *report.searches):
        print(f"{held.name}: {held.problem.key} ({len(held.trials)} tried, noise {held.noise:.2%})")
        print("\n".join(lines(held)))
    print(f"{report.seconds:.0f} s")


if __name__ == "__main__":
    main()
