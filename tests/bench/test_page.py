"""The benchmark of layers by made-up rows: which there are, what is claimed of them, and how they are shown."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilewise.bench import baseline, core_report, page_plot, page_report, page_specs
from tilewise.bench.core_answers import answers_of
from tilewise.bench.page_records import BACKENDS, EXPLICIT, Cell, PageRow, Spent, Timing
from tilewise.bench.page_specs import Chosen, Spec, specs
from tilewise.bench.page_verdicts import verdicts
from tilewise.bench.trinix_layers import TRINIX
from tilewise.cli.commands.bench_page import spread
from tilewise.domain.errors import SettingsError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import reference
from tilewise.kernels.call import Call

from . import made

# rows


def test_the_rows_are_those_of_the_page() -> None:
    found = specs(Chosen())
    assert len(found) == 32
    assert {spec.pass_: sum(each.pass_ is spec.pass_ for each in found) for spec in found} == dict.fromkeys(Pass, 16)
    assert [spec.model for spec in found if spec.layer == "mla"] == ["deepseek_v3"] * 2
    rows = {(spec.model, spec.layer): spec for spec in found}
    assert rows["deepseek_v3", "gqa"].kv_heads == 8
    assert rows["llama3_405b", "gqa"].problem.key == "training.fp16.b1.h128.kv8.q2048.k2048.d128.causal"
    assert rows["llama3_70b", "mqa"].kv_heads == 1
    assert rows["deepseek_v3", "mla"].problem.head_dim == 192
    assert rows["deepseek_v3", "mla"].problem.v_head_dim == 128
    assert (
        len(specs(Chosen(models=("llama3_70b",), layers=("FastMultiHeadAttention", "mqa"), passes=(Pass.TRAINING,))))
        == 2
    )


def test_the_sizes_that_the_page_leaves_open() -> None:
    shapes = {}
    for spec in specs(Chosen(models=("deepseek_v3",), passes=(Pass.INFERENCE,))):
        layer = spec.build(torch.device("meta"))
        shapes[spec.layer] = {name: tuple(weight.shape) for name, weight in layer.named_parameters()}
    assert shapes["latent"]["kv_down_proj.weight"] == (7168 // 8, 7168)
    assert shapes["mla"]["q_down_proj.weight"] == (1536, 7168)
    assert shapes["mla"]["kv_down_proj.weight"] == (512 + 64, 7168)
    assert shapes["mla"]["v_up_proj.weight"] == (128 * 128, 512)
    assert not [name for names in shapes.values() for name in names if name.endswith("bias")]


def test_sweeps() -> None:
    by_length = specs(Chosen(sweeps=("seq_len",), passes=(Pass.INFERENCE,)))
    assert [(spec.seq_len, spec.hidden, spec.layer) for spec in by_length] == [
        (size, 7168, "mha") for size in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    by_width = specs(Chosen(sweeps=("hidden",), passes=(Pass.INFERENCE,)))
    assert [(spec.hidden, spec.problem.head_dim) for spec in by_width] == [
        (4096, 32), (7168, 56), (8192, 64), (16384, 128)
    ]  # fmt: skip
    short = specs(Chosen(sweeps=("seq_len",), passes=(Pass.INFERENCE,), seq_len=80))
    assert [spec.seq_len for spec in short] == [20, 40, 80]
    limited = specs(Chosen(sweeps=("seq_len",), passes=(Pass.INFERENCE,), seq_len=4096))
    assert [spec.seq_len for spec in limited] == [512, 1024, 2048, 4096]
    narrow = specs(Chosen(sweeps=("hidden",), passes=(Pass.INFERENCE,), hidden=36, heads=12))
    assert [spec.hidden for spec in narrow] == [36]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Chosen(models=("gpt",)), "--models: expected some of deepseek_v3, llama3_70b, llama3_405b, got 'gpt'"),
        (Chosen(layers=("mhsa",)), "--layers: expected some of mha, self, gqa, mqa, latent, mla, .* got 'mhsa'"),
        (Chosen(sweeps=("heads",)), "--sweep: expected seq_len or hidden, got 'heads'"),
        (Chosen(hidden=100), "--hidden 100: expected a multiple of the 128 heads"),
        (Chosen(hidden=96, heads=12), "--heads 12: expected a multiple of the 8 heads of keys and values"),
    ],
)
def test_rows_that_cannot_be(chosen: Chosen, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        specs(chosen)


def test_several_values_behind_one_name() -> None:
    given = ["--models", "a", "b", "--num_runs", "3", "--pass", "training", "core"]
    assert spread(given) == [
        "--models",
        "a",
        "--models",
        "b",
        "--num_runs",
        "3",
        "--pass",
        "training",
        "--pass",
        "core",
    ]
    assert spread(["core", "--rows", "forward"]) == ["core", "--rows", "forward"]
    assert spread(["--models=a", "b", "--seq_len=8"]) == ["--models", "a", "--models", "b", "--seq_len=8"]


@pytest.mark.parametrize("given", [["--models"], ["--models", "--layers", "mha"], ["--models="]])
def test_no_value_behind_a_name(given: list[str]) -> None:
    with pytest.raises(SettingsError, match="--models: expected one value or more behind it, got none"):
        spread(given)


# the plain form


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_baseline_is_attention(causal: bool, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 9, heads, dim, generator=generator) for heads, dim in ((4, 8), (kv_heads, 8), (kv_heads, 6))
    )
    problem = Problem(
        batch=2, heads=4, kv_heads=kv_heads, q_len=9, head_dim=8, v_head_dim=6, dtype=Dtype.FP32, causal=causal
    )
    wanted, _ = reference.attention(Call(problem, query, key, value, 0.3))
    found = baseline.attend(query, key, value, scale=0.3, causal=causal)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_baseline_keeps_what_dropout_leaves() -> None:
    ones = torch.ones(1, 400, 1, 8)
    torch.manual_seed(0)
    found = baseline.attend(ones, ones, ones, scale=1.0, causal=False, dropout=0.25)
    assert found.std() > 0
    assert abs(float(found.mean()) - 1) < 0.01


# verdicts


def timing(ratio: float, spread: float = 0.0) -> Timing:
    return Timing.of([ratio * 10, ratio * 10 + spread], [10.0, 10.0])


def a_row(spec: Spec, auto: float, *, flash: float = 0.4, core: float = 0.1, trinix: float = 1.0) -> PageRow:
    """Return a row whose cells take these shares of the plain form's 10 ms."""
    ratios = {"pytorch": 1.0, "triton": 0.5, "flash": flash, "sdpa": 0.5, "triton_default": 0.6, "auto": auto,
              "trinix_pytorch": trinix}  # fmt: skip
    cells = tuple(
        Cell(backend=name, outcome=Outcome.OK, ran=name, layer=timing(ratio), core=timing(core),
             peak_bytes=int(ratio * 2**30))
        for name, ratio in ratios.items()
    )  # fmt: skip
    return PageRow(
        spec=spec, cells=cells, reference="pytorch", projection_flops=2 * 10**12, matmul_tflops=1000.0,
        core_matmul_tflops=800.0, seconds=1.0, run=made.RUN,
    )  # fmt: skip


