"""What every repository promises, on SQLite and on PostgreSQL alike."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

from tilewise.db.answer_lists import AnswerFilter, AnswerListRepository, Sort
from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.references import MAX_TEXT
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer, Finalist
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.errors import ConflictError, DeviceError
from tilewise.domain.job import BUDGETS, JobState
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.trial import NumericError, Outcome, Stage, Trial

H200 = Device(
    kind=DeviceKind.CUDA,
    name="NVIDIA H200",
    arch="sm_90",
    units=132,
    memory_gib=141,
    power_limit_w=700,
    shared_memory=232448,
)
OTHER = Problem(batch=2, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)


def put(database: Database, new: Answer, expected_version: int = 0, reason: str = "test") -> bool:
    with database.write() as session:
        return AnswerRepository(session).replace(new, expected_version=expected_version, reason=reason)


def keep(database: Database, *trials: Trial, problem: Problem = PROBLEM) -> None:
    with database.write() as session:
        for trial in trials:
            TrialRepository(session).add(trial, problem=problem, device_key=DEVICE, software=SOFTWARE)


def trial(candidate: Candidate = TILED, outcome: Outcome = Outcome.OK, **fields: object) -> Trial:
    made = Trial(
        candidate=candidate,
        stage=Stage.FORWARD,
        outcome=outcome,
        measurement=measurement(2.5, 0.5) if outcome is Outcome.OK else None,
    )
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def speed_of(found: Answer) -> float:
    config = found.plan.forward.config()
    assert config is not None
    return float(config["speed"])


def final_against(standing: Answer | None, speed: float, problem: Problem) -> Answer | None:
    """The answer of a final in which `speed` beat what stands; None where it did not."""
    new = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", speed=speed))
    held = [(new, speed), (SDPA, 1.0)]
    if standing is not None:
        if speed_of(standing) <= speed:
            return None
        held.append((standing.plan.forward, speed_of(standing)))
    whole = answer(problem)
    assert whole.evidence is not None
    finalists = tuple(Finalist(candidate=one, measurement=measurement(30 * ratio, ratio)) for one, ratio in held)
    return dataclasses.replace(whole, plan=Plan(new), evidence=dataclasses.replace(whole.evidence, finalists=finalists))


class TestDevices:
    def test_a_device_comes_back_as_it_was_saved(self, database: Database) -> None:
        with database.write() as session:
            DeviceRepository(session).save(H200)
        with database.read() as session:
            assert DeviceRepository(session).get(H200.key) == H200
            assert DeviceRepository(session).keys() == (H200.key,)

    def test_a_later_save_replaces_what_was_known(self, database: Database) -> None:
        for device in (H200, dataclasses.replace(H200, shared_memory=1)):
            with database.write() as session:
                DeviceRepository(session).save(device)
        with database.read() as session:
            found = DeviceRepository(session).get(H200.key)
        assert found is not None
        assert found.shared_memory == 1

    def test_a_device_known_by_its_key_alone_has_no_description(self, database: Database) -> None:
        put(database, answer())
        with database.read() as session:
            assert DeviceRepository(session).keys() == (DEVICE,)
            assert DeviceRepository(session).get(DEVICE) is None


class TestJobs:
    def test_a_job_goes_from_the_queue_to_success(self, database: Database) -> None:
        with database.write() as session:
            job = JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"])
        with database.write() as session:
            attempt = JobRepository(session).start(job.id)
        assert attempt == 1
        with database.write() as session:
            assert JobRepository(session).progress(
                job.id, attempt, progress=0.5, message="8 of 16", best=TILED, best_ms=1.5
            )
            assert JobRepository(session).progress(job.id, attempt, progress=0.75, message="12 of 16")
        with database.read() as session:
            running = JobRepository(session).get(job.id)
        assert running is not None
        assert running.job == dataclasses.replace(job, state=JobState.RUNNING, progress=0.75, message="12 of 16")
        assert (running.best, running.best_ms, running.attempt, running.finished) == (TILED, 1.5, 1, None)
        with database.write() as session:
            assert JobRepository(session).finish(job.id, attempt, JobState.SUCCEEDED, message="done")
            ended = JobRepository(session).get(job.id)
        assert ended is not None
        assert (ended.job.state, ended.job.progress, ended.job.message) == (JobState.SUCCEEDED, 1.0, "done")
        assert ended.started is not None
        assert ended.finished is not None
        assert job.created <= ended.started <= ended.finished

    def test_a_job_starts_once(self, database: Database) -> None:
        with database.write() as session:
            jobs = JobRepository(session)
            job = jobs.create(PROBLEM, DEVICE, BUDGETS["quick"])
            assert (jobs.start(job.id), jobs.start(job.id), jobs.start("no such job")) == (1, None, None)

    def test_a_cancelled_job_tells_its_worker_and_stays_cancelled(self, database: Database) -> None:
        with database.write() as session:
            jobs = JobRepository(session)
            job = jobs.create(PROBLEM, DEVICE, BUDGETS["quick"])
            attempt = jobs.start(job.id)
            assert attempt is not None
            assert jobs.cancel(job.id)
            assert not jobs.cancel(job.id)
            assert not jobs.progress(job.id, attempt, progress=0.9)
            assert not jobs.finish(job.id, attempt, JobState.SUCCEEDED)
            found = jobs.get(job.id)
        assert found is not None
        assert (found.job.state, found.job.progress) == (JobState.CANCELLED, 0.0)

    def test_another_attempt_cannot_write(self, database: Database) -> None:
        with database.write() as session:
            jobs = JobRepository(session)
            job = jobs.create(PROBLEM, DEVICE, BUDGETS["quick"])
            assert jobs.start(job.id) == 1
            assert not jobs.progress(job.id, 2, progress=0.9)
            assert not jobs.finish(job.id, 0, JobState.FAILED)

    def test_a_job_cannot_end_as_running(self, database: Database) -> None:
        with database.write() as session, pytest.raises(ValueError, match="a job ends as succeeded, failed, cancelled"):
            JobRepository(session).finish("any", 1, JobState.RUNNING)

    def test_jobs_are_listed_newest_first_and_filtered(self, database: Database) -> None:
        with database.write() as session:
            jobs = JobRepository(session)
            first = jobs.create(PROBLEM, DEVICE, BUDGETS["quick"])
            second = jobs.create(OTHER, H200.key, BUDGETS["full"])
            jobs.start(second.id)
            assert [found.job.id for found in jobs.list()] == [second.id, first.id]
            assert [found.job.id for found in jobs.list(states=[JobState.QUEUED])] == [first.id]
            assert [found.job.id for found in jobs.list(device_key=H200.key)] == [second.id]
            assert len(jobs.list(limit=1)) == 1
            assert jobs.get("no such job") is None


class TestTrials:
    def test_trials_come_back_as_they_were_kept_in_their_order(self, database: Database) -> None:
        with database.write() as session:
            job = JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"]).id
        odd = Candidate.of("triton", forward=Config.of("k", whole=1, real=1.0, big=1e16, tiny=1e-7, on=True, text="ä"))
        kept = (
            trial(odd, job=job, attempt=2, seconds=0.25),
            trial(
                SDPA, Outcome.WRONG_RESULT, error=NumericError(worst=3.5, tensor="out", case="masked"), message="3.5x"
            ),
        )
        keep(database, *kept)
        with database.read() as session:
            found = TrialRepository(session).list(PROBLEM, DEVICE)
        assert found == kept
        config = found[0].candidate.config()
        assert config is not None
        assert {name: type(value) for name, value in config.values} == {
            "whole": int, "real": float, "big": float, "tiny": float, "on": bool, "text": str
        }  # fmt: skip

    def test_trials_are_filtered(self, database: Database) -> None:
        with database.write() as session:
            job = JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"]).id
        fast, slow = trial(), trial(SDPA, Outcome.TIMED_OUT)
        back = trial(SDPA, stage=Stage.BACKWARD, job=job)
        keep(database, fast, slow, back)
        keep(database, trial(), problem=OTHER)
        with database.read() as session:
            trials = TrialRepository(session)
            assert trials.list(PROBLEM, DEVICE, backend="cpu_tiled") == (fast,)
            assert trials.list(PROBLEM, DEVICE, outcomes=[Outcome.TIMED_OUT, Outcome.FAILED]) == (slow,)
            assert trials.list(PROBLEM, DEVICE, stage=Stage.BACKWARD) == (back,)
            assert trials.list(PROBLEM, DEVICE, job_id=job) == (back,)
            assert trials.list(PROBLEM, H200.key) == ()
            assert trials.count(PROBLEM, DEVICE) == {Outcome.OK: 2, Outcome.TIMED_OUT: 1}

    def test_a_resumed_search_sees_the_newest_of_what_was_finished(self, database: Database) -> None:
        died, again = trial(TILED, Outcome.WORKER_DIED), trial(TILED)
        skipped, cancelled = trial(SDPA, Outcome.SKIPPED), trial(SDPA, Outcome.CANCELLED)
        keep(database, died, skipped, again, cancelled)
        with database.read() as session:
            assert TrialRepository(session).finished(PROBLEM, DEVICE, SOFTWARE) == (again,)

    def test_a_change_of_software_voids_only_what_depends_on_it(self, database: Database) -> None:
        keep(database, trial(TILED), trial(SDPA))
        changed = dataclasses.replace(SOFTWARE, kernels=(("cpu_tiled", "changed"), ("sdpa", "ba9876543210")))
        with database.read() as session:
            found = TrialRepository(session).finished(PROBLEM, DEVICE, changed)
        assert [one.candidate for one in found] == [SDPA]

    def test_messages_that_no_database_takes_are_made_fit(self, database: Database) -> None:
        keep(database, trial(message="nul \0 and half \ud800"), trial(message="a" * MAX_TEXT + "end"))
        with database.read() as session:
            odd, long = TrialRepository(session).list(PROBLEM, DEVICE)
        assert odd.message == "nul � and half ?"
        assert "... 3 characters left out ..." in long.message
        assert long.message.endswith("aend")

    def test_times_of_any_zone_are_kept_as_utc(self, database: Database) -> None:
        moment = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
        keep(database, trial(when=moment))
        with database.read() as session:
            (found,) = TrialRepository(session).list(PROBLEM, DEVICE)
        assert found.when == moment
        assert found.when.tzinfo is UTC

    def test_what_is_not_a_device_key_is_refused(self, database: Database) -> None:
        with database.write() as session, pytest.raises(DeviceError):
            TrialRepository(session).add(trial(), problem=PROBLEM, device_key="My GPU", software=SOFTWARE)


class TestAnswers:
    def test_an_answer_comes_back_with_its_new_version(self, database: Database) -> None:
        assert put(database, answer(version=17))
        with database.read() as session:
            answers = AnswerRepository(session)
            assert answers.get(DEVICE, PROBLEM) == answer(version=1)
            assert answers.of_device(DEVICE) == {PROBLEM.key: answer(version=1)}
            assert answers.get(DEVICE, OTHER) is None
            assert answers.of_device(H200.key) == {}

    def test_a_swap_needs_the_version_it_replaces(self, database: Database) -> None:
        assert not put(database, answer(), expected_version=1)
        assert put(database, answer(), expected_version=0)
        assert not put(database, answer(), expected_version=0)
        assert put(database, answer(), expected_version=1)
        assert not put(database, answer(), expected_version=1)
        with database.read() as session:
            found = AnswerRepository(session).get(DEVICE, PROBLEM)
        assert found is not None
        assert found.version == 2

    def test_every_version_stays_in_the_history(self, database: Database) -> None:
        put(database, answer(), reason="first verdict")
        put(database, dataclasses.replace(answer(), expected_ms=9.0), expected_version=1, reason="10% faster")
        put(database, answer(), expected_version=1, reason="lost")
        with database.read() as session:
            history = AnswerRepository(session).history(DEVICE, PROBLEM)
        assert [(change.answer.version, change.reason) for change in history] == [
            (2, "10% faster"),
            (1, "first verdict"),
        ]
        assert history[0].answer.expected_ms == 9.0
        assert history[0].changed >= history[1].changed

    def test_of_many_writers_one_wins_each_version(self, database: Database) -> None:
        writers, rounds = 6, 8
        together = threading.Barrier(writers)

        def write(number: int) -> int:
            won = 0
            for version in range(rounds):
                together.wait()
                won += put(database, answer(), expected_version=version, reason=f"writer {number}")
            return won

        with ThreadPoolExecutor(writers) as pool:
            wins = list(pool.map(write, range(writers)))
        assert sum(wins) == rounds
        with database.read() as session:
            history = AnswerRepository(session).history(DEVICE, PROBLEM)
        assert [change.answer.version for change in history] == list(range(rounds, 0, -1))

    def test_what_raises_changes_nothing(self, database: Database) -> None:
        with pytest.raises(RuntimeError), database.write() as session:  # noqa: PT012
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
            raise RuntimeError("stop")
        with database.read() as session:
            assert AnswerRepository(session).get(DEVICE, PROBLEM) is None
            assert AnswerRepository(session).history(DEVICE, PROBLEM) == ()

    def test_who_follows_sees_every_change_once(self, database: Database) -> None:
        seen, followed = 0, []
        for new, version in ((answer(), 0), (answer(), 1), (answer(OTHER), 0)):
            put(database, new, expected_version=version)
            with database.read() as session:
                answers = AnswerRepository(session)
                followed += [(found.problem_key, found.bare.version) for found in answers.changed_since(seen)]
                seen = answers.newest()
        assert followed == [(PROBLEM.key, 1), (PROBLEM.key, 2), (OTHER.key, 1)]
        with database.read() as session:
            stand = AnswerRepository(session).changed_since(0)
        assert sorted((found.problem_key, found.bare.version) for found in stand) == [
            (PROBLEM.key, 2),
            (OTHER.key, 1),
        ]

    def test_a_slower_one_of_the_same_final_does_not_replace(self, database: Database) -> None:
        put(database, answer())
        slower = dataclasses.replace(answer(), plan=Plan(SDPA))
        with pytest.raises(ConflictError, match=r"the standing answer had the ratio 0\.3333, the new one 1\.0000"):
            put(database, slower, expected_version=1)
        with database.read() as session:
            assert AnswerRepository(session).get(DEVICE, PROBLEM) == answer()

    def test_64_writers_lose_nothing_and_regress_nothing(self, database_url: str) -> None:
        """Each writer holds a final of its own against what stands, as a tuner does, and tries again when it lost."""
        problems = [PROBLEM, OTHER]
        with Database.open(database_url, upgrade=True) as database:

            def write(number: int) -> list[tuple[str, int]]:
                won = []
                for problem in problems:
                    while True:
                        with database.read() as session:
                            standing = AnswerRepository(session).get(DEVICE, problem)
                        speed = 1 / (number + 2)
                        new = final_against(standing, speed, problem)
                        if new is None:
                            break
                        if put(database, new, standing.version if standing else 0, reason=f"writer {number}"):
                            won.append((problem.key, number))
                            break
                return won

            with ThreadPoolExecutor(64) as pool:
                won = [pair for pairs in pool.map(write, range(64)) for pair in pairs]
            for problem in problems:
                with database.read() as session:
                    answers = AnswerRepository(session)
                    standing, history = answers.get(DEVICE, problem), answers.history(DEVICE, problem)
                assert standing is not None
                assert speed_of(standing) == 1 / 65
                speeds = [speed_of(change.answer) for change in reversed(history)]
                assert speeds == sorted(speeds, reverse=True)
                assert [change.answer.version for change in history] == list(range(len(history), 0, -1))
                assert {change.reason for change in history} == {f"writer {n}" for key, n in won if key == problem.key}

    def test_a_snapshot_holds_one_device_or_all(self, database: Database) -> None:
        put(database, answer())
        put(database, answer(device_key=H200.key))
        with database.read() as session:
            everything = AnswerRepository(session).snapshot()
            assert AnswerRepository(session).snapshot(DEVICE) == everything.for_device(DEVICE)
        assert Snapshot.loads(everything.dumps()) == everything
        assert [one.device_key for one in everything.answers] == [DEVICE, H200.key]


class TestPages:
    @pytest.fixture
    def filled(self, database: Database) -> Database:
        times: list[tuple[Problem, str, float | None]] = [
            (PROBLEM, DEVICE, 10),
            (OTHER, DEVICE, 5),
            (OTHER, H200.key, None),
        ]
        for problem, device_key, expected in times:
            put(database, dataclasses.replace(answer(problem, device_key=device_key), expected_ms=expected))
        return database

    @pytest.mark.parametrize("sort", Sort)
    @pytest.mark.parametrize("descending", [False, True])
    def test_every_order_lists_everything(self, filled: Database, sort: Sort, descending: bool) -> None:
        with filled.read() as session:
            page = AnswerListRepository(session).page(sort=sort, descending=descending)
        assert page.total == len(page.answers) == 3

    @pytest.mark.parametrize("descending", [False, True])
    def test_what_has_no_value_comes_last(self, filled: Database, descending: bool) -> None:
        with filled.read() as session:
            page = AnswerListRepository(session).page(sort=Sort.EXPECTED, descending=descending)
        times = [listed.answer.expected_ms for listed in page.answers]
        assert times == ([10, 5, None] if descending else [5, 10, None])
        assert page.answers[0].forward_flops == page.answers[0].answer.problem.forward_flops

    @pytest.mark.parametrize(
        ("search", "found"),
        [
            ("", 3),
            ("  CAUSAL ", 3),
            ("h200", 1),
            ("d128 epyc", 1),
            ("cpu_tiled", 3),
            ("cpuxtiled", 0),
            ("%", 0),
            ("_", 3),
            ("\\", 0),
            ("d128\0epyc", 1),
            ("' OR 1=1 --", 0),
        ],
    )
    def test_search_finds_every_word_as_it_stands(self, filled: Database, search: str, found: int) -> None:
        with filled.read() as session:
            page = AnswerListRepository(session).page(AnswerFilter(search=search))
        assert page.total == len(page.answers) == found

    def test_pages_follow_one_another(self, filled: Database) -> None:
        with filled.read() as session:
            answers = AnswerListRepository(session)
            pages = [answers.page(sort=Sort.DEVICE, descending=False, offset=n, limit=1) for n in range(4)]
        assert [len(page.answers) for page in pages] == [1, 1, 1, 0]
        assert {page.total for page in pages} == {3}
        assert len({(one.answer.device_key, one.answer.problem) for page in pages for one in page.answers}) == 3
