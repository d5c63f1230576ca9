"""The plots of `tilewise bench`: bars per model, and speed-up and memory against sequence length and hidden size."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .page_records import BACKENDS, BASELINE, PageRow
from .page_report import PageReport, columns_of, groups_of, sweeps_of, title_of
from .page_specs import LAYERS, Spec

# Okabe and Ito's colours for every kind of colour vision, and marks that tell them apart in grey too.
LOOKS = {
    "pytorch": ("#000000", "o", ""), "triton": ("#D55E00", "s", "//"), "flash": ("#0072B2", "^", ""),
    "sdpa": ("#56B4E9", "v", ".."), "triton_default": ("#E69F00", "D", "xx"), "auto": ("#009E73", "*", ""),
    "trinix_pytorch": ("#999999", "P", ""), "trinix_triton": ("#CC79A7", "X", "\\\\"),
}  # fmt: skip
LEGEND_COLUMNS = 7  # at most: what the width holds
DOTS_PER_INCH = 120
SWEPT = {"seq_len": "sequence length", "hidden": "hidden size"}
SHORT = {"mha": "MHA", "self": "Self", "gqa": "GQA", "mqa": "MQA", "latent": "Latent", "mla": "DeepSeek's"}


def draw(report: PageReport, path: Path) -> list[Path]:
    """Write a plot of the tables to `path` and one of each sweep beside it; return those that had something to show."""
    written = []
    groups = [rows for rows in groups_of(report.rows) if _beside(rows)]
    if groups:
        _bars(groups, report.device.name).savefig(path)
        written.append(path)
    for sweep in ("seq_len", "hidden"):
        swept = [rows for rows in sweeps_of(report.rows) if rows[0].spec.sweep == sweep and _speedups(rows)]
        if swept:
            target = path.with_name(f"{path.stem}_{sweep}{path.suffix}")
            _curves(swept, report.device.name).savefig(target)
            written.append(target)
    return written


def _bars(groups: Sequence[Sequence[PageRow]], device: str) -> Figure:
    """Return a panel per table: the time of every layer and backend as a share of the plain form's."""
    width = min(12.0, 6 + 0.6 * max(map(len, groups)))  # few rows are no wide bars
    drawn = Figure(figsize=(width, 3.4 * len(groups) + 1), dpi=DOTS_PER_INCH, layout="constrained")
    panels = drawn.subplots(len(groups), 1, squeeze=False)[:, 0]
    for panel, rows in zip(panels, groups, strict=True):
        names = _beside(rows)
        width = 0.85 / len(names)
        for place, name in enumerate(names):
            colour, _, hatch = LOOKS[name]
            heights = [row.speedup(name) or 0.0 for row in rows]
            places = [index + (place - (len(names) - 1) / 2) * width for index in range(len(rows))]
            bars = panel.bar(places, heights, width, color=colour, hatch=hatch, edgecolor="white", label=BACKENDS[name])
            labels = [f"{height:.1f}" if height else "" for height in heights]
            panel.bar_label(bars, labels, fontsize=6, padding=1, rotation=90 if len(rows) > 8 else 0)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xlim(-0.5, len(rows) - 0.5)
        panel.set_xticks(range(len(rows)), [SHORT[row.spec.layer] for row in rows], fontsize=8)
        _name_models(panel, [row.spec for row in rows])
        panel.set_ylabel("times PyTorch's speed")
        panel.set_title(title_of(rows[0].spec), loc="left", fontsize=10)
        panel.margins(x=0.01, y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    drawn.suptitle(f"Attention layers on {device}; PyTorch, the plain form, is 1", x=0.01, ha="left", fontweight="bold")
    _legend(drawn, panels)
    return drawn


def _beside(rows: Sequence[PageRow]) -> list[str]:
    """Return the columns that have a speed-up over the plain form in any row."""
    return [name for name in columns_of(rows) if name != BASELINE and any(row.speedup(name) for row in rows)]


def _legend(drawn: Figure, panels: Iterable[Axes]) -> None:
    """Write one legend of what any panel shows."""
    found: dict[str, Artist] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    lines = -(-len(found) // LEGEND_COLUMNS) or 1
    drawn.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=-(-len(found) // lines) or 1,
        frameon=False, fontsize=9,
    )  # fmt: skip


def _name_models(panel: Axes, specs: Sequence[Spec]) -> None:
    """Write each model below the middle of its layers, and a line between models."""
    first = 0
    for place in range(1, len(specs) + 1):
        if place == len(specs) or specs[place].model != specs[first].model:
            middle = (first + place - 1) / 2
            panel.annotate(
                specs[first].model, (middle, 0), xycoords=("data", "axes fraction"), xytext=(0, -22),
                textcoords="offset points", ha="center", va="top", fontsize=9, fontweight="bold", annotation_clip=False,
            )  # fmt: skip
            if place < len(specs):
                panel.axvline(place - 0.5, color="#cccccc", linewidth=0.8)
            first = place


def _curves(groups: Sequence[Sequence[PageRow]], device: str) -> Figure:
    """Return a row of panels per group: speed-up, and memory, against the swept size."""
    sweep = groups[0][0].spec.sweep
    drawn = Figure(figsize=(11, 3.6 * len(groups) + 0.8), dpi=DOTS_PER_INCH, layout="constrained")
    panels = drawn.subplots(len(groups), 2, squeeze=False)
    for (speeds, memory), rows in zip(panels, groups, strict=True):
        spec = rows[0].spec
        speeds.set_title(f"{spec.model} {LAYERS[spec.layer]}, {title_of(spec)}", loc="left", fontsize=9)
        _lines(speeds, sweep, _speedups(rows))
        speeds.axhline(1, color="black", linewidth=0.8)
        speeds.set_ylabel("times PyTorch's speed")
        speeds.set_ylim(bottom=0)
        _memory(memory, sweep, rows)
    drawn.suptitle(f"By {SWEPT[sweep]} on {device}", x=0.01, ha="left", fontweight="bold")
    _legend(drawn, panels.flat)
    return drawn


Curves = dict[str, list[tuple[int, float]]]


def _speedups(rows: Sequence[PageRow]) -> Curves:
    found: Curves = {}
    for name in columns_of(rows):
        points = [
            (int(getattr(row.spec, row.spec.sweep)), value)
            for row in rows
            if name != BASELINE and (value := row.speedup(name)) is not None
        ]
        if points:
            found[name] = points
    return found


def _memory(panel: Axes, sweep: str, rows: Sequence[PageRow]) -> None:
    """Draw the peak memory of the plain form and of auto, hollow where the plain form would only need it."""
    sizes: Curves = {}
    missing: list[tuple[int, float]] = []
    for name in (BASELINE, "auto"):
        for row in rows:
            cell = row.cell(name)
            size = None if cell is None else cell.peak_bytes or cell.needed_bytes
            if cell is not None and size:
                point = (int(getattr(row.spec, sweep)), size / 2**30)
                sizes.setdefault(name, []).append(point)
                missing += [point] if cell.peak_bytes is None else []
    _lines(panel, sweep, sizes)
    if missing:
        panel.plot(*zip(*missing, strict=True), "o", markersize=9, markerfacecolor="white", color="black",
                   label="does not fit: what it would need")  # fmt: skip
    if sizes:
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter(lambda size, _: f"{size:g}")
    else:
        panel.text(0.5, 0.5, "this device does not tell", ha="center", transform=panel.transAxes)
    panel.set_title("memory", loc="left", fontsize=9)
    panel.set_ylabel("peak memory, GiB")


def _lines(panel: Axes, sweep: str, curves: Curves) -> None:
    for name, points in curves.items():
        colour, mark, _ = LOOKS[name]
        panel.plot(*zip(*points, strict=True), color=colour, marker=mark, label=BACKENDS[name])
    ticks = sorted({size for points in curves.values() for size, _ in points})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(size) for size in ticks], fontsize=8)
    panel.minorticks_off()
    panel.set_xlabel(SWEPT[sweep])
    panel.spines[["top", "right"]].set_visible(False)
