"""What the dashboard is tested with: real trials of an H200, and what people did with them."""

from pathlib import Path

from tilewise.bench.core_import import import_report, judgeable
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.pins import PinRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import AuditRepository
from tilewise.db.trials import TrialRepository, TrialSort
from tilewise.domain.answer import Match
from tilewise.domain.config import Candidate
from tilewise.domain.job import JobState, budget_named
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.usage import Usage, Use

# The same benchmark on the same H200 days apart: 15 rows of older kernels, and what stands now.
EARLIER = Path(__file__).with_name("h200_earlier.json")
REPORT = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200_core.json"
H200 = "nvidia-h200.sm90.141g.700w"
TUNED = Problem.parse("inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal")
MISSED = Problem.parse("training.bf16.b4.h32.kv8.q8192.k8192.d128.causal")
ALSO_MISSED = Problem.parse("inference.bf16.b8.h32.kv8.q2048.k2048.d128.causal")
JOBS = 60


def fill(url: str) -> None:
    """Make the database: 40 tuned problems, 60 jobs, two snapshots with a channel, and what clients reported."""
    with Database.open(url, upgrade=True) as database:
        for report in (EARLIER, REPORT):
            import_report(judgeable(report), database)
        _queue(database)
        _freeze_and_report(database)


def _queue(database: Database) -> None:
    with database.write() as session:
        jobs = JobRepository(session)
        for number in range(JOBS):
            problem = MISSED if number % 2 or number > JOBS - 10 else ALSO_MISSED
            job = jobs.create(problem, H200, budget_named("quick", trials=number + 1))
            attempt = jobs.start(job.id) if number < JOBS - 5 else None
            if attempt is None:
                continue
            for share in (0.25, 0.5):
                message = f"{share:.0%} of the trials are done"
                jobs.progress(job.id, attempt, progress=share, message=message, best=Candidate("triton"), best_ms=1.5)
            if number < JOBS - 7:
                ended = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)[number % 3]
                jobs.finish(job.id, attempt, ended, message=f"ended as {ended}")


def queue_one(database: Database) -> str:
    """Queue one more job and return its id."""
    with database.write() as session:
        return JobRepository(session).create(TUNED, H200, budget_named("quick")).id


def _freeze_and_report(database: Database) -> None:
    with database.write() as session:
        snapshots, channels = SnapshotRepository(session), ChannelRepository(session)
        every = AnswerRepository(session).snapshot()
        before = snapshots.freeze(Snapshot.of(every.answers[:-3]), note="before the last three")
        after = snapshots.freeze(every, note="all that was measured")
        for frozen, reason in ((before, "the first"), (after, "three more problems")):
            channels.move("stable", frozen.id, reason=reason, actor="release")
            AuditRepository(session).add("release", "channel.move", "stable", f"{frozen.id}: {reason}")
        uses = (
            Use(problem=MISSED, match=Match.DEFAULT, calls=1_200_000),
            Use(problem=ALSO_MISSED, match=Match.DEFAULT, calls=900_000),
            Use(problem=TUNED, match=Match.EXACT, calls=400_000),
        )
        DemandRepository(session).add(Usage(device_key=H200, snapshot=after.id, uses=uses))
        for reporter in ("pretraining", "serving"):
            PinRepository(session).add(after.id, H200, reporter)


def found(url: str) -> dict[str, str]:
    """Return ids that paths of pages are made of: a job that runs, the two snapshots, a trial."""
    with Database.open(url, upgrade=False) as database, database.read() as session:
        (job, *_) = JobRepository(session).list(states=(JobState.RUNNING,))
        after, before = SnapshotRepository(session).page().items
        trials = TrialRepository(session).page(problem=TUNED, sort=TrialSort.MEDIAN, descending=False, limit=1)
    return {"job": job.job.id, "snapshot": after.id, "before": before.id, "trial": str(trials.items[0].id)}
