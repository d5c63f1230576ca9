"""Tunes one problem on one device: defaults, search, interleaved final, verdict, kept."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.embedded import refresh_snapshot
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config
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

from .correctness import Checker
from .progress import Progress, Reporter, silent
from .search import Search
from .timing import clock_for, final
from .trying import Bench
from .verdict import Searched, decide

MAX_SWAPS = 5
# A backend's best within this factor of the best of all is in the final too: the screening that ranked it is coarse,
# and the evidence then tells how every serious backend did.
CONTENDER = 1.5
MAX_FINAL_SECONDS = 60.0
# The share of the search's seconds that compiling one config of a backend may take.
AFFORDABLE = 0.5
# Outcomes of what was not run.
NOT_TRIED = (Outcome.UNSUPPORTED, Outcome.SKIPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The kept answer, what stood before it, and how many trials were taken over from an earlier run."""

    answer: Answer
    previous: Answer | None
    resumed: int


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
    claim: tuple[str, int] | None = None,
) -> Verdict:
    """Find the fastest way to compute `problem` on `device`, keep every trial and the answer, and return the verdict.

    - backends: only these, beside torch's own choice; empty means every one that supports the problem.
    - fresh: do not resume from trials that an earlier run kept.
    - claim: the id and attempt of a claimed job to run, which the caller ends; by default a job of its own.

    Ends early, with everything finished kept, on KeyboardInterrupt, which is raised again. Raises ConfigError for an
    unknown backend, UnsupportedError or TuningError where nothing can be measured, DatabaseError where nothing can be
    kept, ConflictError where the job was cancelled or goes on elsewhere.
    """
    for name in backends:
        backend_named(name)
    with torch.random.fork_rng(devices=[]):
        return _Tuning(problem, device, database, budget, backends, fresh=fresh, seed=seed, report=report).run(claim)


