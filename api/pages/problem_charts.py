"""The charts of a problem's page that are about its finals: backends, roofline, versions over time."""

from collections.abc import Sequence

from tilewise.domain.peaks import Roof
from tilewise.domain.problem import Problem

from .. import describe
from .charts import Axis, Bars, Figure, Note, Points, colour, plain, symbol
from .finals import FinalistRow, Version


def backends(rows: Sequence[FinalistRow]) -> Figure:
    """Return the best of each backend as a bar, the fastest at the top, with its 20th to 80th percentile."""
    best = [row for row in rows if row.best]
    times = [row.measurement for row in best]
    bars = Bars(
        name="median",
        places=[_place(row) for row in best],
        values=[time.median_ms for time in times],
        colours=[colour(row.candidate.backend) for row in best],
        low=[time.p20_ms for time in times],
        high=[time.p80_ms for time in times],
        texts=[_hover(row) for row in best],
        horizontal=True,
    )
    longest = max((time.p80_ms for time in times), default=1.0)
    return Figure(
        traces=(bars,),
        x=Axis(title="median, ms", span=(0, longest * 1.42)),
        y=Axis(reverse=True, grid=False),
        height=60 + 38 * max(len(best), 1),
        legend=False,
        notes=tuple(
            Note(
                x=row.measurement.p80_ms,
                y=_place(row),
                text=describe.milliseconds(row.measurement.median_ms),
                anchor="left",
                above=False,
            )
            for row in best
        ),
        zoom=False,
    )


def roofline(problem: Problem, roof: Roof, rows: Sequence[FinalistRow]) -> Figure:
    """Return the roof of the device, and where the best of each backend stands below it."""
    ridge = roof.peak * 1e3 / roof.peaks.bandwidth
    low, high = min(ridge, roof.intensity) / 8, max(ridge, roof.intensity) * 8
    line = Points(
        name="roof",
        x=[low, ridge, high],
        y=[low * roof.peaks.bandwidth / 1e3, roof.peak, roof.peak],
        colour="@quiet",
        mode="lines",
        hover=False,
        legend=False,
    )
    points = []
    reached = []
    for row in rows:
        rate = describe.tflops(problem, problem.forward_flops, row.measurement.median_ms)
        if not row.best or rate is None:
            continue
        reached.append(rate)
        points.append(
            Points(
                name=row.candidate.backend,
                x=[roof.intensity],
                y=[rate],
                colour=colour(row.candidate.backend),
                symbol=symbol(row.candidate.backend),
                size=13 if row.winner else 9,
                texts=[
                    f"<b>{plain(row.candidate.backend)}</b><br>{rate:.0f} TFLOP/s, {rate / roof.roof:.0%} of its roof"
                ],
            )
        )
    floor = min([*reached, low * roof.peaks.bandwidth / 1e3]) / 1.6
    return Figure(
        traces=(line, *points),
        x=Axis(title="FLOP per byte moved", log=True, span=(low, high)),
        y=Axis(title="TFLOP/s", log=True, span=(floor, roof.peak * 1.8)),
        height=340,
        notes=(
            Note(x=high, y=roof.peak, text=f"{roof.peak:,.0f} TFLOP/s", anchor="right"),
            Note(x=low, y=low * roof.peaks.bandwidth / 1e3, text=f"{roof.peaks.bandwidth:,.0f} GB/s", anchor="left"),
        ),
    )


def over_time(versions: Sequence[Version]) -> Figure:
    """Return what each version of the answer won over torch's own choice in its own final, oldest first."""
    shown = [version for version in reversed(versions) if version.over]
    moments = [version.measured.isoformat(timespec="seconds") for version in shown]
    texts = [
        "<br>".join(
            [
                f"<b>version {version.answer.version}: {plain(version.answer.plan.forward.backend)}</b>",
                f"{describe.factor(version.over)} over torch, {describe.milliseconds(version.answer.expected_ms)}",
                *(plain(change) for change in version.software),
            ]
        )
        for version in shown
    ]
    line = Points(
        name="over torch",
        x=moments,
        y=[version.over for version in shown],
        colour="@accent",
        mode="lines+markers",
        size=9,
        texts=texts,
        links=[f"#version-{version.answer.version}" for version in shown],
    )
    least = min((version.over or 1.0 for version in shown), default=1.0)
    most = max((version.over or 1.0 for version in shown), default=1.0)
    return Figure(
        traces=(line,),
        x=Axis(title="measured, UTC"),
        y=Axis(title="times as fast as torch", span=(min(1.0, least) * 0.97, max(1.0, most) * 1.03)),
        height=260,
        legend=False,
    )


def _place(row: FinalistRow) -> str:
    return f"{plain(row.candidate.backend)}  <b>{describe.factor(row.over)}</b>"


def _hover(row: FinalistRow) -> str:
    time = row.measurement
    lines = [
        f"<b>{plain(row.candidate.backend)}</b>",
        f"{describe.milliseconds(time.median_ms)} ({describe.figure(time.p20_ms)} to {describe.figure(time.p80_ms)})",
        f"{describe.factor(row.over)} over torch",
    ]
    for role, config in row.candidate.configs:
        lines.append(plain(f"{role}: {config}" if len(row.candidate.configs) > 1 else str(config)))
    return "<br>".join(lines)
