"""What it may cost to run a plan that was measured for another problem, or on another device.

A model belongs to one kernel, and to inference, decoding or training. It says, for how far the problems and the devices
are apart, what share of time is lost at most in nine cases of ten against the best plan (`regret`), and by how much at
most the plan's ratio to torch's own choice is worse than where it was measured (`drift`). `python -m
tilewise.bench.near fit` fits the models on measured landscapes and writes transfer_models.json, which is read here. A
kernel that no landscapes were measured of has no model, and its plans are never served for another problem or device;
nor are those of training whose roles have configs of their own.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from . import codec
from .answer import Answer, Match
from .config import Candidate, Plan
from .device_gap import DeviceGap
from .problem import MAX_DECODE_Q_LEN, Problem

NOTHING = DeviceGap()
PATH = Path(__file__).with_name("transfer_models.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """An upper bound: base + problem * (distance of the problems) + device * (distance of the devices)."""

    base: float
    problem: float
    device: float = 0.0

    def at(self, problem: float, device: float = 0.0) -> float:
        return self.base + self.problem * problem + self.device * device


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """regret: share of time lost at most; drift: natural logarithm of how much worse the ratio gets at most.

    reach: how far apart the devices were that it was fitted on; beyond it it says nothing.
    """

    regret: Bound
    drift: Bound
    reach: DeviceGap = NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What was fitted for a kernel: for another problem of the same device, and for another device."""

    near: CostModel | None = None
    predicted: CostModel | None = None


def read(path: Path) -> dict[str, Models]:
    """Return the models of a file by `subject`. Raises ValueError where it is none."""
    return {name: codec.from_json(Models, item) for name, item in json.loads(path.read_text()).items()}


def write(path: Path, models: Mapping[str, Models]) -> None:
    path.write_text(json.dumps(codec.to_json(models), indent=1, sort_keys=True) + "\n")


@functools.cache
def shipped() -> Mapping[str, Models]:
    """Return the models that come with this version."""
    return read(PATH)


def predicted_backends() -> frozenset[str]:
    """Return the backends of which some plan can be served on devices that it was not measured on."""
    return frozenset(name.partition(".")[0] for name, models in shipped().items() if models.predicted is not None)


def subject(plan: Plan | Candidate, problem: Problem) -> str | None:
    """Return what a model of `plan` is kept under: backend, kernel and pass, or decode; None where none can be fitted.

    Decoding is a kind of its own: few queries against many keys are bound by other things than the rest.
    """
    candidates = plan.candidates if isinstance(plan, Plan) else (plan,)
    configs = [config for candidate in candidates for _, config in candidate.configs]
    if len(candidates) != 1 or len(configs) != 1:
        return None
    kind = "decode" if problem.q_len <= MAX_DECODE_Q_LEN else problem.pass_
    return f"{candidates[0].backend}.{configs[0].kernel}.{kind}"


def near(found: Answer, problem: Problem, far: float, models: Mapping[str, Models]) -> Answer | None:
    """Return what `found`, measured `far` away, says for `problem`; None if its worst case does not beat the default.

    Times are scaled by the operations of both, and the interval is as wide as the ratio may drift.
    """
    model = _model(found, models).near
    if model is None or worst_ratio(found, model, far) >= 1 or found.interval is None:
        return None
    assert found.expected_ms is not None, "it has a ratio"
    assert found.baseline_ms is not None, "it has a ratio"
    scale = problem.forward_flops / max(1, found.problem.forward_flops)
    low, high = (scale * math.exp(sign * model.drift.at(far)) for sign in (-1, 1))
    return replace(
        found,
        problem=problem,
        match=Match.NEAR,
        measured=found.measured or found.problem,
        expected_ms=found.expected_ms * scale,
        baseline_ms=found.baseline_ms * scale,
        interval=(found.interval[0] * low, found.interval[1] * high),
        regret=model.regret.at(far),
    )


def predicted(
    found: Answer, problem: Problem, device_key: str, far: float, gap: DeviceGap, models: Mapping[str, Models]
) -> Answer | None:
    """Return what `found`, measured on another device, says for `problem` on `device_key`.

    None if its worst case does not beat the default. It has no times: nothing was measured on `device_key`, and only
    the ratio is known within bounds.
    """
    model = _model(found, models).predicted
    if model is None or not gap.within(model.reach) or worst_ratio(found, model, far, gap) >= 1:
        return None
    return replace(
        found,
        problem=problem,
        device_key=device_key,
        match=Match.PREDICTED,
        measured=found.measured or found.problem,
        measured_on=found.device_key,
        expected_ms=None,
        baseline_ms=None,
        interval=None,
        regret=model.regret.at(far, gap.distance),
    )


def may_predict(found: Answer, gap: DeviceGap, models: Mapping[str, Models]) -> bool:
    """Return whether `found` could be served on a device that is `gap` away, for some problem and software."""
    return predicted(found, found.problem, found.device_key, 0.0, gap, models) is not None


def worst_ratio(found: Answer, model: CostModel, far: float, gap: DeviceGap = NOTHING) -> float:
    """Return the time of the plan over that of torch's own choice, at most; infinite where none was measured."""
    if not found.expected_ms or not found.baseline_ms:
        return math.inf
    return found.expected_ms / found.baseline_ms * math.exp(model.drift.at(far, gap.distance))


def _model(found: Answer, models: Mapping[str, Models]) -> Models:
    name = subject(found.plan, found.problem)
    return Models() if name is None else models.get(name, Models())