class _Tuning:
    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        database: Database,
        budget: Budget,
        backends: Sequence[str],
        *,
        fresh: bool,
        seed: int,
        report: Reporter,
    ) -> None:
        self._problem, self._torch_device, self._database = problem, device, database
        self._budget, self._fresh, self._seed, self._report = budget, fresh, seed, report
        self._device: Device = devices.describe(device)
        self._software: Software = devices.software(self._device.kind)
        self._default = default_candidate(problem)
        self._backends = {self._default.backend, *(backends or BACKENDS)}
        self._named = frozenset(backends)
        self._tried: dict[Candidate, Trial] = {}
        self._start = time.monotonic()

    def run(self, claim: tuple[str, int] | None) -> Verdict:
        job, attempt = self._claim = claim or self._open_job()
        self._ends_job = claim is None
        try:
            self._tell("prepare")
            checker = Checker(self._problem, self._torch_device, seed=self._seed)
            bench = Bench(checker, clock_for(self._torch_device), self._default, job=job, attempt=attempt)
            resumed = self._resume()
            self._start = time.monotonic()
            spaces = self._try_defaults(bench)
            self._search(bench, spaces)
            verdict = self._conclude(bench, job, resumed)
        except (KeyboardInterrupt, SystemExit):
            self._close_job(job, attempt, JobState.CANCELLED, "interrupted")
            raise
        except Exception as error:
            self._close_job(job, attempt, JobState.FAILED, str(error))
            raise
        self._close_job(
            job, attempt, JobState.SUCCEEDED, verdict.answer.evidence.reason if verdict.answer.evidence else ""
        )
        self._tell("done")
        return verdict

    # what is tried

    def _resume(self) -> int:
        if not self._fresh:
            with self._database.read() as session:
                kept = TrialRepository(session).finished(self._problem, self._device.key, self._software)
            self._tried = {
                trial.candidate: trial
                for trial in kept
                if trial.candidate.backend in self._backends
                # torch's own choice is what everything is compared with: had it failed once, nothing could be tuned
                and (trial.candidate != self._default or trial.outcome is Outcome.OK)
            }
        return sum(trial.outcome not in NOT_TRIED for trial in self._tried.values())

    def _try_defaults(self, bench: Bench) -> dict[tuple[str, str, str], SearchSpace]:
        """Try every backend's default, torch's own choice first; return the spaces by backend, role and kernel."""
        names = [
            self._default.backend,
            *(name for name in BACKENDS if name in self._backends - {self._default.backend}),
        ]
        spaces: dict[tuple[str, str, str], SearchSpace] = {}
        for name in names:
            backend = backend_named(name)
            reason = backend.supports(self._problem, self._device)
            candidate = Candidate(name) if reason else backend.default(self._problem, self._device)
            skipped = self._why_skipped(backend) if reason is None and candidate not in self._tried else None
            if skipped is not None:
                self._keep(bench.refused(candidate, skipped, Outcome.SKIPPED))
                continue
            if candidate not in self._tried:
                self._keep(bench.refused(candidate, reason) if reason else self._attempt(bench, candidate))
            if reason is None:
                for role, space in backend.spaces(self._problem, self._device).items():
                    spaces |= {(name, role, kernel.kernel): kernel for kernel in space.by_kernel}
            if candidate == self._default and self._tried[candidate].outcome is not Outcome.OK:
                message = self._tried[candidate].message
                raise TuningError(f"{self._default} fails on {self._problem.key}, nothing can be compared: {message}")
        return spaces

    def _why_skipped(self, backend: Backend) -> str | None:
        """Return why this budget cannot afford to compile `backend`, which was not asked for by name."""
        most = AFFORDABLE * self._budget.seconds
        if backend.compile_seconds <= most or backend.name in self._named:
            return None
        return (
            f"compiling it takes about {backend.compile_seconds:.0f} s, and a search of {self._budget.seconds:g} s "
            f"spends at most {most:g} s on that; allow more seconds or name it with --backends"
        )

    def _search(self, bench: Bench, spaces: dict[tuple[str, str, str], SearchSpace]) -> None:
        """Search every space in turn. A config of one role is tried with the best known configs of the others."""
        searches = {
            (name, role, kernel): Search(space, seed=self._seed, tried=self._ratios(name, role))
            for (name, role, kernel), space in spaces.items()
        }
        spent = dict.fromkeys(searches, 0.0)
        stale = 0
        while searches:
            if self._count() >= self._budget.trials or self._seconds_left() <= 0:
                return
            if stale >= self._budget.patience or not any(search.remaining for search in searches.values()):
                return
            # the space that has had least time: what compiles for long is tried less often
            chosen = min((each for each in searches if searches[each].remaining), key=spent.__getitem__)
            name, role, _ = chosen
            config = searches[chosen].ask()
            assert config is not None, "configs remain"
            before = self._best_ratio()
            trial = self._attempt(bench, self._best_of(name).with_config(role, config))
            self._keep(trial)
            spent[chosen] += trial.seconds
            searches[chosen].tell(config, trial.measurement.ratio if trial.measurement else None)
            stale = 0 if self._best_ratio() < before else stale + 1

    def _best_of(self, backend: str) -> Candidate:
        """Return the fastest candidate of a backend so far, its default where nothing of it was right yet."""
        right = [trial for trial in self._of(backend) if trial.outcome is Outcome.OK]
        if not right:
            return backend_named(backend).default(self._problem, self._device)
        return min(right, key=_ratio).candidate

    def _of(self, backend: str) -> list[Trial]:
        return [trial for trial in self._tried.values() if trial.candidate.backend == backend]

    def _ratios(self, backend: str, role: str) -> list[tuple[Config, float | None]]:
        return [
            (config, trial.measurement.ratio if trial.measurement else None)
            for trial in self._of(backend)
            if (config := trial.candidate.config(role)) is not None
        ]

    def _attempt(self, bench: Bench, candidate: Candidate) -> Trial:
        return bench.attempt(candidate, best_ratio=self._best_ratio())

    # the verdict

    def _conclude(self, bench: Bench, job: str, resumed: int) -> Verdict:
        """Run the final and keep its answer; where another tuner's answer came in between, hold the final again."""
        self._tell("final")
        for _ in range(MAX_SWAPS):
            with self._database.read() as session:
                previous = AnswerRepository(session).get(self._device.key, self._problem)
            standing = self._standing(previous, bench)
            finalists = self._finalists(standing)
            result = final(
                bench.clock,
                [bench.step(candidate) for candidate in finalists],
                rounds=self._budget.rounds,
                seconds=min(MAX_FINAL_SECONDS, self._budget.seconds / 2),
                device=self._torch_device,
            )
            searched = Searched(
                job=job, trials=self._count(), failed=self._failed(), seconds=time.monotonic() - self._start
            )
            answer = decide(
                self._problem,
                self._device.key,
                self._software,
                finalists,
                result,
                standing=standing,
                searched=searched,
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
                return Verdict(answer=kept or answer, previous=previous, resumed=resumed)
        raise TuningError(
            f"the answer of {self._problem.key} changed {MAX_SWAPS} times while its final was held; "
            "another tuner works on it: let it finish, then run this again"
        )

    def _standing(self, previous: Answer | None, bench: Bench) -> Candidate | None:
        """Return the standing answer's candidate if it is still right here; it may be of older software."""
        if previous is None:
            return None
        candidate = previous.plan.forward
        if candidate not in self._tried:
            try:
                usable = backend_named(candidate.backend).supports(self._problem, self._device) is None
            except TilewiseError:
                return None
            if not usable:
                return None
            self._keep(self._attempt(bench, candidate))
        return candidate if self._tried[candidate].outcome is Outcome.OK else None

    def _finalists(self, standing: Candidate | None) -> tuple[Candidate, ...]:
        """Return torch's own choice, the standing answer, defaults, the best few and each backend's near-best one."""
        right = [trial for trial in self._tried.values() if trial.outcome is Outcome.OK]
        ranked = sorted(right, key=_ratio)
        best = [trial.candidate for trial in ranked[: self._budget.finalists]]
        of_backends = {trial.candidate.backend: trial for trial in reversed(ranked)}.values()
        best += [trial.candidate for trial in of_backends if _ratio(trial) < CONTENDER * self._best_ratio()]
        defaults = [
            trial.candidate
            for trial in right
            if trial.candidate.configs
            and trial.candidate == backend_named(trial.candidate.backend).default(self._problem, self._device)
        ]
        standing_too = [standing] if standing is not None else []
        return tuple(dict.fromkeys([self._default, *standing_too, *defaults, *best]))

    # what is kept and told

    def _open_job(self) -> tuple[str, int]:
        with self._database.write() as session:
            DeviceRepository(session).save(self._device)
            jobs = JobRepository(session)
            job = jobs.create(self._problem, self._device.key, self._budget)
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

    def _keep(self, trial: Trial) -> None:
        with self._database.write() as session:
            self._guard(JobRepository(session))
            TrialRepository(session).add(
                trial, problem=self._problem, device_key=self._device.key, software=self._software
            )
        self._tried[trial.candidate] = trial
        self._tell("search")

    def _tell(self, phase: str) -> None:
        right = [trial for trial in self._tried.values() if trial.outcome is Outcome.OK]
        self._report(
            Progress(
                phase=phase,
                trials=self._count(),
                failed=self._failed(),
                total=self._budget.trials,
                seconds_left=max(0.0, self._seconds_left()),
                best=min(right, key=_ratio, default=None),
                baseline=self._tried.get(self._default),
            )
        )

    def _count(self) -> int:
        return sum(trial.outcome not in NOT_TRIED for trial in self._tried.values())

    def _failed(self) -> int:
        return sum(trial.outcome not in (Outcome.OK, *NOT_TRIED) for trial in self._tried.values())

    def _best_ratio(self) -> float:
        return min((_ratio(trial) for trial in self._tried.values()), default=float("inf"))

    def _seconds_left(self) -> float:
        return self._budget.seconds - (time.monotonic() - self._start)


def _ratio(trial: Trial) -> float:
    ratio = trial.measurement.ratio if trial.measurement else None
    return float("inf") if ratio is None else ratio
