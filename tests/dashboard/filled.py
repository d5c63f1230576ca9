"""What the dashboard is tested with: real trials of an H200, and what people did with them."""

from pathlib import Path

from tilewise.bench.core_import import import_report, judgeable
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import AuditRepository
from tilewise.domain.answer import Match
from tilewise.domain.job import JobState, budget_named
from tilewise.domain.problem import Problem
from tilewise.domain.usage import Usage, Use

REPORT = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200_core.json"
H200 = "nvidia-h200.sm90.141g.700w"
TUNED = Problem.parse("inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal")
MISSED = Problem.parse("training.bf16.b4.h32.kv8.q8192.k8192.d128.causal")


def fill(url: str) -> None:
    with Database.open(url, upgrade=True) as database:
        import_report(judgeable(REPORT), database)
        with database.write() as session:
            jobs = JobRepository(session)
            for number in range(60):
                waiting = jobs.create(MISSED, H200, budget_named("quick", trials=number + 1))
                if number < 55:
                    attempt = jobs.start(waiting.id)
                    assert attempt is not None
                    jobs.progress(waiting.id, attempt, progress=0.5, message="half of the trials are done")
                    if number < 50:
                        ended = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)[number % 3]
                        jobs.finish(waiting.id, attempt, ended, message=f"ended as {ended}")
            snapshots, channels, audit = (
                SnapshotRepository(session),
                ChannelRepository(session),
                AuditRepository(session),
            )
            answers = AnswerRepository(session).snapshot().answers
            before = snapshots.freeze(
                type(AnswerRepository(session).snapshot()).of(answers[:-3]), note="before the last three"
            )
            after = snapshots.freeze(AnswerRepository(session).snapshot(), note="all that was measured")
            for frozen, reason in ((before, "the first"), (after, "three more problems")):
                channels.move("stable", frozen.id, reason=reason, actor="a test")
                audit.add("a test", "channel.move", "stable", f"{frozen.id}: {reason}")
            demand = DemandRepository(session)
            uses = (
                Use(problem=MISSED, match=Match.DEFAULT, calls=1_200_000),
                Use(problem=TUNED, match=Match.EXACT, calls=400_000),
            )
            demand.add(Usage(device_key=H200, snapshot=after.id, uses=uses))
