"""Rows as a GPU could give them, with times that are made up."""

from collections.abc import Callable
from datetime import UTC, datetime

from tilewise.bench.bars import Cell, bars
from tilewise.bench.records import Entry, Row, Run, teraflops
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, NumericError, Outcome, Stage, Trial

CARD = Device(
    kind=DeviceKind.CUDA, name="Made Up", arch="sm_90", units=132, memory_gib=141, power_limit_w=700,
    shared_memory=232448,
)  # fmt: skip
RUN = Run(
    device=CARD,
    device_key=CARD.key,
    software=Software(torch="2.11.0", triton="3.6.0"),
    command="tilewise bench core",
    started=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
)
OURS = Candidate.of("triton", forward=Config.of("triton_forward", block_m=64, block_n=64))
PEERS = {"sdpa": 1.0, "sdpa_cudnn": 1.0, "flash_cute": 0.9, "sdpa_flash": 1.9, "flex": 1.4}


def measured(ratio: float) -> Measurement:
    return Measurement(
        median_ms=ratio / 2, p20_ms=ratio / 2, p80_ms=ratio / 2, samples=60, ratio=ratio, spread=0.005, clock_mhz=1755,
        power_w=690.0, temperature_c=60, power_state="settled",
    )  # fmt: skip


def row(problem: Problem, ours: float, peers: dict[str, float] = PEERS, *, failed: tuple[Trial, ...] = ()) -> Row:
    """Return a row in which ours and the peers have these ratios to torch's choice; each ratio is twice its ms."""
    decoding = problem.q_len == 1
    mine = Candidate("triton_decode", OURS.configs) if decoding else OURS
    ratios = {mine: ours, **{Candidate(name): ratio for name, ratio in peers.items()}}
    error = NumericError(worst=0.5, tensor="out", case="problem")
    entries = [
        Entry(candidate=c, measurement=measured(r), rate=2000.0 if decoding else teraflops(problem, r / 2), error=error)
        for c, r in sorted(ratios.items(), key=lambda pair: pair[1])
    ]
    trials = [Trial(candidate=candidate, stage=Stage.FORWARD, outcome=Outcome.OK) for candidate in ratios]
    return Row(
        problem=problem,
        ours=mine.backend,
        reference=Candidate("sdpa"),
        entries=tuple(entries),
        noise=0.002,
        trials=(*trials, *failed),
        seconds=20.0,
        run=RUN,
        copy_gbps=2200.0 if decoding else None,
    )


def rows(ours: Callable[[Cell], float], dtype: Dtype = Dtype.FP16) -> list[Row]:
    """Return a row for every cell of every bar."""
    cells = {cell.problem: cell for bar in bars(DeviceKind.CUDA, dtype) for cell in bar.cells}
    return [row(problem, ours(cell)) for problem, cell in cells.items()]
