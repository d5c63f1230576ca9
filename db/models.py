"""The tables. Nothing outside this folder sees them: repositories take and return the types of domain/."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

# SQLite numbers rows only in an INTEGER primary key.
RowId = BigInteger().with_variant(Integer, "sqlite")
# `json`, not `jsonb`: jsonb rewrites numbers (1e16 comes back as an integer), and documents must come back as written.
Document = JSON(none_as_null=True)
Key = String(255)
Digest = String(64)
Word = String(32)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, stored as UTC and returned with its zone; SQLite has no zones, so a naive value there is UTC."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"expected a time with its zone, got {value!r}; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    # Named constraints: a later migration can drop one on either database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class DeviceRow(Base):
    """A device by its key. The document is null while only the key is known, from an imported answer."""

    __tablename__ = "devices"

    key: Mapped[str] = mapped_column(Key, primary_key=True)
    document: Mapped[Any | None] = mapped_column(Document)


class SoftwareRow(Base):
    __tablename__ = "software"

    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    document: Mapped[Any] = mapped_column(Document)


class ProblemRow(Base):
    """A problem by its key, which says everything; the other columns are there to filter and sort by."""

    __tablename__ = "problems"

    key: Mapped[str] = mapped_column(Key, primary_key=True)
    pass_: Mapped[str] = mapped_column("pass", Word)
    dtype: Mapped[str] = mapped_column(Word)
    batch: Mapped[int] = mapped_column(BigInteger)
    heads: Mapped[int] = mapped_column(BigInteger)
    kv_heads: Mapped[int] = mapped_column(BigInteger)
    q_len: Mapped[int] = mapped_column(BigInteger)
    kv_len: Mapped[int] = mapped_column(BigInteger)
    head_dim: Mapped[int] = mapped_column(BigInteger)
    v_head_dim: Mapped[int] = mapped_column(BigInteger)
    causal: Mapped[bool]
    mask: Mapped[str] = mapped_column(Word)
    # Counting the attended pairs takes time in proportion to q_len: once a problem, not once a page.
    forward_flops: Mapped[float] = mapped_column(Double)


class JobRow(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "state", "created"),
        Index(None, "device_key", "problem_key"),
        Index(None, "created", "id"),
    )

    id: Mapped[str] = mapped_column(Key, primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key))
    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key))
    budget: Mapped[Any] = mapped_column(Document)
    state: Mapped[str] = mapped_column(Word)
    progress: Mapped[float] = mapped_column(Double)
    message: Mapped[str] = mapped_column(Text)
    attempt: Mapped[int]
    best_candidate: Mapped[Any | None] = mapped_column(Document)
    best_ms: Mapped[float | None] = mapped_column(Double)
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    started: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished: Mapped[datetime | None] = mapped_column(UtcDateTime)
    # Who runs it, and until when that is believed without a heartbeat; both null for `tilewise tune`.
    lease_owner: Mapped[str | None] = mapped_column(Key)
    lease_expires: Mapped[datetime | None] = mapped_column(UtcDateTime)


class JobEventRow(Base):
    """What happened to a job, in order: what a watcher that lost its connection catches up with."""

    __tablename__ = "job_events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey(JobRow.id))
    attempt: Mapped[int]
    state: Mapped[str] = mapped_column(Word)
    progress: Mapped[float] = mapped_column(Double)
    message: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class TrialRow(Base):
    __tablename__ = "trials"
    # One index per filter of the list, each with the order that its pages go by.
    __table_args__ = (
        Index(None, "device_key", "problem_key", "id"),
        Index(None, "problem_key", "id"),
        Index(None, "backend", "id"),
        Index(None, "outcome", "id"),
        Index(None, "job_id", "id"),
        Index(None, "problem_key", "median_ms", "id"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key))
    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key))
    software_digest: Mapped[str] = mapped_column(ForeignKey(SoftwareRow.digest))
    job_id: Mapped[str | None] = mapped_column(ForeignKey(JobRow.id))
    attempt: Mapped[int]
    backend: Mapped[str] = mapped_column(Key)
    candidate: Mapped[Any] = mapped_column(Document)
    candidate_digest: Mapped[str] = mapped_column(Digest)
    stage: Mapped[str] = mapped_column(Word)
    outcome: Mapped[str] = mapped_column(Word)
    median_ms: Mapped[float | None] = mapped_column(Double)
    ratio: Mapped[float | None] = mapped_column(Double)
    measurement: Mapped[Any | None] = mapped_column(Document)
    error: Mapped[Any | None] = mapped_column(Document)
    message: Mapped[str] = mapped_column(Text)
    seconds: Mapped[float] = mapped_column(Double)
    tried: Mapped[datetime] = mapped_column(UtcDateTime)


class AnswerRow(Base):
    """The standing answer. The document says everything; the columns after it are there to filter and sort by."""

    __tablename__ = "answers"
    __table_args__ = (Index(None, "updated"),)

    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key), primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key), primary_key=True)
    version: Mapped[int]
    software_digest: Mapped[str] = mapped_column(ForeignKey(SoftwareRow.digest))
    updated: Mapped[datetime] = mapped_column(UtcDateTime)
    document: Mapped[Any] = mapped_column(Document)
    backend: Mapped[str] = mapped_column(Key)
    # the kernels of its plan, `triton:hopper_forward triton:triton_dq`: what decides which software makes it stale
    kernels: Mapped[str] = mapped_column(Text, server_default=text("''"))
    expected_ms: Mapped[float | None] = mapped_column(Double)
    baseline_ms: Mapped[float | None] = mapped_column(Double)
    default_speedup: Mapped[float | None] = mapped_column(Double)
    trials: Mapped[int]
    measured: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AnswerChangeRow(Base):
    """Every version an answer ever had, and why it came about; the newest equals the standing answer."""

    __tablename__ = "answer_changes"
    __table_args__ = (
        ForeignKeyConstraint(["device_key", "problem_key"], [AnswerRow.device_key, AnswerRow.problem_key]),
        UniqueConstraint("device_key", "problem_key", "version"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    device_key: Mapped[str] = mapped_column(Key)
    problem_key: Mapped[str] = mapped_column(Key)
    version: Mapped[int]
    reason: Mapped[str] = mapped_column(Text)
    changed: Mapped[datetime] = mapped_column(UtcDateTime)
    document: Mapped[Any] = mapped_column(Document)


class SnapshotRow(Base):
    """A frozen snapshot by its id. The file is what was hashed, gzipped, and goes out as it is."""

    __tablename__ = "snapshots"
    __table_args__ = (Index(None, "created", "id"),)

    id: Mapped[str] = mapped_column(Digest, primary_key=True)
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    answers: Mapped[int]
    note: Mapped[str] = mapped_column(Text)
    file: Mapped[bytes] = mapped_column(LargeBinary)


class SentSnapshotRow(Base):
    """A snapshot that went out without being frozen, and when it was last sent or reported as used."""

    __tablename__ = "sent_snapshots"
    __table_args__ = (Index(None, "used", "id"),)

    id: Mapped[str] = mapped_column(Digest, primary_key=True)
    used: Mapped[datetime] = mapped_column(UtcDateTime)
    file: Mapped[bytes] = mapped_column(LargeBinary)


class SnapshotEntryRow(Base):
    """Which version of which answer a snapshot holds, to find the snapshots of an answer and to compare two."""

    __tablename__ = "snapshot_entries"
    __table_args__ = (Index(None, "device_key", "problem_key"),)

    snapshot_id: Mapped[str] = mapped_column(ForeignKey(SnapshotRow.id), primary_key=True)
    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key), primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key), primary_key=True)
    version: Mapped[int]


class ChannelRow(Base):
    """A name that points at a snapshot, and can be moved."""

    __tablename__ = "channels"

    name: Mapped[str] = mapped_column(Digest, primary_key=True)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey(SnapshotRow.id))
    changed: Mapped[datetime] = mapped_column(UtcDateTime)


class ChannelChangeRow(Base):
    """Everything that a channel ever pointed at, who moved it and why."""

    __tablename__ = "channel_changes"
    __table_args__ = (Index(None, "name", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    name: Mapped[str] = mapped_column(ForeignKey(ChannelRow.name))
    snapshot_id: Mapped[str] = mapped_column(ForeignKey(SnapshotRow.id))
    previous_id: Mapped[str | None] = mapped_column(ForeignKey(SnapshotRow.id))
    reason: Mapped[str] = mapped_column(Text)
    actor: Mapped[str] = mapped_column(Key)
    changed: Mapped[datetime] = mapped_column(UtcDateTime)


class DemandRow(Base):
    """What clients reported: calls by bucket of the problem and by how well they were answered."""

    __tablename__ = "demand"
    __table_args__ = (Index(None, "last"),)

    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key), primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key), primary_key=True)
    match: Mapped[str] = mapped_column(Word, primary_key=True)
    calls: Mapped[int] = mapped_column(BigInteger)
    reports: Mapped[int] = mapped_column(BigInteger)
    snapshot_id: Mapped[str | None] = mapped_column(Digest)
    first: Mapped[datetime] = mapped_column(UtcDateTime)
    last: Mapped[datetime] = mapped_column(UtcDateTime)


class PinRow(Base):
    """Which snapshot ran on which device, and which token reported it. The snapshot may be none that is kept here."""

    __tablename__ = "pins"

    snapshot_id: Mapped[str] = mapped_column(Digest, primary_key=True)
    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key), primary_key=True)
    reporter: Mapped[str] = mapped_column(Key, primary_key=True)
    reports: Mapped[int] = mapped_column(BigInteger)
    first: Mapped[datetime] = mapped_column(UtcDateTime)
    last: Mapped[datetime] = mapped_column(UtcDateTime)


class TokenRow(Base):
    """A bearer token without its secret, of which only the SHA-256 is kept."""

    __tablename__ = "tokens"

    id: Mapped[str] = mapped_column(Word, primary_key=True)
    name: Mapped[str] = mapped_column(Key)
    scopes: Mapped[str] = mapped_column(Key)
    digest: Mapped[str] = mapped_column(Digest)
    created: Mapped[datetime] = mapped_column(UtcDateTime)
    expires: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked: Mapped[datetime | None] = mapped_column(UtcDateTime)


class AuditRow(Base):
    """Who changed what that others rely on: jobs, snapshots, channels, tokens."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    actor: Mapped[str] = mapped_column(Key)
    action: Mapped[str] = mapped_column(Key)
    subject: Mapped[str] = mapped_column(Key)
    detail: Mapped[str] = mapped_column(Text)
