"""What `tilewise bench compile` chooses, keeps and prints; tests/kernels/test_offline.py compiles."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tilewise.bench import compile_report, matrix
from tilewise.bench.matrix import DEVICES, Job, Row, corners, jobs, predicted, spaces, winners
from tilewise.bench.workers import Done
from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels.backends import hopper_spaces

from ..cli.test_cli import Cli

TRAINING = Problem(pass_=Pass.TRAINING, batch=1, heads=8, q_len=1024, head_dim=128, mask="bias.b1h1", bias_grad=True)
DECODING = Problem(batch=4, heads=64, kv_heads=8, q_len=1, kv_len=8192, head_dim=128)
ARCHS = ("sm_80", "sm_90")


class Compiler:
    """Stands in for the worker processes: configs of 8 warps fail, the others need what was predicted."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, _: Callable[[Job], Row], given: Iterable[Job], **__: Any) -> Iterator[Done[Job, Row]]:
        for job in given:
            self.jobs.append(job)
            if job.config is not None and job.config["num_warps"] == 8:
                yield Done(job, Outcome.WORKER_DIED, None, "exit code -6", 0.5)
                continue
            sized = job.config is not None and job.role != "combine"
            size = predicted(job.problem, job.role, DEVICES[job.arch], job.config) if sized and job.config else 0
            row = Row(job=job, outcome=Outcome.OK, shared_memory=size, registers=128, stack=64 * (size > 100_000))
            yield Done(job, Outcome.OK, row, "", 1.5)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(matrix, "run_each", found)
    return found


def test_every_kernel_on_every_architecture() -> None:
    roles = {(job.role, job.arch) for job in jobs([TRAINING, DECODING], ARCHS, limit=1)}
    kernels = ("forward", "dkdv", "dq", "delta", "dbias", "decode", "combine")
    tiled = {(role, arch) for role in kernels for arch in ARCHS}
    assert roles == tiled | {(kernel, "sm_90") for kernel in hopper_spaces.KERNELS}


@pytest.mark.parametrize("problem", [TRAINING, DECODING], ids=lambda problem: str(problem.key))
@pytest.mark.parametrize("arch", ARCHS)
def test_corners_are_the_ends_of_every_parameter(problem: Problem, arch: str) -> None:
    device = DEVICES[arch]
    for role, space in spaces(problem, device).items():
        if space is None or role == "combine":
            continue
        inside = list(space)
        found = corners(space, problem, role, device)
        assert set(found) <= set(inside)
        for parameter in space.parameters:
            values = [value for value in parameter.values if any(c[parameter.name] == value for c in inside)]
            assert {values[0], values[-1]} <= {config[parameter.name] for config in found}
        assert max(predicted(problem, role, device, config) for config in inside) == predicted(
            problem, role, device, found[-1]
        )


def test_a_sample_is_the_same_every_time_and_refused_ones_are_so_for_shared_memory() -> None:
    first, again = (jobs([TRAINING], ARCHS, limit=8) for _ in range(2))
    assert first == again
    for arch in ARCHS:
        for role in ("forward", "dkdv", "dq"):
            why = Counter(job.why for job in first if (job.role, job.arch) == (role, arch) and job.problem == TRAINING)
            assert why["default"] == 1
            assert 0 < why["refused"] <= 2
            assert 4 <= why["space"] <= 8
    for job in first:
        space = spaces(job.problem, DEVICES[job.arch])[job.role]
        if job.why == "refused":
            assert job.config is not None
            assert space is not None
            assert predicted(job.problem, job.role, DEVICES[job.arch], job.config) > DEVICES[job.arch].shared_memory


