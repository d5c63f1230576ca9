"""Jobs with leases, snapshots and channels, demand, tokens, the audit trail and lists by page, on every database."""

import dataclasses
import gzip
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import text, update
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.devices import DeviceRepository, ProblemRepository
from tilewise.db.finals import FinalRepository, with_software
from tilewise.db.jobs import MAX_ATTEMPTS, SILENCE, JobRepository
from tilewise.db.models import JobRow
from tilewise.db.pins import PinRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import AuditRepository, TokenRepository
from tilewise.db.trials import ListedTrial, TrialRepository, TrialSort
from tilewise.domain import token as tokens
from tilewise.domain.answer import Match
from tilewise.domain.config import Plan
from tilewise.domain.errors import NotFoundError, SettingsError
from tilewise.domain.job import BUDGETS, Job, JobState
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot, differences
from tilewise.domain.token import Scope
from tilewise.domain.trial import Outcome, Stage, Trial, now
from tilewise.domain.usage import NEAR_LOSS, STALE_LOSS, UNKNOWN_LOSS, Usage, Use

OTHER = Problem(batch=2, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)


def queue(database: Database, number: int = 1) -> list[Job]:
    with database.write() as session:
        return [JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"]) for _ in range(number)]


class TestClaims:
    def test_a_claim_takes_the_oldest_of_its_device_with_a_lease(self, database: Database) -> None:
        first, second = queue(database, 2)
        with database.write() as session:
            jobs = JobRepository(session)
            assert jobs.claim("other.device", "w", lease=60) is None
            one, two, none = (jobs.claim(DEVICE, f"w{n}", lease=60) for n in range(3))
        assert one is not None
        assert two is not None
        assert none is None
        assert [one.job.id, two.job.id] == [first.id, second.id]
        assert one.job.lease is not None
        assert (one.job.lease.owner, one.job.lease.attempt, one.job.state) == ("w0", 1, JobState.RUNNING)
        assert timedelta(seconds=50) < one.job.lease.expires - now() <= timedelta(seconds=60)

    def test_a_lost_workers_job_goes_on_under_a_new_attempt(self, database: Database) -> None:
        (job,) = queue(database)
        with database.write() as session:
            jobs = JobRepository(session)
            assert jobs.claim(DEVICE, "lost", lease=-1) is not None
        with database.write() as session:
            jobs = JobRepository(session)
            again = jobs.claim(DEVICE, "next", lease=60)
            assert again is not None
            assert (again.job.id, again.attempt) == (job.id, 2)
            assert not jobs.holds(job.id, 1)
            assert not jobs.heartbeat(job.id, 1, lease=60)
            assert not jobs.finish(job.id, 1, JobState.SUCCEEDED)
            assert jobs.holds(job.id, 2)
            assert jobs.heartbeat(job.id, 2, lease=60)
            assert jobs.finish(job.id, 2, JobState.SUCCEEDED)
            ended = jobs.get(job.id)
        assert ended is not None
        assert ended.job.lease is None

    def test_a_job_that_kills_its_workers_fails(self, database: Database) -> None:
        (job,) = queue(database)
        for _ in range(MAX_ATTEMPTS):
            with database.write() as session:
                assert JobRepository(session).claim(DEVICE, "w", lease=-1) is not None
        with database.write() as session:
            assert JobRepository(session).claim(DEVICE, "w", lease=-1) is None
            ended = JobRepository(session).get(job.id)
        assert ended is not None
        assert (ended.job.state, ended.attempt) == (JobState.FAILED, MAX_ATTEMPTS)
        assert "workers were lost" in ended.job.message

    def test_a_job_without_a_lease_is_not_taken_over(self, database: Database) -> None:
        (job,) = queue(database)
        with database.write() as session:
            assert JobRepository(session).start(job.id) == 1
            assert JobRepository(session).claim(DEVICE, "w", lease=60) is None

    def test_a_tuning_of_which_nothing_is_heard_fails_when_another_begins(self, database: Database) -> None:
        killed, quiet, leased, fresh = queue(database, 4)
        with database.write() as session:
            repository = JobRepository(session)
            assert [repository.start(job.id) for job in (killed, quiet)] == [1, 1]
            claimed = repository.claim(DEVICE, "w", lease=-1)
            assert claimed is not None
            assert claimed.job.id == leased.id
            heard = Trial(candidate=SDPA, stage=Stage.FORWARD, outcome=Outcome.SKIPPED, job=quiet.id, attempt=1)
            TrialRepository(session).add(heard, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)
            long_ago = now() - SILENCE - timedelta(seconds=1)
            session.execute(update(JobRow).where(JobRow.id != fresh.id).values(started=long_ago))
        queue(database)
        with database.read() as session:
            repository = JobRepository(session)
            states = [found.job.state for job in (killed, quiet, leased, fresh) if (found := repository.get(job.id))]
            assert states == [JobState.FAILED, JobState.RUNNING, JobState.RUNNING, JobState.QUEUED]
            assert "nothing was heard" in repository.events(killed.id)[-1].message

    def test_of_many_claims_at_once_each_gets_another_job(self, database: Database) -> None:
        wanted = {job.id for job in queue(database, 24)}
        together = threading.Barrier(8)

        def claim(number: int) -> list[str]:
            together.wait()
            found: list[str] = []
            while True:
                with database.write() as session:
                    record = JobRepository(session).claim(DEVICE, f"w{number}", lease=60)
                if record is None:
                    return found
                found.append(record.job.id)

        with ThreadPoolExecutor(8) as pool:
            claimed = [job for jobs in pool.map(claim, range(8)) for job in jobs]
        assert sorted(claimed) == sorted(wanted)

    def test_what_happened_can_be_read_from_anywhere(self, database: Database) -> None:
        (job,) = queue(database)
        with database.write() as session:
            jobs = JobRepository(session)
            record = jobs.claim(DEVICE, "w", lease=60)
            assert record is not None
            jobs.progress(job.id, 1, progress=0.5, message="12 of 24")
            jobs.cancel(job.id)
            events = jobs.events(job.id)
            assert [(event.state, event.progress, event.attempt) for event in events] == [
                (JobState.QUEUED, 0.0, 0),
                (JobState.RUNNING, 0.0, 1),
                (JobState.RUNNING, 0.5, 1),
                (JobState.CANCELLED, 0.5, 1),
            ]
            assert jobs.events(job.id, after=events[1].id) == events[2:]
            assert jobs.latest(job.id, limit=3) == events[:0:-1]
            assert jobs.counts()[JobState.CANCELLED] == 1


class TestSnapshots:
    def test_a_frozen_snapshot_comes_back_to_the_byte(self, database: Database) -> None:
        whole = Snapshot.of([answer(), answer(OTHER)])
        for _ in range(2):
            with database.write() as session:
                frozen = SnapshotRepository(session).freeze(whole, note="before the upgrade")
        with database.read() as session:
            snapshots = SnapshotRepository(session)
            assert snapshots.load(whole.id).dumps() == whole.dumps()
            assert snapshots.page().items == (frozen,)
            assert (frozen.answers, frozen.note) == (2, "before the upgrade")
            assert session.scalar(text("SELECT count(*) FROM snapshot_entries")) == 2
            with pytest.raises(NotFoundError, match="no snapshot ffff"):
                snapshots.load("f" * 64)

    def test_what_was_sent_is_kept_while_it_is_used(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tilewise.db.snapshots.MAX_SENT", 3)
        sent = [Snapshot.of([answer(dataclasses.replace(OTHER, batch=batch))]) for batch in range(1, 6)]

        def keep(snapshot: Snapshot) -> None:
            with database.write() as session:
                SnapshotRepository(session).keep_sent(snapshot.id, gzip.compress(snapshot.dumps()))

        def kept() -> list[int]:
            with database.read() as session:
                return [n for n, each in enumerate(sent) if SnapshotRepository(session).file(each.id) is not None]

        for each in sent[:3]:
            keep(each)
        with database.write() as session:
            SnapshotRepository(session).note_use(sent[0].id)  # a job says that it runs with it
            SnapshotRepository(session).note_use("f" * 64)  # one that nobody knows
        keep(sent[3])
        assert kept() == [0, 2, 3]
        keep(sent[2])  # sent again, to whoever asked
        keep(sent[4])
        assert kept() == [2, 3, 4]
        with database.read() as session:
            assert SnapshotRepository(session).load(sent[2].id).dumps() == sent[2].dumps()
            assert SnapshotRepository(session).page().items == ()  # nobody froze it
        with database.write() as session:
            ChannelRepository(session).move("stable", sent[2].id, reason="it ran well", actor="me")
        with database.read() as session:
            (frozen,) = SnapshotRepository(session).page().items
        assert (frozen.id, frozen.answers) == (sent[2].id, 1)

    def test_a_channel_moves_back_and_tells_its_history(self, database: Database) -> None:
        first, second = Snapshot.of([answer()]), Snapshot.of([answer(OTHER)])
        with database.write() as session:
            for each in (first, second):
                SnapshotRepository(session).freeze(each)
            channels = ChannelRepository(session)
            assert channels.get("stable") is None
            channels.move("stable", first.id, reason="first", actor="ci")
            channels.move("stable", second.id, reason="faster", actor="ci")
            assert channels.get("stable") == second.id
            assert channels.rollback("stable", reason="slower at night", actor="me").snapshot == first.id
            assert channels.get("stable") == first.id
            history = channels.history("stable")
            assert channels.names() == ("stable",)
        assert [(change.snapshot, change.previous, change.reason) for change in history] == [
            (first.id, second.id, "slower at night"),
            (second.id, first.id, "faster"),
            (first.id, None, "first"),
        ]

    def test_a_channel_points_at_nothing_that_is_not_there(self, database: Database) -> None:
        whole = Snapshot.of([answer()])
        with database.write() as session:
            channels = ChannelRepository(session)
            with pytest.raises(NotFoundError, match="freeze or import it first"):
                channels.move("stable", whole.id, reason="", actor="")
            with pytest.raises(SettingsError, match="channel: expected lower-case"):
                channels.move("a/b", whole.id, reason="", actor="")
            with pytest.raises(NotFoundError, match="no channel"):
                channels.rollback("stable", reason="", actor="")
            SnapshotRepository(session).freeze(whole)
            channels.move("stable", whole.id, reason="", actor="")
            for to in (None, "e" * 64):
                with pytest.raises(NotFoundError, match="nothing to go back to"):
                    channels.rollback("stable", to=to, reason="", actor="")

    def test_what_differs_between_two_is_read_without_building_all(self, database: Database) -> None:
        third = dataclasses.replace(PROBLEM, batch=3)
        other_plan = dataclasses.replace(answer(OTHER), plan=Plan(SDPA))
        newer = dataclasses.replace(answer(), version=2)  # measured again, the same plan
        one, two = Snapshot.of([answer(), answer(OTHER)]), Snapshot.of([newer, other_plan, answer(third)])
        with database.write() as session:
            snapshots = SnapshotRepository(session)
            for each in (one, two):
                snapshots.freeze(each)
            found = snapshots.differences(one.id, two.id)
            assert (found.items, found.total) == (differences(one, two), 2)
            assert {(each.problem, each.before is None) for each in found.items} == {(OTHER, False), (third, True)}
            assert snapshots.differences(one.id, two.id, offset=1, limit=1).items == found.items[1:]
            assert snapshots.differences(one.id, one.id).total == 0
            back = snapshots.differences(two.id, one.id).items
            assert [(each.before, each.after) for each in back] == [(each.after, each.before) for each in found.items]
            assert snapshots.answers(two.id, offset=1, limit=2) == two.answers[1:]
            with pytest.raises(NotFoundError, match="no snapshot"):
                snapshots.differences(one.id, "e" * 64)


class TestDemand:
    def report(self, database: Database, *uses: Use) -> None:
        with database.write() as session:
            DemandRepository(session).add(Usage(device_key=DEVICE, snapshot=None, uses=uses))

    def test_what_is_lost_most_comes_first(self, database: Database) -> None:
        with database.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
        once = Use(problem=OTHER, match=Match.DEFAULT, calls=10)
        self.report(database, once, Use(problem=PROBLEM, match=Match.EXACT, calls=1000))
        self.report(database, once)
        with database.read() as session:
            missed, served = DemandRepository(session).list()
        assert (missed.problem, missed.calls, missed.missed, missed.standing) == (OTHER, 20, 20, False)
        # estimated from the one answer of the device: 10 ms for its operations, two thirds of the time won
        assert missed.expected_ms == pytest.approx(OTHER.forward_flops / PROBLEM.forward_flops * 10)
        assert missed.loss == pytest.approx(2 / 3)
        assert missed.expected_ms is not None
        assert missed.lost_ms == pytest.approx(20 * missed.expected_ms * 2 / 3)
        assert (served.problem, served.calls, served.missed, served.lost_ms) == (PROBLEM, 1000, 0, 0)

    def test_a_stale_answer_loses_little(self, database: Database) -> None:
        with database.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
        self.report(database, Use(problem=PROBLEM, match=Match.STALE, calls=100))
        with database.read() as session:
            (found,) = DemandRepository(session).list(device_key=DEVICE)
        assert (found.loss, found.standing) == (STALE_LOSS, True)

    def test_a_device_that_was_never_measured_is_estimated_by_one_like_it(self, database: Database) -> None:
        with database.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
        never, unlike = DEVICE.replace("avx512", "avx2"), "nvidia-h200.sm90.141g.700w"
        for device_key in (never, unlike):
            for match in (Match.PREDICTED, Match.DEFAULT):
                with database.write() as session:
                    use = Use(problem=PROBLEM, match=match, calls=100)
                    DemandRepository(session).add(Usage(device_key=device_key, snapshot=None, uses=(use,)))
        with database.read() as session:
            (like,) = DemandRepository(session).list(device_key=never)
            (other,) = DemandRepository(session).list(device_key=unlike)
            (proposed,) = DemandRepository(session).proposals()
        assert like.expected_ms == pytest.approx(10)
        assert like.loss == pytest.approx((UNKNOWN_LOSS + NEAR_LOSS) / 2)
        assert (other.expected_ms, other.lost_ms) == (None, 0)
        assert proposed == like

    def test_problems_count_by_their_bucket(self, database: Database) -> None:
        for length in (3000, 3070, 3072):
            use = Use(problem=dataclasses.replace(OTHER, q_len=length, kv_len=length), match=Match.DEFAULT, calls=1)
            self.report(database, use)
        with database.read() as session:
            (found,) = DemandRepository(session).list()
        assert (found.problem.q_len, found.calls) == (3072, 3)

    def test_a_sum_stops_before_it_overflows(self, database: Database) -> None:
        for _ in range(3):
            self.report(database, *[Use(problem=OTHER, match=Match.DEFAULT, calls=2**53)] * 600)
        with database.write() as session:
            session.execute(text(f"UPDATE demand SET calls = {2**62 - 1}"))
        self.report(database, Use(problem=OTHER, match=Match.DEFAULT, calls=5))
        with database.read() as session:
            assert DemandRepository(session).list()[0].calls == 2**62

    def test_reports_that_come_at_once_are_all_counted(self, database: Database) -> None:
        uses = [Use(problem=dataclasses.replace(OTHER, batch=n), match=Match.DEFAULT, calls=1) for n in range(1, 6)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: self.report(database, *(uses if n % 2 else reversed(uses))), range(16)))
        with database.read() as session:
            assert {found.calls for found in DemandRepository(session).list()} == {16}


class TestPins:
    def test_who_runs_a_snapshot_is_counted_by_token_and_device(self, database: Database) -> None:
        other = "nvidia-h200.sm90.141g.700w"
        for snapshot, device, reporter in (
            ("a" * 64, DEVICE, "one"), ("a" * 64, DEVICE, "one"), ("a" * 64, other, "one"), ("a" * 64, DEVICE, "two"),
            ("b" * 64, DEVICE, "two"),
        ):  # fmt: skip
            with database.write() as session:
                PinRepository(session).add(snapshot, device, reporter)
        with database.read() as session:
            pins = PinRepository(session)
            found = pins.of_snapshot("a" * 64)
            assert [(pin.reporter, pin.device_key, pin.reports) for pin in found] == [
                ("two", DEVICE, 1), ("one", other, 1), ("one", DEVICE, 2),
            ]  # fmt: skip
            assert found[2].first < found[2].last
            both = pins.summaries(["a" * 64, "b" * 64, "c" * 64])
            assert set(both) == {"a" * 64, "b" * 64}
            first, last = both["a" * 64], found[0].last
            assert (first.reporters, first.devices, first.last) == (2, 2, last)
            assert pins.summaries([]) == {}

    def test_reports_that_come_at_once_are_all_counted(self, database: Database) -> None:
        def add(_: int) -> None:
            with database.write() as session:
                PinRepository(session).add("a" * 64, DEVICE, "one")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(16)))
        with database.read() as session:
            assert [pin.reports for pin in PinRepository(session).of_snapshot("a" * 64)] == [16]


