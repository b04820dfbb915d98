"""
The life of a shard: assigned, started, completed or failed, and taken back from whoever vanished.

An attempt is a row with a state of its own; being *live* is its right to write. Every verb here is one conditional
change: it says by its answer whether the caller won, and a caller that lost has written nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, Connection, and_, func, insert, or_, select, update

from db import devices, events, jobs, results, tables
from db.devices import Device
from db.engine import Database
from farm.jobs import (
    LIVE,
    Assignment,
    AttemptState,
    DeviceState,
    Failure,
    Job,
    JobState,
    ShardResult,
    ShardState,
)

#: Shards a device holds: one running, one waiting. A third adds nothing on this broker.
WINDOW = 2
#: Crashes, hangs and refused batches of a shard after which the next attempt looks for the sample that causes them.
ISOLATE_AFTER = 2
#: Failed attempts of a shard after which its job fails.
MAX_FAILED = 6

_LIVE = [state.value for state in LIVE]
_BREAKING = (Failure.CRASH.value, Failure.HANG.value, Failure.DATA.value)

a = tables.attempt.c
s = tables.shard.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """A device that must be told of an attempt, once the transaction that made it is committed."""

    device: str
    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What a worker gets for a doorbell that was worth answering."""

    assignment: Assignment
    waiting: Assignment | None  #: the next one in this device's window, to read ahead


class _Pending(NamedTuple):
    id: int
    job_id: int
    idx: int
    start: int
    stop: int


class _Fenced(Exception):
    """The attempt is not live any more: an answer, raised only to roll back."""


def assign(conn: Connection, database: Database, lease_s: float, only: str | None = None) -> list[Ring]:
    """Fill the windows of all devices that take work (or of `only` one). Ring what it returns after the commit."""
    now = database.now(conn)
    up = devices.live(conn, database, lease_s)
    open_jobs = jobs.active(conn) if up else []
    rings: list[Ring] = []
    for device in up:
        if only in (None, device.name) and open_jobs:
            rings += _fill(conn, now, device, up, open_jobs)
    return rings


def _fill(conn: Connection, now: float, device: Device, up: Sequence[Device], open_jobs: Sequence[Job]) -> list[Ring]:
    suited = {j.id: j for j in open_jobs if devices.matching([device], j.spec.artifact.backend, j.spec.devices)}
    devices.hold(conn, device.name)  # two assigners must not count the same window
    held = conn.scalar(select(func.count()).where(a.device == device.name, a.state.in_(_LIVE))) or 0
    rings: list[Ring] = []
    while suited and held + len(rings) < WINDOW:
        row = _next_pending(conn, device, up, suited)
        if row is None:
            break
        rings.append(_attempt(conn, now, row, suited[row.job_id], device))
    return rings


def _next_pending(conn: Connection, device: Device, up: Collection[Device], suited: dict[int, Job]) -> _Pending | None:
    """The first pending shard of the oldest job; one that failed here goes elsewhere first, if it can."""
    failed_here = select(a.shard_id).where(a.device == device.name, a.state == AttemptState.FAILED.value)
    query = (
        select(s.id, s.job_id, s.idx, s.start, s.stop)
        .where(s.state == ShardState.PENDING.value, s.job_id.in_(suited))
        .order_by(s.job_id, s.idx)
        .with_for_update(skip_locked=True)
        .limit(1)
    )
    row = conn.execute(query.where(s.id.not_in(failed_here))).first()
    if row is not None:
        return _Pending(*row)
    for row in conn.execute(query.limit(16)):
        job = suited[row.job_id]
        peers = devices.matching(up, job.spec.artifact.backend, job.spec.devices)
        tried = set(
            conn.execute(select(a.device).where(a.shard_id == row.id, a.state == AttemptState.FAILED.value)).scalars()
        )
        if tried.issuperset(d.name for d in peers):
            return _Pending(*row)
    return None


