"""The report of `tilewise bench`: one JSON document that invocations add rows to, and a Markdown page of it."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from tilewise.domain.answer import Match
from tilewise.domain.device import Device
from tilewise.domain.models import MODELS
from tilewise.domain.problem import Pass
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome, now

from . import report_file
from .page_records import BACKENDS, BASELINE, Cell, PageRow, Spent
from .page_specs import LATENT_SHARE, LAYERS, Spec
from .page_verdicts import PageVerdict, verdicts
from .records import Run
from .trinix_layers import TRINIX


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A backend that left the device unusable for its process: it is not tried on that row again."""

    spec: Spec
    backend: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PageReport:
    """All rows of one device. command and software are those of the last invocation."""

    command: str
    device: Device
    device_key: str
    software: Software
    updated: datetime
    verdicts: tuple[PageVerdict, ...] = ()
    rows: tuple[PageRow, ...] = ()
    spoilt: tuple[Spoilt, ...] = ()

    def row(self, spec: Spec) -> PageRow | None:
        return next((row for row in self.rows if row.spec == spec), None)

    def with_row(self, row: PageRow) -> "PageReport":
        """Return the report with `row` in the place of an older one of its spec."""
        rows = {each.spec: each for each in self.rows} | {row.spec: row}
        return replace(self, rows=tuple(rows.values()), verdicts=verdicts(rows.values()), updated=now())

    def judged(self) -> "PageReport":
        """Return the report with today's verdicts on its rows."""
        return replace(self, verdicts=verdicts(self.rows))

    def with_spoilt(self, spoilt: Spoilt) -> "PageReport":
        return replace(self, spoilt=(*self.spoilt, spoilt), updated=now())


def opened(path: Path, run: Run) -> PageReport:
    """Return the report at `path` for `run` to add to, an empty one where there is no file.

    Raises SettingsError for a file that is no such report, or one of another device.
    """
    empty = PageReport(
        command=run.command, device=run.device, device_key=run.device_key, software=run.software, updated=now()
    )
    if not path.exists():
        return empty
    found = read(path)
    report_file.check_device(path, found.device_key, run.device_key)
    return replace(empty, rows=found.rows, spoilt=found.spoilt, verdicts=verdicts(found.rows))


def read(path: Path) -> PageReport:
    """Return the report at `path`. Raises SettingsError where there is none."""
    return report_file.load(PageReport, path, command="tilewise bench")


def write(report: PageReport, path: Path) -> None:
    """Write the JSON to `path` and the page beside it."""
    report_file.save(report, page(report), path)


# the page


def page(report: PageReport) -> str:
    """Return the Markdown page: how it was measured, verdicts, the tables, the cores, and what was refused."""
    lines = [
        f"# Attention layers on {report.device.name}",
        "",
        f"{report.device.name} (`{report.device_key}`); {_versions(report.software)}. Measured by",
        "",
        "```sh",
        *dict.fromkeys(row.run.command for row in report.rows),
        "```",
        "",
        *_how(report),
    ]
    if report.verdicts:
        lines += ["", "## What it comes to", "", *_verdict_table(report.verdicts), *_unanswered(report.rows)]
    for rows in groups_of(report.rows):
        lines += ["", *_section(rows)]
    for rows in sweeps_of(report.rows):
        lines += ["", *_sweep(rows)]
    lines += ["", *_refused(report.rows)]
    return "\n".join(lines).rstrip() + "\n"


def _versions(software: Software) -> str:
    names = ("torch", "triton", "cuda", "driver", "cudnn", "flash_attn")
    return ", ".join(f"{name} {getattr(software, name)}" for name in names if getattr(software, name))


def _how(report: PageReport) -> list[str]:
    cells = [cell for row in report.rows for cell in row.cells]
    counted = _range([cell.layer.samples for cell in cells if cell.layer is not None])
    return [
        f"Times are milliseconds, mean ± standard deviation of {counted} rounds; a round calls every backend once, the "
        "cache cleared before each. Speed-ups are medians of the ratios within a round. Every cell was first "
        "compared with float64: the result and, in training, the gradients of the input and of every weight.",
        "",
        "- PyTorch is the plain form, pinned in `bench/baseline.py`; SDPA is torch's own choice; Triton is our kernel "
        "with the best config known, Triton default without any search; auto is what the layer runs by itself.",
        "- Memory is what a step allocates at its peak (reset_peak_memory_stats), with weights, input and gradients; "
        "in brackets what it would need, and an MB is 2**20 bytes, as on the page this one is to be laid beside.",
        "- Most of a layer's time is its projections, which are the same for every backend. The ceiling is their time "
        "at the rate of a large matrix product in the same run, plus the fastest core; core is the share of the "
        "attention core in auto's time. Cores alone are timed in "
        f"{_range([cell.core.samples for cell in cells if cell.core is not None])} rounds.",
        "- A training step is forward and backward with the gradients of all weights. There are no biases, dropout or "
        f"positions, except DeepSeek's own. GroupedQueryAttention of DeepSeek V3 has 8 heads of keys, LatentAttention "
        f"a latent of hidden / {LATENT_SHARE}; DeepSeek's has ranks 1536 / 512 and heads of 128 + 64 / 128.",
        *_spent([row.spent for row in report.rows if row.spent is not None]),
    ]


