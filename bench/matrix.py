"""Compiles our kernels over their spaces for GPUs that this machine need not have.

`tilewise bench compile` is its command, compile_report.py what it says. Every config that was compiled is kept beside
the report (NAME.rows.jsonl), and a second run goes on from there.
"""

import importlib.metadata
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config, Value
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import ProblemError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome

from .workers import run_each

RESULTS = Path(__file__).parent / "results"
SEED = 0
# refused for their shared memory alone: compiled too, to see how many of them would have run
REFUSED_SHARE = 4
MEMORY_REASON = "shared memory"

DEVICES = {
    "sm_80": Device(
        kind=DeviceKind.CUDA, name="NVIDIA A100", arch="sm_80", units=108, memory_gib=80, shared_memory=166912
    ),
    "sm_86": Device(
        kind=DeviceKind.CUDA, name="NVIDIA A10", arch="sm_86", units=72, memory_gib=24, shared_memory=101376
    ),
    "sm_89": Device(
        kind=DeviceKind.CUDA, name="NVIDIA L4", arch="sm_89", units=58, memory_gib=24, shared_memory=101376
    ),
    "sm_90": Device(
        kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, shared_memory=232448
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One compilation. `why`: space, default, corner, winner, or refused by the space for its shared memory alone."""

    problem: Problem
    role: str
    arch: str
    config: Config | None
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What came of a job; sizes as in kernels.offline.Compiled, 0 where it failed.

    `overwritten`: registers that ptxas overwrites (kernels.sass).
    """

    job: Job
    outcome: Outcome
    shared_memory: int = 0
    registers: int = 0
    stack: int = 0
    overwritten: int = 0
    seconds: float = 0.0
    message: str = ""

    @property
    def fits(self) -> bool:
        return self.shared_memory <= DEVICES[self.job.arch].shared_memory


def problems() -> list[Problem]:
    """Return the benchmark's shapes in training, other dtypes and features of one of them, and decoding."""
    base = Problem(pass_=Pass.TRAINING, batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)
    small = replace(base, batch=2, heads=128, kv_heads=128, q_len=2048, kv_len=2048, head_dim=64, v_head_dim=64)
    full = replace(small, causal=False)
    decode = Problem(batch=32, heads=64, kv_heads=8, q_len=1, kv_len=8192, head_dim=128)
    return [
        replace(small, head_dim=56, v_head_dim=56),
        small,
        base,
        replace(base, heads=128, q_len=2048, kv_len=2048),
        replace(base, heads=32, q_len=16384, kv_len=16384),
        replace(base, dtype=Dtype.BF16),
        replace(base, heads=128, kv_heads=128, head_dim=192),
        replace(small, dtype=Dtype.FP32),
        replace(base, dtype=Dtype.FP32),
        replace(full, mask="bias.b1h1", bias_grad=True),
        replace(full, mask="bool"),
        replace(small, window=(1024, 0)),
        replace(small, alibi=True),
        replace(small, softcap=True),
        replace(small, dropout=True),
        decode,
        replace(decode, page_size=64),
        replace(decode, head_dim=64, v_head_dim=64),
        replace(decode, kv_heads=1),
    ]


def kind(problem: Problem, role: str) -> str:
    """Return what a kernel knows of a problem, in the words of its key: neither batch, heads nor lengths."""
    dims = [f"d{problem.head_dim}", *([f"dv{problem.v_head_dim}"] if problem.v_head_dim != problem.head_dim else [])]
    words = [word for word in problem.key.split(".")[8:] if not word.startswith("dv")]
    rows = [f"{problem.q_len * problem.heads // problem.kv_heads} rows"] if role in ("decode", "combine") else []
    return " ".join([str(problem.dtype), *dims, *words, *rows])


def spaces(problem: Problem, device: Device) -> dict[str, SearchSpace | None]:
    """Return the space of each kernel that the problem runs on the device; None for a kernel without parameters.

    A kernel stands under its role, and under its own name where it is not the role's first.
    """
    from tilewise.kernels.backends.triton import Triton
    from tilewise.kernels.backends.triton_decode import TritonDecode

    found: dict[str, SearchSpace | None] = {}
    if TritonDecode().supports(problem, device) is None:
        space = TritonDecode().spaces(problem, device)["forward"]
        found |= {"decode": space, "combine": space}
    elif Triton().supports(problem, device) is None:
        for role, space in Triton().spaces(problem, device).items():
            found |= {role if each.kernel == f"triton_{role}" else each.kernel: each for each in space.by_kernel}
        if problem.pass_ is Pass.TRAINING:
            found["delta"] = None
        if problem.bias_grad:
            found["dbias"] = None
    return found


def jobs(
    wanted: Sequence[Problem], archs: Sequence[str], *, every: int | None = None, limit: int | None = None
) -> list[Job]:
    """Return what to compile: of each space every `every`-th config, or `limit` at random (seeded), or all.

    Defaults are always there, the winners kept under bench/results for problems of the same kinds, and corners for the
    first problem of each dtype, head dims, mask and page size.
    For every REFUSED_SHARE configs of a space comes one that it refuses for its shared memory alone.
    """
    found: dict[tuple[object, ...], Job] = {}
    cornered: set[tuple[object, ...]] = set()

    def add(problem: Problem, role: str, arch: str, config: Config | None, why: str) -> None:
        job = Job(problem=problem, role=role, arch=arch, config=config, why=why)
        found.setdefault(_identity(job), job)

    for problem, arch in itertools.product(wanted, archs):
        for role, space in spaces(problem, DEVICES[arch]).items():
            if space is None:
                add(problem, role, arch, None, "default")
                continue
            if role == "combine":  # it knows of a config only the number of splits
                for config in _splits(space):
                    add(problem, role, arch, config, "space")
                continue
            add(problem, role, arch, space.default, "default")
            dims = role, arch, problem.dtype, problem.head_dim, problem.v_head_dim, problem.mask, problem.page_size
            if dims not in cornered:
                cornered.add(dims)
                for config in corners(space, problem, role, DEVICES[arch]):
                    add(problem, role, arch, config, "corner")
            inside, refused = _split(space)
            for config in _sample(inside, every, limit):
                add(problem, role, arch, config, "space")
            for config in _sample(refused, every and every * REFUSED_SHARE, limit and -(-limit // REFUSED_SHARE)):
                add(problem, role, arch, config, "refused")
    kinds = {(job.role, kind(job.problem, job.role)) for job in found.values()}
    for job in winning(archs):
        if (job.role, kind(job.problem, job.role)) in kinds:
            found[_identity(job)] = job
    return list(found.values())


def winning(archs: Sequence[str]) -> list[Job]:
    """Return the winners kept under bench/results, for each architecture whose space has them, once for a kind.

    A parameter that is newer than a winner has the space's default.
    """
    found: dict[tuple[object, ...], Job] = {}
    for (problem, role, config), arch in itertools.product(winners(RESULTS), archs):
        space = spaces(problem, DEVICES[arch]).get(role)
        if space is not None:
            whole = Config.of(config.kernel, **{**space.default.as_dict(), **config.as_dict()})
            if whole in space:
                job = Job(problem=problem, role=role, arch=arch, config=whole, why="winner")
                found.setdefault((role, arch, whole, kind(problem, role)), job)
    return list(found.values())


def corners(space: SearchSpace, problem: Problem, role: str, device: Device) -> list[Config]:
    """Return, for the least and the largest value of each parameter, the config of the space nearest to its default.

    Then the one of the largest predicted shared memory.
    """
    inside, default = list(space), space.default.as_dict()

    def distance(config: Config) -> int:
        return sum(value != default[name] for name, value in config.values)

    def size(config: Config) -> int:
        return predicted(problem, role, device, config)

    found = []
    for parameter in space.parameters:
        for value in {parameter.values[0]: None, parameter.values[-1]: None}:
            having = [config for config in inside if config[parameter.name] == value]
            found += [min(having, key=distance)] if having else []
    return list(dict.fromkeys([*found, max(inside, key=size)]))


def winners(folder: Path) -> list[tuple[Problem, str, Config]]:
    """Return the configs of our fastest candidate of each final in `folder`, each with its role and problem."""
    from tilewise.kernels.backends import hopper_spaces

    found: dict[tuple[Problem, str, Config], None] = {}
    for path in sorted(folder.glob("*.json")):
        for problem, candidate in _fastest(json.loads(path.read_text()), None):
            for role, config in candidate.configs:
                named = config.kernel if config.kernel in hopper_spaces.KERNELS else role
                found[problem, "decode" if candidate.backend == "triton_decode" else named, config] = None
    return list(found)


def _fastest(data: Any, problem: Problem | None) -> Iterator[tuple[Problem, Candidate]]:
    """Yield our fastest candidate of each final of a document, with the problem that it stands under.

    A final is a list of objects with a candidate and its measurement, whatever it is called, but for trials.
    """
    if isinstance(data, dict):
        if isinstance(data.get("problem"), str):
            try:
                problem = Problem.parse(data["problem"])
            except ProblemError:
                problem = None
        for name, item in data.items():
            if name != "trials":
                yield from _fastest(item, problem)
    elif isinstance(data, list):
        ours = [item for item in data if isinstance(item, dict) and _is_ours(item)]
        if problem is not None and ours:
            yield problem, Candidate.from_json(min(ours, key=lambda item: item["measurement"]["ratio"])["candidate"])
        else:
            for item in data:
                yield from _fastest(item, problem)


def _is_ours(item: Mapping[str, Any]) -> bool:
    candidate, measurement = item.get("candidate"), item.get("measurement")
    ours = isinstance(candidate, dict) and candidate.get("backend") in ("triton", "triton_decode")
    return ours and isinstance(measurement, dict) and measurement.get("ratio") is not None


def _split(space: SearchSpace) -> tuple[list[Config], list[Config]]:
    """Return the configs of the space, and those that only the limit on shared memory keeps out."""
    inside, refused = [], []
    for config in grid(space):
        broken = [rule.reason for rule in space.constraints if not rule.holds(config.as_dict())]
        if not broken:
            inside.append(config)
        elif len(broken) == 1 and MEMORY_REASON in broken[0]:
            refused.append(config)
    return inside, refused


def grid(space: SearchSpace) -> Iterator[Config]:
    """Yield every combination of the parameters, whatever the constraints say."""
    names = [parameter.name for parameter in space.parameters]
    for values in itertools.product(*(parameter.values for parameter in space.parameters)):
        yield Config.of(space.kernel, **dict(zip(names, values, strict=True)))


def _splits(space: SearchSpace) -> list[Config]:
    """Return the default with each number of splits that makes a second kernel."""
    counts = next(each.values for each in space.parameters if each.name == "num_splits")
    configs = [Config.of(space.kernel, **{**space.default.as_dict(), "num_splits": count}) for count in counts]
    return [config for config in configs if config["num_splits"] > 1]


def _sample(configs: Sequence[Config], every: int | None, limit: int | None) -> Sequence[Config]:
    if limit is not None:
        return random.Random(SEED).sample(configs, min(limit, len(configs)))
    return configs[:: every or 1]


def predicted(problem: Problem, role: str, device: Device, config: Config) -> int:
    """Return the bytes of shared memory that the space counts with."""
    from tilewise.kernels.backends import hopper_spaces, triton_decode
    from tilewise.kernels.backends.triton import tiles_of
    from tilewise.kernels.backends.triton_memory import shared_memory

    values: dict[str, Value] = config.as_dict()
    if role == "decode":
        return triton_decode.shared_memory(problem, device.capability, values)
    if role in hopper_spaces.KERNELS:
        return hopper_spaces.predicted(role, problem, device, values)
    return shared_memory(role, tiles_of(problem, device), values)


def compile_one(job: Job) -> Row:
    """Compile one job in this process. Raises what the compiler raises."""
    from tilewise.kernels import offline
    from tilewise.kernels.sass import overwritten

    found = offline.compiled(job.role, job.problem, job.config, DEVICES[job.arch].capability)
    return Row(
        job=job,
        outcome=Outcome.OK,
        shared_memory=found.shared_memory,
        registers=found.registers,
        stack=found.stack,
        overwritten=len(overwritten(found.cubin)),
    )


def compile_all(
    wanted: Sequence[Job], rows_file: Path, *, processes: int, seconds: float, report: Callable[[Row], None]
) -> list[Row]:
    """Return the row of each job; those that `rows_file` has from the same versions are not compiled again."""
    known = _read(rows_file)
    todo = [job for job in wanted if _identity(job) not in known]
    with rows_file.open("a") as file:
        for done in run_each(compile_one, todo, processes=processes, seconds=seconds):
            row = done.result or Row(job=done.job, outcome=done.outcome, message=done.message)
            row = replace(row, seconds=round(done.seconds, 2))
            known[_identity(done.job)] = row
            file.write(codec.canonical(row).decode() + "\n")
            file.flush()
            report(row)
    return [replace(known[_identity(job)], job=job) for job in wanted]


def _identity(job: Job) -> tuple[object, ...]:
    return job.problem, job.role, job.arch, job.config


def _read(path: Path) -> dict[tuple[object, ...], Row]:
    """Return the rows of an earlier run of the same versions; the file of others starts anew."""
    first = codec.canonical(versions()).decode()
    lines = path.read_text().splitlines() if path.exists() else []
    if lines[:1] != [first]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(first + "\n")
        return {}
    rows = [codec.from_json(Row, json.loads(line)) for line in lines[1:] if line.endswith("}")]
    return {_identity(row.job): row for row in rows}


def versions() -> dict[str, object]:
    """Return what decides what a compilation gives, and so whether its row still holds."""
    from tilewise.kernels import device as devices

    software = devices.software(DeviceKind.CPU)  # of a GPU it would ask the driver
    return {"torch": software.torch, "triton": importlib.metadata.version("triton"), "kernels": dict(software.kernels)}
