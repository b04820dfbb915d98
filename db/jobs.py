"""Jobs: written with their shards, looked up, cancelled, settled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, case, func, insert, or_, select, true, update

from db import events, tables
from db.devices import Device
from db.engine import Database
from db.tables import one_of
from farm.errors import UsageError
from farm.jobs import LIVE, AttemptState, Job, JobSpec, JobState, ResultState, ShardState

_SPEC = TypeAdapter(JobSpec)
_ONE = select(tables.job).where(tables.job.c.id == bindparam("job"))
_STATE = select(tables.job.c.state).where(tables.job.c.id == bindparam("job"))
ACTIVE = (JobState.PENDING, JobState.RUNNING)
UNFINISHED = (ShardState.PENDING, ShardState.ASSIGNED, ShardState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """A host that is skipped for a job."""

    job_id: int
    host: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a job is, counted from rows."""

    job: Job
    finished_samples: int  #: of done shards
    failed_samples: int
    shards: int
    open_shards: int
    live_attempts: int


def create(
    conn: Connection,
    database: Database,
    spec: JobSpec,
    shards: Sequence[tuple[int, int]],
    submission: int | None = None,
) -> Job:
    """Write a job and its shards, perhaps one of a `submission` that began with that job; nothing is assigned yet."""
    now = database.now(conn)
    job_id = conn.execute(
        insert(tables.job)
        .values(
            state=JobState.PENDING.value,
            model=spec.model,
            bs=spec.bs,
            backend=spec.artifact.backend,
            soc=spec.artifact.chip,
            artifact_sha256=spec.artifact.sha256,
            samples=spec.samples,
            spec=_SPEC.dump_json(spec).decode(),
            created=now,
            priority=spec.priority,
            devices=f",{','.join(spec.devices)}," if spec.devices else "",
            submission=submission,
        )
        .returning(tables.job.c.id)
    ).scalar_one()
    conn.execute(
        insert(tables.shard),
        [
            {"job_id": job_id, "idx": idx, "start": start, "stop": stop, "state": ShardState.PENDING.value}
            for idx, (start, stop) in enumerate(shards)
        ],
    )
    events.record(conn, now, "job_submitted", f"{len(shards)} shards", job_id=job_id)
    return get(conn, job_id)


def get(conn: Connection, job_id: int) -> Job:
    row = conn.execute(_ONE, {"job": job_id}).one_or_none()
    if row is None:
        raise UsageError(f"there is no job {job_id}: farm jobs lists them")
    return _record(row)


def state(conn: Connection, job_id: int) -> JobState:
    """Where a job stands, for those who ask often."""
    return JobState(conn.execute(_STATE, {"job": job_id}).scalar_one())


def recent(conn: Connection, limit: int) -> list[Job]:
    """The newest jobs, newest first."""
    return several(conn, true(), (tables.job.c.id.desc(),), limit)


def of_speed(conn: Connection, artifact_sha256: str, device: str) -> list[Job]:
    """The newest jobs of speed of an artifact on one device that were done, newest first."""
    job = tables.job.c
    which = and_(
        job.artifact_sha256 == artifact_sha256,
        job.samples == 0,
        job.state == JobState.DONE.value,
        job.devices == f",{device},",
    )
    return several(conn, which, (job.id.desc(),), 20)


def alike(conn: Connection, spec: JobSpec) -> list[Job]:
    """Jobs that evaluate the same samples with the same artifact and choice of devices, done or not; newest first."""
    job = tables.job.c
    states = (*ACTIVE, JobState.DONE, JobState.DONE_WITH_ERRORS)
    which = and_(job.artifact_sha256 == spec.artifact.sha256, job.samples == spec.samples, one_of(job.state, states))
    found = several(conn, which, (job.id.desc(),), 100)
    wanted = (spec.manifest_digest, spec.devices)
    return [each for each in found if (each.spec.manifest_digest, each.spec.devices) == wanted]


def several(
    conn: Connection, which: ColumnElement[bool], order: Sequence[ColumnElement[Any]], limit: int | None = None
) -> list[Job]:
    return [_record(row) for row in conn.execute(select(tables.job).where(which).order_by(*order).limit(limit))]


def is_active() -> ColumnElement[bool]:
    return one_of(tables.job.c.state, ACTIVE)


def has_pending() -> ColumnElement[bool]:
    """Of a job in a query: whether one of its shards waits for a device."""
    return _has_one([ShardState.PENDING])


def _has_one(states: Iterable[ShardState]) -> ColumnElement[bool]:
    shard = tables.shard.c
    return select(shard.id).where(shard.job_id == tables.job.c.id, one_of(shard.state, states)).exists()


def suits() -> ColumnElement[bool]:
    """
    Of a job in a query: whether a device may serve it: backend, chip, choice of devices, what its host holds.

    Which device, `suiting` tells the query.
    """
    job, unfit = tables.job.c, tables.unfit.c
    return and_(
        job.backend.in_(bindparam("backends", expanding=True)),
        job.soc.in_(["", bindparam("soc")]),
        or_(job.devices == "", job.devices.like(bindparam("named"), escape="/")),
        ~select(unfit.host).where(unfit.job_id == job.id, unfit.host == bindparam("host")).exists(),
    )


def suiting(device: Device) -> Mapping[str, Any]:
    """Parameters of a query that asks what `suits` a device."""
    name = re.sub(r"[/%_]", r"/\g<0>", device.name)
    return {"backends": device.backends, "soc": device.soc, "named": f"%,{name},%", "host": device.host}


_FINISHED_BUT_OPEN = select(tables.job.c.id).where(is_active(), ~_has_one(UNFINISHED))


