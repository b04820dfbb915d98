"""What segmentation makes of an image."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "segments",
        sa.Column("job_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column(
            "superseded",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            server_default="0",
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("label_map", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("areas", sa.LargeBinary(), nullable=False),
        sa.Column("merge_ms", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_segments_job_id")),
        sa.PrimaryKeyConstraint("job_id", "name", "superseded", name=op.f("pk_segments")),
    )