PAGE = specs(Chosen(passes=(Pass.INFERENCE,)))


def claims(rows: list[PageRow]) -> dict[str, tuple[str, bool | None]]:
    return {each.claim: (each.found, each.met) for each in verdicts(rows)}


def test_a_page_that_holds() -> None:
    found = claims([a_row(spec, 1 / 3, core=0.12) for spec in PAGE])
    assert found == {
        "auto over PyTorch, inference, fp16, causal: geomean of 15 rows": ("3.00x", True),
        "rows with every cell, fp16, causal": ("15", True),
        "auto of its ceiling, each row, fp16, causal": ("96%", True),
        "auto slower than the fastest explicit backend, each row, fp16, causal": ("-16.7%", True),
        "trinix's PyTorch against the baseline, each row, fp16, causal": ("+0.0%", True),
        "auto against the best of trinix, speed, each row, fp16, causal": ("3.00x, 3.00x on average", True),
        "auto against the best of trinix, memory, each row, fp16, causal": ("3.00x, 3.00x on average", True),
    }


def test_each_claim_fails_by_its_worst_row() -> None:
    rows = [a_row(spec, 1 / 3, core=0.12) for spec in PAGE]
    worst = replace(a_row(PAGE[3], 0.5, flash=0.45, trinix=0.4), spec=PAGE[3])
    rows[3] = worst
    found = {each.claim.split(",")[0]: each for each in verdicts(rows)}
    assert found["auto of its ceiling"].met is False
    assert found["auto of its ceiling"].worst == PAGE[3].name
    assert found["auto slower than the fastest explicit backend"].found == "+11.1%"
    assert found["auto slower than the fastest explicit backend"].met is False
    assert found["trinix's PyTorch against the baseline"].met is False
    assert found["auto against the best of trinix"].met is False
    assert found["auto over PyTorch"].met is True  # of the mean


