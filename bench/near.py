"""What it costs to run the plan of another problem or another device: the models of domain/transfer.py.

    python -m tilewise.bench.near record          # a sample of the tiled CPU kernel's configs on this machine
    ATEN_CPU_CAPABILITY=avx2 python -m tilewise.bench.near record   # what torch computes with on an older CPU
    python -m tilewise.bench.near fit --output bench/results/near_cpu.json

`record` calls a sample of configs beside torch's own choice, in turn, and keeps each problem as a landscape
(bench/landscape.py). `fit` takes landscapes of any kernel, device and origin, those of `tilewise landscape record` on a
GPU too, and writes the models of their backends into domain/transfer_models.json, and a report. How they are fitted and
what they must hold stands in bench/near_fit.py.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tilewise.domain import codec, transfer
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome, now
from tilewise.kernels import device as devices
from tilewise.kernels.backends import backend_named
from tilewise.kernels.inputs import random_call
from tilewise.tuner.steps import make_step
from tilewise.tuner.timing import CpuClock

from .landscape import Header, Landscape, Point, load_all, path_of, save
from .near_fit import report_of

BACKEND = "cpu_tiled"
FOLDER = Path("bench/landscapes/near")


def problems() -> list[Problem]:
    """Return families of sliding windows, where the tiled kernel wins, over lengths and heads."""
    return [
        Problem(dtype=dtype, batch=1, heads=heads, q_len=length, head_dim=head_dim, causal=causal, window=window)
        for dtype, causal, window, head_dim in (
            (Dtype.FP32, True, (64, 0), 64), (Dtype.FP32, True, (256, 0), 64), (Dtype.FP32, True, (128, 0), 128),
            (Dtype.FP32, False, (64, 64), 64), (Dtype.BF16, True, (128, 0), 64),
        )
        for heads, length in itertools.product((2, 4, 8, 16), (512, 1024, 2048))
        if heads * length <= 8192
    ]  # fmt: skip


def sample(device: Device, wanted: int) -> list[Config]:
    """Return configs that every problem's space holds, the same ones for all problems and devices."""
    spaces = [set(_space(problem, device)) for problem in problems()]
    ordered = sorted(set.intersection(*spaces), key=str)
    return random.Random(0).sample(ordered, min(wanted, len(ordered)))


def landscape(problem: Problem, configs: Sequence[Config], rounds: int) -> Landscape:
    """Measure configs of a problem, torch's own choice being the reference, with the clock that tunings have."""
    began, start, load = now(), time.monotonic(), os.getloadavg()[0]
    device = devices.describe(torch.device("cpu"))
    call, space = random_call(problem, torch.device("cpu"), seed=0), _space(problem, device)
    reference = default_candidate(problem)
    candidates = [reference, reference, *(Candidate.of(BACKEND, forward=config) for config in configs)]
    steps = [make_step(call, candidate) for candidate in candidates]
    clock = CpuClock()
    clock.settle(steps)
    first, again, *times = clock.interleave(steps, rounds)
    ratios = [statistics.median(a / b for a, b in zip(each, first, strict=True)) for each in (again, *times)]
    points = tuple(
        Point(config=config, outcome=Outcome.OK, ratio=ratio, samples=rounds, seconds=round(sum(each) / 1e3, 3))
        for config, ratio, each in zip(configs, ratios[1:], times, strict=True)
    )
    header = Header(
        problem=problem, device=device, device_key=device.key, software=devices.software(device.kind), role="forward",
        kernel=space.kernel, base=Candidate.of(BACKEND, forward=space.default), reference=reference, torch_ratio=1.0,
        parameters=space.parameters, default=space.default, seed=0, noise=abs(ratios[0] - 1),
        load=tuple(round(each / os.cpu_count(), 2) for each in (load, os.getloadavg()[0])),  # type: ignore[arg-type, operator]
        seconds=round(time.monotonic() - start, 1), command=_command(), started=began,
    )  # fmt: skip
    return Landscape(header, points)


def _space(problem: Problem, device: Device) -> SearchSpace:
    return backend_named(BACKEND).spaces(problem, device)["forward"]


def _command() -> str:
    setting = os.environ.get("ATEN_CPU_CAPABILITY")
    words = ["python", "-m", "tilewise.bench.near", *sys.argv[1:]]
    return " ".join([*([f"ATEN_CPU_CAPABILITY={setting}"] if setting else []), *words])


def record(folder: Path, wanted: int, rounds: int, threads: int) -> None:
    """Measure what `folder` does not hold yet of this device."""
    torch.set_num_threads(threads)
    device = devices.describe(torch.device("cpu"))
    configs = sample(device, wanted)
    for problem in problems():
        if path_of(folder, BACKEND, problem, device.key).exists():
            continue
        found = landscape(problem, configs, rounds)
        path = save(found, folder)
        print(f"{path}: best {found.best:.3f} of torch's time, noise {found.header.noise:.3f}", flush=True)


def fit(paths: Sequence[Path], output: Path, models: Path) -> None:
    report = report_of(load_all(paths), command=_command())
    output.write_text(json.dumps(codec.to_json(report), indent=1) + "\n")
    known = transfer.read(models) if models.exists() else {}
    transfer.write(models, {**known, **{each.kernels: each.models for each in report.fits}})
    for each in report.fits:
        print(f"{each.kernels}\n  {each.models.near}, {each.near}\n  {each.models.predicted}, {each.predicted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    recording = commands.add_parser("record", help="measure this machine")
    recording.add_argument("--folder", type=Path, default=FOLDER)
    recording.add_argument("--configs", type=int, default=16)
    recording.add_argument("--rounds", type=int, default=15)
    recording.add_argument("--threads", type=int, default=1)
    fitting = commands.add_parser("fit", help="fit the models of landscapes")
    fitting.add_argument("landscapes", type=Path, nargs="*", default=[FOLDER], help="files or folders")
    fitting.add_argument("--output", type=Path, required=True)
    fitting.add_argument("--models", type=Path, default=transfer.PATH)
    given = parser.parse_args()
    if given.what == "record":
        record(given.folder, given.configs, given.rounds, given.threads)
    else:
        fit(given.landscapes, given.output, given.models)


if __name__ == "__main__":
    main()
