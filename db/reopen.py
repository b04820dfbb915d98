"""
Doing again what was done: failed samples, jobs that failed or were cancelled, and what a distrusted device computed.

Rows that were there stay, superseded; they and the states of their shards change in one transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, func, select, update

from db import events, jobs, tables
from db.engine import Database
from farm.errors import UsageError
from farm.jobs import AttemptState, JobState, ResultState, ShardState

a = tables.attempt.c
s = tables.shard.c
r = tables.result.c

_STOPPED = (JobState.FAILED, JobState.CANCELLED)
_GOING = (JobState.PENDING, JobState.RUNNING, JobState.DONE, JobState.DONE_WITH_ERRORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reopened:
    """What will be computed again."""

    jobs: tuple[int, ...]
    shards: int
    samples: int


def retry(conn: Connection, database: Database, job_id: int) -> int:
    """Open the shards with failed samples of a job that is done; the answer is how many. `UsageError` if it is not."""
    job = jobs.get(conn, job_id)
    if job.state not in (JobState.DONE, JobState.DONE_WITH_ERRORS):
        hint = "farm resume goes on with it" if job.state.is_final else "it is not finished yet"
        raise UsageError(f"job {job_id} is {job.state.value}: {hint}")
    failed = select(r.attempt_id).where(r.job_id == job_id, r.superseded == 0, r.state == ResultState.FAILED.value)
    opened = _open(conn, database, and_(s.job_id == job_id, s.winner.in_(failed)), "its samples are tried again")
    if opened.shards:
        _go_on(conn, database, job_id, _GOING, f"{opened.shards} shards with failed samples are tried again")
    return opened.shards


def resume(conn: Connection, database: Database, job_id: int) -> int:
    """Open what a failed or cancelled job left undone; the answer is how many shards. `UsageError` for another job."""
    job = jobs.get(conn, job_id)
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        hint = "farm retry tries its failed samples again" if job.state.is_final else "it goes on by itself"
        raise UsageError(f"job {job_id} is {job.state.value}: {hint}")
    _go_on(conn, database, job_id, _STOPPED, "resumed by its user")
    left: int = conn.execute(
        update(tables.shard)
        .where(s.job_id == job_id, tables.one_of(s.state, [ShardState.FAILED, ShardState.CANCELLED]))
        .values(state=ShardState.PENDING.value, winner=None, since=_tries())
    ).rowcount
    rows = select(r.attempt_id, func.count().label("rows")).where(r.job_id == job_id, r.superseded == 0)
    counted = rows.group_by(r.attempt_id).subquery()
    incomplete = (
        select(s.id)
        .outerjoin(counted, counted.c.attempt_id == s.winner)
        .where(s.job_id == job_id, s.state == ShardState.DONE.value)
        .where(func.coalesce(counted.c.rows, 0) != s.stop - s.start)
    )
    holes = _open(conn, database, s.id.in_(incomplete), "its rows are incomplete").shards
    conn.execute(tables.unfit.delete().where(tables.unfit.c.job_id == job_id))
    return left + holes


def distrust(
    conn: Connection, database: Database, device: str, since: float, why: str, *, artifact_sha256: str | None = None
) -> Reopened:
    """Open all shards that a device won since then (with one artifact only, if it is named), of finished jobs, too."""
    won = and_(a.device == device, a.state == AttemptState.WON.value, a.ended >= since)
    # A job of speed is for this device alone, and says nothing that could be wrong.
    winners = select(a.id).join(tables.job, tables.job.c.id == a.job_id).where(won, tables.job.c.samples > 0)
    if artifact_sha256 is not None:
        winners = winners.where(tables.job.c.artifact_sha256 == artifact_sha256)
    opened = _open(conn, database, s.winner.in_(winners), f"{device} is distrusted: {why}")
    for job_id in opened.jobs:
        _go_on(conn, database, job_id, _GOING, f"what {device} computed is computed again: {why}")
    return opened


def _open(conn: Connection, database: Database, which: ColumnElement[bool], why: str) -> Reopened:
    """Supersede the rows of done shards and have them wait for a device, or, where their job has ended, for its end."""
    now = database.now(conn)
    found = conn.execute(
        select(s.id, s.job_id, s.winner, s.start, s.stop, tables.job.c.state)
        .join(tables.job, tables.job.c.id == s.job_id)
        .where(s.state == ShardState.DONE.value, which)
        .order_by(s.id)
        .with_for_update(of=tables.shard)
    ).all()
    for row in found:
        _supersede(conn, row.job_id, row.winner)
        ended = {JobState.FAILED.value: ShardState.FAILED, JobState.CANCELLED.value: ShardState.CANCELLED}
        state = ended.get(row.state, ShardState.PENDING)
        conn.execute(update(tables.shard).where(s.id == row.id).values(state=state.value, winner=None, since=_tries()))
        conn.execute(update(tables.attempt).where(a.id == row.winner).values(state=AttemptState.LOST.value, reason=why))
        events.record(conn, now, "shard_reopened", why, job_id=row.job_id, shard_id=row.id, attempt_id=row.winner)
    return Reopened(
        jobs=tuple(sorted({row.job_id for row in found})),
        shards=len(found),
        samples=sum(row.stop - row.start for row in found),
    )


def _supersede(conn: Connection, job_id: int, winner: int) -> None:
    """Have an attempt's rows count no more; they stay, under its number."""
    g = tables.segments.c
    mine = and_(r.job_id == job_id, r.attempt_id == winner, r.superseded == 0)
    names = select(r.name).where(mine)
    conn.execute(
        update(tables.segments)
        .where(g.job_id == job_id, g.superseded == 0, g.name.in_(names))
        .values(superseded=winner)
    )
    conn.execute(update(tables.result).where(mine).values(superseded=winner))


def _go_on(conn: Connection, database: Database, job_id: int, states: Sequence[JobState], text: str) -> None:
    """Have a job want work again, if it is in one of these states."""
    job = tables.job.c
    again = conn.execute(
        update(tables.job)
        .where(job.id == job_id, tables.one_of(job.state, states))
        .values(state=JobState.RUNNING.value, finished=None, error="")
    )
    if again.rowcount:
        events.record(conn, database.now(conn), "job_reopened", text, job_id=job_id)


def _tries() -> ColumnElement[int]:
    """How many attempts a shard has had."""
    return select(func.coalesce(func.max(a.no), 0)).where(a.shard_id == s.id).scalar_subquery()