class TestDevices:
    def test_a_device_is_summed_up(self, database: Database) -> None:
        with database.write() as session:
            for problem in (PROBLEM, OTHER):
                AnswerRepository(session).replace(answer(problem), expected_version=0, reason="test")
            jobs = JobRepository(session)
            made = [jobs.create(PROBLEM, DEVICE, BUDGETS["quick"]) for _ in range(3)]
            jobs.start(made[0].id)
            jobs.cancel(made[1].id)
            jobs.create(PROBLEM, "nvidia-a100.sm80.40g", BUDGETS["quick"])
        with database.read() as session:
            first, second = DeviceRepository(session).summaries()
        assert (first.key, first.answers, first.trials, first.queued, first.running) == (DEVICE, 2, 80, 1, 1)
        assert first.speedup == pytest.approx(3)
        evidence = answer().evidence
        assert evidence is not None
        assert first.measured == evidence.measured
        assert (second.key, second.answers, second.speedup, second.measured) == ("nvidia-a100.sm80.40g", 0, None, None)

    def test_two_devices_to_compare_are_those_with_most_in_common(self, database: Database) -> None:
        def common(key: str = "") -> tuple[str, ...]:
            with database.read() as session:
                return DeviceRepository(session).most_in_common(key)

        def put(device_key: str, *problems: Problem) -> None:
            with database.write() as session:
                for problem in problems:
                    made = dataclasses.replace(answer(problem), device_key=device_key)
                    AnswerRepository(session).replace(made, expected_version=0, reason="test")

        assert common() == ()
        third = dataclasses.replace(PROBLEM, batch=3)
        put("c.avx2.1t", PROBLEM, OTHER, third)
        assert common() == common("c.avx2.1t") == ()
        put("a.avx2.1t", PROBLEM)
        put("b.avx2.1t", PROBLEM, OTHER)
        assert common() == ("b.avx2.1t", "c.avx2.1t")
        assert common("c.avx2.1t") == ("c.avx2.1t", "b.avx2.1t")
        assert common("a.avx2.1t") == ("a.avx2.1t", "b.avx2.1t")


