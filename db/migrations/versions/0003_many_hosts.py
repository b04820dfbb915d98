"""Priorities, drained devices, hosts unfit for a job, and canaries."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.add_column("job", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("job", sa.Column("devices", sa.Text, nullable=False, server_default=""))
    _keep_choices_of_devices()
    op.add_column("shard", sa.Column("since", sa.Integer, nullable=False, server_default="0"))
    op.add_column("device", sa.Column("kind", sa.String(200), nullable=False, server_default=""))
    op.add_column("device", sa.Column("drained", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("device", sa.Column("quarantines", sa.Integer, nullable=False, server_default="0"))
    op.add_column("device", sa.Column("reason", sa.Text, nullable=False, server_default=""))
    op.drop_index("ix_attempt_device_state", "attempt")
    op.create_index("ix_attempt_state_device", "attempt", ["state", "device"])
    op.create_table(
        "unfit",
        sa.Column("job_id", big, autoincrement=False, nullable=False),
        sa.Column("host", sa.String(64), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_unfit_job_id")),
        sa.PrimaryKeyConstraint("job_id", "host", name=op.f("pk_unfit")),
    )
    op.create_table(
        "canary",
        sa.Column("id", big, nullable=False),
        sa.Column("artifact_sha256", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("device", sa.String(80), nullable=False),
        sa.Column("kind", sa.String(200), nullable=False),
        sa.Column("incarnation", sa.Integer, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("max_abs_diff", sa.Double),
        sa.Column("ms", sa.Double, nullable=False),
        sa.Column("verdict", sa.String(12), nullable=False),
        sa.ForeignKeyConstraint(["device"], ["device.name"], name=op.f("fk_canary_device")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_canary")),
    )
    op.create_index("ix_canary_artifact_sha256_kind_number", "canary", ["artifact_sha256", "kind", "number"])
    op.create_index("ix_canary_device_id", "canary", ["device", "id"])


def _keep_choices_of_devices() -> None:
    """Which devices a job is for, was only in its specification."""
    job = sa.table("job", sa.column("id"), sa.column("spec"), sa.column("devices"))
    conn = op.get_bind()
    for job_id, spec in conn.execute(sa.select(job.c.id, job.c.spec)).all():
        frozen = json.loads(spec)
        if isinstance(frozen, dict) and (devices := frozen.get("devices")):
            conn.execute(sa.update(job).where(job.c.id == job_id).values(devices=f",{','.join(devices)},"))