def test_without_a_sample_it_is_the_whole_space() -> None:
    space = spaces(DECODING, DEVICES["sm_80"])["decode"]
    assert space is not None
    every = [job for job in jobs([DECODING], ["sm_80"]) if job.role == "decode" and job.problem == DECODING]
    found = [job.config for job in every if job.why != "refused"]
    assert len(found) == len(set(found))
    assert set(found) == set(space)
    some = [job for job in jobs([DECODING], ["sm_80"], every=10) if job.why == "space" and job.role == "decode"]
    assert len(some) <= -(-len(found) // 10)


def test_winners_are_our_fastest_of_each_final(tmp_path: Path) -> None:
    def entry(backend: str, ratio: float, **configs: Config) -> Any:
        candidate = codec.to_json(Candidate.of(backend, **configs))
        return {"candidate": candidate, "measurement": {"ratio": ratio}}

    slow, fast, other = (Config.of("triton_forward", block_m=size) for size in (32, 64, 128))
    gradients = {"dkdv": Config.of("hopper_dkdv", block_m=64), "dq": Config.of("triton_dq", block_m=16)}
    final = [entry("sdpa", 1.0), entry("triton", 1.3, forward=slow), entry("triton", 1.1, forward=fast, **gradients)]
    document = {
        "answers": [{"problem": TRAINING.key, "evidence": {"finalists": final}, "reference": final[0]["candidate"]}],
        "rows": [
            {"problem": DECODING.key, "entries": [entry("triton_decode", 0.9, forward=Config.of("triton_decode"))]},
            {"problem": DECODING.key, "trials": [entry("triton", 0.1, forward=other)]},
            {"problem": "not a key", "entries": [entry("triton", 0.1, forward=other)]},
        ],
    }
    (tmp_path / "one.json").write_text(json.dumps(document))
    assert winners(tmp_path) == [
        (TRAINING, "hopper_dkdv", gradients["dkdv"]),
        (TRAINING, "dq", gradients["dq"]),
        (TRAINING, "forward", fast),
        (DECODING, "decode", Config.of("triton_decode")),
    ]


def test_committed_winners_are_compiled_for_problems_of_their_kind() -> None:
    assert len(winners(matrix.RESULTS)) >= 3
    problem = Problem.parse("inference.fp16.b1.h8.kv8.q99.k99.d64.causal")
    assert "winner" in {job.why for job in jobs([problem], ["sm_90"], limit=0)}


def test_a_second_run_goes_on_and_other_versions_start_anew(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, file = jobs([DECODING], ["sm_80"], limit=5), tmp_path / "new" / "rows.jsonl"
    reported: list[Row] = []
    run = {"processes": 1, "seconds": 9.0, "report": reported.append}
    rows = matrix.compile_all(wanted[:6], file, **run)  # type: ignore[arg-type]
    assert [row.job for row in rows] == wanted[:6]
    assert reported == rows
    assert matrix.compile_all(wanted, file, **run)[:6] == rows  # type: ignore[arg-type]
    assert compiler.jobs == wanted
    with file.open("a") as cut:
        cut.write('{"job":{"arch"')  # the machine stopped while it wrote
    matrix.compile_all(wanted, file, **run)  # type: ignore[arg-type]
    assert compiler.jobs == wanted
    monkeypatch.setattr(matrix, "versions", lambda: {"torch": "9", "triton": "9", "kernels": {}})
    matrix.compile_all(wanted[:2], file, **run)  # type: ignore[arg-type]
    assert compiler.jobs == [*wanted, *wanted[:2]]


@pytest.mark.usefixtures("compiler")
def test_the_report_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)  # no winners
    wanted = jobs([DECODING, replace(DECODING, batch=8)], ["sm_80"], limit=20)
    rows = matrix.compile_all(wanted, tmp_path / "rows.jsonl", processes=1, seconds=9.0, report=lambda _: None)
    small = next(n for n, row in enumerate(rows) if row.job.why == "space" and row.outcome is Outcome.OK)
    rows[small] = replace(rows[small], shared_memory=200_000)
    wrong = next(n for n, row in enumerate(rows) if row.job.why == "refused" and row.outcome is Outcome.OK)
    rows[wrong] = replace(rows[wrong], shared_memory=100_000)
    report = compile_report.summarise(rows, "tilewise bench compile")
    decode, combine = report.lines
    assert (decode.role, decode.arch, decode.kind, decode.problems) == ("decode", "sm_80", "fp16 d128 8 rows", 2)
    assert combine.grid == combine.space == 0
    assert decode.grid == decode.space + sum(count for _, count in decode.refused)
    ((reason, count),) = decode.failed
    assert reason == "worker_died: exit code -6"
    assert decode.tried == decode.compiled + count < decode.space
    assert (decode.too_large, decode.refused_wrongly) == (1, 1)
    assert decode.shared_memory[1] == 200_000
    assert (decode.exact, decode.under) == (decode.compiled + decode.refused_tried - 2, 1)
    assert decode.registers == (128, 128)
    assert 0 < decode.spilling < decode.compiled
    assert decode.stack == 64
    assert all(
        row.outcome is not Outcome.OK or row.job.why in ("default", "corner", "winner") for row in report.special
    )
    assert codec.from_json(compile_report.Report, json.loads(codec.canonical(report))) == report

    compile_report.write(report, tmp_path / "report.json")
    text = (tmp_path / "report.md").read_text()
    assert "1 need more shared memory than the device has" in text
    assert f"| decode | sm_80 | fp16 d128 8 rows | {decode.grid} | {decode.space} | {decode.tried} |" in text
    assert "worker_died: exit code -6" in text.partition("## What failed")[2]
    assert json.loads((tmp_path / "report.json").read_text())["command"] == "tilewise bench compile"


def test_the_command(tmp_path: Path, compiler: Compiler, run: Cli) -> None:
    output = tmp_path / "found.json"
    arguments = ("bench", "compile", "--output", str(output), "--problems", DECODING.key, "--limit", "2")
    assert run(*arguments) == 0
    assert run.out.startswith("kernel")
    assert f"{len(compiler.jobs)} configs, {len(compiler.jobs)} of them compiled now: {output}\n" in run.out
    assert f"    tilewise bench compile --output {output} --problems {DECODING.key} --limit 2\n" in (
        output.with_suffix(".md").read_text()
    )
    done = len(compiler.jobs)
    assert run(*arguments, "--json") == 0
    assert len(json.loads(run.out)["lines"]) == 4
    assert len(compiler.jobs) == done, "the second run has them all"

    assert run(*arguments, "--every", "3") == 2
    assert run.err == "tilewise: --every and --limit: expected one of them, got both\n"
    assert run("bench", "compile", "--output", str(output), "--arch", "sm_75") == 2
    assert run.err.startswith("tilewise: --arch: expected one of sm_80, sm_86, sm_89, sm_90, got 'sm_75'")
    assert run("bench", "compile", "--output", str(output), "--models", "gpt") == 2
