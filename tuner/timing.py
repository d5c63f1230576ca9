"""Times candidates call by call in turn, so that what the device does to one it does to all.

A GPU at its power cap, or a host with other work, makes a time depend on what ran just before. Two candidates whose
single calls alternate see the same device, and the ratio of their times holds where the times do not.
"""

import abc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tilewise.domain.trial import Measurement
from tilewise.kernels.device import Telemetry, telemetry

from .steps import Step


class Clock(abc.ABC):
    """Times single calls in milliseconds with a cold cache."""

    @abc.abstractmethod
    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        """Call every step once per round, in rotating order; return each step's times, a row per step."""

    @abc.abstractmethod
    def settle(self, steps: Sequence[Step]) -> str:
        """Bring the device into the state that a long run has; return its name for Measurement.power_state."""

    def launch_bound(self, step: Step) -> bool:  # noqa: ARG002
        """Return whether a call keeps the host busy for longer than the device."""
        return False

    def captured(self, step: Step) -> Step | None:  # noqa: ARG002
        """Return a step that replays what `step` does on the device, without its host; None where that cannot be."""
        return None

    @abc.abstractmethod
    def peak_memory(self, step: Step) -> int | None:
        """Return the bytes that one call allocates at its peak; None where the device does not tell."""


class CpuClock(Clock):
    """Times each call after a sweep through more memory than the last-level cache holds.

    With one thread of torch it is the time that this process ran: other work on the machine then counts only for what
    it does to caches and clocks. With several it is wall time: how long the slowest of them took.
    """

    _CACHE_BYTES = 64 << 20

    def __init__(self) -> None:
        self._flush = torch.empty(self._CACHE_BYTES // 4, dtype=torch.int32)

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in steps]
        now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        for turn in range(rounds):
            for index in _order(len(steps), turn):
                self._flush.zero_()
                start = now()
                steps[index]()
                times[index].append((now() - start) * 1e3)
        return times

    def settle(self, steps: Sequence[Step]) -> str:
        for step in steps:
            step()
        return "settled"

    def peak_memory(self, step: Step) -> int | None:  # noqa: ARG002
        return None


class CudaClock(Clock):
    """Device events around each call, after a sweep that clears the L2 cache."""

    _CACHE_BYTES = 256 << 20
    _SETTLE_SECONDS = 1.0
    _CALLS = 20  # to see what a call costs the host, and before one is captured
    _AHEAD = 100  # sweeps at most, two a call, that the host gets ahead by: on a busy one the device would wait for it

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(self._CACHE_BYTES // 4, dtype=torch.int32, device=device)

    def interleave(self, steps: Sequence[Step], rounds: int) -> list[list[float]]:
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in steps]
        with torch.cuda.device(self._device):
            for _ in range(min(self._AHEAD, 2 * rounds * len(steps))):
                self._flush.zero_()
            for turn in range(rounds):
                for index in _order(len(steps), turn):
                    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    self._flush.zero_()
                    start.record()
                    steps[index]()
                    stop.record()
                    events[index].append((start, stop))
            torch.cuda.synchronize()
        return [[start.elapsed_time(stop) for start, stop in row] for row in events]

    def settle(self, steps: Sequence[Step]) -> str:
        until = time.monotonic() + self._SETTLE_SECONDS
        with torch.cuda.device(self._device):
            while time.monotonic() < until:
                for step in steps:
                    step()
                torch.cuda.synchronize()
        return "settled"

    def launch_bound(self, step: Step) -> bool:
        with torch.cuda.device(self._device):
            step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self._CALLS):
                step()
            host = (time.perf_counter() - start) * 1e3 / self._CALLS
            torch.cuda.synchronize()
            # the host is ahead here: what it does is hidden behind the sweep
            (times,) = self.interleave([step], self._CALLS)
        return host > statistics.median(times)

    def captured(self, step: Step) -> Step | None:
        with torch.cuda.device(self._device):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            try:
                with torch.cuda.graph(graph, stream=stream):
                    step()
            except RuntimeError:  # it waits for the device, or allocates outside torch
                return None
        return graph.replay

    def peak_memory(self, step: Step) -> int | None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        step()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before


def clock_for(device: torch.device) -> Clock:
    return CpuClock() if device.type == "cpu" else CudaClock(device)