def test_a_page_with_rows_missing_is_open() -> None:
    rows = [a_row(spec, 1 / 3) for spec in PAGE[:4]]
    refused = Cell(backend="flash", outcome=Outcome.UNSUPPORTED, message="no")
    rows[1] = replace(rows[1], cells=tuple(refused if cell.backend == "flash" else cell for cell in rows[1].cells))
    found = {each.claim: each for each in verdicts(rows)}
    assert found["auto over PyTorch, inference, fp16, causal: geomean of 4 rows"].met is None
    filled = found["rows with every cell, fp16, causal"]
    assert (filled.found, filled.wanted, filled.met, filled.worst) == ("3", "15", False, PAGE[1].name)
    each = [verdict for claim, verdict in found.items() if "each row" in claim]
    assert len(each) == 5
    # none is met by four rows; one of them is enough to fail
    assert {verdict.met for verdict in each} == {None}
    slow = {each.claim: each.met for each in verdicts([*rows[:3], a_row(PAGE[3], 0.5)])}
    assert slow["auto of its ceiling, each row, fp16, causal"] is False


def test_what_a_row_says() -> None:
    row = a_row(PAGE[0], 0.25, core=0.1)
    assert row.ceiling_ms == pytest.approx(2 + 1)
    assert row.of_ceiling == pytest.approx(3 / 2.5)
    assert row.core_share == pytest.approx(0.4)
    assert row.fastest() == "auto"
    assert row.speedup("auto", over="flash") == pytest.approx(1.6)
    assert row.core_tflops("auto") == pytest.approx(PAGE[0].problem.forward_flops / 1e9)
    assert page_report.memory_savings(row) == pytest.approx(0.75)
    assert Timing.of([1.0, 3.0], [1.0, 2.0]).std_ms == pytest.approx(2**0.5)


def test_a_cell_that_does_not_fit_says_what_it_would_need() -> None:
    row = a_row(replace(PAGE[0], sweep="seq_len"), 0.25)
    absent = Cell(backend="pytorch", outcome=Outcome.SKIPPED, message="no room", needed_bytes=300 << 30)
    row = replace(row, cells=(absent, *row.cells[1:]), reference="triton")
    report = page_report.opened(Path("nowhere"), made.RUN).with_row(row)
    assert "needs 300 GiB" in page_report.page(report)
    assert "(307200)" in page_report.page(report)
    auto = row.cell("auto")
    assert auto is not None
    assert auto.layer is not None
    assert f"| {auto.layer.mean_ms:.3f} ± {auto.layer.std_ms:.3f} ms |" in page_report.page(report)
    assert page_report.memory_savings(row) == pytest.approx(1 - 0.25 / 300)


def shown(*rows: PageRow) -> str:
    report = page_report.opened(Path("nowhere"), made.RUN)
    for row in rows:
        report = report.with_row(row)
    return page_report.page(report)


def test_a_table_ends_with_the_figures_of_the_page() -> None:
    text = shown(a_row(PAGE[0], 0.25), a_row(PAGE[1], 0.5, flash=0.2))
    assert (
        "Over PyTorch: auto 3.00x on average, 4.00x at best; the most is 5.00x (Flash, deepseek_v3 SelfAttention). "
        "Fastest are auto in 1, Flash in 1 of 2 rows."
    ) in text
    assert "A row takes" not in text
    spent = Spent(checks=1.25, layers=3.0, cores=0.5)
    assert "A row takes about 5 s: 1.2 for the checks" in shown(replace(a_row(PAGE[0], 0.25), spent=spent))


