"""The time that leases are kept by: the database's own, for the clocks of workers differ and jump."""

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tilewise.domain.trial import now


def database_now(session: Session) -> datetime:
    """Return the moment by the server's clock; a SQLite file has none but that of this machine."""
    if session.get_bind().dialect.name != "postgresql":
        return now()
    moment: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return moment
