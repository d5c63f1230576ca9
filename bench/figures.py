"""Every figure under bench/results/ that needs a GPU, by the command that makes it, for a machine lent by the hour.

python -m tilewise.bench.figures --card h200 --seconds 540            # all, as far as the time goes
python -m tilewise.bench.figures --card h200 landscapes tunings       # some
python -m tilewise.bench.figures --card h200 --list                   # the commands, nothing run

What is there already is not made again, and what an earlier run left is gone on with: call it until nothing is left. On
a machine with several GPUs, give each process one (CUDA_VISIBLE_DEVICES) and steps of its own.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tilewise.domain.device import DeviceKind
from tilewise.domain.problem import Dtype

from . import bars, landscape
from .page_specs import SWEEPS, Chosen, specs

RESULTS = Path("bench/results")
ROW_SECONDS = "2.5"  # of a row of layers: calls of the plain form would else take most of the time
GRACE = 10.0  # seconds that a command has to end by itself, beyond what it was told
# Forward with and without warp specialisation, D=56, D=64, GQA, long, bias, backward, decode.
LANDSCAPES = (
    ("triton", "hopper_forward", "forward", "inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"),
    ("triton", "triton_forward", "forward", "inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"),
    ("triton", "hopper_forward", "forward", "inference.fp16.b2.h128.kv128.q2048.k2048.d56.causal"),
    ("triton", "hopper_forward", "forward", "inference.fp16.b2.h128.kv128.q2048.k2048.d64.causal"),
    ("triton", "hopper_forward", "forward", "inference.fp16.b1.h128.kv8.q2048.k2048.d128"),
    ("triton", "hopper_forward", "forward", "inference.fp16.b1.h32.kv8.q16384.k16384.d128.causal"),
    ("triton", "triton_forward", "forward", "inference.fp16.b2.h16.kv16.q4096.k4096.d128.bias.b1"),
    ("triton", "triton_dq", "dq", "training.fp16.b1.h64.kv8.q4096.k4096.d128.causal"),
    ("triton_decode", "triton_decode", "forward", "inference.fp16.b32.h64.kv8.q1.k8192.d128"),
)
# in bench/results/h200_core.json candidates of several backends lie within 1.5% of the best
CLOSE_RACES = (
    "inference.fp16.b2.h128.kv128.q2048.k2048.d64.causal",
    "inference.fp16.b1.h64.kv8.q4096.k4096.d128",
    "inference.fp16.b1.h128.kv8.q2048.k2048.d128.causal",
)
TRAINED = (
    "training.fp16.b1.h64.kv8.q4096.k4096.d128.causal",
    "training.fp16.b2.h128.kv128.q2048.k2048.d56.causal",
)
TILEWISE = ("tilewise.cli.main",)
# what the layers' columns may run beside our kernels; FlexAttention is none of them, and takes long to compile
LAYER_PEERS = "sdpa,sdpa_cudnn,sdpa_flash,flash_cute"


@dataclass(frozen=True, slots=True)
class Step:
    """One command of Python, `python -m ...`.

    - made: whether there is nothing left to do; asked before it is run.
    - limited: it takes --seconds, and stops by itself.
    """

    group: str
    command: tuple[str, ...]
    made: Callable[[], bool]
    limited: bool = False


def steps(card: str, trinix: str | None) -> tuple[Step, ...]:
    """Return all steps in the order in which they are worth most; `card` names the files, `trinix` its folder."""
    forward = tuple(cell.problem.key for cell in _forward_cells())
    tunings = ("tilewise.bench.tunings", "--landscapes", str(landscape.FOLDER))
    core = (*TILEWISE, "bench", "core", "--backends", LAYER_PEERS)
    layers = [*TILEWISE, "bench", "--row_seconds", ROW_SECONDS, *(("--trinix", trinix) if trinix else ())]
    found = [
        Step(
            "landscapes",
            (
                *TILEWISE,
                "landscape",
                "record",
                "--backend",
                backend,
                "--kernel",
                kernel,
                "--role",
                role,
                "--problem",
                key,
            ),
            partial(_recorded, f"{kernel}.{key}.*{card}*{landscape.SUFFIX}"),
        )
        for backend, kernel, role, key in LANDSCAPES
    ]
    found += [
        _kept("tunings", (*tunings, *_problems(forward), "--budget", "quick", "--budget", "normal"), f"{card}_tunings"),
        _kept("tunings", (*tunings, *_problems(TRAINED), "--budget", "quick", "--budget", "normal"), f"{card}_tunings"),
        _kept("five", (*tunings, *_problems(forward[4:5]), "--repeats", "5"), f"{card}_five_tunings"),
        Step(
            "regret",
            ("tilewise.bench.regret", *_problems(CLOSE_RACES), *_output(f"{card}_regret")),
            (RESULTS / f"{card}_regret.json").exists,
        ),
    ]
    for dtype, kept in (("float16", Dtype.FP16), ("bfloat16", Dtype.BF16)):
        cores = f"{card}_layer_cores_{dtype}"
        found += [
            _kept("cores", (*core, *_problems(_cores(Chosen(dtype=kept)), "--only"), "--configs", "4"), cores),
            _kept(
                "layers",
                (*layers, "--dtype", dtype, "--cores", str(RESULTS / f"{cores}.json")),
                f"{card}_layers_{dtype}",
            ),
        ]
    swept, cores = Chosen(sweeps=tuple(SWEEPS)), f"{card}_sweep_cores"
    few = ("--configs", "2", "--alternatives", "0")
    found += [
        _kept("sweeps", (*core, *_problems(_cores(swept), "--only"), *few), cores),
        _kept(
            "sweeps",
            (*layers, "--dtype", "float16", *_problems(swept.sweeps, "--sweep"), "--cores", f"{RESULTS / cores}.json"),
            f"{card}_sweeps",
        ),
    ]
    return tuple(found)


def _recorded(pattern: str) -> bool:
    return any(landscape.FOLDER.glob(pattern))


def _forward_cells() -> tuple[bars.Cell, ...]:
    return next(bar.cells for bar in bars.bars(DeviceKind.CUDA, Dtype.FP16) if bar.name == "forward")


def _cores(chosen: Chosen) -> tuple[str, ...]:
    return tuple(dict.fromkeys(spec.problem.key for spec in specs(chosen)))


def _problems(keys: Sequence[str], option: str = "--problem") -> tuple[str, ...]:
    return tuple(word for key in keys for word in (option, key))


def _output(name: str) -> tuple[str, str]:
    return "--output", str(RESULTS / f"{name}.json")


def _kept(group: str, command: tuple[str, ...], name: str) -> Step:
    """Return a step that keeps row by row, and has nothing to do where all rows are there."""
    return Step(group, (*command, *_output(name)), lambda: False, limited=True)


def run(wanted: Sequence[Step], seconds: float) -> list[tuple[Step, int | None, float]]:
    """Run one step after another in `seconds` in all; return each with its exit code, None where it was ended."""
    until = time.monotonic() + seconds
    done: list[tuple[Step, int | None, float]] = []
    for step in wanted:
        left = until - time.monotonic()
        if left < GRACE:
            break
        if step.made():
            continue
        limit = ("--seconds", f"{left - GRACE:.0f}") if step.limited else ()
        print("$", shlex.join(["python", "-m", *step.command, *limit]), flush=True)
        start = time.monotonic()
        try:
            code: int | None = subprocess.run(
                [sys.executable, "-m", *step.command, *limit], timeout=left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        done.append((step, code, time.monotonic() - start))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("groups", nargs="*", help="landscapes, tunings, five, regret, cores, layers, sweeps; else all")
    parser.add_argument("--card", required=True, help="the GPU's name as files have it, as h200")
    parser.add_argument("--trinix", help="folder of an unpacked wheel of trinix")
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--only", default="", metavar="TEXT", help="steps whose command holds this, as bfloat16")
    parser.add_argument("--list", action="store_true", help="print the commands, and run nothing")
    given = parser.parse_args()
    every = steps(given.card, given.trinix)
    unknown = set(given.groups) - {step.group for step in every}
    if unknown:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(dict.fromkeys(s.group for s in every))}"
        )
    wanted = [step for step in every if not given.groups or step.group in given.groups]
    wanted = [step for step in wanted if given.only in shlex.join(step.command)]
    if given.list:
        print("\n".join(shlex.join(["python", "-m", *step.command]) for step in wanted))
        return
    for step, code, seconds in run(wanted, given.seconds):
        print(f"{step.group:12}{seconds:7.0f} s  {'ended' if code is None else code}  {step.command[-1]}")


if __name__ == "__main__":
    main()
