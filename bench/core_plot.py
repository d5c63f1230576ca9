"""The plot of `tilewise bench core`: a panel per bar, our speed in each cell as a share of the rival's."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from .bars import Verdict, named
from .core_report import Report, summary

# Dark, middle and light, apart in grey too, of Okabe and Ito's colours for every kind of colour vision.
COLOURS = ("#0072B2", "#56B4E9", "#F0E442")
BAR_COLOUR = "#D55E00"
BAR_INCHES, PANEL_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.22, 0.55, 1.2, 9.0
GAP = 0.35  # between cells of different labels, in bars
DOTS_PER_INCH = 120


def draw(report: Report, path: Path) -> bool:
    """Write the plot to `path`, in the format of its ending; return whether there was anything to draw."""
    drawn = figure(report)
    if drawn is not None:
        drawn.savefig(path)
    return drawn is not None


def figure(report: Report) -> Figure | None:
    """Return a panel for every bar with a share, None where there is none."""
    verdicts = [verdict for verdict in report.verdicts if verdict.shares]
    if not verdicts:
        return None
    counts = [len(verdict.shares) + GAP * len({share.cell.label for share in verdict.shares}) for verdict in verdicts]
    height = sum(counts) * BAR_INCHES + len(counts) * PANEL_INCHES + MARGIN_INCHES
    drawn = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
    ratios = {"height_ratios": counts}
    panels = drawn.subplots(len(verdicts), 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
    for panel, verdict in zip(panels, verdicts, strict=True):
        _panel(panel, verdict)
    furthest = max(share.share for verdict in verdicts for share in verdict.shares)
    panels[-1].set_xlim(0, max(1.25, furthest) * 1.35)
    panels[-1].set_xlabel("our speed as a share of the rival's: 1 is as fast, further right is faster")
    drawn.suptitle(f"Attention cores on {report.device.name}", x=0.01, ha="left", fontweight="bold")
    drawn.legend(handles=_legend(verdicts), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return drawn


def _panel(panel: Axes, verdict: Verdict) -> None:
    places: list[float] = []
    colours: list[str] = []
    labels = list(dict.fromkeys(share.cell.label for share in verdict.shares))
    for label in labels:
        inside = [share for share in verdict.shares if share.cell.label == label]
        for number, _ in enumerate(inside):
            places.append(len(places) + GAP * labels.index(label))
            colours.append(COLOURS[number % len(COLOURS)])
    shares = [share.share for share in verdict.shares]
    panel.barh(places, shares, height=0.86, color=colours, edgecolor="black", linewidth=0.5)
    for place, share in zip(places, verdict.shares, strict=True):
        panel.annotate(
            f"{share.share:.2f} of {named(share.rival)}",
            (share.share, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.5},
            zorder=3,
        )
    names = [share.cell.name for share in verdict.shares]
    panel.set_yticks(places, names, fontsize=8.5)
    panel.set_title(f"{verdict.title}\n{summary(verdict, where=False)}", loc="left", fontsize=9)
    panel.axvline(1, color="grey", linewidth=0.8, zorder=0)
    for least, style in ((verdict.geomean_bar, "--"), (verdict.each_bar, ":")):
        if least is not None:
            line = panel.axvline(least, color=BAR_COLOUR, linestyle=style, linewidth=1.8, zorder=2)
            line.set_path_effects([withStroke(linewidth=3.6, foreground="white")])  # seen on a dark bar in grey too
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _legend(verdicts: Sequence[Verdict]) -> list[Line2D]:
    lines = [Line2D([], [], color="grey", linewidth=0.8, label="as fast as the rival")]
    if any(verdict.geomean_bar is not None for verdict in verdicts):
        lines.append(Line2D([], [], color=BAR_COLOUR, linestyle="--", linewidth=1.8, label="bar of the geomean"))
    if any(verdict.each_bar is not None for verdict in verdicts):
        lines.append(Line2D([], [], color=BAR_COLOUR, linestyle=":", linewidth=1.8, label="bar of every cell"))
    return lines
