"""What a service needs: leases and events of jobs, frozen snapshots and channels, demand, tokens, an audit trail.

Revision 0002, after 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("action", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answers", sa.Integer(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("file", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
    )
    op.create_index("ix_snapshots_created_id", "snapshots", ["created", "id"])

    op.create_table(
        "tokens",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("scopes", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
    )
    op.create_table(
        "channels",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=False),
        sa.Column("changed", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_channels_snapshot_id_snapshots"),
        sa.PrimaryKeyConstraint("name", name="pk_channels"),
    )
    op.create_table(
        "demand",
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("match", sa.String(length=32), nullable=False),
        sa.Column("calls", sa.BigInteger(), nullable=False),
        sa.Column("reports", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=True),
        sa.Column("first", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_demand_device_key_devices"),
        sa.ForeignKeyConstraint(["problem_key"], ["problems.key"], name="fk_demand_problem_key_problems"),
        sa.PrimaryKeyConstraint("device_key", "problem_key", "match", name="pk_demand"),
    )
    op.create_index("ix_demand_last", "demand", ["last"])

    op.create_table(
        "snapshot_entries",
        sa.Column("snapshot_id", sa.String(length=64), nullable=False),
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_snapshot_entries_device_key_devices"),
        sa.ForeignKeyConstraint(["problem_key"], ["problems.key"], name="fk_snapshot_entries_problem_key_problems"),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_snapshot_entries_snapshot_id_snapshots"),
        sa.PrimaryKeyConstraint("snapshot_id", "device_key", "problem_key", name="pk_snapshot_entries"),
    )
    op.create_index("ix_snapshot_entries_device_key_problem_key", "snapshot_entries", ["device_key", "problem_key"])

    op.create_table(
        "channel_changes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("snapshot_id", sa.String(length=64), nullable=False),
        sa.Column("previous_id", sa.String(length=64), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("changed", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["name"], ["channels.name"], name="fk_channel_changes_name_channels"),
        sa.ForeignKeyConstraint(["previous_id"], ["snapshots.id"], name="fk_channel_changes_previous_id_snapshots"),
        sa.ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"], name="fk_channel_changes_snapshot_id_snapshots"),
        sa.PrimaryKeyConstraint("id", name="pk_channel_changes"),
    )
    op.create_index("ix_channel_changes_name_id", "channel_changes", ["name", "id"])

    op.create_table(
        "job_events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id_jobs"),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
    )
    op.create_index("ix_job_events_job_id_id", "job_events", ["job_id", "id"])

    op.add_column("jobs", sa.Column("lease_owner", sa.String(length=255), nullable=True))
    op.add_column("jobs", sa.Column("lease_expires", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_jobs_created_id", "jobs", ["created", "id"])

    op.drop_index("ix_trials_job_id", "trials")
    op.create_index("ix_trials_backend_id", "trials", ["backend", "id"])
    op.create_index("ix_trials_job_id_id", "trials", ["job_id", "id"])
    op.create_index("ix_trials_problem_key_median_ms_id", "trials", ["problem_key", "median_ms", "id"])
    op.create_index("ix_trials_outcome_id", "trials", ["outcome", "id"])
    op.create_index("ix_trials_problem_key_id", "trials", ["problem_key", "id"])


def downgrade() -> None:
    op.drop_index("ix_trials_problem_key_id", "trials")
    op.drop_index("ix_trials_outcome_id", "trials")
    op.drop_index("ix_trials_problem_key_median_ms_id", "trials")
    op.drop_index("ix_trials_job_id_id", "trials")
    op.drop_index("ix_trials_backend_id", "trials")
    op.create_index("ix_trials_job_id", "trials", ["job_id"])
    op.drop_index("ix_jobs_created_id", "jobs")
    op.drop_column("jobs", "lease_expires")
    op.drop_column("jobs", "lease_owner")
    op.drop_table("job_events")
    op.drop_table("channel_changes")
    op.drop_table("snapshot_entries")
    op.drop_table("demand")
    op.drop_table("channels")
    op.drop_table("tokens")
    op.drop_table("snapshots")
    op.drop_table("audit")