def _spent(rows: Sequence[Spent]) -> list[str]:
    """Return where a row's seconds go, by medians."""
    if not rows:
        return []
    checks, layers, cores = (
        statistics.median(getattr(each, name) for each in rows) for name in ("checks", "layers", "cores")
    )
    return [
        f"- A row takes about {checks + layers + cores:.0f} s: {checks:.1f} for the checks, with what compiles then, "
        f"{layers:.1f} to time the layers and {cores:.1f} the cores."
    ]


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _verdict_table(found: Iterable[PageVerdict]) -> list[str]:
    lines = [_line(("claim", "found", "wanted", "verdict", "worst row")), _line(["---"] * 5)]
    words = {True: "met", False: "not met", None: "open"}
    return lines + [_line((each.claim, each.found, each.wanted, words[each.met], each.worst)) for each in found]


def _unanswered(rows: Sequence[PageRow]) -> list[str]:
    """Say in how many rows auto had nothing to choose by."""
    ran = [cell.ran for row in rows if (cell := row.cell("auto")) is not None]
    without = sum(each.endswith(f"({Match.DEFAULT})") for each in ran)
    if not without:
        return []
    return [
        "",
        f"In {without} of {len(ran)} rows nothing was known of the core, and auto ran torch's own choice: give it "
        "answers with `--cores`, or tune.",
    ]


def groups_of(rows: Sequence[PageRow]) -> list[list[PageRow]]:
    """Return the rows of the tables, apart by dtype, causality and pass."""
    groups: dict[tuple[object, ...], list[PageRow]] = {}
    for row in rows:
        if not row.spec.sweep:
            groups.setdefault((row.spec.dtype, row.spec.causal, row.spec.pass_), []).append(row)
    models, layers = list(MODELS), list(LAYERS)
    return [
        sorted(group, key=lambda row: (models.index(row.spec.model), layers.index(row.spec.layer)))
        for group in groups.values()
    ]


def columns_of(rows: Iterable[PageRow]) -> list[str]:
    present = {cell.backend for row in rows for cell in row.cells}
    return [name for name in BACKENDS if name in present]


def title_of(spec: Spec) -> str:
    what = "forward and backward" if spec.pass_ is Pass.TRAINING else "inference"
    return f"{what}, {spec.dtype}, {'causal' if spec.causal else 'full'} attention"


def _section(rows: list[PageRow]) -> list[str]:
    columns = columns_of(rows)
    heads = ["model", "hidden, heads, kv heads, seq, batch", "layer", *(f"{BACKENDS[name]} ms" for name in columns)]
    heads += ["best", "auto's speed-up", "memory MB, PyTorch", "memory MB, auto", "core's share", "ceiling ms"]
    heads += ["auto of it"]
    title = title_of(rows[0].spec)
    lines = [f"## {title[0].upper()}{title[1:]}", "", _line(heads), _line(["---"] * len(heads))]
    for row in rows:
        cells = [_time(row.cell(name)) for name in columns]
        ceiling = row.ceiling_ms
        lines.append(
            _line([
                row.spec.model, _sizes(row.spec), LAYERS[row.spec.layer], *cells, _best(row),
                _times(row.speedup("auto")), _memory(row.cell(BASELINE)), _memory(row.cell("auto")),
                _percent(row.core_share), "-" if ceiling is None else f"{ceiling:.3f}", _percent(row.of_ceiling),
            ])
        )  # fmt: skip
    return [*lines, "", *_summary(rows), *_cores(rows, columns)]


def _summary(rows: Sequence[PageRow]) -> list[str]:
    """Return the page's own three figures: the average speed-up, the best, and which backend is fastest."""
    ours = [name for name in BACKENDS if name not in TRINIX]
    found = {row.spec: (name, value) for row in rows if (name := row.fastest(ours)) and (value := row.speedup(name))}
    autos = [value for row in rows if (value := row.speedup("auto")) is not None]
    if not found or not autos:
        return []
    spec, (name, most) = max(found.items(), key=lambda each: each[1][1])
    wins = Counter(name for name, _ in found.values()).most_common()
    return [
        f"Over PyTorch: auto {sum(autos) / len(autos):.2f}x on average, {max(autos):.2f}x at best; the most is "
        f"{most:.2f}x ({BACKENDS[name]}, {spec.model} {LAYERS[spec.layer]}). Fastest are "
        f"{', '.join(f'{BACKENDS[each]} in {number}' for each, number in wins)} of {len(found)} rows.",
        "",
    ]


