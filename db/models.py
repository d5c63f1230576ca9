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
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
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
    __table_args__ = (Index(None, "state", "created"), Index(None, "device_key", "problem_key"))

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


class TrialRow(Base):
    __tablename__ = "trials"
    __table_args__ = (Index(None, "device_key", "problem_key", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey(ProblemRow.key))
    device_key: Mapped[str] = mapped_column(ForeignKey(DeviceRow.key))
    software_digest: Mapped[str] = mapped_column(ForeignKey(SoftwareRow.digest))
    job_id: Mapped[str | None] = mapped_column(ForeignKey(JobRow.id), index=True)
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
    expected_ms: Mapped[float | None] = mapped_column(Double)
    baseline_ms: Mapped[float | None] = mapped_column(Double)
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
