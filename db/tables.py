"""
The tables. Times are seconds since the epoch by the database's clock (`db.engine.Database.now`).

`SCHEMA_REVISION` is the newest Alembic revision; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    literal_column,
)

SCHEMA_REVISION = "0004"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Id = BigInteger().with_variant(Integer, "sqlite")

job = Table(
    "job",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("state", String(20), nullable=False),
    Column("model", String(40), nullable=False),
    Column("bs", Integer, nullable=False),
    Column("backend", String(20), nullable=False),
    Column("artifact_sha256", String(64), nullable=False),
    Column("samples", Integer, nullable=False),
    Column("spec", Text, nullable=False),  # JSON of farm.jobs.JobSpec
    Column("created", Double, nullable=False),
    Column("finished", Double),
    Column("error", Text, nullable=False, server_default=""),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("devices", Text, nullable=False, server_default=""),  # ",h:0,h:1," or, for all, nothing
    Column("submission", _Id),  # the first of the jobs submitted with it, if it is not that
    Column("soc", String(40), nullable=False, server_default=""),  # that its devices must have; nothing: any
    Index(None, "state", "id"),
    sqlite_autoincrement=True,
)

shard = Table(
    "shard",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", ForeignKey("job.id"), nullable=False),
    Column("idx", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("stop", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("winner", _Id),  # attempt.id, once done
    Column("since", Integer, nullable=False, server_default="0"),  # attempts up to this number are history
    UniqueConstraint("job_id", "idx"),
    Index(None, "job_id", "state", "idx"),
)

attempt = Table(
    "attempt",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("job_id", ForeignKey("job.id"), nullable=False),
    Column("shard_id", ForeignKey("shard.id"), nullable=False),
    Column("no", Integer, nullable=False),
    Column("device", ForeignKey("device.name"), nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("state", String(20), nullable=False),
    Column("isolating", Boolean, nullable=False),
    Column("assigned", Double, nullable=False),
    Column("rung", Double, nullable=False),  # when its device was last told
    Column("started", Double),
    Column("ended", Double),
    Column("failure", String(20)),
    Column("reason", Text, nullable=False, server_default=""),
    Column("batch_ms", LargeBinary),  # float32 [batches, 3]: h2d, compute, d2h
    Column("budget", Text),  # JSON: ms by stage
    UniqueConstraint("shard_id", "no"),
    Index(None, "state", "device"),
    Index(None, "job_id", "state"),
    sqlite_autoincrement=True,
)

device = Table(
    "device",
    metadata,
    Column("name", String(80), primary_key=True),  # host:3
    Column("host", String(64), nullable=False),
    Column("idx", Integer, nullable=False),
    Column("soc", String(40), nullable=False),
    Column("backends", String(80), nullable=False),  # comma-separated
    Column("state", String(20), nullable=False),
    Column("incarnation", Integer, nullable=False),  # counts the starts of its worker
    Column("pid", Integer, nullable=False),
    Column("pid_started", Double, nullable=False),  # tells a reused pid from the worker
    Column("registered", Double, nullable=False),
    Column("heartbeat", Double, nullable=False),
    Column("strikes", Integer, nullable=False),
    Column("info", Text, nullable=False),  # JSON: what the worker says of itself
    Column("kind", String(200), nullable=False, server_default=""),  # devices of one kind give the same bits
    Column("drained", Boolean, nullable=False, server_default=false()),  # by its user: takes no work
    Column("quarantines", Integer, nullable=False, server_default="0"),  # since it was last seen to be sound
    Column("reason", Text, nullable=False, server_default=""),  # of its quarantine
)

# A host that cannot do a job, for what it holds: bins or artifact missing, or others.
unfit = Table(
    "unfit",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True, autoincrement=False),
    Column("host", String(64), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
)

# What devices answered to inputs that are the same everywhere.
canary = Table(
    "canary",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("artifact_sha256", String(64), nullable=False),
    Column("number", Integer, nullable=False),  # which input
    Column("device", ForeignKey("device.name"), nullable=False),
    Column("kind", String(200), nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("at", Double, nullable=False),
    Column("digest", String(64), nullable=False),  # sha256 of the outputs' bytes
    Column("max_abs_diff", Double),  # to onnxruntime, over the largest magnitude; none without a reference
    Column("ms", Double, nullable=False),
    Column("verdict", String(12), nullable=False),
    Index(None, "artifact_sha256", "kind", "number"),
    Index(None, "device", "id"),
)

result = Table(
    "result",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True, autoincrement=False),
    Column("name", String(255), primary_key=True),
    # 0: the row that counts. A row that was superseded keeps its attempt's id here.
    Column("superseded", _Id, primary_key=True, autoincrement=False, server_default="0"),
    Column("attempt_id", ForeignKey("attempt.id"), nullable=False),
    Column("state", String(10), nullable=False),
    Column("label", Integer, nullable=False),
    Column("rank", Integer),
    *(Column(f"class{i}", SmallInteger) for i in range(1, 6)),
    *(Column(f"score{i}", Double) for i in range(1, 6)),
    Column("reason", Text, nullable=False, server_default=""),
    sqlite_with_rowid=False,
)

# What a scored row of a segmentation job has besides; apart from it, for these are large and seldom read.
segments = Table(
    "segments",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True, autoincrement=False),
    Column("name", String(255), primary_key=True),
    Column("superseded", _Id, primary_key=True, autoincrement=False, server_default="0"),
    Column("height", Integer, nullable=False),
    Column("width", Integer, nullable=False),
    Column("label_map", LargeBinary, nullable=False),  # PNG
    Column("sha256", String(64), nullable=False),  # of the label map's uint8 values
    Column("areas", LargeBinary, nullable=False),  # uint32 [3, 150]: intersecting, predicted, labelled
    Column("merge_ms", Double, nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("id", _Id, primary_key=True),
    Column("at", Double, nullable=False),
    Column("kind", String(30), nullable=False),
    Column("job_id", _Id),
    Column("shard_id", _Id),
    Column("attempt_id", _Id),
    Column("device", String(80)),
    Column("text", Text, nullable=False, server_default=""),
    Index(None, "job_id", "id"),
)


def one_of(column: ColumnElement[str], states: Iterable[Enum]) -> ColumnElement[bool]:
    """Whether a column holds one of these; as literals, for a list of values is put into the text at each execution."""
    return column.in_([literal_column(f"'{state.value}'") for state in states])