@dataclass(frozen=True, slots=True)
class Final:
    """Measurements of all candidates of one interleaved run, the first being the reference; `noise` is its floor."""

    measurements: tuple[Measurement, ...]
    noise: float


SCREEN_ROUNDS = 9
SLOW = 3.0
LEAST_ROUNDS = 15
_NOTHING_READ = Telemetry()


def screen(clock: Clock, step: Step, reference: Step, *, best_ratio: float, seconds: float) -> Measurement:
    """Time `step` against `reference`, interleaved, in about `seconds`: enough to rank it, not to judge it.

    A step more than 3 times slower than `best_ratio` is given up after one round.
    """
    clock.interleave([reference, step], 1)  # warm: compile, allocate
    (first_reference,), (first,) = clock.interleave([reference, step], 1)
    if first / first_reference > SLOW * best_ratio:
        rows = [[first_reference], [first]]
    else:
        rounds = _rounds(SCREEN_ROUNDS, 3, seconds, first + first_reference)
        rows = clock.interleave([reference, step], rounds)
    return _measurement(rows[1], rows[0], "unknown")


def final(clock: Clock, steps: Sequence[Step], *, rounds: int, seconds: float, device: torch.device) -> Final:
    """Time all steps call by call in turn, the first, which is the reference, twice a round to see the noise."""
    steps = [*steps, steps[0]]
    memory = [clock.peak_memory(step) for step in steps[:-1]]
    state = clock.settle(steps)
    began = time.perf_counter()
    calls = sum(row[0] for row in clock.interleave(steps, 1))
    once = max(calls, (time.perf_counter() - began) * 1e3)  # the sweeps between short calls take longer than these
    rows = clock.interleave(steps, _rounds(rounds, LEAST_ROUNDS, seconds, once))
    reading = telemetry(device)
    if reading.others:
        state = "shared"
    again = _measurement(rows[-1], rows[0], state)
    assert again.ratio is not None
    assert again.spread is not None
    measured = tuple(
        _measurement(row, rows[0], state, memory=bytes_, reading=reading)
        for row, bytes_ in zip(rows[:-1], memory, strict=True)
    )
    return Final(measurements=measured, noise=max(abs(again.ratio - 1), again.spread))


def _order(count: int, turn: int) -> list[int]:
    """Return the order of one round: over 2 * count rounds every step follows every other equally often.

    Rotating alone would not do: the one after the slowest would still always be the same. Williams (1949),
    "Experimental designs balanced for the estimation of residual effects of treatments".
    """
    zigzag = [(index + 1) // 2 if index % 2 else -(index // 2) for index in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [(place + turn) % count for place in zigzag]
    return order if turn // count % 2 == 0 else order[::-1]


def _rounds(wanted: int, least: int, seconds: float, once_ms: float) -> int:
    return max(least, min(wanted, int(seconds * 1e3 / max(once_ms, 1e-3))))


def _measurement(
    row: list[float],
    reference: list[float],
    state: str,
    *,
    memory: int | None = None,
    reading: Telemetry = _NOTHING_READ,
) -> Measurement:
    """Summarise one step's times; the ratio is the median of the ratios of each round."""
    ratios = sorted(mine / theirs for mine, theirs in zip(row, reference, strict=True))
    ordered = sorted(row)
    return Measurement(
        median_ms=statistics.median(ordered),
        p20_ms=ordered[round(0.2 * (len(ordered) - 1))],
        p80_ms=ordered[round(0.8 * (len(ordered) - 1))],
        samples=len(ordered),
        ratio=statistics.median(ratios),
        spread=_median_spread(ratios) if len(ratios) > 1 else None,  # one call says nothing of its spread
        peak_memory_bytes=memory,
        clock_mhz=reading.clock_mhz,
        power_w=reading.power_w,
        temperature_c=reading.temperature_c,
        power_state=state,
    )


def _median_spread(ordered: Sequence[float]) -> float:
    """Return half the width of the median's 95% confidence interval, as a share of the median.

    The interval's ends are order statistics: n / 2 -+ 0.98 sqrt(n) (Conover, Practical Nonparametric Statistics, 3.2).
    """
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach) - 1)
    return (ordered[high] - ordered[low]) / 2 / statistics.median(ordered)
