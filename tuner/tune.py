"""Tunes one problem on one device: defaults, search, interleaved final, verdict, kept."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.embedded import refresh_snapshot
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.device import Device
from tilewise.domain.errors import ConflictError, TilewiseError, TuningError
from tilewise.domain.job import Budget, JobState
from tilewise.domain.matching import default_candidate
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.space import SearchSpace
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels import device as devices
from tilewise.kernels.backend import Backend
from tilewise.kernels.backends import BACKENDS, backend_named

from . import allowance
from .crew import Crew, Pipeline, Tried
from .hunt import Hunt, Role
from .known import known
from .ledger import Ledger, ratio_of
from .neighbours import nearest
from .progress import Reporter, Spent, silent
from .timing import Final
from .verdict import Searched, decide

MAX_SWAPS = 5
# A backend's best within this factor of the best of all is in the final too: the screening that ranked it is coarse,
# and the evidence then tells how every serious backend did.
CONTENDER = 1.5
MAX_FINAL_SECONDS = 60.0
# What ratios are taken against where torch's own choice is wrong, the first that is right: cuDNN's dropout is no fair
# draw (docs/notes/backends.md).
STAND_INS = ("sdpa_flash", "sdpa_efficient", "sdpa_math", "plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The kept answer, what stood before it, and how it came about.

    - resumed: how many trials were taken over from an earlier run.
    - trials: everything that was tried, of earlier runs too, and what was not, with its reason.
    - spent: where the seconds of this run went.
    """

    answer: Answer
    previous: Answer | None
    resumed: int
    trials: tuple[Trial, ...]
    spent: Spent


def tune(
    problem: Problem,
    *,
    device: torch.device,
    database: Database,
    budget: Budget,
    backends: Sequence[str] = (),
    fresh: bool = False,
    seed: int = 0,
    report: Reporter = silent,
    crew: Crew | None = None,
    claim: tuple[str, int] | None = None,
    since: float | None = None,
) -> Verdict:
    """Find the fastest way to compute `problem` on `device`, keep every trial and the answer, and return the verdict.

    - backends: only these, beside torch's own choice; empty means every one that supports the problem.
    - fresh: do not resume from trials that an earlier run kept.
    - crew: of workers to use, of the same device; without one, some are started and ended.
    - claim: the id and attempt of a claimed job to run, which the caller ends; by default a job of its own.
    - since: when whoever calls began with what this tuning needs, on the clock of time.monotonic: counts as its start.

    Ends early, with everything finished kept, on KeyboardInterrupt, which is raised again. Raises ConfigError for an
    unknown backend, UnsupportedError or TuningError where nothing can be measured, DatabaseError where nothing can be
    kept, ConflictError where the job was cancelled or goes on elsewhere.
    """
    for name in backends:
        backend_named(name)
    with contextlib.nullcontext(crew) if crew is not None else Crew(device) as hands:
        hands.begin(problem, seed=seed, backends=backends)
        tuning = _Tuning(problem, hands, database, budget, backends, fresh=fresh, seed=seed, report=report, since=since)
        return tuning.run(claim)