def _attempt(conn: Connection, now: float, row: _Pending, job: Job, device: Device) -> Ring:
    past = conn.execute(select(a.failure).where(a.shard_id == row.id)).scalars().all()
    isolating = sum(failure in _BREAKING for failure in past) >= ISOLATE_AFTER
    attempt_id = conn.execute(
        insert(tables.attempt)
        .values(
            job_id=job.id,
            shard_id=row.id,
            no=len(past) + 1,
            device=device.name,
            incarnation=device.incarnation,
            state=AttemptState.ASSIGNED.value,
            isolating=isolating,
            assigned=now,
            rung=now,
        )
        .returning(a.id)
    ).scalar_one()
    conn.execute(update(tables.shard).where(s.id == row.id).values(state=ShardState.ASSIGNED.value))
    if job.state is JobState.PENDING:
        conn.execute(
            update(tables.job)
            .where(tables.job.c.id == job.id, tables.job.c.state == JobState.PENDING.value)
            .values(state=JobState.RUNNING.value)
        )
    if isolating:
        text = "looks for the sample that breaks the device process"
        events.record(conn, now, "isolating", text, job_id=job.id, shard_id=row.id, attempt_id=attempt_id)
    return Ring(
        device=device.name,
        assignment=Assignment(
            attempt_id=attempt_id,
            shard_id=row.id,
            job=job,
            shard=row.idx,
            attempt=len(past) + 1,
            start=row.start,
            stop=row.stop,
            isolating=isolating,
            non_finite_before=Failure.NON_FINITE.value in past,
        ),
    )


def start(conn: Connection, database: Database, attempt_id: int, device: str, incarnation: int) -> Started | None:
    """
    Take up an assigned attempt. None when there is nothing to take up: it ended, runs already, is another
    incarnation's, or was never there. A doorbell may ring twice, late, or for nobody.
    """
    now = database.now(conn)
    mine = and_(a.device == device, a.incarnation == incarnation, a.state == AttemptState.ASSIGNED.value)
    taken = conn.execute(
        update(tables.attempt).where(a.id == attempt_id, mine).values(state=AttemptState.RUNNING.value, started=now)
    )
    if taken.rowcount != 1:
        return None
    assignment = _assignments(conn, a.id == attempt_id)[0]
    conn.execute(
        update(tables.shard)
        .where(s.id == assignment.shard_id, s.state == ShardState.ASSIGNED.value)
        .values(state=ShardState.RUNNING.value)
    )
    waiting = _assignments(conn, mine)
    return Started(assignment=assignment, waiting=waiting[0] if waiting else None)


def complete(
    database: Database, assignment: Assignment, device: str, incarnation: int, result: ShardResult, lease_s: float
) -> list[Ring] | None:
    """
    Write an attempt's rows, its end and the device's next assignment in one transaction, or nothing at all.

    None when the attempt is not live any more: another one has the shard, the rows are dropped. Raises
    `InvariantBroken` when the rows are not one a sample.
    """
    try:
        with database.write() as conn:
            now = database.now(conn)
            _win(conn, now, assignment, device, incarnation, result)
            results.insert(conn, assignment, result.samples)
            devices.clear_strikes(conn, device)
            return assign(conn, database, lease_s, only=device)
    except _Fenced:
        with database.write() as conn:
            _fence(conn, database.now(conn), assignment, device, incarnation)
        return None


def _fence(conn: Connection, now: float, assignment: Assignment, device: str, incarnation: int) -> None:
    """Say that an attempt came too late; nothing for an attempt that is another's, or still to be taken up."""
    fenced = conn.execute(
        update(tables.attempt)
        .where(
            a.id == assignment.attempt_id,
            a.device == device,
            a.incarnation == incarnation,
            a.state.in_([AttemptState.RUNNING.value, AttemptState.LOST.value]),
        )
        .values(state=AttemptState.FENCED.value, ended=now)
    )
    if fenced.rowcount:
        _reopen(conn, [assignment.shard_id])
        _event(conn, now, "fenced", assignment, device, "came back after its shard was taken away")


def _win(
    conn: Connection, now: float, assignment: Assignment, device: str, incarnation: int, result: ShardResult
) -> None:
    won = conn.execute(
        update(tables.attempt)
        .where(
            a.id == assignment.attempt_id,
            a.state == AttemptState.RUNNING.value,
            a.device == device,
            a.incarnation == incarnation,
        )
        .values(
            state=AttemptState.WON.value,
            ended=now,
            batch_ms=np.asarray(result.batch_ms, dtype="<f4").tobytes(),
            budget=json.dumps({key: round(value, 3) for key, value in asdict(result.budget).items()}),
        )
    )
    done = conn.execute(
        update(tables.shard)
        .where(s.id == assignment.shard_id, s.state.in_([state.value for state in jobs.UNFINISHED]))
        .values(state=ShardState.DONE.value, winner=assignment.attempt_id)
    )
    if won.rowcount != 1 or done.rowcount != 1:
        raise _Fenced
    conn.execute(
        update(tables.attempt)
        .where(a.shard_id == assignment.shard_id, a.state.in_(_LIVE))
        .values(state=AttemptState.LOST.value, ended=now, reason="another attempt was faster")
    )


