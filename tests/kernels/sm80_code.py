"""Run sm_80's code of our kernels on this machine's GPU and compare it with float64: a script for a fresh process.

    sm80_code.py compile CACHE    compile each kernel's default into a folder, assembled for sm_90; needs no GPU
    sm80_code.py run CACHE        compile defaults and corners in parallel, then run them

Prints JSON: the kernels that were compiled with what was wrong, and for `run` [problem, candidate, result] of each.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tilewise.bench.matrix import DEVICES, corners, spaces
from tilewise.bench.workers import run_each
from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Pass, Problem

CAPABILITY = 80
Job = tuple[str, Problem, Config | None, str, int]  # role, problem, config, cache, capability that it is assembled for


def problems() -> list[Problem]:
    base = Problem(pass_=Pass.TRAINING, batch=1, heads=4, kv_heads=2, q_len=389, kv_len=517, head_dim=64, causal=True)
    decode = Problem(batch=3, heads=16, kv_heads=2, q_len=2, kv_len=1111, head_dim=128, varlen=True)
    return [
        base,
        replace(base, head_dim=128, v_head_dim=128, dtype=Dtype.BF16),
        replace(base, head_dim=56, v_head_dim=56),
        replace(base, head_dim=192, v_head_dim=128),
        replace(base, dtype=Dtype.FP32),
        replace(base, causal=False, mask="bias.b1h1", bias_grad=True),
        replace(base, causal=False, mask="bool", window=(100, 20)),
        replace(base, alibi=True, softcap=True),
        decode,
        replace(decode, page_size=64),
        replace(decode, head_dim=56, v_head_dim=56, q_len=16, window=(300, 0)),
    ]


def candidates(problem: Problem, *, corners_too: bool = True) -> Iterator[Candidate]:
    """Yield the default of sm_80's spaces, and each role's corners with the others at their defaults."""
    device = DEVICES["sm_80"]
    found = {role: space for role, space in spaces(problem, device).items() if space is not None and role != "combine"}
    if "decode" in found:
        space = found["decode"]
        others = corners(space, problem, "decode", device) if corners_too else []
        for config in dict.fromkeys((space.default, *others)):
            yield Candidate.of("triton_decode", forward=config)
        return
    default = Candidate.of("triton", **{role: space.default for role, space in found.items()})
    yield default
    if not corners_too or problem.dtype is Dtype.FP32:  # its products are unrolled: large tiles compile for minutes
        return
    for role, space in found.items():
        for config in corners(space, problem, role, device):
            if config != space.default:
                yield default.with_config(role, config)


def jobs(problem: Problem, cache: str, assemble_for: int, *, corners_too: bool = True) -> Iterator[Job]:
    for candidate in candidates(problem, corners_too=corners_too):
        for role, config in candidate.configs:
            name = "decode" if candidate.backend == "triton_decode" else role
            yield name, problem, config, cache, assemble_for
    for role, space in spaces(problem, DEVICES["sm_80"]).items():
        if space is None:
            yield role, problem, None, cache, assemble_for


def compile_one(job: Job) -> list[tuple[str, str, int]]:
    """Compile one job into the cache; return name, target of the PTX and capability of the machine code of each."""
    from tilewise.kernels import offline

    role, problem, config, cache, assemble_for = job
    with offline.compiling(CAPABILITY, cache=Path(cache), assemble_for=assemble_for) as found:
        offline.launch(role, problem, config)
    return [(name, target(each.ptx), each.cubin[48]) for name, each in found.items()]


def target(ptx: str) -> str:
    return next(line.split()[1].rstrip(",") for line in ptx.splitlines() if line.startswith(".target"))


def compile_all(wanted: Iterable[Job]) -> dict[str, list[str]]:
    """Compile in parallel; return the kernels' names with what went wrong, nothing where all are as they should be."""
    found: dict[str, list[str]] = {}
    for done in run_each(compile_one, dict.fromkeys(wanted), processes=os.cpu_count() or 1, seconds=90):
        role, problem, config, _, assemble_for = done.job
        if done.result is None:
            found.setdefault(role, []).append(f"{problem.key} {config}: {done.outcome} {done.message}")
        for name, ptx, code in done.result or ():
            wrong = found.setdefault(name, [])
            if (ptx, code) != (f"sm_{CAPABILITY}", assemble_for):
                wrong.append(f"{problem.key} {config}: {ptx} for sm_{code}")
    return found


def run(cache: Path) -> Iterator[tuple[str, str, float | str]]:
    """Yield problem, candidate and its error as a share of the bound, or what it raised."""
    from tilewise.kernels import device as devices
    from tilewise.kernels import offline
    from tilewise.tuner.correctness import Checker

    device = devices.select("cuda")
    with offline.running_as(CAPABILITY, cache=cache):
        for problem in problems():
            checker = Checker(problem, device, seed=0)
            for candidate in candidates(problem):
                result: float | str
                try:
                    result = checker.check(candidate).worst
                except Exception as error:  # every candidate has its line
                    result = f"{type(error).__name__}: {error}"[:300]
                yield problem.key, str(candidate), result


def main(command: str, cache: str) -> None:
    if command == "compile":
        few = [problem for problem in problems() if problem.bias_grad or problem.page_size]
        wanted = [job for problem in few for job in jobs(problem, cache, 90, corners_too=False)]
        print(json.dumps(compile_all(wanted)))
        return
    major, minor = torch.cuda.get_device_capability()
    wanted = [job for problem in problems() for job in jobs(problem, cache, 10 * major + minor)]
    print(json.dumps([compile_all(wanted), list(run(Path(cache)))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
