"""Fits what a plan may cost on another problem or device, and says how well that holds.

A pair of landscapes tells what the best plan of one costs on the other. The bounds are planes over the distances of
the problems and of the devices at the 95th percentile (least pinball loss: Koenker and Bassett, Econometrica 46, 1978),
with no coefficient below 0. How well they hold is asked of what a fit has not seen: families of problems, for what is
predicted on pairs of devices that it has not seen either.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linprog

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.device_gap import DeviceGap, device_gap
from tilewise.domain.errors import SettingsError
from tilewise.domain.matching import default_candidate
from tilewise.domain.near import MAX_DISTANCE, distance, group
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.transfer import Bound, CostModel, Models, subject

from .landscape import Landscape

QUANTILE = 0.95
# Of a model that is served from, what its bounds must cover of what they had not seen.
COVERAGE = 0.9
LEAST_PAIRS = 40


@dataclass(frozen=True)
class Seen:
    """A landscape as ratios to torch's own choice."""

    landscape: Landscape

    @property
    def problem(self) -> Problem:
        return self.landscape.header.problem

    @property
    def device_key(self) -> str:
        return self.landscape.header.device_key

    @cached_property
    def ratios(self) -> dict[Config, float]:
        scale = torch_ratio(self.landscape)
        assert scale is not None, "only such landscapes are looked at"
        return {point.config: point.ratio / scale for point in self.landscape.points if point.ratio is not None}

    @cached_property
    def best(self) -> tuple[Config, float]:
        return min(self.ratios.items(), key=lambda pair: (pair[1], str(pair[0])))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The best plan of one landscape where another is: how far that is, the share of time lost, the ratio's drift."""

    measured: Problem
    asked: Problem
    devices: tuple[str, str]
    problem_distance: float
    gap: DeviceGap
    regret: float
    drift: float


Fold = tuple[list[Pair], list[Pair]]  # what is fitted, what it is tested on


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model's pairs, and the shares of them that bounds fitted without them cover; None where none can be left out.

    unsuited: pairs of which the plan does not run where it is asked about; the client refuses such a plan.
    """

    pairs: int
    unsuited: int
    regret_coverage: float | None
    drift_coverage: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The models of one kernel and kind of problem (`kernels`), and how they hold."""

    kernels: str
    models: Models
    near: Held
    predicted: Held
    problems: tuple[Problem, ...]
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was fitted on which landscapes. loads: least and greatest load of a core while they were recorded.

    recorded: the commands that did. left_out: landscapes that say nothing here, by name, with the reason."""

    command: str
    devices: tuple[Device, ...]
    software: tuple[Software, ...]
    loads: tuple[float, ...]
    recorded: tuple[str, ...]
    quantile: float
    fits: tuple[Fit, ...]
    left_out: tuple[tuple[str, str], ...]


def torch_ratio(landscape: Landscape) -> float | None:
    """Return the ratio of torch's own choice to the landscape's reference; None where it was not measured."""
    header = landscape.header
    return 1.0 if header.reference == default_candidate(header.problem) else header.torch_ratio


def subject_of(landscape: Landscape) -> str | None:
    header = landscape.header
    base: Candidate = header.base.with_config(header.role, header.default)
    return subject(base, header.problem)


def why_not(landscape: Landscape) -> str | None:
    """Return why a landscape says nothing of what a plan costs elsewhere; None where it does."""
    if subject_of(landscape) is None:
        return "its plans have configs for several roles, of which one was varied"
    if torch_ratio(landscape) is None:
        return "torch's own choice was not measured beside it: record it again"
    return None


def pairs(seen: Sequence[Seen]) -> tuple[list[Pair], list[Pair], int, int]:
    """Return the pairs on one device, those on two, and of each how many more have a plan that does not run there."""
    found: tuple[list[Pair], list[Pair]] = ([], [])
    unsuited = [0, 0]
    for there, here in itertools.permutations(seen, 2):
        gap = device_gap(there.device_key, here.device_key)
        if gap is None or group(there.problem) != group(here.problem):
            continue
        far = distance(there.problem, here.problem)
        if far > MAX_DISTANCE:
            continue
        across = there.device_key != here.device_key
        config, ratio = there.best
        if config not in here.ratios:
            unsuited[across] += 1
            continue
        found[across].append(
            Pair(
                measured=there.problem, asked=here.problem, devices=(there.device_key, here.device_key),
                problem_distance=far, gap=gap, regret=here.ratios[config] / min(1.0, here.best[1]) - 1,
                drift=math.log(here.ratios[config] / ratio),
            )
        )  # fmt: skip
    return found[False], found[True], unsuited[False], unsuited[True]


def bound(found: Sequence[Pair], value: Callable[[Pair], float]) -> Bound:
    """Return the plane of least pinball loss at QUANTILE over both distances, no coefficient below 0."""
    rows = np.array([(1.0, pair.problem_distance, pair.gap.distance) for pair in found])
    values = np.array([value(pair) for pair in found])
    # the dual has a bounded variable for each pair and three constraints; their multipliers are the coefficients
    solved = linprog(-values, A_ub=rows.T, b_ub=np.zeros(3), bounds=(QUANTILE - 1, QUANTILE), method="highs")
    base, problem, device = (float(abs(each)) for each in solved.ineqlin.marginals)
    return Bound(base=base, problem=problem, device=device)


def fit(found: Sequence[Pair]) -> CostModel:
    reach = DeviceGap()
    for pair in found:
        reach = reach.widened(pair.gap)
    return CostModel(
        regret=bound(found, lambda pair: pair.regret), drift=bound(found, lambda pair: pair.drift), reach=reach
    )


def held(found: Sequence[Pair], unsuited: int, folds: Iterable[Fold]) -> Held:
    """Return how many pairs of the folds' tests the fits of the others cover."""
    tested = regret = drift = 0
    for fitted, tests in folds:
        if len(fitted) < LEAST_PAIRS:
            continue
        model = fit(fitted)
        tested += len(tests)
        for pair in tests:
            regret += pair.regret <= model.regret.at(pair.problem_distance, pair.gap.distance)
            drift += pair.drift <= model.drift.at(pair.problem_distance, pair.gap.distance)
    shares = (regret / tested, drift / tested) if tested else (None, None)
    return Held(pairs=len(found), unsuited=unsuited, regret_coverage=shares[0], drift_coverage=shares[1])