def fail(
    conn: Connection,
    database: Database,
    assignment: Assignment,
    device: str,
    failure: Failure,
    reason: str,
    lease_s: float,
) -> list[Ring]:
    """End an attempt that broke, blame whom it concerns, and give the device something else to do."""
    now = database.now(conn)
    ended = conn.execute(
        update(tables.attempt)
        .where(a.id == assignment.attempt_id, a.state.in_(_LIVE))
        .values(state=AttemptState.FAILED.value, ended=now, failure=failure.value, reason=reason)
    )
    if ended.rowcount != 1:
        return []
    _event(conn, now, f"attempt_{failure.value}", assignment, device, reason)
    _reopen(conn, [assignment.shard_id])
    if failure is Failure.JOB:
        jobs.fail(conn, database, assignment.job.id, reason)
    else:
        _blame(conn, database, assignment, device, failure, reason, lease_s)
    return assign(conn, database, lease_s, only=device)


def _blame(
    conn: Connection,
    database: Database,
    assignment: Assignment,
    device: str,
    failure: Failure,
    reason: str,
    lease_s: float,
) -> None:
    """
    A device that fails where others do not gets a strike; a shard that fails on two devices is itself suspect.

    A device that is alone cannot be compared: the isolating attempt will tell. What every device there refuses, no
    device can do: that is the job's fault, and none of theirs.
    """
    spec = assignment.job.spec
    broken = conn.execute(
        select(a.device, a.failure).where(a.shard_id == assignment.shard_id, a.state == AttemptState.FAILED.value)
    ).all()
    where = f"samples {assignment.start} to {assignment.stop - 1}"
    if failure is Failure.DEVICE:
        refusals = [row.device for row in broken if row.failure == Failure.DEVICE.value]
        there = devices.heard(conn, database, lease_s)
        serving = {d.name for d in devices.matching(there, spec.artifact.backend, spec.devices)}
        if len(refusals) >= ISOLATE_AFTER and serving <= set(refusals):
            for name in set(refusals):
                devices.strike(conn, database, name, -refusals.count(name), "")
            jobs.fail(conn, database, assignment.job.id, f"no device can do {where}: {reason}")
        else:
            devices.strike(conn, database, device, 1, reason)
    elif failure.value in _BREAKING:
        others = {row.device for row in broken if row.failure in _BREAKING} - {device}
        peers = devices.matching(devices.live(conn, database, lease_s), spec.artifact.backend, spec.devices)
        for other in others:
            devices.strike(conn, database, other, -1, "")
        if not others and len(peers) > 1:
            devices.strike(conn, database, device, 1, reason)
    _release_quarantined(conn, database, device)
    # What a device did wrong costs the shard no attempt: another device has yet to fail at it.
    if sum(row.failure != Failure.DEVICE.value for row in broken) >= MAX_FAILED:
        jobs.fail(conn, database, assignment.job.id, f"{where} failed {MAX_FAILED} times, last on {device}: {reason}")


def _release_quarantined(conn: Connection, database: Database, device: str) -> None:
    found = devices.get(conn, device)
    if found is not None and found.state is DeviceState.QUARANTINED:
        _take_back(conn, database, and_(a.device == device, a.state == AttemptState.ASSIGNED.value), "quarantined")


def hand_back(conn: Connection, database: Database, device: str, incarnation: int) -> int:
    """Return what a leaving worker holds; the answer is how many attempts that were."""
    mine = and_(a.device == device, a.incarnation == incarnation)
    return _take_back(conn, database, mine, "handed back by its worker")


def abandon(conn: Connection, database: Database, device: str) -> int:
    """Take back what earlier incarnations of a device hold, before the next one registers and is heard of."""
    return _take_back(conn, database, a.device == device, "its device vanished")


def orphans(conn: Connection, database: Database, lease_s: float) -> list[int]:
    """Live attempts whose device is gone, started anew, or was not heard of for a lease."""
    d = tables.device.c
    lost = or_(
        d.incarnation != a.incarnation,
        d.state == DeviceState.GONE.value,
        d.heartbeat < database.now(conn) - lease_s,
    )
    query = select(a.id).join(tables.device, d.name == a.device).where(a.state.in_(_LIVE), lost).order_by(a.id)
    return list(conn.execute(query).scalars())


def rescue(conn: Connection, database: Database, lease_s: float) -> int:
    """Take orphans' shards back; the answer is how many."""
    found = orphans(conn, database, lease_s)
    return _take_back(conn, database, a.id.in_(found), "its device vanished") if found else 0


