"""Snapshots that were sent to jobs without being frozen, so that a job can pin them later.

Revision 0003, after 0002.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "sent_snapshots",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("used", sa.DateTime(timezone=True), nullable=False),
        sa.Column("file", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sent_snapshots"),
    )
    op.create_index("ix_sent_snapshots_used_id", "sent_snapshots", ["used", "id"])


def downgrade() -> None:
    op.drop_index("ix_sent_snapshots_used_id", "sent_snapshots")
    op.drop_table("sent_snapshots")