class TestFinals:
    def test_the_best_of_each_backend_is_read(self, database: Database) -> None:
        with database.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
        with database.read() as session:
            (final,) = FinalRepository(session).standing(DEVICE)
            assert FinalRepository(session).standing("nvidia-a100.sm80.40g") == ()
        assert (final.problem, final.winner, final.winner_ms, final.reference) == (PROBLEM, "cpu_tiled", 10.0, "sdpa")
        assert [standing.backend for standing in final.standings] == ["cpu_tiled", "sdpa"]
        assert final.speedup("cpu_tiled") == pytest.approx(3)
        assert final.speedup("flex") is None

    def test_finals_are_told_apart_by_their_software(self, database: Database) -> None:
        newer = dataclasses.replace(SOFTWARE, torch="2.14.0")
        with database.write() as session:
            answers = AnswerRepository(session)
            answers.replace(answer(), expected_version=0, reason="first")
            answers.replace(answer(OTHER), expected_version=0, reason="first")
            evidence = answer().evidence
            assert evidence is not None
            later = dataclasses.replace(evidence, measured=evidence.measured + timedelta(days=1))
            again = dataclasses.replace(answer(software=newer), evidence=later)
            answers.replace(again, expected_version=1, reason="upgraded")
        with database.read() as session:
            finals = FinalRepository(session).every(DEVICE)
            assert [final.problem_key for final in finals] == [PROBLEM.key, OTHER.key, PROBLEM.key]
            new, old = FinalRepository(session).softwares(finals)
            assert (sorted(new.problems), sorted(old.problems)) == ([PROBLEM.key], sorted([PROBLEM.key, OTHER.key]))
            assert (new.software, new.finals, old.software, old.finals) == (newer, 1, SOFTWARE, 2)
            assert (old.first, old.last, new.first) == (evidence.measured, evidence.measured, later.measured)
            keys = [[final.problem_key for final in with_software(finals, use.digest)] for use in (new, old)]
        assert keys == [[PROBLEM.key], sorted([PROBLEM.key, OTHER.key])]


