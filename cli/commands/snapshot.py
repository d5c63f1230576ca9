"""tilewise snapshot export, import, list, show, diff, point, rollback, keygen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out, print_json, print_table
from ..options import AsJson, Db, database_url, secret_of, user_name

if TYPE_CHECKING:
    from tilewise.db.session import Database
    from tilewise.domain.snapshot import ChannelChange, Snapshot

app = typer.Typer(help="Frozen answers, and the channels that point at them.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(help="A channel, an id, or a snapshot file.")]
Channel = Annotated[str, typer.Argument(help="Name of the channel.")]
Reason = Annotated[str, typer.Option(help="Why; kept in the history.")]


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Where to write it.")],
    which: Annotated[str | None, typer.Option("--of", help="A channel or an id, instead of freezing now.")] = None,
    device: Annotated[str | None, typer.Option(help="Only this device's answers; by default all.")] = None,
    note: Annotated[str, typer.Option(help="Why it was frozen.")] = "",
    sign_with: Annotated[Path | None, typer.Option(metavar="FILE", help="Sign it with this private key.")] = None,
    db: Db = None,
) -> None:
    """Freeze the standing answers, keep them, and write them as a file."""
    from tilewise.db.answers import AnswerRepository
    from tilewise.db.session import Database
    from tilewise.db.signature import Signer
    from tilewise.db.snapshots import SnapshotRepository
    from tilewise.domain.errors import SnapshotError

    signer = None if sign_with is None else Signer(secret_of(sign_with))
    with Database.open(database_url(db), upgrade=False) as database:
        if which is not None:
            snapshot = _load(database, which)
        else:
            with database.write() as session:
                snapshot = AnswerRepository(session).snapshot(device)
                SnapshotRepository(session).freeze(snapshot, note=note)
    if signer is not None:
        snapshot = snapshot.signed(signer.sign(snapshot.id))
    try:
        file.write_bytes(snapshot.dumps())
    except OSError as error:
        raise SnapshotError(f"cannot write {file}: {error.strerror}") from error
    out.print(f"{snapshot.id}  {len(snapshot.answers)} answers: {file}", markup=False)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A snapshot file.")],
    note: Annotated[str, typer.Option(help="Where it came from.")] = "",
    db: Db = None,
) -> None:
    """Keep a snapshot file, so that channels can point at it; no standing answer changes."""
    from tilewise.db.session import Database
    from tilewise.db.snapshots import SnapshotRepository

    snapshot = _read(file)
    with Database.open(database_url(db), upgrade=db is None) as database, database.write() as session:
        SnapshotRepository(session).freeze(snapshot, note=note)
    out.print(f"{snapshot.id}  {len(snapshot.answers)} answers", markup=False)


@app.command("list")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="How many at most, the newest first.")] = 50,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """The snapshots, and the channels that point at them."""
    from tilewise.db.session import Database
    from tilewise.db.snapshots import ChannelRepository, SnapshotRepository

    with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
        snapshots = SnapshotRepository(session).page(limit=limit).items
        channels = ChannelRepository(session)
        points = {name: channels.get(name) for name in channels.names()}
    if as_json:
        print_json({"snapshots": snapshots, "channels": points})
        return
    rows = [
        (one.id, f"{one.created:%Y-%m-%d %H:%M}", str(one.answers),
         ", ".join(name for name, target in points.items() if target == one.id), one.note)
        for one in snapshots
    ]  # fmt: skip
    print_table("", ("id", "created, UTC", "answers", "channels", "note"), rows)


@app.command()
def show(which: Which, db: Db = None, as_json: AsJson = False) -> None:
    """The answers of a snapshot; for a channel its history too."""
    from tilewise.db.session import Database
    from tilewise.db.snapshots import ChannelRepository

    from ..verdicts import COLUMNS, row

    history: tuple[ChannelChange, ...] = ()
    if Path(which).is_file():
        snapshot = _read(Path(which))
    else:
        with Database.open(database_url(db), upgrade=False) as database:
            snapshot = _load(database, which)
            with database.read() as session:
                history = ChannelRepository(session).history(which)
    if as_json:
        print_json({"id": snapshot.id, "answers": snapshot.answers, "history": history})
        return
    print_table(f"snapshot {snapshot.id}", COLUMNS, map(row, snapshot.answers))
    lines = [(f"{one.changed:%Y-%m-%d %H:%M}", one.snapshot[:12], one.actor, one.reason) for one in history]
    if lines:
        print_table(f"\nchannel {which}", ("changed, UTC", "snapshot", "by", "why"), lines)


@app.command()
def diff(before: Which, after: Which, db: Db = None, as_json: AsJson = False) -> None:
    """What runs differently under another snapshot."""
    from tilewise.db.session import Database
    from tilewise.domain.snapshot import differences

    if Path(before).is_file() and Path(after).is_file():
        snapshots = [_read(Path(before)), _read(Path(after))]
    else:
        with Database.open(database_url(db), upgrade=False) as database:
            snapshots = [
                _read(Path(which)) if Path(which).is_file() else _load(database, which) for which in (before, after)
            ]
    found = [
        {
            "device_key": one.device_key,
            "problem": one.problem.key,
            "before": one.before and one.before.plan,
            "after": one.after and one.after.plan,
        }
        for one in differences(*snapshots)
    ]
    if as_json:
        print_json({"differences": found})
        return
    rows = [
        (str(one["problem"]), str(one["device_key"]), str(one["before"] or "-"), str(one["after"] or "-"))
        for one in found
    ]
    if not rows:
        err.print("the same plans")
        return
    print_table("", ("problem", "device", "before", "after"), rows)


@app.command()
def point(
    channel: Channel,
    snapshot_id: Annotated[str, typer.Argument(help="Id of a kept snapshot.")],
    reason: Reason = "",
    db: Db = None,
) -> None:
    """Let a channel point at a snapshot; a new name makes a new channel."""
    from tilewise.db.session import Database
    from tilewise.db.snapshots import ChannelRepository
    from tilewise.db.tokens import AuditRepository

    with Database.open(database_url(db), upgrade=False) as database, database.write() as session:
        change = ChannelRepository(session).move(channel, snapshot_id, reason=reason, actor=user_name())
        AuditRepository(session).add(user_name(), "channel.move", channel, f"{change.snapshot}: {reason}")
    out.print(f"{channel} -> {change.snapshot}", markup=False)


@app.command()
def rollback(
    channel: Channel,
    to: Annotated[str | None, typer.Option(help="A snapshot of its history; by default the one before.")] = None,
    reason: Reason = "",
    db: Db = None,
) -> None:
    """Let a channel point at what it pointed at before."""
    from tilewise.db.session import Database
    from tilewise.db.snapshots import ChannelRepository
    from tilewise.db.tokens import AuditRepository

    with Database.open(database_url(db), upgrade=False) as database, database.write() as session:
        change = ChannelRepository(session).rollback(channel, to=to, reason=reason, actor=user_name())
        AuditRepository(session).add(user_name(), "channel.rollback", channel, f"{change.snapshot}: {reason}")
    out.print(f"{channel} -> {change.snapshot}", markup=False)


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="Where to write the private key; nobody else can read it.")],
) -> None:
    """Make a key to sign snapshots with, and print the public one: TILEWISE_SNAPSHOT_KEY of those who check."""
    import os

    from tilewise.db import signature
    from tilewise.domain.errors import SettingsError

    private, public = signature.generate()
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out_file:
            out_file.write(private + "\n")
    except OSError as error:
        raise SettingsError(f"cannot write {file}: {error.strerror}; a key is never written over") from error
    out.print(public, markup=False)


def _load(database: "Database", which: str) -> "Snapshot":
    from tilewise.db.snapshots import ChannelRepository, SnapshotRepository

    with database.read() as session:
        return SnapshotRepository(session).load(ChannelRepository(session).get(which) or which)


def _read(file: Path) -> "Snapshot":
    from tilewise.domain.errors import SnapshotError
    from tilewise.domain.snapshot import Snapshot

    try:
        return Snapshot.loads(file.read_bytes(), name=str(file))
    except OSError as error:
        raise SnapshotError(f"cannot read {file}: {error.strerror}") from error
