"""A whole tuning of a tiny problem on this CPU, with everything that can go wrong on the way."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRecord, JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Plan
from tilewise.domain.errors import ConfigError, TuningError
from tilewise.domain.job import Budget, JobState
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.snapshot import Snapshot, path_beside
from tilewise.domain.trial import Outcome, Trial
from tilewise.kernels.device import describe
from tilewise.tuner import tune as tuning
from tilewise.tuner.crew import Crew, Pipeline
from tilewise.tuner.ledger import NOT_TRIED
from tilewise.tuner.progress import Progress
from tilewise.tuner.trying import Judged
from tilewise.tuner.tune import Verdict, tune

from ..domain.examples import answer as an_answer
from .fakes import BUDGET, CPU, FAST_LIMITS, TINY, seen, set_up_slow, set_up_without_sdpa, set_up_without_torch

KEY = describe(CPU).key
SDPA = Candidate("sdpa")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path}/tilewise.db", upgrade=True) as opened:
        yield opened


class Watcher:
    """Keeps what a tuning reports, and does something at one of its phases."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        self.act(progress)

    def act(self, progress: Progress) -> None:
        """Nothing, by default."""

    @property
    def phases(self) -> list[str]:
        names = [progress.phase for progress in self.seen]
        return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


@pytest.fixture(autouse=True)
def hands(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tuned` use the workers that are there."""
    monkeypatch.setitem(HANDS, "crew", crew)


HANDS: dict[str, Crew] = {}


def tuned(
    database: Database,
    problem: Problem = TINY,
    *,
    budget: Budget = BUDGET,
    backends: tuple[str, ...] = (),
    fresh: bool = False,
    report: Watcher | None = None,
) -> Verdict:
    return tune(
        problem,
        device=CPU,
        database=database,
        budget=budget,
        backends=backends,
        fresh=fresh,
        report=report or Watcher(),
        crew=HANDS["crew"],
    )


def trials(database: Database, problem: Problem = TINY) -> tuple[Trial, ...]:
    with database.read() as session:
        return TrialRepository(session).list(problem, KEY)


def jobs(database: Database) -> tuple[JobRecord, ...]:
    with database.read() as session:
        return JobRepository(session).list()


def standing(database: Database, problem: Problem = TINY) -> Answer | None:
    with database.read() as session:
        return AnswerRepository(session).get(KEY, problem)


def measured(database: Database) -> list[Candidate]:
    return [trial.candidate for trial in trials(database) if trial.outcome not in NOT_TRIED]


def test_a_tuning_keeps_what_it_found(database: Database) -> None:
    watcher = Watcher()
    verdict = tuned(database, report=watcher)
    assert verdict.previous is None
    assert verdict.resumed == 0
    assert verdict.answer == standing(database)
    assert verdict.answer.version == 1
    assert (verdict.answer.problem, verdict.answer.device_key) == (TINY, KEY)

    kept = trials(database)
    assert len(measured(database)) == len(set(measured(database))) == BUDGET.trials
    assert {trial.candidate.backend for trial in kept} >= {"sdpa", "sdpa_math", "cpu_tiled", "plain", "triton"}
    assert kept[0].candidate == SDPA
    assert kept[0].measurement is not None
    assert kept[0].measurement.ratio is not None
    refused = [trial for trial in kept if trial.outcome is Outcome.UNSUPPORTED]
    assert "needs a CUDA device" in {trial.message for trial in refused}

    evidence = verdict.answer.evidence
    assert evidence is not None
    assert evidence.reference == SDPA
    finalists = [finalist.candidate for finalist in evidence.finalists]
    assert SDPA in finalists
    defaults = [finalist.candidate.backend for finalist in evidence.finalists if finalist.default]
    assert defaults == ["cpu_tiled"], "the default is always in the final, and said to be one"
    assert verdict.answer.plan.forward in finalists
    assert evidence.trials == BUDGET.trials

    (job,) = jobs(database)
    assert job.job.state is JobState.SUCCEEDED
    assert job.job.id == evidence.job
    assert job.job.message == evidence.reason
    assert watcher.phases == ["prepare", "search", "final", "done"]
    last = watcher.seen[-1]
    assert (last.trials, last.total, last.failed) == (BUDGET.trials, BUDGET.trials, 0)
    assert last.baseline is not None
    assert last.best is not None


def test_packed_sequences_can_be_tuned(database: Database) -> None:
    problem = Problem.parse("inference.fp32.b3.h2.kv2.q64.k64.d16.causal.window16.varlen")
    verdict = tuned(database, problem)
    assert verdict.answer == standing(database, problem)
    kept = trials(database, problem)
    right = {trial.candidate.backend for trial in kept if trial.outcome is Outcome.OK}
    assert right == {"sdpa", "sdpa_math", "cpu_tiled", "plain"}
    assert all(trial.outcome in (Outcome.OK, *NOT_TRIED) for trial in kept)


def test_a_verdict_refreshes_the_snapshot_beside_the_database(database: Database) -> None:
    verdict = tuned(database)
    assert database.file is not None
    snapshot = Snapshot.loads(path_beside(database.file).read_bytes())
    assert [found.plan for found in snapshot.answers] == [verdict.answer.plan]


def test_training_is_measured_with_its_gradients(database: Database) -> None:
    problem = dataclasses.replace(TINY, pass_=Pass.TRAINING)
    verdict = tuned(database, problem)
    assert verdict.answer.evidence is not None
    assert {trial.outcome for trial in trials(database, problem)} <= {Outcome.OK, *NOT_TRIED}
    assert {trial.stage for trial in trials(database, problem)} == {"both"}


def test_a_second_run_resumes_and_repeats_nothing(database: Database) -> None:
    tuned(database, budget=dataclasses.replace(BUDGET, trials=6))
    first = measured(database)
    assert len(first) == 6
    verdict = tuned(database)
    assert verdict.resumed == 6
    assert verdict.previous is not None
    assert verdict.answer.version == 2
    everything = measured(database)
    assert len(everything) == BUDGET.trials
    assert everything[: len(first)] == first
    assert len(set(everything)) == len(everything)


def test_a_run_whose_budget_is_spent_only_holds_the_final(database: Database) -> None:
    tuned(database)
    before = measured(database)
    assert tuned(database).answer.version == 2
    assert measured(database) == before


def test_the_final_of_a_spent_run_may_take_as_long_as_its_candidates(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this run measures itself says nothing of it."""
    limits = dataclasses.replace(FAST_LIMITS, measure=0.4)
    budget = dataclasses.replace(BUDGET, trials=1, seconds=1)
    with Crew(CPU, compilers=1, limits=limits, setup=set_up_slow) as crew:
        monkeypatch.setitem(HANDS, "crew", crew)
        assert tuned(database, budget=budget, backends=("sdpa",)).resumed == 0
        crew.measurer.stop()
        assert tuned(database, budget=budget, backends=("sdpa",)).resumed == 1


def test_fresh_tries_everything_again(database: Database) -> None:
    tuned(database)
    assert tuned(database, fresh=True).resumed == 0
    assert len(measured(database)) == 2 * BUDGET.trials


def test_a_small_space_is_exhausted(database: Database) -> None:
    problem = dataclasses.replace(TINY, q_len=1, kv_len=40, heads=1, kv_heads=1, window=None)
    budget = dataclasses.replace(BUDGET, trials=100, patience=100)
    tuned(database, problem, budget=budget)
    tried = [trial for trial in trials(database, problem) if trial.candidate.backend == "cpu_tiled"]
    assert len(tried) == 1


class InterruptAfter(Watcher):
    def __init__(self, trials: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.trials, self.error = trials, error

    def act(self, progress: Progress) -> None:
        if progress.phase == "search" and progress.trials == self.trials:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_keeps_its_trials_and_goes_on_later(database: Database, error: type[BaseException]) -> None:
    with pytest.raises(error):
        tuned(database, report=InterruptAfter(5, error))
    finished = measured(database)
    assert len(finished) == 5
    (job,) = jobs(database)
    assert (job.job.state, job.job.message) == (JobState.CANCELLED, "interrupted")
    assert standing(database) is None

    verdict = tuned(database)
    assert verdict.resumed == 5
    assert len(measured(database)) == len(set(measured(database))) == BUDGET.trials
    assert {job.job.state for job in jobs(database)} == {JobState.CANCELLED, JobState.SUCCEEDED}


@pytest.mark.parametrize(
    ("name", "outcome", "message"),
    [
        ("broken", Outcome.FAILED, "RuntimeError: the kernel is broken"),
        ("wrong", Outcome.WRONG_RESULT, "out of the case 'problem' is off by"),
        ("not_a_number", Outcome.WRONG_RESULT, "off by 1e+30 times the bound"),
        ("out_of_memory", Outcome.OUT_OF_RESOURCES, "tried to allocate"),
        ("no_kernel", Outcome.UNSUPPORTED, "No available kernel"),
    ],
)
def test_a_bad_backend_costs_one_trial_and_never_wins(
    name: str, outcome: Outcome, message: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = tuned(database, backends=seen(monkeypatch, name))
    (trial,) = [trial for trial in trials(database) if trial.candidate.backend == name]
    assert trial.outcome is outcome
    assert message in trial.message
    assert trial.measurement is None
    assert verdict.answer.plan.forward == SDPA
    assert verdict.answer.evidence is not None
    assert [finalist.candidate for finalist in verdict.answer.evidence.finalists] == [SDPA]
    assert verdict.answer.evidence.failed == (outcome is not Outcome.UNSUPPORTED)


def test_only_the_named_backends_beside_torchs_own_choice(database: Database) -> None:
    tuned(database, backends=("plain",))
    assert {trial.candidate.backend for trial in trials(database)} == {"sdpa", "plain"}


def test_an_unknown_backend_leaves_nothing_behind(database: Database) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'nope'"):
        tuned(database, backends=("plain", "nope"))
    assert jobs(database) == ()


def tuned_by(crew: Crew, database: Database, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    with crew, monkeypatch.context() as patch:
        patch.setitem(HANDS, "crew", crew)
        return tuned(database)


def test_another_path_stands_in_where_torchs_own_choice_fails(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up_without_sdpa)
    answer = tuned_by(crew, database, monkeypatch).answer
    assert answer.evidence is not None
    assert answer.evidence.reference == Candidate("sdpa_math")
    assert SDPA not in {each.candidate for each in answer.evidence.finalists}
    assert {trial.outcome for trial in trials(database) if trial.candidate == SDPA} == {Outcome.FAILED}
    assert "what stands in for torch's own choice, which is wrong here" in answer.evidence.reason

    # what made it fail is gone: a later run does not hold the failure against it
    later = tuned(database).answer.evidence
    assert later is not None
    assert later.reference == SDPA


def test_nothing_is_tuned_where_no_path_of_torch_is_right(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = Crew(CPU, compilers=1, limits=FAST_LIMITS, setup=set_up_without_torch)
    with pytest.raises(TuningError, match=r"nothing can be compared: sdpa fails: .*broken.*; plain fails: .*broken"):
        tuned_by(crew, database, monkeypatch)
    (job,) = jobs(database)
    assert job.job.state is JobState.FAILED
    assert "nothing can be compared" in job.job.message


class AnswerInBetween(Watcher):
    """Another tuner writes its answer while the final is held, the first `times` times."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        super().__init__()
        self.finals, self.times = 0, times
        held = Pipeline.judge

        def judge(*arguments: Any, **options: Any) -> Judged:
            result = held(*arguments, **options)
            self.finals += 1
            if self.finals <= self.times:
                with database.write() as session:
                    answers = AnswerRepository(session)
                    before = answers.get(KEY, TINY)
                    theirs = an_answer(TINY, device_key=KEY)
                    DeviceRepository(session).save(describe(CPU))
                    theirs = dataclasses.replace(theirs, plan=Plan(Candidate("plain")), evidence=None)
                    version = before.version if before else 0
                    assert answers.replace(theirs, expected_version=version, reason="theirs")
            return result

        monkeypatch.setattr(Pipeline, "judge", judge)


def test_an_answer_that_came_in_between_repeats_the_final(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = AnswerInBetween(database, monkeypatch, 1)
    verdict = tuned(database, report=watcher)
    assert watcher.finals == 2
    assert verdict.answer.version == 2
    assert verdict.previous is not None
    assert verdict.previous.plan.forward == Candidate("plain")
    assert verdict.answer.evidence is not None
    # the answer that came in between took part in the second final
    assert Candidate("plain") in [finalist.candidate for finalist in verdict.answer.evidence.finalists]
    with database.read() as session:
        history = AnswerRepository(session).history(KEY, TINY)
    assert [change.reason == "theirs" for change in history] == [False, True]


def test_answers_that_keep_coming_in_between_are_an_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = AnswerInBetween(database, monkeypatch, 100)
    with pytest.raises(TuningError, match=r"changed 5 times while its final was held"):
        tuned(database, report=watcher)
    assert watcher.finals == tuning.MAX_SWAPS
    assert jobs(database)[0].job.state is JobState.FAILED


def test_a_standing_answer_of_an_unknown_backend_is_left_out(database: Database) -> None:
    with database.write() as session:
        DeviceRepository(session).save(describe(CPU))
        gone = dataclasses.replace(an_answer(TINY, device_key=KEY), plan=Plan(Candidate("gone")), evidence=None)
        assert AnswerRepository(session).replace(gone, expected_version=0, reason="from another version")
    verdict = tuned(database, backends=("plain",))
    assert verdict.answer.version == 2
    assert verdict.answer.plan.forward.backend in ("sdpa", "plain")


def test_the_standing_answer_is_in_the_final_of_other_backends(database: Database) -> None:
    with database.write() as session:
        DeviceRepository(session).save(describe(CPU))
        theirs = dataclasses.replace(an_answer(TINY, device_key=KEY), plan=Plan(Candidate("sdpa_math")), evidence=None)
        assert AnswerRepository(session).replace(theirs, expected_version=0, reason="tuned by hand")
    verdict = tuned(database, backends=("plain",))
    assert verdict.answer.evidence is not None
    assert Candidate("sdpa_math") in [finalist.candidate for finalist in verdict.answer.evidence.finalists]
