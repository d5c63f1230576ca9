"""The charts of comparisons."""

import itertools
from collections.abc import Sequence

from .. import describe
from ..comparison import EDGES, Duel, Family, Pair, Size
from .charts import Axis, Bars, Figure, Points, colour, plain, symbol

_UNITS = {Size.LENGTH: "tokens", Size.HIDDEN: "hidden size (heads x head_dim)"}


def family(found: Family) -> Figure:
    """Return speed-up over torch's own choice against the size, a line for each backend."""
    traces = []
    for backend in found.backends:
        points = [
            (size, speedup, final)
            for size, final in zip(found.sizes, found.finals, strict=True)
            if (speedup := final.speedup(backend)) is not None
        ]
        traces.append(
            Points(
                name=backend,
                x=[size for size, _, _ in points],
                y=[speedup for _, speedup, _ in points],
                colour=colour(backend),
                symbol=symbol(backend),
                mode="lines+markers",
                texts=[plain(f"{backend}, {size:,}: {describe.factor(speedup)}") for size, speedup, _ in points],
                links=[describe.link(final.device_key, final.problem) for _, _, final in points],
            )
        )
    ticks = [(size, f"{size:,}") for size in found.sizes]
    return Figure(
        traces=tuple(traces),
        x=Axis(title=_UNITS[found.size], log=True, ticks=ticks),
        y=Axis(title="times as fast as torch", zero=True),
        height=320,
        zoom=False,
    )


def bins(duel: Duel) -> tuple[tuple[str, int], ...]:
    """Return the bins of a distribution in words, with how many finals are in each."""
    names = [f"below {EDGES[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(EDGES)]
    names.append(f"{EDGES[-1]:g} and more")
    return tuple(zip(names, duel.distribution, strict=True))


def distribution(duel: Duel) -> Figure:
    """Return how often the first backend was how many times as fast as the second."""
    found = bins(duel)
    middle = EDGES.index(1.02)
    colours = [
        colour(duel.second) if place < middle else "@faint" if place == middle else colour(duel.first)
        for place in range(len(found))
    ]
    bars = Bars(
        name="finals",
        places=[name for name, _ in found],
        values=[number for _, number in found],
        colours=colours,
        texts=[plain(f"{name}: {number:,} finals") for name, number in found],
        labels=[str(number) if number else "" for _, number in found],
    )
    return Figure(
        traces=(bars,),
        x=Axis(title=f"speed of {duel.first} over that of {duel.second}", grid=False),
        y=Axis(title="finals", zero=True),
        height=300,
        legend=False,
        zoom=False,
    )


def sides(pairs: Sequence[Pair], first: str, second: str) -> Figure:
    """Return how many times faster the second side is, against the time on the first."""
    points = Points(
        name="problems",
        x=[pair.a.ms for pair in pairs],
        y=[pair.ratio for pair in pairs],
        colour="@accent",
        size=9,
        opacity=0.8,
        texts=[
            plain(f"{pair.a.final.problem_key}: {describe.milliseconds(pair.a.ms)}, ")
            + plain(f"then {describe.milliseconds(pair.b.ms)} ({describe.factor(pair.ratio)})")
            for pair in pairs
        ],
        links=[describe.link(pair.b.final.device_key, pair.b.final.problem) for pair in pairs],
    )
    times = [pair.a.ms for pair in pairs]
    ends = [min(times, default=0.1) * 0.8, max(times, default=10) * 1.25]
    equal = Points(name="equal", x=ends, y=[1, 1], colour="@faint", mode="lines", dash="dash", hover=False)
    return Figure(
        traces=(equal, points),
        x=Axis(title=f"ms, {first}", log=True),
        y=Axis(title=f"speed of {second} over it"),
        height=340,
        legend=False,
    )
