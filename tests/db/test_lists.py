"""Lists of answers and points of trials, on SQLite and on PostgreSQL alike."""

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

from tilewise.db.answer_lists import AnswerFilter, AnswerListRepository, Masking, Sort, kernels_of
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.session import Database
from tilewise.db.trial_points import TrialPointRepository, kept_trial
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Outcome, Stage, Trial
from tilewise.domain.usage import Usage, Use

OTHER = "nvidia-h200.sm90.141g.700w"
FULL = Problem(batch=2, heads=8, q_len=512, head_dim=128)
MASKED = Problem(batch=3, heads=8, q_len=512, head_dim=128, mask="bool.h1", pass_=Pass.TRAINING)
BIASED = Problem(batch=4, heads=8, q_len=512, head_dim=64, mask="bias.b1h1", causal=True, alibi=True, dtype=Dtype.BF16)
DAY = datetime(2026, 11, 1, tzinfo=UTC)


def made(problem: Problem, day: int, software: Software = SOFTWARE, **fields: object) -> Answer:
    one = dataclasses.replace(answer(problem, software=software), **fields)  # type: ignore[arg-type]
    assert one.evidence is not None
    return dataclasses.replace(
        one, evidence=dataclasses.replace(one.evidence, measured=DAY + timedelta(days=day), finalists=())
    )


def put(database: Database, *answers: Answer) -> None:
    with database.write() as session:
        for one in answers:
            assert AnswerRepository(session).replace(one, expected_version=0, reason="test")


def batches(database: Database, wanted: AnswerFilter) -> list[int]:
    with database.read() as session:
        page = AnswerListRepository(session).page(wanted, sort=Sort.PROBLEM, descending=False)
    assert page.total == len(page.answers)
    return sorted(listed.answer.problem.batch for listed in page.answers)


@pytest.fixture
def filled(database: Database) -> Database:
    old = dataclasses.replace(SOFTWARE, triton="3.6.0", kernels=(("cpu_tiled", "old"), ("sdpa", "ba9876543210")))
    triton = Candidate.of("triton", forward=Config.of("triton_forward", block_m=64))
    put(
        database,
        made(PROBLEM, 3),
        made(FULL, 1, old),  # cpu_tiled's source is another by now
        made(MASKED, 1, old, plan=Plan(SDPA)),  # what sdpa depends on is the same
        made(BIASED, 0, dataclasses.replace(old, triton="3.5.0"), plan=Plan(triton), device_key=OTHER),
    )
    return database


FOUND: tuple[tuple[AnswerFilter, list[int]], ...] = (
    (AnswerFilter(), [1, 2, 3, 4]),
    (AnswerFilter(device_key=OTHER), [4]),
    (AnswerFilter(backend="sdpa"), [3]),
    (AnswerFilter(pass_="training"), [3]),
    (AnswerFilter(dtype="bf16"), [4]),
    (AnswerFilter(head_dim=128), [2, 3]),
    (AnswerFilter(masking=Masking.FULL), [2]),
    (AnswerFilter(masking=Masking.CAUSAL), [1, 4]),
    (AnswerFilter(masking=Masking.WINDOW), [1]),
    (AnswerFilter(masking=Masking.BOOL), [3]),
    (AnswerFilter(masking=Masking.BIAS), [4]),
    (AnswerFilter(masking=Masking.ALIBI), [4]),
    (AnswerFilter(stale=True), [2]),
    (AnswerFilter(stale=False), [1, 3, 4]),
    (AnswerFilter(stale=True, search="d64"), []),
    (AnswerFilter(search="fp16 d128", head_dim=128, backend="cpu_tiled"), [2]),
)


def test_each_filter_narrows_the_list(filled: Database) -> None:
    for wanted, found in FOUND:
        assert (wanted, batches(filled, wanted)) == (wanted, found)


def test_a_stale_answer_says_what_changed(filled: Database) -> None:
    with filled.read() as session:
        page = AnswerListRepository(session).page(AnswerFilter(stale=True))
        current = AnswerListRepository(session).current()
    assert [listed.outdated for listed in page.answers] == [("kernel cpu_tiled old -> 0123456789ab",)]
    assert current[DEVICE] == SOFTWARE
    assert current[OTHER].triton == "3.5.0"


def test_what_there_is_to_filter_by(filled: Database) -> None:
    with filled.read() as session:
        facets = AnswerListRepository(session).facets()
        summary = AnswerListRepository(session).summary()
    assert facets.devices == ((DEVICE, 3), (OTHER, 1))
    assert facets.backends == (("cpu_tiled", 2), ("sdpa", 1), ("triton", 1))
    assert facets.passes == (("inference", 3), ("training", 1))
    assert facets.dtypes == (("fp16", 3), ("bf16", 1))
    assert facets.head_dims == ((64, 2), (128, 2))
    assert (summary.answers, summary.devices, summary.faster, summary.stale) == (4, 2, 4, 1)


