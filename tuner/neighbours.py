"""What was found for near problems: where a search of a new one begins."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tilewise.db.devices import DeviceRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Config
from tilewise.domain.device import Device
from tilewise.domain.problem import MAX_DECODE_Q_LEN, Dtype, Problem
from tilewise.domain.trial import Outcome, Trial

from .surrogate import Neighbour

NEAREST = 2  # problems
FURTHEST = 8.0
FIRST = 2  # configs of each neighbour that are tried before anything else
OTHER_DEVICE, OTHER_ARCH = 3.0, 3.0


@dataclass(frozen=True, slots=True)
class Near:
    """The trials of one near problem that were right, and how far it is: 0 for the same on this device."""

    problem: Problem
    distance: float
    trials: tuple[Trial, ...]


def distance(one: Problem, other: Problem) -> float:
    """Return how different the best configs of two problems may be; infinite where nothing carries over.

    About the powers of two between their sizes, and a few for each feature that only one has.
    """
    single = (one.dtype is Dtype.FP32, other.dtype is Dtype.FP32)
    if single[0] != single[1] or one.packed != other.packed or decodes(one) != decodes(other):
        return math.inf
    sizes = (
        (one.q_len, other.q_len, 0.5),
        (one.kv_len, other.kv_len, 0.5),
        (one.batch * one.heads, other.batch * other.heads, 0.25),
        (one.heads // one.kv_heads, other.heads // other.kv_heads, 0.5),
        (one.head_dim, other.head_dim, 2.0),
        (one.v_head_dim, other.v_head_dim, 2.0),
    )
    apart = sum(weight * abs(math.log2(a / b)) for a, b, weight in sizes)
    features = (
        (one.causal != other.causal, 1.0),
        ((one.window is None) != (other.window is None), 1.5),
        (one.mask.partition(".")[0] != other.mask.partition(".")[0], 2.0),
        (one.dropout != other.dropout, 1.5),
        (one.softcap != other.softcap, 0.5),
        (one.alibi != other.alibi, 0.5),
        (one.varlen != other.varlen, 1.0),
        (bool(one.page_size) != bool(other.page_size), 1.0),
        (one.dtype != other.dtype, 0.25),
        (one.pass_ != other.pass_, 1.0),
    )
    return apart + sum(weight for differs, weight in features if differs)


def decodes(problem: Problem) -> bool:
    """Return whether a decoding kernel computes `problem`."""
    return problem.q_len <= MAX_DECODE_Q_LEN


def nearest(database: Database, problem: Problem, device: Device) -> tuple[Near, ...]:
    """Return the nearest problems that were tuned, on this device or another of its kind, the nearest first."""
    with database.read() as session:
        trials, devices = TrialRepository(session), DeviceRepository(session)
        found: list[tuple[float, str, Problem]] = []
        for device_key, other in trials.tuned():
            if (device_key, other) == (device.key, problem):
                continue
            apart = distance(problem, other)
            if device_key != device.key:
                there = devices.get(device_key)
                if there is None or there.kind is not device.kind:
                    continue
                apart += OTHER_DEVICE + OTHER_ARCH * (there.arch != device.arch)
            if apart <= FURTHEST:
                found.append((apart, device_key, other))
        found.sort(key=lambda each: each[:2])
        return tuple(
            Near(other, apart, trials.list(other, device_key, outcomes=(Outcome.OK,)))
            for apart, device_key, other in found[:NEAREST]
        )


def of_kernel(near: Sequence[Near], backend: str, role: str, kernel: str) -> tuple[list[Config], list[Neighbour]]:
    """Return what near problems teach about one space: configs to try first, and all that was found."""
    first: list[Config] = []
    neighbours = []
    for each in near:
        best: dict[Config, float] = {}
        for trial in each.trials:
            config = trial.candidate.config(role)
            ratio = trial.measurement.ratio if trial.measurement else None
            if trial.candidate.backend == backend and config is not None and config.kernel == kernel and ratio:
                best[config] = min(ratio, best.get(config, math.inf))
        if best:
            first += sorted(best, key=best.__getitem__)[:FIRST]
            neighbours.append(Neighbour(tuple((config, math.log(ratio)) for config, ratio in best.items())))
    return list(dict.fromkeys(first)), neighbours