def unfit_hosts(conn: Connection, job_id: int | None = None) -> list[Unfit]:
    """Which hosts cannot do which active jobs, and why."""
    unfit = tables.unfit.c
    query = select(tables.unfit).join(tables.job, tables.job.c.id == unfit.job_id).where(is_active())
    if job_id is not None:
        query = query.where(unfit.job_id == job_id)
    rows = conn.execute(query.order_by(unfit.job_id, unfit.host))
    return [Unfit(job_id=row.job_id, host=row.host, reason=row.reason, at=row.at) for row in rows]


def fit_again(conn: Connection, database: Database, job_id: int, host: str) -> None:
    """A host has now what a job needs."""
    unfit = tables.unfit.c
    gone = conn.execute(tables.unfit.delete().where(unfit.job_id == job_id, unfit.host == host))
    if gone.rowcount:
        events.record(conn, database.now(conn), "host_fit", f"{host} has what it lacked", job_id=job_id)


def progress(conn: Connection, job_id: int) -> Progress:
    shard, attempt, result = tables.shard.c, tables.attempt.c, tables.result.c
    is_open = one_of(shard.state, UNFINISHED)
    finished, shards, open_shards = conn.execute(
        select(
            func.coalesce(func.sum(_if(shard.state == ShardState.DONE.value, shard.stop - shard.start)), 0),
            func.count(),
            func.coalesce(func.sum(_if(is_open, 1)), 0),
        ).where(shard.job_id == job_id)
    ).one()
    failed = conn.scalar(
        select(func.count()).where(
            result.job_id == job_id, result.superseded == 0, result.state == ResultState.FAILED.value
        )
    )
    live = conn.scalar(select(func.count()).where(attempt.job_id == job_id, one_of(attempt.state, LIVE)))
    return Progress(
        job=get(conn, job_id),
        finished_samples=int(finished),
        failed_samples=failed or 0,
        shards=shards,
        open_shards=int(open_shards),
        live_attempts=live or 0,
    )


def cancel(conn: Connection, database: Database, job_id: int) -> bool:
    """End a job as cancelled, its live attempts lost. False when it had ended already."""
    return _end(conn, database, job_id, JobState.CANCELLED, "cancelled by its user", ShardState.CANCELLED)


def fail(conn: Connection, database: Database, job_id: int, error: str) -> bool:
    """End a job as failed: no device can finish it. False when it had ended already."""
    return _end(conn, database, job_id, JobState.FAILED, error, ShardState.FAILED)


def _end(
    conn: Connection, database: Database, job_id: int, state: JobState, error: str, shard_state: ShardState
) -> bool:
    now = database.now(conn)
    ended = conn.execute(
        update(tables.job)
        .where(tables.job.c.id == job_id, is_active())
        .values(state=state.value, finished=now, error=error)
    )
    if ended.rowcount != 1:
        return False
    conn.execute(  # before the attempts: one that is being made becomes visible when its shard is free
        update(tables.shard)
        .where(tables.shard.c.job_id == job_id, one_of(tables.shard.c.state, UNFINISHED))
        .values(state=shard_state.value)
    )
    conn.execute(
        update(tables.attempt)
        .where(tables.attempt.c.job_id == job_id, one_of(tables.attempt.c.state, LIVE))
        .values(state=AttemptState.LOST.value, ended=now, reason=f"job {state.value}")
    )
    events.record(conn, now, f"job_{state.value}", error, job_id=job_id)
    return True


def hold(conn: Connection, job_id: int) -> None:
    """Have a job's end to oneself until the transaction ends; its shards go on."""
    conn.execute(select(tables.job.c.id).where(tables.job.c.id == job_id).with_for_update(key_share=True))


def finished_but_open(conn: Connection) -> list[int]:
    """Jobs whose shards have all ended although they have not."""
    return list(conn.execute(_FINISHED_BUT_OPEN).scalars())


def settle(conn: Connection, database: Database, job_id: int) -> JobState:
    """
    End a job whose shards are all done, after counting: scored + failed = total, else it ends as failed.

    Safe to call by many at once; whoever comes second changes nothing.
    """
    result = tables.result.c
    by_state = (
        select(result.state, func.count()).where(result.job_id == job_id, result.superseded == 0).group_by(result.state)
    )
    hold(conn, job_id)  # nobody settles or reopens it meanwhile
    job = get(conn, job_id)
    if job.state.is_final or job_id not in finished_but_open(conn):
        return job.state
    counts = {row[0]: row[1] for row in conn.execute(by_state)}  # after that: shards that are done have all their rows
    found = sum(counts.values())
    if found != job.spec.samples:
        error = f"refused to settle: {found} result rows for {job.spec.samples} samples; the database was altered"
        fail(conn, database, job_id, error)
        return JobState.FAILED
    state = JobState.DONE_WITH_ERRORS if counts.get(ResultState.FAILED.value) else JobState.DONE
    now = database.now(conn)
    settled = conn.execute(
        update(tables.job).where(tables.job.c.id == job_id, is_active()).values(state=state.value, finished=now)
    )
    if settled.rowcount == 1:
        what = job.spec.extent if job.spec.loop else f"{found} samples"
        events.record(conn, now, f"job_{state.value}", what, job_id=job_id)
        return state
    return get(conn, job_id).state


def _record(row: Row[Any]) -> Job:
    fields = row._mapping
    return Job(
        id=fields["id"],
        state=JobState(fields["state"]),
        spec=_spec(fields["spec"]),
        created=fields["created"],
        finished=fields["finished"],
        error=fields["error"],
    )


@lru_cache(maxsize=256)
def _spec(text: str) -> JobSpec:
    """Never changed once it is written, and asked for with every shard."""
    return _SPEC.validate_json(text)


def _if(condition: ColumnElement[bool], value: ColumnElement[int] | int) -> ColumnElement[int]:
    return case((condition, value), else_=0)
