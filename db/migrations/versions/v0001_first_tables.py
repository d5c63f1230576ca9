"""The first tables: devices, software, problems, jobs, trials, answers and the history of answers.

Revision 0001.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "devices",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("document", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("key", name="pk_devices"),
    )
    op.create_table(
        "problems",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("pass", sa.String(length=32), nullable=False),
        sa.Column("dtype", sa.String(length=32), nullable=False),
        sa.Column("batch", sa.BigInteger(), nullable=False),
        sa.Column("heads", sa.BigInteger(), nullable=False),
        sa.Column("kv_heads", sa.BigInteger(), nullable=False),
        sa.Column("q_len", sa.BigInteger(), nullable=False),
        sa.Column("kv_len", sa.BigInteger(), nullable=False),
        sa.Column("head_dim", sa.BigInteger(), nullable=False),
        sa.Column("v_head_dim", sa.BigInteger(), nullable=False),
        sa.Column("causal", sa.Boolean(), nullable=False),
        sa.Column("mask", sa.String(length=32), nullable=False),
        sa.Column("forward_flops", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_problems"),
    )
    op.create_table(
        "software",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_software"),
    )
    op.create_table(
        "answers",
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("software_digest", sa.String(length=64), nullable=False),
        sa.Column("updated", sa.DateTime(timezone=True), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("backend", sa.String(length=255), nullable=False),
        sa.Column("expected_ms", sa.Double(), nullable=True),
        sa.Column("baseline_ms", sa.Double(), nullable=True),
        sa.Column("trials", sa.Integer(), nullable=False),
        sa.Column("measured", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_answers_device_key_devices"),
        sa.ForeignKeyConstraint(["problem_key"], ["problems.key"], name="fk_answers_problem_key_problems"),
        sa.ForeignKeyConstraint(["software_digest"], ["software.digest"], name="fk_answers_software_digest_software"),
        sa.PrimaryKeyConstraint("device_key", "problem_key", name="pk_answers"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("budget", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("progress", sa.Double(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("best_candidate", sa.JSON(), nullable=True),
        sa.Column("best_ms", sa.Double(), nullable=True),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_jobs_device_key_devices"),
        sa.ForeignKeyConstraint(["problem_key"], ["problems.key"], name="fk_jobs_problem_key_problems"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_table(
        "answer_changes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("changed", sa.DateTime(timezone=True), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_key", "problem_key"],
            ["answers.device_key", "answers.problem_key"],
            name="fk_answer_changes_device_key_problem_key_answers",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_answer_changes"),
        sa.UniqueConstraint(
            "device_key", "problem_key", "version", name="uq_answer_changes_device_key_problem_key_version"
        ),
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("problem_key", sa.String(length=255), nullable=False),
        sa.Column("device_key", sa.String(length=255), nullable=False),
        sa.Column("software_digest", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("backend", sa.String(length=255), nullable=False),
        sa.Column("candidate", sa.JSON(), nullable=False),
        sa.Column("candidate_digest", sa.String(length=64), nullable=False),
        sa.Column("stage", sa.String(length=32), nullable=False),
        sa.Column("outcome", sa.String(length=32), nullable=False),
        sa.Column("median_ms", sa.Double(), nullable=True),
        sa.Column("ratio", sa.Double(), nullable=True),
        sa.Column("measurement", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("tried", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["device_key"], ["devices.key"], name="fk_trials_device_key_devices"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_trials_job_id_jobs"),
        sa.ForeignKeyConstraint(["problem_key"], ["problems.key"], name="fk_trials_problem_key_problems"),
        sa.ForeignKeyConstraint(["software_digest"], ["software.digest"], name="fk_trials_software_digest_software"),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
    )
    op.create_index("ix_answers_updated", "answers", ["updated"])
    op.create_index("ix_jobs_device_key_problem_key", "jobs", ["device_key", "problem_key"])
    op.create_index("ix_jobs_state_created", "jobs", ["state", "created"])
    op.create_index("ix_trials_device_key_problem_key_id", "trials", ["device_key", "problem_key", "id"])
    op.create_index("ix_trials_job_id", "trials", ["job_id"])


def downgrade() -> None:
    op.drop_table("trials")
    op.drop_table("answer_changes")
    op.drop_table("jobs")
    op.drop_table("answers")
    op.drop_table("software")
    op.drop_table("problems")
    op.drop_table("devices")
