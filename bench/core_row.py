"""One row of the benchmark of cores: what is tried on one problem, and its final."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from tilewise.domain.config import Candidate
from tilewise.domain.errors import TuningError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels.backends import backend_named
from tilewise.kernels.backends.triton_decode import KERNEL
from tilewise.tuner.correctness import Checker
from tilewise.tuner.timing import SLOW, Clock, final
from tilewise.tuner.trying import Bench

from . import decode
from .bars import OURS, Cell, judging, peers
from .core_report import Broken
from .peers import configs as peer_configs
from .portfolio import candidates
from .records import Entry, Row, Run, teraflops
from .vet import Job, Vetted

REFERENCES = ("sdpa", "sdpa_math", "plain")  # the first that is right is what ratios are taken against
FINALISTS = 4  # of ours, beside the default
FINAL_ROUNDS, FINAL_SECONDS = 60, 3.0
MESSAGE_LIMIT = 300
TUNED_PEERS = ("flash_cute", "flex")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What one invocation does.

    - groups: names of bars without the dtype, empty for all; only: these problems instead, of a bar or not.
    - seconds: soft limit of wall time: no row starts that would probably pass it.
    - configs, explore: known configs of ours per role, and how many near them.
    - alternatives: configs of flash_cute and of flex beside their default, forward only.
    - backends: peers, empty for those that a row's bar is about.
    - again: measure rows that the report has already.
    - workers: processes that compile ahead; 0 compiles where it is measured.
    """

    groups: tuple[str, ...] = ()
    only: tuple[Problem, ...] = ()
    dtype: Dtype = Dtype.FP16
    seconds: float = 540.0
    configs: int = 8
    explore: int = 0
    alternatives: int = 1
    backends: tuple[str, ...] = ()
    again: bool = False
    workers: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all rows of an invocation have in common; `until` is a time.monotonic()."""

    device: torch.device
    run: Run
    options: Options
    clock: Clock
    vetted: Mapping[Job, Vetted]
    until: float


class BrokenError(Exception):
    """The device cannot be used by this process any more."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.message)
        self.broken = broken


def usable(device: torch.device) -> bool:
    """Whether this process can still use `device`: an illegal access spoils a CUDA context for good."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def ours(problem: Problem, known: Sequence[Candidate], options: Options, run: Run) -> tuple[Candidate, ...]:
    """Return the candidates of our backend, its default first; just its name where it does not support the problem."""
    name = OURS[run.device.kind]
    if backend_named(name).supports(problem, run.device) is not None:
        return (Candidate(name),)
    counts = {"configs": options.configs, "explore": options.explore, "seed": options.seed}
    return candidates(problem, run.device, name, best=known, **counts)


def rivals(problem: Problem, options: Options, run: Run) -> tuple[Candidate, ...]:
    """Return each peer's default, and of those with parameters some other configs for a forward."""
    found: list[Candidate] = []
    for name in options.backends or peers(problem, run.device.kind):
        backend = backend_named(name)
        try:
            supported = backend.supports(problem, run.device) is None
            spaces = backend.spaces(problem, run.device) if supported else {}
        except Exception:  # a package that breaks where it is imported breaks again, with its reason, where it is tried
            spaces = {}
        found.append(Candidate.of(name, **{role: space.default for role, space in spaces.items()}))
        if "forward" in spaces and name in TUNED_PEERS and problem.pass_ is Pass.INFERENCE:
            others = [config for config in peer_configs(name) if config in spaces["forward"]]
            found += [Candidate.of(name, forward=config) for config in others[: options.alternatives]]
    return tuple(found)


