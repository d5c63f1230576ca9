"""Run by Alembic with the connection, the metadata and the version table that db/schema.py hands over.

Alembic loads this file by its path, outside any package, so it cannot import its neighbours. There is no offline
mode: the connection is always given, already inside the transaction that holds the lock against other upgrades.
"""

from typing import Any, Literal

from alembic import context


def render_item(kind: str, item: Any, _context: object) -> str | Literal[False]:
    """Write our own column types into a new migration as the plain type below: migrations outlive our classes."""
    if kind == "type" and type(item).__module__.startswith("tilewise."):
        return f"sa.{item.impl_instance!r}"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=context.config.attributes["metadata"],
    version_table=context.config.attributes["version_table"],
    compare_type=True,
    compare_server_default=True,
    render_as_batch=True,
    render_item=render_item,
)
with context.begin_transaction():
    context.run_migrations()
