"""Charts as typed values, made on the server; charts.js fetches them, colours them and lets plotly draw them.

A colour is the name of a CSS variable behind an @, so that light and dark have their own: `@accent`, `@backend-sdpa`.
Only what plotly draws as SVG is used: its WebGL traces build functions from text, which the policy forbids.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from tilewise.domain import codec

from .. import describe

Number = float | int | None
Place = float | int | str | None

# One shape per backend beside its colour: who cannot tell two colours apart still tells two backends.
_SYMBOLS = {
    "triton": "circle",
    "triton_decode": "circle",
    "cpu_tiled": "circle",
    "sdpa": "square",
    "sdpa_cudnn": "diamond",
    "sdpa_flash": "triangle-up",
    "sdpa_efficient": "triangle-down",
    "sdpa_math": "x",
    "plain": "cross",
    "flex": "star",
    "flex_cpu": "star",
    "flash": "pentagon",
    "flash_cute": "hexagon",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Bars from 0, one a place, horizontal where `horizontal`; `low` and `high` are the ends of their whiskers."""

    name: str
    places: Sequence[str]
    values: Sequence[Number]
    colours: Sequence[str]
    low: Sequence[Number] | None = None
    high: Sequence[Number] | None = None
    texts: Sequence[str] = ()
    labels: Sequence[str] = ()
    links: Sequence[str | None] = ()
    horizontal: bool = False

    def plotly(self) -> dict[str, Any]:
        along, across = ("x", "y") if self.horizontal else ("y", "x")
        made: dict[str, Any] = {
            "type": "bar",
            "name": plain(self.name),
            across: list(self.places),
            along: list(self.values),
            "marker": {"color": list(self.colours)},
            "hovertext": list(self.texts),
            "hoverinfo": "text",
            "customdata": list(self.links),
            "text": list(self.labels),
            "textposition": "outside",
            "cliponaxis": False,
        }
        if self.horizontal:
            made["orientation"] = "h"
        if self.low is not None and self.high is not None:
            made[f"error_{along}"] = {
                "type": "data",
                "symmetric": False,
                "array": [_gap(high, value) for high, value in zip(self.high, self.values, strict=True)],
                "arrayminus": [_gap(value, low) for low, value in zip(self.low, self.values, strict=True)],
                "color": "@text",
                "thickness": 1.2,
                "width": 4,
            }
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points, a line through them, or both (`mode`: markers, lines, lines+markers). `links` open what a point is of."""

    name: str
    x: Sequence[Place]
    y: Sequence[Place]
    colour: str
    mode: str = "markers"
    symbol: str = "circle"
    size: float | Sequence[float] = 7
    width: float = 2
    dash: str = "solid"
    step: bool = False
    opacity: float = 1.0
    texts: Sequence[str] = ()
    links: Sequence[str | None] = ()
    legend: bool = True
    hover: bool = True

    def plotly(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "type": "scatter",
            "name": plain(self.name),
            "x": list(self.x),
            "y": list(self.y),
            "mode": self.mode,
            "opacity": self.opacity,
            "showlegend": self.legend,
            "hoverinfo": ("text" if self.texts else "x+y+name") if self.hover else "skip",
            "customdata": list(self.links),
        }
        if self.texts:
            made["hovertext"] = list(self.texts)
        if "lines" in self.mode:
            shape = "hv" if self.step else "linear"
            made["line"] = {"color": self.colour, "width": self.width, "dash": self.dash, "shape": shape}
        if "markers" in self.mode:
            size = list(self.size) if isinstance(self.size, Sequence) else self.size
            made["marker"] = {"color": self.colour, "symbol": self.symbol, "size": size}
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis. `ticks` are places with labels, where they are not left to plotly; `span` is in the data's unit."""

    title: str = ""
    log: bool = False
    zero: bool = False
    reverse: bool = False
    grid: bool = True
    hidden: bool = False
    ticks: Sequence[tuple[Place, str]] | None = None
    span: tuple[float, float] | None = None

    def plotly(self) -> dict[str, Any]:
        made: dict[str, Any] = {
            "title": {"text": self.title, "standoff": 10},
            "type": "log" if self.log else "-",
            "showgrid": self.grid,
            "automargin": True,
            "zeroline": False,
            "visible": not self.hidden,
        }
        if self.zero and not self.log:
            made["rangemode"] = "tozero"
        if self.reverse:
            made["autorange"] = "reversed"
        ticks = _log_ticks(*self.span) if self.log and self.span and self.ticks is None else self.ticks
        if ticks is not None:
            made |= {
                "tickmode": "array",
                "tickvals": [place for place, _ in ticks],
                "ticktext": [text for _, text in ticks],
            }
        if self.span is not None:
            low, high = self.span
            made["range"] = [math.log10(low), math.log10(high)] if self.log else [low, high]
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Words at a point of the chart: above it, or in its middle. Behind an `anchor` of left they begin there."""

    x: float
    y: float | str
    text: str
    anchor: str = "center"
    above: bool = True

    def plotly(self, *, log_x: bool, log_y: bool) -> dict[str, Any]:
        return {
            "x": math.log10(self.x) if log_x else self.x,
            "y": math.log10(self.y) if log_y and not isinstance(self.y, str) else self.y,
            "text": self.text,
            "showarrow": False,
            "xanchor": self.anchor,
            "yanchor": "bottom" if self.above else "middle",
            "xshift": 6 if self.anchor == "left" else 0,
            "yshift": 3 if self.above else 0,
            "font": {"size": 12, "color": "@text"},
            "bgcolor": "@card",
            "borderpad": 1,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A whole chart, `height` in pixels.

    With `legend` the names of its traces stand above it, with `topmost_first` the last one drawn before the others.
    """

    traces: tuple[Bars | Points, ...]
    x: Axis
    y: Axis
    height: int = 360
    legend: bool = True
    topmost_first: bool = False
    notes: tuple[Note, ...] = ()
    zoom: bool = True

    def plotly(self) -> dict[str, Any]:
        return {
            "data": [trace.plotly() for trace in self.traces],
            "layout": {
                "height": self.height,
                "xaxis": {**self.x.plotly(), "fixedrange": not self.zoom},
                "yaxis": {**self.y.plotly(), "fixedrange": not self.zoom},
                "showlegend": self.legend,
                "legend": {"traceorder": "reversed" if self.topmost_first else "normal"},
                "annotations": [note.plotly(log_x=self.x.log, log_y=self.y.log) for note in self.notes],
            },
        }

    def response(self) -> Response:
        """Return the chart as what charts.js fetches."""
        body = codec.canonical(_finite(self.plotly()))
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-cache"})


def colour(backend: str) -> str:
    """Return the one colour of a backend, the same in every chart."""
    return f"@{describe.backend_class(backend)}"


def symbol(backend: str) -> str:
    """Return the one shape of a backend's points."""
    return _SYMBOLS.get(backend, "asterisk")


def plain(text: str) -> str:
    """Return `text` as plotly shows it literally: it reads a small part of HTML in labels and hover texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _log_ticks(low: float, high: float) -> list[tuple[Place, str]]:
    """Return round numbers between the ends of a logarithmic axis: more of them in a decade where it is short."""
    steps: Sequence[float] = (1, 2, 5) if high / low > 6 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    if high / low > 300:
        steps = (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [step * 10.0**decade for decade in decades for step in steps]
    return [(place, f"{place:,.10g}") for place in places if low <= place <= high]


def _gap(upper: Number, lower: Number) -> Number:
    return None if upper is None or lower is None else max(0.0, upper - lower)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: where one came in, nothing is drawn."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
