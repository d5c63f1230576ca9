"""tilewise jobs submit, list, show, watch, cancel, propose."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out, print_json, print_table
from ..options import AsJson, Db, database_url, user_name

if TYPE_CHECKING:
    from tilewise.db.jobs import JobRecord
    from tilewise.db.session import Database

app = typer.Typer(help="Tunings that workers run.", no_args_is_help=True)
DeviceKey = Annotated[
    str, typer.Option("--device", help="Key of the device that shall run it, or auto, cpu or cuda:N for one here.")
]
BudgetName = Annotated[str, typer.Option(help="quick, normal or full.")]
JobId = Annotated[str, typer.Argument(help="Id of the job.")]
COLUMNS = ("id", "state", "progress", "problem", "device", "attempt", "message")
WATCH_SECONDS = 0.5


@app.command()
def submit(
    problem: Annotated[list[str], typer.Option(metavar="KEY", help="Problem key; may be repeated.")],
    device: DeviceKey = "auto",
    budget: BudgetName = "normal",
    trials: Annotated[int | None, typer.Option(min=1, help="Trials at most, instead of the budget's.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Seconds of search, instead of the budget's.")] = None,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """Queue tunings; a worker on the device takes them."""
    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database
    from tilewise.db.tokens import AuditRepository
    from tilewise.domain.job import budget_named
    from tilewise.domain.problem import Problem

    limits = budget_named(budget, trials=trials, seconds=seconds)
    problems, device_key = [Problem.parse(key) for key in problem], _device_key(device)
    with Database.open(database_url(db), upgrade=db is None) as database, database.write() as session:
        jobs = [JobRepository(session).create(one, device_key, limits) for one in problems]
        for job in jobs:
            AuditRepository(session).add(user_name(), "job.submit", job.id, f"{job.problem.key} on {device_key}")
    if as_json:
        print_json({"jobs": jobs})
        return
    for job in jobs:
        out.print(f"{job.id}  {job.problem.key} on {device_key}", markup=False)


@app.command("list")
def list_(
    state: Annotated[list[str] | None, typer.Option(help="Only in this state; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="Only of the device with this key.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 50,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """The jobs, the newest first."""
    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database
    from tilewise.domain.errors import SettingsError
    from tilewise.domain.job import JobState

    unknown = sorted(set(state or ()) - set(JobState))
    if unknown:
        raise SettingsError(f"--state: expected some of {', '.join(JobState)}, got {', '.join(unknown)}")
    states = [JobState(name) for name in state or ()]
    with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
        found = JobRepository(session).list(states=states, device_key=device, limit=limit)
    if as_json:
        print_json({"jobs": found})
    else:
        print_table("", COLUMNS, map(_row, found))


@app.command()
def show(job_id: JobId, db: Db = None, as_json: AsJson = False) -> None:
    """One job and what happened to it."""
    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database

    with Database.open(database_url(db), upgrade=False) as database:
        record = _get(database, job_id)
        with database.read() as session:
            events = JobRepository(session).events(job_id)
    if as_json:
        print_json({"job": record, "events": events})
        return
    print_table("", COLUMNS, [_row(record)])
    rows = [
        (f"{one.at:%Y-%m-%d %H:%M:%S}", str(one.attempt), str(one.state), f"{one.progress:.0%}", one.message)
        for one in events
    ]
    print_table("\nevents, UTC", ("at", "attempt", "state", "progress", "message"), rows)


@app.command()
def watch(job_id: JobId, db: Db = None) -> None:
    """Print what happens to a job until it has ended; exit code 1 where it did not succeed."""
    import time

    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database
    from tilewise.domain.job import JobState

    with Database.open(database_url(db), upgrade=False) as database:
        after, state = 0, _get(database, job_id).job.state
        while True:
            with database.read() as session:
                events = JobRepository(session).events(job_id, after=after)
            for event in events:
                after, state = event.id, event.state
                line = f"{event.at:%H:%M:%S}  {event.state:<9}  {event.progress:>4.0%}  {event.message}"
                out.print(line.rstrip(), markup=False)
            if state.ended and not events:
                break
            if not events:
                time.sleep(WATCH_SECONDS)
    raise typer.Exit(0 if state is JobState.SUCCEEDED else 1)


@app.command()
def cancel(job_id: JobId, db: Db = None) -> None:
    """Cancel a job that waits or runs; what was measured is kept."""
    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database
    from tilewise.db.tokens import AuditRepository
    from tilewise.domain.errors import ConflictError

    with Database.open(database_url(db), upgrade=False) as database:
        _get(database, job_id)
        with database.write() as session:
            if not JobRepository(session).cancel(job_id, message=f"cancelled by {user_name()}"):
                raise ConflictError(f"job {job_id} has ended already; there is nothing to cancel")
            AuditRepository(session).add(user_name(), "job.cancel", job_id)
    out.print(f"job {job_id} is cancelled", markup=False)


@app.command()
def propose(
    top: Annotated[int, typer.Option(min=1, help="How many problems at most.")] = 10,
    device: Annotated[str | None, typer.Option(help="Only of the device with this key.")] = None,
    budget: BudgetName = "normal",
    submit_: Annotated[bool, typer.Option("--submit", help="Queue them, not only show them.")] = False,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """Where most GPU time is lost for want of a tuning, as jobs; what is queued or running already is left out."""
    from tilewise.db.demand import DemandRepository
    from tilewise.db.jobs import JobRepository
    from tilewise.db.session import Database
    from tilewise.db.tokens import AuditRepository
    from tilewise.domain.job import budget_named

    limits = budget_named(budget)
    with Database.open(database_url(db), upgrade=False) as database:
        with database.read() as session:
            found = DemandRepository(session).proposals(device_key=device, limit=top)
        if submit_:
            with database.write() as session:
                for one in found:
                    job = JobRepository(session).create(one.problem, one.device_key, limits)
                    detail = f"{one.lost_ms:.0f} ms lost by {one.problem.key}"
                    AuditRepository(session).add(user_name(), "job.submit", job.id, detail)
    if as_json:
        print_json({"proposals": [{"demand": one, "lost_ms": one.lost_ms} for one in found], "submitted": submit_})
        return
    if not found:
        err.print("no client reported a problem that waits for a tuning")
        return
    rows = [
        (one.problem.key, one.device_key, str(one.missed), f"{one.lost_ms / 1000:.1f}", f"{one.loss:.0%}")
        for one in found
    ]
    title = f"{len(found)} jobs queued" if submit_ else "worth tuning; --submit queues them"
    print_table(title, ("problem", "device", "calls missed", "GPU time lost, s", "of a call"), rows)


def _get(database: "Database", job_id: str) -> "JobRecord":
    from tilewise.db.jobs import JobRepository
    from tilewise.domain.errors import NotFoundError

    with database.read() as session:
        record = JobRepository(session).get(job_id)
    if record is None:
        raise NotFoundError(f"no job {job_id!r}; `tilewise jobs list` shows those that there are")
    return record


def _row(record: "JobRecord") -> tuple[str, ...]:
    job = record.job
    message = job.message.partition("\n")[0]
    state, attempt = str(job.state), str(record.attempt)
    return job.id, state, f"{job.progress:.0%}", job.problem.key, job.device_key, attempt, message


def _device_key(name: str) -> str:
    from tilewise.domain.device import check_device_key

    if "." in name:
        return check_device_key(name)
    from ..torch import need_torch

    need_torch()
    from tilewise.kernels import device as devices

    return devices.describe(devices.select(name)).key