def _cores(rows: list[PageRow], columns: Sequence[str]) -> list[str]:
    """Return medians of the whole layer and of its core alone, and how far the core is from the matmul rate."""
    kept = [name for name in columns if any(row.timing(name) is not None for row in rows)]
    if not kept:
        return []
    heads = ["model", "layer", *(f"{BACKENDS[name]} ms" for name in kept)]
    heads += ["auto's core, speed-up", "auto's core TFLOP/s", "matmul TFLOP/s", "core of matmul", "auto runs"]
    lines = [f"Medians of the whole layer / of the attention core alone; {title_of(rows[0].spec)}:", "", _line(heads)]
    lines.append(_line(["---"] * len(heads)))
    for row in rows:
        rate, auto = row.core_tflops("auto"), row.cell("auto")
        lines.append(
            _line([
                row.spec.model, LAYERS[row.spec.layer], *(_medians(row.cell(name)) for name in kept),
                _times(row.speedup("auto", core=True)), _rate(rate), _rate(row.core_matmul_tflops or None),
                _percent(rate / row.core_matmul_tflops if rate and row.core_matmul_tflops else None),
                "-" if auto is None else auto.ran.replace("|", "\\|") or "-",
            ])
        )  # fmt: skip
    return lines


def _medians(cell: Cell | None) -> str:
    if cell is None or cell.layer is None:
        return "-"
    return f"{cell.layer.median_ms:.3f} / {'-' if cell.core is None else f'{cell.core.median_ms:.4f}'}"


def sweeps_of(rows: Iterable[PageRow]) -> list[list[PageRow]]:
    groups: dict[tuple[object, ...], list[PageRow]] = {}
    for row in rows:
        spec = row.spec
        if spec.sweep:
            key = (spec.sweep, spec.model, spec.layer, spec.dtype, spec.causal, spec.pass_)
            groups.setdefault(key, []).append(row)
    return [sorted(group, key=lambda row: int(getattr(row.spec, row.spec.sweep))) for group in groups.values()]


def _sweep(rows: list[PageRow]) -> list[str]:
    spec = rows[0].spec
    columns = [name for name in columns_of(rows) if name != BASELINE]
    heads = [spec.sweep, "PyTorch ms", *(f"{BACKENDS[name]} speed-up" for name in columns)]
    heads += ["auto ms", "memory MB, PyTorch", "memory MB, auto", "memory savings"]
    lines = [f"## By {spec.sweep}: {spec.model} {LAYERS[spec.layer]}, {title_of(spec)}", "", _line(heads)]
    lines.append(_line(["---"] * len(heads)))
    for row in rows:
        savings = memory_savings(row)
        lines.append(
            _line([
                str(getattr(row.spec, spec.sweep)), _time(row.cell(BASELINE)),
                *(_speedup(row, name) for name in columns), _time(row.cell("auto")), _memory(row.cell(BASELINE)),
                _memory(row.cell("auto")), _percent(savings),
            ])
        )  # fmt: skip
    return lines


def _speedup(row: PageRow, backend: str) -> str:
    """Return how many times as fast as the plain form a backend is; where that was not timed, its own time."""
    speedup, cell = row.speedup(backend), row.cell(backend)
    if speedup is None:
        return _time(cell) + (" ms" if cell is not None and cell.layer is not None else "")
    return _times(speedup)


def memory_savings(row: PageRow) -> float | None:
    """Return the share of the plain form's memory that auto does without; that it would need counts as well."""
    plain, auto = row.cell(BASELINE), row.cell("auto")
    if plain is None or auto is None or auto.peak_bytes is None:
        return None
    size = plain.peak_bytes or plain.needed_bytes
    return None if size is None else 1 - auto.peak_bytes / size


def _refused(rows: Iterable[PageRow]) -> list[str]:
    """Return what was not timed: a line for all rows of a backend with the same reason but for its figures."""
    alike: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for row in rows:
        for cell in row.cells:
            if cell.outcome is not Outcome.OK:
                kind = re.sub(r"\S*\d\S*", "#", cell.message)
                alike.setdefault((cell.backend, str(cell.outcome), kind), []).append((cell.message, row.spec.name))
    if not alike:
        return []
    lines = ["## Not timed", "", _line(["backend", "outcome", "reason", "rows"]), _line(["---"] * 4)]
    for (backend, outcome, _), found in alike.items():
        message, name = found[0]
        which = name if len(found) == 1 else f"{name} and {len(found) - 1} more"
        lines.append(_line([BACKENDS[backend], outcome, message.replace("|", "\\|"), which]))
    return lines


def _sizes(spec: Spec) -> str:
    return f"{spec.hidden}, {spec.heads}, {spec.kv_heads}, {spec.seq_len}, {spec.batch}"


def _time(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if cell.layer is not None:
        return f"{cell.layer.mean_ms:.3f} ± {cell.layer.std_ms:.3f}"
    return f"needs {cell.needed_bytes / 2**30:.0f} GiB" if cell.needed_bytes else str(cell.outcome).replace("_", " ")


def _best(row: PageRow) -> str:
    name = row.fastest([name for name in BACKENDS if name not in TRINIX])
    return "-" if name is None else f"{BACKENDS[name]} {_times(row.speedup(name))}"


def _memory(cell: Cell | None) -> str:
    if cell is None or cell.peak_bytes is None:
        return "-" if cell is None or cell.needed_bytes is None else f"({cell.needed_bytes / 2**20:.0f})"
    return f"{cell.peak_bytes / 2**20:.2f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
