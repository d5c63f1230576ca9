"""The bars of attention cores: which problems, against which peers, and how much faster or slower ours may be."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tilewise.domain.device import DeviceKind
from tilewise.domain.problem import Dtype, Pass, Problem

from .decode import cells as decode_cells
from .peers import SHAPES
from .records import Row

OTHER = "other"
COPY = "copy"  # the rival of decoding: what a copy of the same bytes would take
NOT_TORCH = ("flash_cute", "flash")  # peers that are no path of torch
OURS = {DeviceKind.CUDA: "triton", DeviceKind.CPU: "cpu_tiled"}
OUR_BACKENDS = (*OURS.values(), "triton_decode")
TORCH = {
    DeviceKind.CUDA: ("sdpa", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_math", "flex", "plain"),
    DeviceKind.CPU: ("sdpa", "sdpa_math", "plain", "flex_cpu"),
}
NAMES = {
    "cpu_tiled": "tiled CPU",
    "flash": "FA2 (flash_attn)",
    "flash_cute": "FA4",
    "flex": "FlexAttention",
    "flex_cpu": "FlexAttention",
    "plain": "plain torch",
    "sdpa": "torch's choice",
    "sdpa_cudnn": "cuDNN",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_flash": "FA2",
    "sdpa_math": "SDPA math",
    "triton": "Triton",
    "triton_decode": "Triton",
    COPY: "a copy",
}


def named(backend: str) -> str:
    """Return what readers call a backend."""
    return NAMES.get(backend, backend)


@dataclass(frozen=True, slots=True)
class Cell:
    """One problem of a bar: bars of one label stand together in the plot."""

    label: str
    variant: str
    problem: Problem

    @property
    def name(self) -> str:
        return f"{self.label}, {self.variant}" if self.variant else self.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """What must hold over `cells`: our speed as a share of the fastest rival's, in geometric mean and in each cell.

    - rivals: backends; empty for every path of torch that was measured, COPY for the bandwidth of a copy.
    - shown: backends with which we are compared besides.
    - geomean, each: the least share; None for no bar.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    rivals: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    geomean: float | None = None
    each: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Our speed in one cell as a share of the fastest rival's: its time over ours.

    `spread` is the sum of the half-widths of both times' 95% intervals, as a share: an upper bound of its own.
    """

    cell: Cell
    share: float
    spread: float
    ours_ms: float
    rival: str
    rival_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Our speed as a share of one backend's, over the cells in which it was in the final."""

    backend: str
    geomean: float
    worst: float
    cells: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the rows say of one bar.

    - worst: the lowest share, worst_cell: where.
    - missing: cells of which there is no share, with the reason.
    - without: named rivals that have no right result in some cell, with the reason.
    - met: None where there is no bar, or where nothing breaks it but cells are missing or rivals absent.
    """

    bar: str
    title: str
    geomean_bar: float | None
    each_bar: float | None
    shares: tuple[Share, ...]
    against: tuple[Against, ...]
    geomean: float | None
    worst: float | None
    worst_cell: str
    missing: tuple[str, ...]
    without: tuple[str, ...]
    met: bool | None


def bars(kind: DeviceKind, dtype: Dtype) -> tuple[Bar, ...]:
    """Return the bars of a device: those of issue 3 on a GPU; on a CPU three cells without a bar, always in fp32."""
    if kind is DeviceKind.CPU:
        return (Bar(name="forward", title="Forward, fp32, against the fastest of the others", cells=_cpu_cells()),)
    suffix = "" if dtype is Dtype.FP16 else f"_{dtype}"
    forward = _shapes(Pass.INFERENCE, dtype)
    fastest = ("sdpa_cudnn", "flash_cute", "sdpa_flash", "flex")
    decode = replace(decode_cells()[2].problem, dtype=dtype)
    return (
        Bar(
            name=f"forward{suffix}",
            title=f"Forward, {dtype}, against the fastest of cuDNN, FA4, FA2 and FlexAttention",
            cells=forward,
            rivals=fastest,
            shown=fastest,
            geomean=0.86,
            each=0.75,
        ),
        Bar(
            name=f"training{suffix}",
            title=f"Forward and backward, {dtype}, against FlexAttention",
            cells=_shapes(Pass.TRAINING, dtype),
            rivals=("flex",),
            shown=("sdpa_cudnn", "flash_cute", "sdpa_flash"),
            geomean=1.2,
            each=1.0,
        ),
        Bar(
            name=f"masks{suffix}",
            title=f"Masks and windows (2 x 4096, 16 heads, d 128), {dtype}, against torch's fastest path",
            cells=_mask_cells(dtype),
            each=1.2,
        ),
        Bar(
            name=f"d56{suffix}",
            title=f"head_dim 56, forward, causal, {dtype}, against cuDNN",
            cells=(Cell("head_dim 56", "causal", forward[0].problem),),
            rivals=("sdpa_cudnn",),
            each=0.9,
        ),
        Bar(
            name=f"decode{suffix}",
            title=f"Decoding, {dtype}, keys and values read per second against the bandwidth of a copy",
            cells=(Cell("batch 32, 64/8 heads", "8192 keys", decode),),
            rivals=(COPY,),
            shown=("sdpa_cudnn",),
            each=0.85,
        ),
    )


def judging(problem: Problem, kind: DeviceKind) -> tuple[str, ...]:
    """Return the backends without which a bar of `problem` cannot be judged, however slow they are."""
    return tuple(dict.fromkeys(name for bar in _of(problem, kind) for name in bar.rivals if name != COPY))


def _of(problem: Problem, kind: DeviceKind) -> list[Bar]:
    return [bar for bar in bars(kind, problem.dtype) if any(cell.problem == problem for cell in bar.cells)]


def peers(problem: Problem, kind: DeviceKind) -> tuple[str, ...]:
    """Return the backends that ours is measured against: those its bars name, else every one of the device."""
    of_problem = _of(problem, kind)
    wanted = [name for bar in of_problem for name in (bar.rivals + bar.shown if bar.rivals else TORCH[kind])]
    everyone = TORCH[kind] + (NOT_TORCH if kind is DeviceKind.CUDA else ())
    return tuple(name for name in dict.fromkeys(wanted) if name != COPY) if of_problem else everyone


def _shapes(pass_: Pass, dtype: Dtype) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            f"{name} ({_sizes(shape)})",
            "causal" if causal else "full",
            replace(shape, pass_=pass_, dtype=dtype, causal=causal),
        )
        for name, shape in SHAPES.items()
        for causal in (True, False)
    )


def _sizes(shape: Problem) -> str:
    return f"{shape.batch} x {shape.q_len}, {shape.heads}/{shape.kv_heads} heads, d {shape.head_dim}"


def _mask_cells(dtype: Dtype) -> tuple[Cell, ...]:
    base = Problem(batch=2, heads=16, q_len=4096, head_dim=128, dtype=dtype)
    kinds = {
        "bias (1, H, Q, K)": replace(base, mask="bias.b1"),
        "bool mask (B, 1, Q, K)": replace(base, mask="bool.h1"),
        "ALiBi, causal": replace(base, alibi=True, causal=True),
        "window 1024, causal": replace(base, window=(1024, 0)),
    }
    found = []
    for label, problem in kinds.items():
        training = replace(problem, pass_=Pass.TRAINING)
        found += [Cell(label, "forward", problem), Cell(label, "forward and backward", training)]
        if problem.mask == "bias.b1":
            found.append(Cell(label, "with the bias's gradient", replace(training, bias_grad=True)))
    return tuple(found)


def _cpu_cells() -> tuple[Cell, ...]:
    base = Problem(batch=1, heads=8, q_len=1024, head_dim=64, dtype=Dtype.FP32)
    return (
        Cell("1024 keys, head_dim 64", "causal", replace(base, causal=True)),
        Cell("1024 keys, head_dim 64", "full", base),
        Cell("1024 keys, head_dim 64", "window 256", replace(base, window=(256, 0))),
    )


def judge(rows: Iterable[Row]) -> tuple[Verdict, ...]:
    """Return what `rows`, of one device, say of every bar that one of them is about, and last of the other problems."""
    found = {row.problem: row for row in rows}
    if not found:
        return ()
    kind = next(iter(found.values())).run.device.kind
    known = [bar for dtype in ((Dtype.FP32,) if kind is DeviceKind.CPU else (Dtype.FP16, Dtype.BF16))
             for bar in bars(kind, dtype)]  # fmt: skip
    barred = {cell.problem for bar in known for cell in bar.cells}
    others = tuple(Cell(problem.key, "", problem) for problem in found if problem not in barred)
    if others:
        known.append(Bar(name=OTHER, title="Other problems, against the fastest of the others", cells=others))
    return tuple(_judge(bar, found) for bar in known if any(cell.problem in found for cell in bar.cells))


def _judge(bar: Bar, rows: Mapping[Problem, Row]) -> Verdict:
    shares: list[Share] = []
    missing: list[str] = []
    for cell in bar.cells:
        row = rows.get(cell.problem)
        share = "not measured" if row is None else _share(cell, row, bar)
        if isinstance(share, Share):
            shares.append(share)
        else:
            missing.append(f"{cell.name}: {share}")
    without = _without(bar, rows)
    worst = min(shares, key=lambda each: each.share, default=None)
    geomean = _geomean([each.share for each in shares])
    return Verdict(
        bar=bar.name,
        title=bar.title,
        geomean_bar=bar.geomean,
        each_bar=bar.each,
        shares=tuple(shares),
        against=_against(bar, rows),
        geomean=geomean,
        worst=worst.share if worst else None,
        worst_cell=worst.cell.name if worst else "",
        missing=tuple(missing),
        without=without,
        met=_met(bar, geomean, worst.share if worst else None, complete=not (missing or without)),
    )


def _share(cell: Cell, row: Row, bar: Bar) -> Share | str:
    """Return our share of the fastest rival in one row, or why there is none."""
    ours = row.best(row.ours)
    if ours is None:
        return f"{named(row.ours)} {row.why_absent(row.ours)}"
    if bar.rivals == (COPY,):
        assert row.copy_gbps is not None, "a row of decoding has the bandwidth of a copy"
        share, spread = ours.rate / row.copy_gbps, ours.measurement.spread or 0.0
        rival, rival_ms = COPY, ours.measurement.median_ms * share
    else:
        names = bar.rivals or tuple(name for name in row.others if bar.name == OTHER or name not in NOT_TORCH)
        fastest = row.best(*names)
        if fastest is None:
            return f"none of its rivals is in the final: {', '.join(names)}"
        share = fastest.ratio / ours.ratio
        spread = (ours.measurement.spread or 0.0) + (fastest.measurement.spread or 0.0)
        rival, rival_ms = fastest.candidate.backend, fastest.measurement.median_ms
    return Share(
        cell=cell,
        share=share,
        spread=spread,
        ours_ms=ours.measurement.median_ms,
        rival=rival,
        rival_ms=rival_ms,
    )


def _without(bar: Bar, rows: Mapping[Problem, Row]) -> tuple[str, ...]:
    """Return which named rivals have no right result, why, and in which of the measured cells."""
    measured = [(cell, rows[cell.problem]) for cell in bar.cells if cell.problem in rows]
    cells: dict[str, list[str]] = {}
    for rival in bar.rivals:
        for cell, row in measured if rival != COPY else ():
            reason = row.why_absent(rival)
            if reason is not None:
                cells.setdefault(f"{named(rival)}: {reason}", []).append(cell.name)
    everywhere = "in every cell that was measured"
    return tuple(
        f"{reason} ({everywhere if len(names) == len(measured) else '; '.join(names)})"
        for reason, names in cells.items()
    )


def _against(bar: Bar, rows: Mapping[Problem, Row]) -> tuple[Against, ...]:
    found = []
    for backend in bar.shown:
        shares = []
        for row in (rows[cell.problem] for cell in bar.cells if cell.problem in rows):
            ours, other = row.best(row.ours), row.best(backend)
            if ours is not None and other is not None:
                shares.append(other.ratio / ours.ratio)
        mean = _geomean(shares)
        if mean is not None:
            found.append(Against(backend=backend, geomean=mean, worst=min(shares), cells=len(shares)))
    return tuple(found)


def _met(bar: Bar, geomean: float | None, worst: float | None, *, complete: bool) -> bool | None:
    if bar.geomean is None and bar.each is None:
        return None
    if worst is not None and bar.each is not None and worst < bar.each:
        return False
    if not complete or geomean is None:
        return None
    return bar.geomean is None or geomean >= bar.geomean


def _geomean(shares: Sequence[float]) -> float | None:
    return math.exp(math.fsum(map(math.log, shares)) / len(shares)) if shares else None