class TestTokens:
    def test_a_token_is_kept_without_its_secret(self, database: Database) -> None:
        with database.write() as session:
            kept, sent = TokenRepository(session).create("ci", (Scope.READ, Scope.TUNE))
            assert TokenRepository(session).all() == (kept,)
        id_, secret = tokens.split(sent) or ("", "")
        assert id_ == kept.id
        assert secret not in repr(kept)
        assert kept.valid(secret, now())
        assert not kept.valid(secret[:-1] + ("a" if secret[-1] != "a" else "b"), now())
        assert [kept.allows(scope) for scope in Scope] == [True, False, True, False]

    def test_a_revoked_or_expired_token_stands_no_longer(self, database: Database) -> None:
        with database.write() as session:
            repository = TokenRepository(session)
            kept, sent = repository.create("ci", (Scope.ADMIN,))
            old, old_sent = repository.create("old", (Scope.READ,), expires=now() - timedelta(seconds=1))
            repository.revoke(kept.id)
            with pytest.raises(NotFoundError, match="no token"):
                repository.revoke("0123")
            revoked = repository.all()[0]
        for token, text_ in ((revoked, sent), (old, old_sent)):
            assert not token.valid((tokens.split(text_) or ("", ""))[1], now())

    def test_the_audit_trail_is_read_newest_first(self, database: Database) -> None:
        with database.write() as session:
            for number in range(3):
                AuditRepository(session).add("ci", "channel.move", "stable", f"to {number}")
            page = AuditRepository(session).page(limit=2)
            rest = AuditRepository(session).page(limit=2, after=page.next)
        assert [entry.detail for entry in (*page.items, *rest.items)] == ["to 2", "to 1", "to 0"]
        assert rest.next is None


