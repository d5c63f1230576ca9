"""Who runs which snapshot, as reported.

Revision 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pins",
        sa.Column("snapshot_id", sa.String(length=64), nullable=False),
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("reporter", sa.String(length=255), nullable=False),
        sa.Column("reports", sa.BigInteger(), nullable=False),
        sa.Column("first", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("snapshot_id", "device_key", "reporter", name="pk_pins"),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_pins_device_key_devices"),
    )


def downgrade() -> None:
    op.drop_table("pins")
