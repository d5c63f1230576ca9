"""`tilewise bench` from end to end on this CPU, and what happens when something goes wrong."""

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise.bench import baseline, core_report, core_row, page, page_report, page_row
from tilewise.bench.page_records import BACKENDS, Cell, PageRow
from tilewise.bench.page_specs import Chosen, Spec
from tilewise.cli import main as cli
from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Dtype, Pass
from tilewise.domain.trial import Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.ahead import COMPILERS
from tilewise.kernels.backends import BACKENDS as KERNELS
from tilewise.kernels.call import Call
from tilewise.layers import session
from tilewise.tuner.timing import CpuClock

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
OURS = [name for name in BACKENDS if not name.startswith("trinix")]
TINY = ("--device", "cpu", "--batch", "1", "--seq_len", "24", "--hidden", "64", "--heads", "8", "--num_runs", "3",
        "--warmup", "0")  # fmt: skip

SMALL = Chosen(models=("llama3_70b",), layers=("gqa", "mqa"), passes=(Pass.INFERENCE,), dtype=Dtype.FP32, batch=1,
               seq_len=24, hidden=64, heads=8)  # fmt: skip
ONE = ("--models", "llama3_70b", "--layers", "gqa", "--pass", "inference")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here depends on how long a call takes, and nothing is configured before and after."""
    monkeypatch.setattr(CpuClock, "_CACHE_BYTES", 1 << 20)
    monkeypatch.setattr(core_row, "FINAL_SECONDS", 0.1)
    monkeypatch.setattr(page_row, "MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr(session, "_settings", None)
    session._clients.clear()
    session._changed()
    yield
    session._clients.clear()
    session._changed()


def ended(call: Callable[[], object]) -> int:
    """Return the exit code of a command."""
    try:
        call()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


Bench = Callable[..., int]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """Run `tilewise bench` of tiny layers, with the report in tmp_path/page.json; return its exit code."""

    def run(*arguments: str) -> int:
        words = ["tilewise", "bench", *arguments, *TINY, "--output", str(tmp_path / "page.json")]
        monkeypatch.setattr(sys, "argv", words)
        return ended(cli.main)

    return run


def report_in(folder: Path) -> page_report.PageReport:
    return page_report.read(folder / "page.json")


# from end to end


def test_the_command_fills_a_page_and_goes_on_where_it_stopped(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--models", "deepseek_v3", "llama3_70b", "--layers", "mha", "gqa", "--pass", "inference")
    assert bench(*chosen) == 0
    said = capsys.readouterr()
    assert "4 of 4 rows to measure" in said.err
    assert "auto over PyTorch, inference, fp32, causal: geomean of 4 rows" in said.out
    assert sorted(path.name for path in tmp_path.glob("page*")) == ["page.json", "page.md", "page.png"]
    report = report_in(tmp_path)
    assert [row.spec.layer for row in report.rows] == ["mha", "gqa"] * 2
    for row in report.rows:
        outcomes = {cell.backend: cell.outcome for cell in row.cells}
        assert [name for name, outcome in outcomes.items() if outcome is Outcome.OK] == ["pytorch", "sdpa", "auto"]
        assert {outcomes[name] for name in ("triton", "flash", "triton_default")} == {Outcome.UNSUPPORTED}
        for name in ("pytorch", "sdpa", "auto"):
            cell = row.cell(name)
            assert cell is not None
            assert cell.error is not None
            assert cell.error.worst <= 1
            assert cell.layer is not None
            assert cell.core is not None
            assert cell.layer.samples == cell.core.samples == 3
    text = (tmp_path / "page.md").read_text()
    assert text.count("\n| deepseek_v3 | 64, 8, 8, 24, 1 | MultiHeadAttention | ") == 1
    assert "needs a CUDA device" in text
    assert "--models deepseek_v3 --models llama3_70b --layers mha --layers gqa" in text
    assert bench(*chosen, "--pass", "training") == 0  # adds to it, and says so
    assert "4 of 8 rows to measure" in capsys.readouterr().err
    report = report_in(tmp_path)
    assert len(report.rows) == 8
    errors = [cell.error for row in report.rows[4:] for cell in row.cells if cell.error is not None]
    assert {error.tensor.partition(".")[0] for error in errors} <= {
        "out", "d_x", "d_q_proj", "d_k_proj", "d_v_proj", "d_o_proj"
    }  # fmt: skip
    assert bench(*chosen, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["verdicts"]) == len(report.verdicts)
    assert bench("--render") == 0
    assert report_in(tmp_path).rows == report.rows


def test_to_render_again_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    assert bench(*ONE) == 0
    written = {path.name: path.read_bytes() for path in tmp_path.glob("page*")}
    assert sorted(written) == ["page.json", "page.md", "page.png"]
    for name in ("page.md", "page.png"):
        (tmp_path / name).unlink()
    assert bench("--render") == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("page*")} == written


@pytest.mark.parametrize(("row_seconds", "rounds"), [(0.0, 30), (1000.0, 40)])
def test_the_time_of_a_row_is_limited_and_told(row_seconds: float, rounds: int, tmp_path: Path) -> None:
    said: list[str] = []
    options = page.Options(chosen=SMALL, num_runs=40, warmup=0, row_seconds=row_seconds)
    page.run(options, CPU, tmp_path / "page.json", command="", tell=said.append)
    row = report_in(tmp_path).rows[0]
    layer, core = row.timing("auto"), row.timing("auto", core=True)
    assert layer is not None
    assert core is not None
    assert (layer.samples, core.samples) == (rounds, 30)
    assert row.spent is not None
    assert 0 < row.spent.checks + row.spent.layers + row.spent.cores <= row.seconds * 1.001
    assert re.search(r"; [0-9.]+ s \(checks [0-9.]+, layers [0-9.]+, cores [0-9.]+\), \d+ s in all", said[1])
    text = (tmp_path / "page.md").read_text()
    assert f"standard deviation of {rounds} rounds" in text
    assert "Cores alone are timed in 30 rounds" in text


def test_what_cannot_be_compiled_ahead_costs_no_cell(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMPILERS, "sdpa", lambda *_: ())  # here; the process that compiles has no such compiler
    assert bench(*ONE, "--workers", "1") == 0
    said = capsys.readouterr().err
    assert "compiled ahead: 0 of 1 in " in said
    assert "KeyError" in said
    assert cells_of(tmp_path)["sdpa"].outcome is Outcome.OK


@pytest.mark.parametrize("layer", ["self", "mqa", "latent", "mla"])
def test_every_layer_is_checked_with_all_its_gradients(layer: str, bench: Bench, tmp_path: Path) -> None:
    assert bench("--models", "deepseek_v3", "--layers", layer, "--pass", "training") == 0
    (row,) = report_in(tmp_path).rows
    assert [cell.backend for cell in row.cells if cell.outcome is Outcome.OK] == ["pytorch", "sdpa", "auto"]
    weights = sum(weight.numel() for weight in row.spec.build(CPU).parameters() if weight.dim() == 2)
    assert row.projection_flops == 6 * 24 * weights


def test_sweeps_have_a_table_and_a_plot(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("--sweep", "seq_len", "--pass", "inference", "--backends", "pytorch", "auto") == 0
    assert capsys.readouterr().out.startswith("written: ")  # of sweeps nothing is claimed
    assert [row.spec.seq_len for row in report_in(tmp_path).rows] == [6, 12, 24]
    assert (tmp_path / "page_seq_len.png").exists()
    assert (
        "## By seq_len: deepseek_v3 MultiHeadAttention, inference, fp32, causal attention"
        in (tmp_path / "page.md").read_text()
    )


def test_print_cores(bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench("--print-cores", "--models", "deepseek_v3", "--pass", "inference", "--full") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "inference.fp32.b1.h8.kv8.q24.k24.d8"
    assert len(lines) == len(set(lines)) == 3  # one head shared by all, and DeepSeek's own besides
    assert not (tmp_path / "page.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "fp16"), "--dtype: expected float16, bfloat16 or float32, got 'fp16'"),
        (("--pass", "backward"), "--pass: expected inference or training, got 'backward'"),
        (("--models", "gpt"), "--models: expected some of .*, got 'gpt'"),
        (("--backends", "pytorch", "cuda"), "--backends: expected some of pytorch, triton, .* got cuda"),
        (("--num_runs", "3", "core"), "--num_runs 3: expected options of core behind its name"),
        (("--trinix", "/nowhere"), "--trinix /nowhere: expected a folder"),
        (("--cores", "/nowhere.json"), "/nowhere.json is no report of `tilewise bench core`"),
    ],
)
def test_bad_usage(
    arguments: tuple[str, ...], message: str, bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(*arguments) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(message, said)
    assert not (tmp_path / "page.json").exists()


@pytest.mark.parametrize("command", [("bench",), ("bench", "core", "--only", "inference.fp32.b1.h2.kv2.q8.k8.d8")])
@pytest.mark.parametrize(
    ("name", "message"),
    [("page.md", "expected a name that ends in .json"), ("file/page.json", "cannot be written .*; name another file")],
)
def test_where_no_report_can_be_written_nothing_is_measured(
    command: tuple[str, ...], name: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["tilewise", *command, "--device", "cpu", "--output", str(tmp_path / name)])
    assert ended(cli.main) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(f"--output .*{name}:? {message}", said)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_script_takes_the_same_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "page.json"
    flags = ["--models", "llama3_70b", "--layers", "gqa", "--pass", "inference", *TINY, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_attention.py", *flags])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert ended(lambda: runpy.run_path(str(ROOT / "benchmark_attention.py"), run_name="__main__")) == 0
    assert len(page_report.read(output).rows) == 1


# what goes wrong costs a cell


def cells_of(folder: Path) -> dict[str, Cell]:
    (row,) = report_in(folder).rows
    return {cell.backend: cell for cell in row.cells}


@pytest.mark.parametrize("fault", ["wrong", "raises", "memory"])
def test_a_faulty_backend(fault: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa, inner = KERNELS["sdpa"], KERNELS["sdpa"].forward

    def forward(call: Call, config: Config | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if fault == "raises":
            raise RuntimeError("broken\nin two lines")
        if fault == "memory":
            raise torch.OutOfMemoryError("no room")
        out, lse = inner(call, config)
        return out * 1.01, lse

    monkeypatch.setattr(sdpa, "forward", forward)
    assert bench(*ONE) == 0
    found = cells_of(tmp_path)
    wanted = {"wrong": Outcome.WRONG_RESULT, "raises": Outcome.FAILED, "memory": Outcome.OUT_OF_RESOURCES}[fault]
    assert found["sdpa"].outcome is found["auto"].outcome is wanted
    assert found["sdpa"].layer is None
    assert "\n" not in found["sdpa"].message
    assert found["pytorch"].outcome is Outcome.OK


def test_a_layer_without_room_is_skipped_and_the_run_goes_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "free_bytes", lambda _: 1 << 20)  # the first layer needs more, the second does not
    monkeypatch.setattr(page, "needed_bytes", lambda spec: 2 << 20 if spec.layer == "mha" else 1)
    assert bench("--models", "llama3_70b", "--layers", "mha", "gqa", "--pass", "inference") == 0
    first, second = report_in(tmp_path).rows
    assert {cell.outcome for cell in first.cells} == {Outcome.SKIPPED}
    assert {cell.message for cell in first.cells} == {
        "the layer and its check need about 0.0 GiB, of which 0.0 GiB are free"
    }
    needed = {cell.backend: cell.needed_bytes for cell in first.cells}
    assert needed["auto"] == 2 << 20
    assert needed["pytorch"] == (2 << 20) + 2 * 8 * 24 * 24 * 4 + 3 * 24 * 64 * 2 * 4  # two score matrices, and copies
    assert second.timing("auto") is not None
    assert "the layer and its check need" in (tmp_path / "page.md").read_text()


def test_a_plain_form_without_room_is_skipped(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_row, "free_bytes", lambda _: 1 << 10)
    assert bench(*ONE) == 0
    (row,) = report_in(tmp_path).rows
    plain = row.cell("pytorch")
    assert plain is not None
    assert plain.outcome is Outcome.SKIPPED
    assert plain.needed_bytes is not None
    assert plain.needed_bytes > baseline.needed_bytes(1, 8, 24, 24, 4, training=False)
    assert row.reference == "sdpa"
    assert row.timing("auto") is not None


def test_a_layer_that_runs_out_of_memory_is_skipped(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bounds(_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate too much\nand more")

    monkeypatch.setattr(page_row.Subject, "bounds", bounds)
    assert bench(*ONE) == 0
    assert {cell.message for cell in cells_of(tmp_path).values()} == {"tried to allocate too much"}


def test_ctrl_c_keeps_finished_rows_and_the_same_command_goes_on(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--models", "llama3_70b", "--layers", "mha", "gqa", "mqa", "--pass", "inference", "--backends", "auto")
    for layer, said in (
        ("mha", "interrupted: no row was finished"),
        (
            "mqa",
            f"interrupted: finished rows are kept in {tmp_path / 'page.json'}; the same command goes on with the rest",
        ),
    ):
        with monkeypatch.context() as patched:

            def interrupted(spec: Spec, *given: Any, layer: str = layer, inner: Any = page_row.measure) -> PageRow:
                if spec.layer == layer:
                    raise KeyboardInterrupt
                found: PageRow = inner(spec, *given)
                return found

            patched.setattr(page, "measure", interrupted)
            assert bench(*command) == 1
        assert capsys.readouterr().err.splitlines()[-1] == said
    assert [row.spec.layer for row in report_in(tmp_path).rows] == ["mha", "gqa"]
    assert bench(*command) == 0
    assert [row.spec.layer for row in report_in(tmp_path).rows] == ["mha", "gqa", "mqa"]


def test_a_row_that_fails_as_a_whole(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bounds(_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(page_row.Subject, "bounds", bounds)
    assert bench("--models", "llama3_70b", "--layers", "gqa", "mqa", "--pass", "inference") == 1
    assert capsys.readouterr().err.count("RuntimeError: broken") == 4  # as it happens, and at the end
    assert not (tmp_path / "page.json").exists()


def test_a_backend_that_spoils_the_device_is_not_tried_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("an illegal memory access")

    with monkeypatch.context() as broken:
        broken.setattr(KERNELS["sdpa"], "forward", forward)
        broken.setattr(page_row, "usable", lambda _: False)
        assert bench(*ONE, "--backends", "pytorch", "sdpa") == 1
    assert f"sdpa left {devices.describe(CPU).name} unusable" in capsys.readouterr().err
    assert [spoilt.backend for spoilt in report_in(tmp_path).spoilt] == ["sdpa"]
    assert bench(*ONE, "--backends", "pytorch", "sdpa") == 0
    found = cells_of(tmp_path)
    assert found["sdpa"].outcome is Outcome.WORKER_DIED
    assert "illegal memory access" in found["sdpa"].message
    assert found["pytorch"].outcome is Outcome.OK


def test_no_row_starts_that_would_pass_the_limit(tmp_path: Path) -> None:
    options = page.Options(chosen=SMALL, num_runs=1, warmup=0, seconds=0.0)
    said: list[str] = []
    result = page.run(options, CPU, tmp_path / "page.json", command="", tell=said.append)
    assert (len(result.report.rows), result.left, result.failed) == (1, 1, ())
    result = page.run(options, CPU, tmp_path / "page.json", command="", tell=said.append)
    assert (len(result.report.rows), result.left) == (2, 0)
    assert [line for line in said if "to measure" in line][1].startswith("1 of 2 rows")


# answers from cores, and Triton's columns


def test_finals_of_cores_become_answers(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiled = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=16, block_k=64, heads_per_chunk=1))
    key = "inference.fp32.b1.h8.kv8.q24.k24.d8.causal"
    command = ["tilewise", "bench", "core", "--only", key, "--device", "cpu"]
    command += ["--backends", "sdpa_math", "--configs", "0", "--output", str(tmp_path / "core.json")]
    monkeypatch.setattr(sys, "argv", command)
    assert ended(cli.main) == 0
    report = core_report.read(tmp_path / "core.json")
    (row,) = report.rows
    others = [entry for entry in row.entries if entry.candidate.backend != "cpu_tiled"]
    won = replace(others[0], candidate=tiled, measurement=replace(others[0].measurement, ratio=0.5))
    entries = (won, *(replace(each, measurement=replace(each.measurement, ratio=1.0)) for each in others))
    core_report.write(report.with_row(replace(row, entries=entries)), tmp_path / "core.json")
    chosen = ("--models", "deepseek_v3", "--layers", "mha", "--pass", "inference")
    assert bench(*chosen, "--cores", str(tmp_path / "core.json")) == 0
    assert cells_of(tmp_path)["auto"].ran == f"{tiled} (exact)"
    assert (tmp_path / "page.answers.json").exists()


def test_tritons_columns(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU in the interpreter; nothing was tuned, and the column of the tuned config says so."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(KERNELS["triton"], "supports", lambda *_: None)
        monkeypatch.setattr(KERNELS["triton"], "spaces", lambda *_: {})
    assert bench(*ONE, "--backends", "pytorch", "triton_default", "triton") == 0
    found = cells_of(tmp_path)
    assert found["triton_default"].outcome is Outcome.OK
    assert "tilewise tune --problem inference.fp32.b1.h8.kv8.q24.k24.d8.causal" in found["triton"].message


# another library's layers

THEIRS = """
import warnings
import torch
from torch import nn
from torch.nn import functional as F