def _take_back(conn: Connection, database: Database, which: ColumnElement[bool], reason: str) -> int:
    now = database.now(conn)
    d = tables.device.c
    found = conn.execute(
        select(a.id, a.shard_id, a.job_id, a.device, a.assigned, a.started, d.heartbeat)
        .join(tables.device, d.name == a.device)
        .where(a.state.in_(_LIVE), which)
        .order_by(a.id)
    ).all()
    taken = 0
    for row in found:
        # Its device was last at work when it was last heard of, which may have been yesterday.
        ended = min(now, max(row.heartbeat, row.started or row.assigned))
        lost = conn.execute(
            update(tables.attempt)
            .where(a.id == row.id, a.state.in_(_LIVE))
            .values(state=AttemptState.LOST.value, ended=ended, reason=reason)
        )
        if lost.rowcount:
            taken += 1
            events.record(
                conn, now, "attempt_lost", reason,
                job_id=row.job_id, shard_id=row.shard_id, attempt_id=row.id, device=row.device,
            )  # fmt: skip
    _reopen(conn, [row.shard_id for row in found])
    return taken


def _reopen(conn: Connection, shard_ids: Sequence[int]) -> None:
    """Back to pending, unless the shard has ended or another attempt of it is live."""
    other = select(a.id).where(a.shard_id == s.id, a.state.in_(_LIVE)).exists()
    states = [ShardState.ASSIGNED.value, ShardState.RUNNING.value]
    conn.execute(
        update(tables.shard)
        .where(s.id.in_(shard_ids), s.state.in_(states), ~other)
        .values(state=ShardState.PENDING.value)
    )


def unheard(conn: Connection, database: Database, ring_again_s: float) -> list[Ring]:
    """Assigned attempts whose idle device seems not to have heard the bell."""
    running = select(a.device).where(a.state == AttemptState.RUNNING.value)
    late = a.rung < database.now(conn) - ring_again_s
    d = tables.device.c
    up = select(d.name).where(d.state == DeviceState.UP.value)
    which = and_(a.state == AttemptState.ASSIGNED.value, late, a.device.not_in(running), a.device.in_(up))
    rows = conn.execute(select(a.id, a.device).where(which)).all()
    found = {assignment.attempt_id: assignment for assignment in _assignments(conn, a.id.in_([r.id for r in rows]))}
    return [Ring(device=row.device, assignment=found[row.id]) for row in rows]


def rang(conn: Connection, database: Database, rings: Sequence[Ring]) -> None:
    ids = [ring.assignment.attempt_id for ring in rings]
    conn.execute(update(tables.attempt).where(a.id.in_(ids)).values(rung=database.now(conn)))


def _assignments(conn: Connection, which: ColumnElement[bool]) -> list[Assignment]:
    past = tables.attempt.alias("past")
    non_finite = (
        select(past.c.id).where(past.c.shard_id == a.shard_id, past.c.failure == Failure.NON_FINITE.value).exists()
    )
    rows = conn.execute(
        select(a.id, a.shard_id, a.no, a.isolating, s.idx, s.start, s.stop, a.job_id, non_finite.label("non_finite"))
        .join(tables.shard, s.id == a.shard_id)
        .where(which)
        .order_by(a.id)
    ).all()
    known = {job_id: jobs.get(conn, job_id) for job_id in {row.job_id for row in rows}}
    return [
        Assignment(
            attempt_id=row.id,
            shard_id=row.shard_id,
            job=known[row.job_id],
            shard=row.idx,
            attempt=row.no,
            start=row.start,
            stop=row.stop,
            isolating=row.isolating,
            non_finite_before=row.non_finite,
        )
        for row in rows
    ]


def _event(conn: Connection, now: float, kind: str, assignment: Assignment, device: str, text: str) -> None:
    events.record(
        conn, now, kind, text,
        job_id=assignment.job.id, shard_id=assignment.shard_id, attempt_id=assignment.attempt_id, device=device,
    )  # fmt: skip


def has_room(conn: Connection, database: Database, lease_s: float) -> bool:
    """Whether some device's window could take a shard that is pending."""
    up = devices.live(conn, database, lease_s)
    wanting = [job for job in jobs.active(conn) if _has_pending(conn, job.id)] if up else []
    if not wanting:
        return False
    by_device = select(a.device, func.count()).where(a.state.in_(_LIVE)).group_by(a.device)
    held = {row[0]: row[1] for row in conn.execute(by_device)}
    free = [device for device in up if held.get(device.name, 0) < WINDOW]
    return any(devices.matching(free, job.spec.artifact.backend, job.spec.devices) for job in wanting)


def _has_pending(conn: Connection, job_id: int) -> bool:
    query = select(s.id).where(s.job_id == job_id, s.state == ShardState.PENDING.value).limit(1)
    return conn.execute(query).first() is not None
