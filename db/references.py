"""The rows that others point at: devices, problems and software, written when first named."""

from typing import Any

from sqlalchemy import Insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from tilewise.domain import codec
from tilewise.domain.device import check_device_key
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software

from .models import Base, DeviceRow, ProblemRow, SoftwareRow

# PostgreSQL takes no NUL in a text, and a compiler's crash can print megabytes.
MAX_TEXT = 20_000


def insert_new(session: Session, row: type[Base], values: dict[str, Any]) -> Insert:
    """Return the statement that inserts `values` unless their key is taken."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(row).values(values).on_conflict_do_nothing()
    return sqlite.insert(row).values(values).on_conflict_do_nothing()


def clean(text: str) -> str:
    """Return `text` as any database takes it: no NUL, no half characters, the middle of a very long one left out."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def device(session: Session, key: str) -> str:
    """Return `key` after making sure that its row exists; raises DeviceError where it is no device key."""
    if session.scalar(select(DeviceRow.key).where(DeviceRow.key == check_device_key(key))) is None:
        session.execute(insert_new(session, DeviceRow, {"key": key, "document": None}))
    return key


def problem(session: Session, problem: Problem) -> str:
    """Return the problem's key after making sure that its row exists."""
    key = problem.key
    if session.scalar(select(ProblemRow.key).where(ProblemRow.key == key)) is None:
        names = ("dtype", "batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "causal", "mask")
        values = {name: getattr(problem, name) for name in names}
        values |= {"key": key, "pass_": problem.pass_, "forward_flops": float(problem.forward_flops)}
        session.execute(insert_new(session, ProblemRow, values))
    return key


def software(session: Session, software: Software) -> str:
    """Return the digest of `software` after making sure that its row exists."""
    found = codec.digest(software)
    if session.scalar(select(SoftwareRow.digest).where(SoftwareRow.digest == found)) is None:
        values = {"digest": found, "document": codec.to_json(software)}
        session.execute(insert_new(session, SoftwareRow, values))
    return found
