"""The charts of many trials: the course of a search, and configs as lines across all parameters.

A browser draws a few thousand shapes at ease. So a stretch of a search is drawn point by point where it is short, and
as the best of every few trials where it is long; zooming in asks for the stretch again.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

from tilewise.db.trial_points import TrialPoint
from tilewise.domain.config import Value
from tilewise.domain.trial import Outcome

from .. import describe
from ..landscape import SHADES, Landscape, Parameter, Spot, sample, shade, spelled
from .charts import Axis, Figure, Note, Place, Points, colour, plain, symbol

MOST_POINTS = 1500
MOST_LINES = 300


def course(trials: Landscape, *, start: int | None, end: int | None, log: bool) -> Figure:
    """Return the level of each trial in the order they were tried, failed ones below, and the best so far.

    `start` and `end` are numbers of trials, counted from 1; None for the first and the last.
    """
    first, last = max(1, start or 1), min(len(trials.points), end or len(trials.points))
    shown = trials.points[first - 1 : last]
    stride = max(1, math.ceil(len(shown) / MOST_POINTS))
    levels = trials.levels[:last]
    steps = _best_so_far(levels, first)
    timed = [each for each in levels[first - 1 :] if each is not None]
    lowest = min([*timed, *(y for _, y in steps)], default=1.0)
    tried = _tried(shown, levels[first - 1 :], first, stride)
    drawn = sorted(y for trace in tried for y in trace.y if isinstance(y, float))
    # a linear axis leaves out the slowest twentieth, or it would show nothing but them
    ceiling = max([*(drawn if log else drawn[: math.ceil(0.95 * len(drawn))]), lowest * 1.1])
    floor = lowest / 1.12 if log else max(0.0, lowest - 0.12 * (ceiling - lowest))
    traces = [
        *tried,
        *_failed(shown, first, stride, floor),
        Points(
            name="best so far",
            x=[x for x, _ in steps],
            y=[y for _, y in steps],
            colour="@text",
            mode="lines",
            step=True,
            hover=False,
        ),
    ]
    return Figure(
        traces=tuple(traces),
        x=Axis(title="trial" if stride == 1 else f"trial (the best of every {stride} drawn; drag to see each)"),
        y=Axis(title="ms", log=log, span=(floor / 1.03 if log else floor, ceiling * 1.05)),
        height=380,
        topmost_first=True,
    )


def parallel(spots: Sequence[Spot], parameters: Sequence[Parameter]) -> Figure:
    """Return the timed configs as lines across their parameters to their level, the slowest below the fastest."""
    chosen = sample(spots, MOST_LINES)
    axes = [each for each in parameters if _shared(each.name, spots)]
    if not chosen:
        return Figure(traces=(), x=Axis(hidden=True), y=Axis(hidden=True), height=120, legend=False)
    fastest, slowest = chosen[0].level or 1.0, chosen[-1].level or 1.0
    places = {each.name: _places(each.values) for each in axes}

    def height(spot: Spot) -> float:
        if slowest <= fastest:
            return 1.0
        return 1 - math.log((spot.level or fastest) / fastest) / math.log(slowest / fastest)

    lines: dict[int, list[Spot]] = defaultdict(list)
    for spot in chosen:
        lines[shade((spot.level or fastest) / fastest)].append(spot)
    traces = []
    for tone in sorted(lines, reverse=True):
        x: list[Place] = []
        y: list[Place] = []
        links: list[str | None] = []
        texts: list[str] = []
        for spot in lines[tone]:
            steps = [(index, places[each.name].get(spot.values.get(each.name, ""))) for index, each in enumerate(axes)]
            steps.append((len(axes), height(spot)))
            x += [*(index for index, _ in steps), None]
            y += [*(place for _, place in steps), None]
            links += [f"/trials/{spot.trial}"] * len(steps) + [None]
            texts += [_hover(spot, axes)] * len(steps) + [""]
        within = SHADES[tone]
        traces.append(
            Points(
                name=f"slower than {SHADES[-2]:g}x" if math.isinf(within) else f"within {within - 1:.0%}",
                x=x,
                y=y,
                colour=f"@heat-{tone}",
                mode="lines+markers",
                size=5,
                width=2.6 if tone == 0 else 1.3,
                opacity=0.95 if tone <= 2 else 0.6,
                texts=texts,
                links=links,
            )
        )
    notes = [
        Note(x=index, y=place, text=plain(spelled(value)))
        for index, each in enumerate(axes)
        for value, place in places[each.name].items()
        if len(each.values) <= 12
    ]
    notes += [
        Note(x=len(axes), y=1.0, text=describe.milliseconds(fastest)),
        Note(x=len(axes), y=0.0, text=describe.milliseconds(slowest)),
    ]
    ticks = [(index, each.name) for index, each in enumerate(axes)] + [(len(axes), "time")]
    return Figure(
        traces=tuple(traces),
        x=Axis(ticks=ticks, span=(-0.3, len(axes) + 0.3)),
        y=Axis(hidden=True, span=(-0.08, 1.12)),
        height=420,
        topmost_first=True,
        notes=tuple(notes),
        zoom=False,
    )


def _tried(shown: Sequence[TrialPoint], levels: Sequence[float | None], first: int, stride: int) -> list[Points]:
    """Return one trace per backend; of every `stride` trials the fastest of each backend stays."""
    kept: dict[tuple[str, int], tuple[float, int, TrialPoint]] = {}
    for index, (point, ms) in enumerate(zip(shown, levels, strict=True)):
        key = point.candidate.backend, index // stride
        if ms is not None and (key not in kept or ms < kept[key][0]):
            kept[key] = (ms, first + index, point)
    by_backend: dict[str, list[tuple[float, int, TrialPoint]]] = defaultdict(list)
    for (backend, _), found in kept.items():
        by_backend[backend].append(found)
    return [
        Points(
            name=backend,
            x=[number for _, number, _ in found],
            y=[ms for ms, _, _ in found],
            colour=colour(backend),
            symbol=symbol(backend),
            size=7,
            opacity=0.85,
            texts=[_tried_hover(ms, number, point) for ms, number, point in found],
            links=[f"/trials/{point.id}" for _, _, point in found],
        )
        for backend, found in sorted(by_backend.items())
    ]


def _failed(shown: Sequence[TrialPoint], first: int, stride: int, floor: float) -> list[Points]:
    kept: dict[int, tuple[int, TrialPoint]] = {}
    for index, point in enumerate(shown):
        if point.outcome is not Outcome.OK:
            kept.setdefault(index // stride, (first + index, point))
    if not kept:
        return []
    return [
        Points(
            name="not right",
            x=[number for number, _ in kept.values()],
            y=[floor] * len(kept),
            colour="@bad",
            symbol="x-thin-open",
            size=8,
            texts=[
                f"<b>trial {number}: {point.outcome.replace('_', ' ')}</b><br>{plain(str(point.candidate))}"
                for number, point in kept.values()
            ],
            links=[f"/trials/{point.id}" for _, point in kept.values()],
        )
    ]


def _best_so_far(levels: Sequence[float | None], first: int) -> list[tuple[int, float]]:
    """Return where the best so far changed from trial `first` on, with what it was there and at the end."""
    steps: list[tuple[int, float]] = []
    best = math.inf
    for number, ms in enumerate(levels, 1):
        better = ms is not None and ms < best
        if better:
            best = ms or best
        if number >= first and not math.isinf(best) and (better or not steps):
            steps.append((number, best))
    if steps:
        steps.append((len(levels), best))
    return steps


def _shared(name: str, spots: Sequence[Spot]) -> bool:
    """Return whether a parameter varies, and most of the spots have it: lines would break at one that few have."""
    values = [spot.values[name] for spot in spots if name in spot.values]
    return len(set(values)) > 1 and len(values) > len(spots) / 2


def _places(values: Sequence[Value]) -> dict[Value | str, float]:
    if len(values) == 1:
        return {values[0]: 0.5}
    return {value: index / (len(values) - 1) for index, value in enumerate(values)}


def _tried_hover(ms: float, number: int, point: TrialPoint) -> str:
    configs = "<br>".join(
        plain(f"{role}: {config}" if len(point.candidate.configs) > 1 else str(config))
        for role, config in point.candidate.configs
    )
    return f"<b>trial {number}: {plain(point.candidate.backend)}, {describe.milliseconds(ms)}</b><br>{configs}"


def _hover(spot: Spot, axes: Sequence[Parameter]) -> str:
    parts = [f"{each.name} {spelled(spot.values.get(each.name))}" for each in axes]
    return f"<b>{describe.milliseconds(spot.level)}</b><br>" + "<br>".join(map(plain, parts))
