"""What the list of answers filters and sorts by: the kernels of each plan, and what tuning won over the default config.

Revision 0005, after 0004.
"""

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("answers", sa.Column("kernels", sa.Text(), nullable=False, server_default=sa.text("''")))
    op.add_column("answers", sa.Column("default_speedup", sa.Double(), nullable=True))
    # Finals did not say yet which of their candidates were defaults: those stay null until a problem is tuned again.
    answers = sa.table(
        "answers",
        sa.column("device_key", sa.String()),
        sa.column("problem_key", sa.String()),
        sa.column("document", sa.Text()),
        sa.column("kernels", sa.Text()),
    )
    connection = op.get_bind()
    rows = connection.execute(
        sa.select(answers.c.device_key, answers.c.problem_key, sa.cast(answers.c.document, sa.Text()))
    ).all()
    for device_key, problem_key, document in rows:
        where = (answers.c.device_key == device_key) & (answers.c.problem_key == problem_key)
        connection.execute(sa.update(answers).where(where).values(kernels=_kernels(json.loads(document)["plan"])))


def downgrade() -> None:
    op.drop_column("answers", "default_speedup")
    op.drop_column("answers", "kernels")


def _kernels(plan: dict[str, dict[str, object] | None]) -> str:
    names = set()
    for candidate in plan.values():
        if candidate:
            configs = candidate["configs"]
            kernels = [config["kernel"] for config in configs.values()] if isinstance(configs, dict) else []
            names |= {f"{candidate['backend']}:{kernel}" for kernel in kernels} or {str(candidate["backend"])}
    return " ".join(sorted(names))