class Table:
    """One problem's tensors, and what was tried on them.

    Raises TuningError where nothing runs that ratios could be taken against, BrokenError where a candidate spoils the
    device.
    """

    def __init__(self, problem: Problem, shared: Shared, known: Sequence[Candidate]) -> None:
        self._start = time.monotonic()
        self._problem, self._shared = problem, shared
        self._name = OURS[shared.run.device.kind]
        self._ours = ours(problem, known, shared.options, shared.run)
        self._trials: dict[Candidate, Trial] = {}
        self._checker = Checker(problem, shared.device, seed=shared.options.seed)
        self._bench = self._referenced()
        self._thorough = Bench(self._checker, shared.clock, self._bench.reference, job="", attempt=1)

    def row(self) -> Row:
        """Try the peers, then ours until the time is over, and hold the final."""
        for candidate in rivals(self._problem, self._shared.options, self._shared.run):
            self._try(candidate, whole=True)
        for place, candidate in enumerate(self._ours):
            if place and time.monotonic() > self._shared.until:
                break
            self._try(candidate)
        if self._right(self._name):
            # each of its kernels has been tried by now, with the others' defaults: no other process need look at it
            self._try(combined(self._ours[0], self._right(self._name)), whole=True)
        return self._final()

    def _referenced(self) -> Bench:
        for name in REFERENCES:
            candidate = Candidate(name)
            bench = Bench(self._checker.main_only(), self._shared.clock, candidate, job="", attempt=1)
            reason = backend_named(name).supports(self._problem, self._shared.run.device)
            self._keep(bench.refused(candidate, reason) if reason else bench.attempt(candidate, best_ratio=math.inf))
            if self._trials[candidate].outcome is Outcome.OK:
                return bench
        reasons = "; ".join(f"{trial.candidate}: {trial.message}" for trial in self._trials.values())
        raise TuningError(f"nothing that ratios could be taken against runs on {self._problem.key}: {reasons}")

    def _try(self, candidate: Candidate, *, whole: bool = False) -> None:
        """Check and screen a candidate, unless another process saw it fail.

        What is checked is the problem itself and, of ours, the small cases where no other process did that. A peer that
        merely failed there gets another chance: it had the device to itself least of all.
        """
        if candidate in self._trials:
            return
        reason = backend_named(candidate.backend).supports(self._problem, self._shared.run.device)
        found = self._shared.vetted.get(Job(self._problem, candidate, whole=whole))
        fatal = (Outcome.WORKER_DIED, Outcome.TIMED_OUT)
        if reason is not None:
            self._keep(self._bench.refused(candidate, reason))
        elif found is not None and (found.outcome in fatal or not (whole or found.outcome is Outcome.OK)):
            self._keep(self._bench.refused(candidate, found.message, found.outcome))
        else:
            bench = self._bench if whole or found is not None else self._thorough
            best_ratio = min(map(_ratio, self._trials.values()), default=math.inf)
            self._keep(bench.attempt(candidate, best_ratio=best_ratio))

    def _keep(self, trial: Trial) -> None:
        lines = trial.message.strip().splitlines()
        trial = replace(trial, message=lines[0][:MESSAGE_LIMIT] if lines else "")
        self._trials[trial.candidate] = trial
        if trial.outcome is Outcome.FAILED and not usable(self._shared.device):
            raise BrokenError(Broken(self._problem, trial.candidate, trial.message))

    def _right(self, backend: str) -> list[Trial]:
        """Return the trials of `backend` that were right, fastest first."""
        right = (t for t in self._trials.values() if t.outcome is Outcome.OK and t.candidate.backend == backend)
        return sorted(right, key=_ratio)

    def _finalists(self) -> tuple[Candidate, ...]:
        """Return the reference, our best and our default, and the best of each peer not far behind or of a bar."""
        mine = self._right(self._name)
        default = [trial for trial in mine if trial.candidate == self._ours[0]]
        backends = dict.fromkeys(candidate.backend for candidate in self._trials if candidate.backend != self._name)
        best = [found[0] for name in backends if (found := self._right(name))]
        furthest, named = SLOW * min(map(_ratio, best)), judging(self._problem, self._shared.run.device.kind)
        near = (trial for trial in best if _ratio(trial) <= furthest or trial.candidate.backend in named)
        entrants = [*mine[:FINALISTS], *default, *near]
        return tuple(dict.fromkeys([self._bench.reference, *(trial.candidate for trial in entrants)]))

    def _final(self) -> Row:
        shared, finalists = self._shared, self._finalists()
        steps = [self._bench.step(candidate) for candidate in finalists]
        held = final(shared.clock, steps, rounds=FINAL_ROUNDS, seconds=FINAL_SECONDS, device=shared.device)
        entries = [
            Entry(
                candidate=candidate,
                measurement=measurement,
                rate=teraflops(self._problem, measurement.median_ms),
                error=self._trials[candidate].error,
            )
            for candidate, measurement in zip(finalists, held.measurements, strict=True)
        ]
        return Row(
            problem=self._problem,
            ours=self._name,
            reference=self._bench.reference,
            entries=tuple(sorted(entries, key=lambda entry: entry.ratio)),
            noise=held.noise,
            trials=tuple(self._trials.values()),
            seconds=time.monotonic() - self._start,
            run=shared.run,
        )


def combined(default: Candidate, right: Sequence[Trial]) -> Candidate:
    """Return the candidate with the best config of each role, among those tried beside the others' defaults."""
    found = default
    for role, config in default.configs:
        alone = [trial for trial in right if trial.candidate.with_config(role, config) == default]
        best = min(alone, key=_ratio, default=None)
        found = found.with_config(role, (best.candidate.config(role) if best else None) or config)
    return found


def decoding(cell: Cell, shared: Shared, copy_gbps: float) -> Row:
    """Search and hold the final of a decoding problem as the benchmark of decoding does."""
    start = time.monotonic()
    named = decode.Cell(name=cell.name, problem=cell.problem)
    result = decode.measure(named, shared.device, shared.run.device, shared.clock)
    errors = {trial.candidate: trial.error for trial in result.trials}
    entries = [
        Entry(
            candidate=found.candidate,
            measurement=found.measurement,
            rate=result.gbps(found),
            error=errors.get(found.candidate),
        )
        for found in result.finalists
    ]
    return Row(
        problem=cell.problem,
        ours=KERNEL,
        reference=result.finalists[0].candidate,
        entries=tuple(sorted(entries, key=lambda entry: entry.ratio)),
        noise=result.noise,
        trials=result.trials,
        seconds=time.monotonic() - start,
        run=shared.run,
        copy_gbps=copy_gbps,
    )


def _ratio(trial: Trial) -> float:
    ratio = trial.measurement.ratio if trial.measurement else None
    return math.inf if ratio is None else ratio