def test_reasons_that_differ_in_figures_are_one_line() -> None:
    rows = []
    for spec in PAGE[:3]:
        cells = {cell.backend: cell for cell in a_row(spec, 0.25).cells}
        message = f"nothing tuned is known of it: tilewise tune --problem {spec.problem.key}"
        cells["triton"] = Cell(backend="triton", outcome=Outcome.UNSUPPORTED, message=message)
        cells["auto"] = replace(cells["auto"], ran="sdpa (default)" if spec is PAGE[1] else "sdpa (exact)")
        rows.append(replace(a_row(spec, 0.25), cells=tuple(cells.values())))
    text = shown(*rows)
    (line,) = (line for line in text.splitlines() if "nothing tuned" in line)
    assert line.endswith(f"{PAGE[0].problem.key} | {PAGE[0].name} and 2 more |")
    assert "In 1 of 3 rows nothing was known of the core" in text


# answers from cores


def test_an_answer_of_a_final_keeps_what_noise_cannot_tell_apart() -> None:
    problem = PAGE[0].problem
    cores = core_report.opened(Path("nowhere"), made.RUN)
    for ours, plan in ((0.999, "sdpa"), (0.5, "triton")):
        peers = {"sdpa": 1.0, "flash_cute": 1.2}
        (answer,) = answers_of(cores.with_row(made.row(problem, ours, peers))).answers
        assert answer.plan.forward.backend == plan
        assert answer.evidence is not None
        assert answer.evidence.finalists[0].candidate == made.OURS


# plots


def test_the_plots_show_every_timed_cell(tmp_path: Path) -> None:
    report = page_report.opened(Path("nowhere"), made.RUN)
    for spec in PAGE:
        report = report.with_row(a_row(spec, 0.25))
    for spec in specs(Chosen(sweeps=("hidden",), passes=(Pass.INFERENCE,))):
        report = report.with_row(a_row(spec, 0.25))
    drawn = page_plot._bars(page_report.groups_of(report.rows), report.device.name)
    heights = [patch.get_height() for panel in drawn.axes for patch in panel.patches]  # type: ignore[attr-defined]
    assert len(heights) == len(PAGE) * 6
    assert sorted(set(heights)) == pytest.approx([1.0, 1 / 0.6, 2.0, 2.5, 4.0])
    assert page_plot.draw(report, tmp_path / "page.png") == [tmp_path / "page.png", tmp_path / "page_hidden.png"]
    alone = page_plot._bars([[a_row(PAGE[0], 0.25)]], report.device.name)
    assert alone.get_figwidth() < drawn.get_figwidth()
    curves = page_plot._curves(page_report.sweeps_of(report.rows), report.device.name)
    curves.draw_without_rendering()
    memory = curves.axes[1]
    labels = {label.get_text() for label in memory.get_yticklabels()}
    assert "0.25" in labels
    assert memory.get_xlabel() == "hidden size"


def test_rows_without_times_keep_their_place_and_tables_of_such_rows_are_not_drawn(tmp_path: Path) -> None:
    def untimed(spec: Spec) -> PageRow:
        return replace(a_row(spec, 0.25), cells=(Cell(backend="auto", outcome=Outcome.SKIPPED),))

    report = page_report.opened(Path("nowhere"), made.RUN).with_row(untimed(PAGE[0]))
    assert page_plot.draw(report, tmp_path / "page.png") == []
    (panel,) = page_plot._bars([[untimed(PAGE[0]), a_row(PAGE[1], 0.25), untimed(PAGE[2])]], "a device").axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["MHA", "Self", "GQA"]
    assert panel.get_xlim() == (-0.5, 2.5)


def test_a_layer_by_any_of_its_names() -> None:
    for short, long in page_specs.LAYERS.items():
        assert page_specs.layer_named(short) == page_specs.layer_named(long) == short
    for short, name in page_specs.CLASSES.items():
        assert page_specs.layer_named(name) == short
        layer = Spec(model="deepseek_v3", layer=short, pass_=Pass.INFERENCE, dtype=Dtype.FP32, causal=True, batch=1,
                     seq_len=8, hidden=64, heads=4, kv_heads=2).build(torch.device("meta"))  # fmt: skip
        assert type(layer).__name__ == name


def test_lists_of_layers_agree() -> None:
    assert set(page_specs.LAYERS) == set(page_plot.SHORT)
    assert set(page_plot.LOOKS) == set(BACKENDS)
    assert {*TRINIX, *EXPLICIT, "auto"} == set(BACKENDS)