class FastGroupedQueryAttention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, bias, causal, kernel_type):
        super().__init__()
        self.heads, self.causal, self.kernel_type = heads, causal, kernel_type
        dim = hidden // heads
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=bias) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, kv_heads * dim, bias=bias) for _ in range(2))

    def forward(self, x):
        if self.kernel_type == "triton":
            warnings.warn("the kernel failed, falling back to PyTorch")
        q, k, v = (each(x).unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2)
                   for each in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None
"""


def test_another_librarys_layers_beside(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder laid out like trinix's wheel: same weights, whole layer only, and what it falls back from is said."""
    package = tmp_path / "wheel" / "trinix" / "layers" / "attention"
    package.mkdir(parents=True)
    for folder in (package.parents[1], package.parent):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(THEIRS)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trinix"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert bench("--models", "llama3_70b", "--layers", "gqa", "--trinix", str(tmp_path / "wheel")) == 0
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trinix"]:
            del sys.modules[name]
    for row in report_in(tmp_path).rows:
        plain, triton = row.cell("trinix_pytorch"), row.cell("trinix_triton")
        assert plain is not None
        assert triton is not None
        assert plain.outcome is Outcome.OK
        assert plain.error is not None
        assert plain.layer is not None
        assert plain.core is None
        assert (triton.outcome, "falling back" in triton.message) == (Outcome.FAILED, True)
    claims = {each.claim.partition(",")[0] for each in report_in(tmp_path).verdicts}
    assert "trinix's PyTorch against the baseline" in claims


@pytest.mark.gpu
def test_a_page_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(page_row, "MATMUL_SIZE", {"cuda": 512})
    flags = ["--models", "deepseek_v3", "--batch", "1", "--seq_len", "512", "--hidden", "512", "--heads", "8"]
    flags += ["--num_runs", "3", "--device", "cuda", "--output", str(tmp_path / "page.json")]
    monkeypatch.setattr(sys, "argv", ["tilewise", "bench", *flags])
    assert ended(cli.main) == 0
    assert re.search(r"compiled ahead: (\d+) of \1 in ", capsys.readouterr().err)
    rows = report_in(tmp_path).rows
    assert len(rows) == 12
    for row in rows:
        cells = {cell.backend: cell for cell in row.cells}
        # nothing was tuned, and FlashAttention 2 has no heads whose values are of another width
        absent = {"triton", "flash"} if row.spec.layer == "mla" else {"triton"}
        assert {cells[name].outcome for name in OURS if name not in absent} == {Outcome.OK}
        plain, auto = cells["pytorch"].peak_bytes, cells["auto"].peak_bytes
        assert plain is not None
        assert auto is not None
        assert auto < plain