def problem_folds(found: Sequence[Pair]) -> Iterable[Fold]:
    """Leave out a family of problems; where there is only one, a problem in both of its roles."""
    families = list(dict.fromkeys(group(pair.asked) for pair in found))
    if len(families) > 1:
        for family in families:
            mine = [pair for pair in found if group(pair.asked) == family]
            yield [pair for pair in found if group(pair.asked) != family], mine
    else:
        for asked in dict.fromkeys(pair.asked for pair in found):
            rest = [pair for pair in found if asked not in (pair.asked, pair.measured)]
            yield rest, [pair for pair in found if pair.asked == asked]


def device_folds(found: Sequence[Pair]) -> Iterable[Fold]:
    """Leave out a pair of devices on all problems, and beside it what `problem_folds` does on all devices."""
    for devices in dict.fromkeys(frozenset(pair.devices) for pair in found):
        for rest, tests in problem_folds(found):
            yield (
                [pair for pair in rest if frozenset(pair.devices) != devices],
                [pair for pair in tests if frozenset(pair.devices) == devices],
            )


def report_of(landscapes: Sequence[Landscape], *, command: str) -> Report:
    """Fit the models of all kernels among the landscapes. Raises SettingsError where none says anything."""
    reasons = [(each, why_not(each)) for each in landscapes]
    by_subject: dict[str, list[Seen]] = {}
    for each, reason in reasons:
        if reason is None:
            by_subject.setdefault(str(subject_of(each)), []).append(Seen(each))
    left_out = tuple(
        (f"{each.name}.{each.header.device_key}", reason) for each, reason in reasons if reason is not None
    )
    if not by_subject:
        raise SettingsError(f"nothing to fit: {left_out[0][1] if left_out else 'no landscape was given'}")
    headers = [each.header for each in landscapes]
    return Report(
        command=command,
        devices=tuple({header.device_key: header.device for header in headers}.values()),
        software=tuple(dict.fromkeys(header.software for header in headers)),
        loads=(min(min(header.load) for header in headers), max(max(header.load) for header in headers)),
        recorded=tuple(dict.fromkeys(header.command for header in headers)),
        quantile=QUANTILE,
        fits=tuple(_fit_of(name, seen) for name, seen in sorted(by_subject.items())),
        left_out=left_out,
    )


def _fit_of(kernels: str, seen: Sequence[Seen]) -> Fit:
    same, across, unsuited_same, unsuited_across = pairs(seen)
    near = held(same, unsuited_same, problem_folds(same))
    predicted = held(across, unsuited_across, device_folds(across))
    return Fit(
        kernels=kernels,
        models=Models(near=_trusted(same, near), predicted=_trusted(across, predicted)),
        near=near,
        predicted=predicted,
        problems=tuple(dict.fromkeys(each.problem for each in seen)),
        devices=tuple(dict.fromkeys(each.device_key for each in seen)),
    )


def _trusted(found: Sequence[Pair], held_out: Held) -> CostModel | None:
    """Return the model of all pairs where its kind covers what it has not seen, and so may be served from."""
    shares = (held_out.regret_coverage, held_out.drift_coverage)
    return fit(found) if all(share is not None and share >= COVERAGE for share in shares) else None