def test_a_list_is_read_in_parts_in_its_order(filled: Database) -> None:
    with filled.read() as session:
        lists = AnswerListRepository(session)
        keys = lists.keys(AnswerFilter(), sort=Sort.MEASURED, descending=True)
        found = [listed.answer.problem.batch for start in (0, 3) for listed in lists.some(keys[start : start + 3])]
        assert found == [1, 2, 3, 4]
        assert [listed.answer.problem.batch for listed in lists.some([keys[3], ("gone", "gone"), keys[0]])] == [4, 1]
        assert lists.some([]) == ()


def test_kernels_of_a_plan() -> None:
    training = Candidate.of("triton", dkdv=Config.of("hopper_dkdv"), dq=Config.of("triton_dq"))
    assert kernels_of(Plan(SDPA)) == "sdpa"
    assert kernels_of(Plan(TILED, training)) == "cpu_tiled:cpu_tiled triton:hopper_dkdv triton:triton_dq"


def test_the_newest_changes_of_all(filled: Database) -> None:
    with filled.write() as session:
        assert AnswerRepository(session).replace(made(FULL, 9), expected_version=1, reason="again")
    with filled.read() as session:
        found = AnswerRepository(session).newest_changes(2)
    assert [(one.answer.problem, one.answer.version, one.reason) for one in found] == [
        (FULL, 2, "again"),
        (BIASED, 1, "test"),
    ]


def test_saved_time_counts_only_calls_that_an_answer_served(filled: Database) -> None:
    with filled.write() as session:
        uses = [(FULL, Match.EXACT, 10), (FULL, Match.STALE, 5), (FULL, Match.NEAR, 7), (MASKED, Match.DEFAULT, 9)]
        found = tuple(Use(problem=problem, match=match, calls=calls) for problem, match, calls in uses)
        DemandRepository(session).add(Usage(device_key=DEVICE, snapshot=None, uses=found))
    with filled.read() as session:
        saved = DemandRepository(session).saved()
    assert (saved.ms, saved.calls) == (15 * 20.0, 15)
    assert saved.since is not None
    assert saved.since.tzinfo is not None


class TestPoints:
    def keep(self, database: Database, *trials: Trial) -> list[int]:
        with database.write() as session:
            return [
                TrialRepository(session).add(trial, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)
                for trial in trials
            ]

    def trial(self, outcome: Outcome = Outcome.OK, message: str = "", candidate: Candidate = TILED) -> Trial:
        times = measurement(2.5, 0.5) if outcome is Outcome.OK else None
        return Trial(candidate=candidate, stage=Stage.FORWARD, outcome=outcome, measurement=times, message=message)

    def test_points_come_in_order_and_from_a_number_on(self, database: Database) -> None:
        with database.read() as session:
            repository = TrialPointRepository(session, DEVICE, PROBLEM)
            assert (repository.state(), repository.points()) == ((0, 0), ())
        numbers = self.keep(database, self.trial(), self.trial(Outcome.TIMED_OUT), self.trial(candidate=SDPA))
        known: dict[str, Candidate] = {}
        with database.read() as session:
            repository = TrialPointRepository(session, DEVICE, PROBLEM)
            points = repository.points(known=known)
            assert repository.state() == (3, numbers[-1])
            assert repository.points(after=numbers[1]) == points[2:]
        assert [(each.id, each.outcome, each.median_ms, each.ratio) for each in points] == [
            (numbers[0], Outcome.OK, 2.5, 0.5),
            (numbers[1], Outcome.TIMED_OUT, None, None),
            (numbers[2], Outcome.OK, 2.5, 0.5),
        ]
        assert points[0].candidate is points[1].candidate
        assert len(known) == 2

    def test_failures_of_one_kind_are_one(self, database: Database) -> None:
        long = "x" * 500
        numbers = self.keep(
            database,
            self.trial(),
            self.trial(Outcome.TIMED_OUT, "took 60 s"),
            *(self.trial(Outcome.COMPILE_FAILED, long + str(number)) for number in range(3)),
        )
        with database.read() as session:
            found = TrialPointRepository(session, DEVICE, PROBLEM).failures()
            assert TrialPointRepository(session, OTHER, PROBLEM).failures() == ()
        assert [(each.outcome, each.trials, each.newest) for each in found] == [
            (Outcome.COMPILE_FAILED, 3, numbers[-1]),
            (Outcome.TIMED_OUT, 1, numbers[1]),
        ]
        assert found[0].message == long[:400]

    def test_one_trial_comes_whole(self, database: Database) -> None:
        one = self.trial(Outcome.WRONG_RESULT, "off")
        (number,) = self.keep(database, one)
        with database.read() as session:
            found = kept_trial(session, number)
            assert kept_trial(session, number + 1) is None
        assert found is not None
        assert (found.listed.trial, found.listed.problem, found.software) == (one, PROBLEM, SOFTWARE)
