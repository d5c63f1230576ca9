"""What `tilewise landscape replay` writes: JSON, a page with the table, and a plot."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tilewise.domain import codec

from .landscape import Landscape
from .replay import AFTER, SHARES, Contender, Run

PLOTTED = 101  # points along an axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A contender on a landscape, medians over seeds (and 90th percentiles); None where less than half got there.

    - trials_to, trials_to_p90, seconds_to: by share of the optimum; seconds are simulated.
    - share_after: the share of the optimum found, by number of trials.
    """

    landscape: str
    contender: str
    configs: int
    right: int
    seeds: int
    trials_to: tuple[tuple[float, float | None], ...]
    trials_to_p90: tuple[tuple[float, float | None], ...]
    seconds_to: tuple[tuple[float, float | None], ...]
    share_after: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A landscape in the report: how hard it is, and how well it was measured."""

    name: str
    device: str
    configs: int
    right: int
    within: tuple[tuple[float, int], ...]
    default: float
    noise: float
    load: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    command: str
    compilers: int
    most: int | None
    landscapes: tuple[Described, ...]
    lines: tuple[Line, ...]
    overall: tuple[Line, ...]
    behind: tuple[Line, ...]


def summarise(
    landscapes: Sequence[Landscape], runs: Sequence[Run], *, command: str, compilers: int, most: int | None
) -> Report:
    """Return a line per landscape and contender, and per contender the median over landscapes and seeds.

    `behind` is over the landscapes whose default leaves a search something to find: it is not within 1% of the best.
    """
    by_name = {landscape.name: landscape for landscape in landscapes}
    contenders = list(dict.fromkeys(run.contender for run in runs))
    lines = [
        _line(name, contender, [landscape], mine)
        for name, landscape in by_name.items()
        for contender in contenders
        if (mine := [run for run in runs if (run.landscape, run.contender) == (name, contender)])
    ]
    described = tuple(map(_described, landscapes))
    hard = [landscape for landscape, its in zip(landscapes, described, strict=True) if its.default < SHARES[-1]]
    return Report(
        command=command,
        compilers=compilers,
        most=most,
        landscapes=described,
        lines=tuple(lines),
        overall=_over("all", landscapes, runs),
        behind=_over("behind", hard, runs),
    )


def _over(name: str, landscapes: Sequence[Landscape], runs: Sequence[Run]) -> tuple[Line, ...]:
    names = {landscape.name for landscape in landscapes}
    by_contender: dict[Contender, list[Run]] = {}
    for run in runs:
        if run.landscape in names:
            by_contender.setdefault(run.contender, []).append(run)
    return tuple(_line(name, contender, landscapes, mine) for contender, mine in by_contender.items())


def _line(name: str, contender: Contender, landscapes: Sequence[Landscape], runs: Sequence[Run]) -> Line:
    def over(values: Callable[[Run, float], float], rank: float) -> tuple[tuple[float, float | None], ...]:
        found = []
        for share in SHARES:
            ordered = sorted(values(run, share) for run in runs)
            value = ordered[min(len(ordered) - 1, math.ceil(rank * len(ordered)) - 1)]
            found.append((share, None if math.isinf(value) else round(value, 2)))
        return tuple(found)

    return Line(
        landscape=name,
        contender=str(contender),
        configs=sum(len(landscape.points) for landscape in landscapes),
        right=sum(_right(landscape) for landscape in landscapes),
        seeds=len({run.seed for run in runs}),
        trials_to=over(Run.trials_to, 0.5),
        trials_to_p90=over(Run.trials_to, 0.9),
        seconds_to=over(Run.seconds_to, 0.5),
        share_after=tuple(
            (trials, round(statistics.median(run.share_after(trials) for run in runs), 4)) for trials in AFTER
        ),
    )


def _right(landscape: Landscape) -> int:
    return sum(point.ratio is not None for point in landscape.points)


def _described(landscape: Landscape) -> Described:
    header = landscape.header
    ratios = [point.ratio for point in landscape.points if point.ratio is not None]
    default = next(point.ratio for point in landscape.points if point.config == header.default)
    return Described(
        name=landscape.name,
        device=header.device_key,
        configs=len(landscape.points),
        right=len(ratios),
        within=tuple((share, sum(ratio <= landscape.best / share for ratio in ratios)) for share in SHARES),
        default=round(landscape.best / default, 4) if default else 0.0,
        noise=round(header.noise, 4),
        load=header.load,
    )


def write(report: Report, runs: Sequence[Run], stem: Path) -> tuple[Path, ...]:
    """Write `stem`.json, .md and .png, and return the files."""
    files = tuple(stem.with_name(f"{stem.name}{end}") for end in (".json", ".md", ".png"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    files[0].write_bytes(codec.canonical(report) + b"\n")
    files[1].write_text(page(report, files[2].name))
    plot(runs, files[2])
    return files


def page(report: Report, picture: str) -> str:
    """Return the report as Markdown."""
    most = f", at most {report.most} trials each" if report.most else ""
    seeds = max((line.seeds for line in report.lines), default=0)
    lines = [
        "# Searches replayed over recorded landscapes",
        "",
        f"`{report.command}`",
        "",
        f"{seeds} seeds{most}; every search begins with the kernel's default. A share is the best found so far over "
        "the best of the landscape. Seconds are simulated: what compiling and measuring took when the landscape was "
        f"recorded, with {report.compilers} processes that compile ahead where something compiles. A dash: less than "
        "half of the seeds (90% of them for p90) got there.",
        "",
        f"![best found so far]({picture})",
        "",
        "| landscape | device | configs | right | within 5% | 3% | 1% | default is at | noise | load per core |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in report.landscapes:
        within = " | ".join(str(count) for _, count in each.within)
        load = f"{each.load[0]:g} to {each.load[1]:g}"
        lines.append(
            f"| {each.name} | {each.device} | {each.configs} | {each.right} | {within} | {each.default:.1%} "
            f"| {each.noise:.2%} | {load} |"
        )
    heads = [f"trials to {share:.0%} (p90)" for share in SHARES] + [f"s to {share:.0%}" for share in SHARES[1:]]
    heads += [f"share after {trials}" for trials in AFTER]
    together = [("All landscapes", report.overall)]
    if report.behind:
        together.append(("Landscapes whose default is not within 1% of the best", report.behind))
    for title, rows in (*together, *_grouped(report.lines)):
        lines += ["", f"## {title}", "", f"| search | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 1)}"]
        lines += [_row(line) for line in rows]
    return "\n".join(lines) + "\n"


def _grouped(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    names = dict.fromkeys(line.landscape for line in lines)
    return [(name, [line for line in lines if line.landscape == name]) for name in names]


def _row(line: Line) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    trials = [
        f"{number(median)} ({number(late)})"
        for (_, median), (_, late) in zip(line.trials_to, line.trials_to_p90, strict=True)
    ]
    seconds = [number(value) for _, value in line.seconds_to[1:]]
    shares = [f"{share:.1%}" for _, share in line.share_after]
    return f"| {line.contender} | {' | '.join([*trials, *seconds, *shares])} |"


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the best found so far, median over seeds with the quartiles, against trials and simulated seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(run.landscape for run in runs))
    contenders = list(dict.fromkeys(run.contender for run in runs))
    figure, rows = pyplot.subplots(
        len(names), 2, figsize=(12, 3.4 * len(names)), squeeze=False, layout="constrained", sharey=True
    )
    for name, (by_trials, by_seconds) in zip(names, rows, strict=True):
        mine = [run for run in runs if run.landscape == name]
        longest = max(step.seconds for run in mine for step in run.steps)
        furthest = min(100, max(run.trials for run in mine))
        for color, contender in enumerate(contenders):
            of_contender = [run for run in mine if run.contender == contender]
            if not of_contender:
                continue
            for axis, end, along in ((by_trials, furthest, "trials"), (by_seconds, longest, "seconds")):
                places = [end * place / (PLOTTED - 1) for place in range(PLOTTED)]
                curves = [[_share_at(run, along, place) for run in of_contender] for place in places]
                quartiles = [statistics.quantiles(at, n=4) if len(at) > 1 else [at[0]] * 3 for at in curves]
                low, middle, high = zip(*quartiles, strict=True)
                axis.plot(places, middle, color=f"C{color}", label=str(contender))
                axis.fill_between(places, low, high, color=f"C{color}", alpha=0.12, linewidth=0)
        by_trials.set_title(name, fontsize=9, loc="left")
        by_trials.set(xlabel="trials", ylabel="best found / optimum", ylim=(0.7, 1.005))
        by_seconds.set(xlabel="simulated seconds of compiling and measuring")
        for axis in (by_trials, by_seconds):
            axis.axhline(0.97, color="0.6", linewidth=0.8, linestyle=":")
            axis.axhline(0.99, color="0.6", linewidth=0.8, linestyle=":")
            axis.grid(alpha=0.25)
    rows[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _share_at(run: Run, along: str, place: float) -> float:
    reached = (step.share for step in run.steps if (step.trials if along == "trials" else step.seconds) <= place)
    return max(reached, default=0.0)
