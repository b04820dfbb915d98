"""The chip that a job's artifact is for, and which jobs were submitted together."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    conn = op.get_bind()
    op.add_column("job", sa.Column("soc", sa.String(40), nullable=False, server_default=""))
    there = {column["name"] for column in sa.inspect(conn).get_columns("job")}
    if "submission" not in there:  # 0003 made it for a while
        op.add_column("job", sa.Column("submission", sa.BigInteger().with_variant(sa.Integer, "sqlite")))
    job = sa.table("job", *map(sa.column, ("id", "spec", "soc", "backend")))
    for job_id, spec in conn.execute(sa.select(job.c.id, job.c.spec).where(job.c.backend != "simulated")).all():
        frozen = json.loads(spec)
        artifact = frozen.get("artifact") if isinstance(frozen, dict) else None
        if isinstance(artifact, dict) and (soc := artifact.get("soc")):
            conn.execute(sa.update(job).where(job.c.id == job_id).values(soc=soc))