class _Tuning:
    def __init__(
        self,
        problem: Problem,
        crew: Crew,
        database: Database,
        budget: Budget,
        backends: Sequence[str],
        *,
        fresh: bool,
        seed: int,
        report: Reporter,
        since: float | None,
    ) -> None:
        self._problem, self._crew, self._database = problem, crew, database
        self._fresh, self._seed, self._report = fresh, seed, report
        self._device: Device = devices.describe(crew.device)
        self._software: Software = devices.software(self._device.kind)
        self._asked = budget
        self._budget = replace(budget, seconds=budget.seconds_for(problem, self._device.kind), stretch=1.0)
        self._default = self._baseline = default_candidate(problem)
        self._backends = {self._default.backend, *(backends or BACKENDS)}
        self._named = frozenset(backends)
        self._defaults: list[Candidate] = []  # that this run tries
        self._newest = 0  # number of the newest trial in the database that is known here
        self._start = time.monotonic()
        self._ledger = Ledger(self._default, self._default_of, since=self._start if since is None else since)

    def run(self, claim: tuple[str, int] | None) -> Verdict:
        job, attempt = self._claim = claim or self._open_job()
        self._ends_job = claim is None
        preparation = self._crew.preparation(self._problem, self._baseline, seed=self._seed, job=job, attempt=attempt)
        pipeline = Pipeline(self._crew, preparation)
        try:
            self._tell("prepare", pipeline)
            resumed = self._resume()
            pipeline.heed(self._ledger.right)
            spaces = self._begin(pipeline)
            self._search(pipeline, spaces)
            verdict = self._conclude(pipeline, job, resumed)
        except (KeyboardInterrupt, SystemExit):
            self._close_job(job, attempt, JobState.CANCELLED, "interrupted")
            raise
        except Exception as error:
            self._close_job(job, attempt, JobState.FAILED, str(error))
            raise
        finally:
            pipeline.abandon()
        self._close_job(
            job, attempt, JobState.SUCCEEDED, verdict.answer.evidence.reason if verdict.answer.evidence else ""
        )
        self._tell("done", pipeline)
        return verdict

    # what is tried

    def _resume(self) -> int:
        if not self._fresh:
            self._ledger.add(self._kept())
        return self._ledger.count

    def _kept(self) -> list[Trial]:
        """Return what earlier runs and other tuners have tried."""
        with self._database.read() as session:
            trials = TrialRepository(session)
            self._newest = trials.newest(self._problem, self._device.key)
            kept = trials.finished(self._problem, self._device.key, self._software)
        return [
            trial
            for trial in kept
            if trial.candidate.backend in self._backends
            # torch's own choice is what everything is compared with: a failure of it is not held against a later run
            and (trial.candidate != self._default or trial.outcome is Outcome.OK)
        ]

    def _begin(self, pipeline: Pipeline) -> dict[Role, SearchSpace]:
        """Try torch's own choice, with every other default on its way; return the spaces by backend, role and kernel.

        What compiles does so while the tensors of the problem are prepared, and the search waits for none of them.
        """
        names = [self._default.backend, *(name for name in BACKENDS if name in self._backends)]
        spaces: dict[Role, SearchSpace] = {}
        refused: list[Trial] = []
        for name in dict.fromkeys(names):
            backend = backend_named(name)
            reason = backend.supports(self._problem, self._device)
            candidate = Candidate(name) if reason else self._default_of(name)
            known = candidate in self._ledger.trials
            if reason is None and not known and (skipped := self._why_skipped(backend, pipeline)) is not None:
                refused.append(pipeline.trial(candidate, Outcome.SKIPPED, skipped))
                continue
            if reason is not None and not known:
                refused.append(pipeline.trial(candidate, Outcome.UNSUPPORTED, reason))
            elif not known:
                self._defaults.append(candidate)
                pipeline.submit(candidate, must=True)
            if reason is None:
                for role, space in backend.spaces(self._problem, self._device).items():
                    spaces |= {(name, role, kernel.kernel): kernel for kernel in space.by_kernel}
        while self._default not in self._ledger.trials and pipeline.pending:
            self._keep(pipeline.take(best_ratio=self._ledger.best_ratio), pipeline)
        found = self._ledger.trials.get(self._default) or next(t for t in refused if t.candidate == self._default)
        if found.outcome is not Outcome.OK:
            self._find_stand_in(pipeline, found)
            for candidate in self._defaults:
                if candidate not in self._ledger.trials:
                    pipeline.submit(candidate, must=True)
        pipeline.time_as(self._ledger.trials[self._baseline].measurement)  # of an earlier run, too
        self._start = time.monotonic()
        pipeline.defer(allowance.deferred(self._budget))
        self._ledger.begin("search")
        for trial in refused:
            self._keep(Tried(trial=trial), pipeline)
        return spaces

    def _why_skipped(self, backend: Backend, pipeline: Pipeline) -> str | None:
        if backend.name in self._named:
            return None
        return allowance.why_skipped(backend, self._budget, ahead=pipeline.compiles_ahead(backend.name))

    def _find_stand_in(self, pipeline: Pipeline, failed: Trial) -> None:
        """Settle what ratios are taken against where torch's own choice is not right: the first of STAND_INS that is.

        Raises TuningError where none is.
        """
        pipeline.abandon()
        wrong = [f"{failed.candidate} fails: {failed.message}"]
        for candidate in map(Candidate, STAND_INS):
            if backend_named(candidate.backend).supports(self._problem, self._device) is not None:
                continue
            self._backends.add(candidate.backend)
            self._baseline = self._ledger.baseline = candidate
            pipeline.compare_with(candidate)
            if candidate not in self._ledger.trials:
                pipeline.submit(candidate)
                self._take_all(pipeline)
            trial = self._ledger.trials[candidate]
            if trial.outcome is Outcome.OK:
                return
            wrong.append(f"{candidate} fails: {trial.message}")
        raise TuningError(f"{self._problem.key}: nothing can be compared: {'; '.join(wrong)}")

    def _take_all(self, pipeline: Pipeline) -> None:
        while pipeline.pending:
            self._keep(pipeline.take(best_ratio=self._ledger.best_ratio), pipeline)

    def _search(self, pipeline: Pipeline, spaces: dict[Role, SearchSpace]) -> None:
        """Search the spaces, several candidates at a time where they compile ahead, until a limit of the budget.

        Defaults finish among them, and are no sign that the search has settled.
        """
        hunt = Hunt(
            spaces,
            seed=self._seed,
            near=nearest(self._database, self._problem, self._device),
            known=lambda space: known(space, self._problem),
        )
        for default in self._defaults:
            hunt.expect(default)
        for trial in self._ledger.trials.values():
            hunt.tell(trial)

        stale = 0
        while stale < self._budget.patience and self._seconds_left() > 0:
            self._meet(hunt)
            while self._ledger.count + pipeline.pending < self._budget.trials:
                candidate = hunt.ask(self._ledger.best_of, pipeline.wants)
                if candidate is None:
                    break
                pipeline.submit(candidate)
            if not pipeline.pending:
                return
            before = self._ledger.best_ratio
            tried = pipeline.take(best_ratio=before)
            self._keep(tried, pipeline)
            hunt.tell(tried.trial)
            if self._ledger.best_ratio < before:
                stale = 0
            elif tried.trial.candidate not in self._defaults:
                stale += 1
        grace = math.inf if self._named else allowance.grace(self._budget)  # who names backends waits for them
        for tried in pipeline.finish(grace=grace):
            self._keep(tried, pipeline)

    def _meet(self, hunt: Hunt) -> None:
        """Take over what another tuner of this problem has tried meanwhile."""
        if self._fresh:
            return
        with self._database.read() as session:
            newest = TrialRepository(session).newest(self._problem, self._device.key)
        if newest == self._newest:
            return
        for trial in self._kept():
            if trial.candidate not in self._ledger.trials:
                self._ledger.add([trial])
                hunt.tell(trial)

    def _is_default(self, candidate: Candidate) -> bool:
        return bool(candidate.configs) and candidate == self._default_of(candidate.backend)

    def _default_of(self, backend: str) -> Candidate:
        return backend_named(backend).default(self._problem, self._device)

    # the verdict

    def _conclude(self, pipeline: Pipeline, job: str, resumed: int) -> Verdict:
        """Hold the final and keep its answer; where another tuner's answer came in between, hold the final again."""
        self._ledger.begin("final")
        self._tell("final", pipeline)
        for _ in range(MAX_SWAPS):
            with self._database.read() as session:
                previous = AnswerRepository(session).get(self._device.key, self._problem)
            standing, finalists, result = self._final(pipeline, previous)
            searched = Searched(
                job=job,
                trials=self._ledger.count,
                failed=self._ledger.failed,
                seconds=time.monotonic() - self._start,
            )
            answer = decide(
                self._problem,
                self._device.key,
                self._software,
                finalists,
                result,
                standing=standing,
                searched=searched,
                previous=previous,
                defaults=[found for found in finalists if self._is_default(found)],
            )
            assert answer.evidence is not None
            version = previous.version if previous else 0
            with self._database.write() as session:
                self._guard(JobRepository(session))
                swapped = AnswerRepository(session).replace(
                    answer, expected_version=version, reason=answer.evidence.reason
                )
            if swapped:
                refresh_snapshot(self._database)
                with self._database.read() as session:
                    kept = AnswerRepository(session).get(self._device.key, self._problem)
                return Verdict(
                    answer=kept or answer,
                    previous=previous,
                    resumed=resumed,
                    trials=tuple(self._ledger.trials.values()),
                    spent=self._ledger.spent,
                )
        raise TuningError(
            f"the answer of {self._problem.key} changed {MAX_SWAPS} times while its final was held; "
            "another tuner works on it: let it finish, then run this again"
        )

    def _final(
        self, pipeline: Pipeline, previous: Answer | None
    ) -> tuple[Candidate | None, tuple[Candidate, ...], Final]:
        """Return the standing answer, the finalists and their final; who fails in it leaves, and it is held again."""
        while True:
            standing = self._standing(previous, pipeline)
            finalists = self._finalists(standing)
            seconds = min(MAX_FINAL_SECONDS, self._budget.seconds / 2)
            judged = pipeline.judge(finalists, rounds=self._budget.rounds, seconds=seconds)
            if judged.final is not None:
                return standing, finalists, judged.final
            for trial in judged.failures:
                self._keep(Tried(trial=trial), pipeline)
                if trial.candidate == self._baseline:
                    raise TuningError(f"{self._baseline} fails in the final of {self._problem.key}: {trial.message}")

    def _standing(self, previous: Answer | None, pipeline: Pipeline) -> Candidate | None:
        """Return the standing answer's candidate if it is still right here; it may be of older software."""
        if previous is None:
            return None
        candidate = previous.plan.forward
        if candidate not in self._ledger.trials:
            try:
                usable = backend_named(candidate.backend).supports(self._problem, self._device) is None
            except TilewiseError:
                return None
            if not usable:
                return None
            pipeline.submit(candidate)
            self._take_all(pipeline)
        return candidate if self._ledger.trials[candidate].outcome is Outcome.OK else None

    def _finalists(self, standing: Candidate | None) -> tuple[Candidate, ...]:
        """Return the baseline, the standing answer, defaults, the best few and each backend's near-best one."""
        ranked = self._ledger.right
        best = [trial.candidate for trial in ranked[: self._budget.finalists]]
        of_backends = {trial.candidate.backend: trial for trial in reversed(ranked)}.values()
        best += [trial.candidate for trial in of_backends if ratio_of(trial) < CONTENDER * ratio_of(ranked[0])]
        defaults = [trial.candidate for trial in ranked if self._is_default(trial.candidate)]
        standing_too = [standing] if standing is not None else []
        return tuple(dict.fromkeys([self._baseline, *standing_too, *defaults, *best]))

    # what is kept and told

    def _open_job(self) -> tuple[str, int]:
        with self._database.write() as session:
            DeviceRepository(session).save(self._device)
            jobs = JobRepository(session)
            job = jobs.create(self._problem, self._device.key, self._asked)
            attempt = jobs.start(job.id)
        assert attempt is not None, "a job made in this transaction is queued"
        return job.id, attempt

    def _close_job(self, job: str, attempt: int, state: JobState, message: str) -> None:
        if not self._ends_job:
            return
        with self._database.write() as session:
            JobRepository(session).finish(job, attempt, state, message=message)

    def _guard(self, jobs: JobRepository) -> None:
        """Keep the job from being claimed until this transaction ends; ConflictError where it is not ours any more."""
        job, attempt = self._claim
        if not jobs.holds(job, attempt):
            raise ConflictError(f"job {job} was cancelled, or goes on elsewhere under a later attempt than {attempt}")

    def _keep(self, tried: Tried, pipeline: Pipeline) -> None:
        with self._database.write() as session:
            self._guard(JobRepository(session))
            number = TrialRepository(session).add(
                tried.trial, problem=self._problem, device_key=self._device.key, software=self._software
            )
        if number == self._newest + 1:  # else another tuner's trials came in between, and are still to be met
            self._newest = number
        self._ledger.note(tried)
        self._tell("search", pipeline)

    def _tell(self, phase: str, pipeline: Pipeline) -> None:
        self._report(
            self._ledger.progress(
                phase, total=self._budget.trials, seconds_left=self._seconds_left(), waiting=pipeline.pending
            )
        )

    def _seconds_left(self) -> float:
        return self._budget.seconds - (time.monotonic() - self._start)