class TestPages:
    @pytest.fixture
    def filled(self, database: Database) -> Database:
        with database.write() as session:
            trials = TrialRepository(session)
            for number in range(23):
                ok = number % 3 > 0
                made = Trial(
                    candidate=TILED if number % 2 else SDPA,
                    stage=Stage.FORWARD,
                    outcome=Outcome.OK if ok else Outcome.FAILED,
                    measurement=measurement(float(number % 5), 1.0) if ok else None,
                )
                trials.add(made, problem=OTHER if number < 7 else PROBLEM, device_key=DEVICE, software=SOFTWARE)
        return database

    @pytest.mark.parametrize("descending", [False, True])
    @pytest.mark.parametrize(
        ("sort", "filters"),
        [
            (TrialSort.ID, {}),
            (TrialSort.ID, {"backend": "sdpa"}),
            (TrialSort.ID, {"outcome": Outcome.OK, "problem": PROBLEM}),
            (TrialSort.MEDIAN, {"problem": PROBLEM}),
            (TrialSort.MEDIAN, {"problem": PROBLEM, "backend": "sdpa"}),
        ],
    )
    def test_pages_of_trials_hold_each_once_in_order(
        self, filled: Database, sort: TrialSort, descending: bool, filters: dict[str, object]
    ) -> None:
        found: list[ListedTrial] = []
        after = None
        with filled.read() as session:
            trials = TrialRepository(session)
            whole = trials.page(sort=sort, descending=descending, limit=100, **filters)  # type: ignore[arg-type]
            while True:
                page = trials.page(sort=sort, descending=descending, limit=4, after=after, **filters)  # type: ignore[arg-type]
                found += page.items
                after = page.next
                if after is None:
                    break
        assert tuple(found) == whole.items
        assert len({one.id for one in found}) == len(found) > 4
        keys = [(one.trial.measurement.median_ms if one.trial.measurement else 0.0, one.id) for one in found]
        order = keys if sort is TrialSort.MEDIAN else [key[1:] for key in keys]
        assert order == sorted(order, reverse=descending)

    def test_problems_devices_and_jobs_are_listed_by_page(self, filled: Database) -> None:
        jobs = [job.id for job in queue(filled, 5)]
        with filled.read() as session:
            problems = ProblemRepository(session)
            assert {*problems.page().items} == {OTHER, PROBLEM}
            assert problems.page(head_dim=128, causal=True).items == (OTHER,)
            assert problems.page(search="d64").items == (PROBLEM,)
            assert problems.page(search="%").items == ()
            assert [one.key for one in DeviceRepository(session).page().items] == [DEVICE]
            first = JobRepository(session).page(limit=3)
            rest = JobRepository(session).page(limit=3, after=first.next)
            assert JobRepository(session).page(states=[JobState.RUNNING]).items == ()
        assert [record.job.id for record in (*first.items, *rest.items)] == jobs[::-1]
