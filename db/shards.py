"""
The life of a shard: assigned, started, completed or failed, and taken back from whoever vanished.

An attempt is a row with a state of its own; being *live* is its right to write. Every verb here is one conditional
change: it says by its answer whether the caller won, and a caller that lost has written nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, func, insert, or_, select, update

from db import canaries, devices, events, jobs, results, tables
from db.devices import Device
from db.engine import Database, locks_rows
from db.tables import one_of
from farm.jobs import (
    LIVE,
    Assignment,
    AttemptState,
    Canary,
    DeviceState,
    Failure,
    Job,
    JobState,
    ShardResult,
    ShardState,
    Verdict,
)

#: Shards a device holds: one running, one waiting. A third adds nothing on this broker.
WINDOW = 2
#: Crashes, hangs and refused batches of a shard after which the next attempt looks for the sample that causes them.
ISOLATE_AFTER = 2
#: Failed attempts of a shard after which its job fails.
MAX_FAILED = 6
#: Jobs among which a device looks for its next shard.
MOST_JOBS = 16
#: Shards of one job in a row after which a device gives way to a job of equal priority that nobody serves.
STREAK = 16
#: A shard is slow that takes longer than this, and so many times as long as the job's others.
SLOW_S, SLOW_FACTOR = 2.0, 3.0

_BREAKING = (Failure.CRASH.value, Failure.HANG.value, Failure.DATA.value)

a = tables.attempt.c
s = tables.shard.c
d = tables.device.c
u = tables.unfit.c


# What every shard and every tick ask for is put together once: putting together costs more than asking.
_past = tables.attempt.alias("past")
_ASSIGNED = (
    select(
        *(a.id, a.shard_id, a.no, a.isolating, s.idx, s.start, s.stop, a.job_id),
        select(_past.c.id)
        .where(_past.c.shard_id == a.shard_id, _past.c.no > s.since, _past.c.failure == Failure.NON_FINITE.value)
        .exists()
        .label("non_finite"),
    )
    .join(tables.shard, s.id == a.shard_id)
    .order_by(a.id)
)
#: Of an attempt and its device: it failed there for a reason that holds for the device `name` of `host`, too.
_FAILED_FOR = and_(
    a.state == AttemptState.FAILED.value,
    or_(d.name == bindparam("name"), and_(a.failure == Failure.HOST.value, d.host == bindparam("host"))),
)
_PENDING = (
    select(s.id, s.job_id, s.idx, s.start, s.stop, s.since)
    .where(s.state == ShardState.PENDING.value, s.job_id == bindparam("job"))
    .order_by(s.idx)
    .with_for_update(skip_locked=True, of=tables.shard)
)
_UNTRIED = _PENDING.where(
    ~select(a.shard_id)
    .join(tables.device, d.name == a.device)
    .where(a.no > s.since, a.shard_id == s.id, _FAILED_FOR)
    .exists()
).limit(1)
_WAITING = (
    select(
        *(tables.job.c.id, tables.job.c.priority),
        func.coalesce(tables.job.c.submission, tables.job.c.id).label("submission"),
    )
    .where(jobs.is_active(), jobs.has_pending())
    .order_by(tables.job.c.priority.desc(), tables.job.c.id)
    .limit(MOST_JOBS)
)
_FITTING = _WAITING.where(jobs.suits())
_WANTING = select(tables.job.c.id).where(jobs.is_active(), jobs.has_pending()).limit(1)
_WANTING_SOME = _WANTING.where(tables.job.c.devices != "")
_WANTING_ONE = _WANTING.where(jobs.suits())
_HELD_BY_ALL = select(a.device, func.count()).where(one_of(a.state, LIVE)).group_by(a.device)
_ORPHANS = (
    select(a.id)
    .join(tables.device, d.name == a.device)
    .where(
        one_of(a.state, LIVE),
        or_(d.incarnation != a.incarnation, d.state == DeviceState.GONE.value, d.heartbeat < bindparam("horizon")),
    )
    .order_by(a.id)
)
_UNHEARD = select(a.id, a.device).where(
    a.state == AttemptState.ASSIGNED.value,
    a.rung < bindparam("horizon"),
    a.device.not_in(select(a.device).where(a.state == AttemptState.RUNNING.value)),
    a.device.in_(select(d.name).where(d.state == DeviceState.UP.value)),
)
_RUNNING_LONG = (
    select(a.id, a.device, a.started, s.id.label("shard_id"), s.job_id, s.idx, s.start, s.stop, s.since)
    .join(tables.shard, s.id == a.shard_id)
    .where(a.state == AttemptState.RUNNING.value, a.started < bindparam("horizon"), ~a.isolating)
    .order_by(a.started)
)
_WON = select(a.started, a.ended, s.start, s.stop, a.job_id).join(tables.shard, s.id == a.shard_id)
_WON = _WON.where(a.state == AttemptState.WON.value).order_by(a.id.desc())
_LATEST_OF_DEVICE = _WON.where(a.device == bindparam("device")).limit(4)
_LATEST_OF_JOB = _WON.where(a.job_id == bindparam("job")).limit(32)
_HELD = select(func.count()).where(a.device == bindparam("device"), one_of(a.state, LIVE))
#: Of one attempt: it is this incarnation's of this device, which is to take it up.
_OWN = and_(a.device == bindparam("me"), a.incarnation == bindparam("mine"))
_ITS_SHARD = select(a.shard_id).where(a.id == bindparam("attempt"), _OWN)
_TO_START = and_(_OWN, a.state == AttemptState.ASSIGNED.value)
_TO_START_AGAIN = and_(_OWN, one_of(a.state, LIVE))
_STARTS = {
    again: update(tables.attempt)
    .where(a.id == bindparam("attempt"), mine)
    .values(state=AttemptState.RUNNING.value, started=bindparam("now"))
    for again, mine in ((False, _TO_START), (True, _TO_START_AGAIN))
}
_STARTED = _ASSIGNED.where(or_(a.id == bindparam("attempt"), _TO_START))
_RUNS = (
    update(tables.shard)
    .where(s.id == bindparam("shard"), s.state == ShardState.ASSIGNED.value)
    .values(state=ShardState.RUNNING.value)
)
_WIN = (
    update(tables.attempt)
    .where(a.id == bindparam("attempt"), a.state == AttemptState.RUNNING.value, _OWN)
    .values(state=AttemptState.WON.value)
)
_DONE = (
    update(tables.shard)
    .where(s.id == bindparam("shard"), one_of(s.state, jobs.UNFINISHED))
    .values(state=ShardState.DONE.value, winner=bindparam("attempt"))
)
_BEATEN = (
    update(tables.attempt)
    .where(a.shard_id == bindparam("shard"), one_of(a.state, LIVE))
    .values(state=AttemptState.LOST.value, ended=bindparam("now"), reason="another attempt was faster")
)
_GIVEN = update(tables.shard).where(s.id == bindparam("shard")).values(state=ShardState.ASSIGNED.value)
_NEW = insert(tables.attempt).returning(a.id)
_TRIES = select(a.no, a.failure).where(a.shard_id == bindparam("shard")).order_by(a.no)


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
    since: int  #: attempts up to this number are history


class _Fenced(Exception):
    """The attempt is not live any more: an answer, raised only to roll back."""


def assign(conn: Connection, database: Database, lease_s: float, only: Collection[str] | None = None) -> list[Ring]:
    """Fill the windows of all devices that take work (or of `only` some). Ring what it returns after the commit."""
    now = database.now(conn)
    rings: list[Ring] = []
    for device in devices.live(conn, database, lease_s, only):
        rings += _fill(conn, database, now, device, lease_s)
    _begin(conn, rings)
    return rings


def _begin(conn: Connection, rings: Sequence[Ring]) -> None:
    """Jobs that got their first device run. Last thing in a transaction: assigners meet at the jobs' rows."""
    for job_id in sorted({ring.assignment.job.id for ring in rings if ring.assignment.job.state is JobState.PENDING}):
        conn.execute(
            update(tables.job)
            .where(tables.job.c.id == job_id, tables.job.c.state == JobState.PENDING.value)
            .values(state=JobState.RUNNING.value)
        )


def _fill(conn: Connection, database: Database, now: float, device: Device, lease_s: float) -> list[Ring]:
    devices.hold(conn, device.name)  # two assigners must not count the same window
    held = conn.scalar(_HELD, {"device": device.name}) or 0
    rings: list[Ring] = []
    while held + len(rings) < WINDOW:
        found = _next_pending(conn, database, device, lease_s)
        if found is None:
            break
        rings.append(_attempt(conn, now, _cut_to_pace(conn, found, device), device))
    return rings


def _cut_to_pace(conn: Connection, shard: _Pending, device: Device) -> _Pending:
    """
    Have a slow device take as many batches of a shard as it does in the usual time; the rest is a new shard.

    So no device holds up the end of a job, and little is lost with any of them. A shard that has a history stays whole,
    and so do those of images in windows: where their batches may begin is not known here.
    """
    rows = conn.execute(_LATEST_OF_DEVICE, {"device": device.name}).all()
    own = _pace([row for row in rows if row.job_id == rows[0].job_id])  # of its latest job, which may not be this one
    usual = _usual_s(conn, rows[0].job_id) if own else None
    if not own or not usual or own < SLOW_FACTOR * usual:
        return shard
    spec = jobs.get(conn, shard.job_id).spec
    past = conn.execute(select(a.state).where(a.shard_id == shard.id, a.state != AttemptState.LOST.value)).first()
    size = max(1, int((shard.stop - shard.start) * usual / own / spec.bs)) * spec.bs
    if spec.windows or past is not None or shard.start + size >= shard.stop:
        return shard
    stop = shard.start + size
    conn.execute(update(tables.shard).where(s.id == shard.id).values(stop=stop))
    conn.execute(
        insert(tables.shard).values(
            job_id=shard.job_id,
            idx=spec.samples + stop,  # nobody else's: shards begin at samples of their own, and were numbered below
            start=stop,
            stop=shard.stop,
            state=ShardState.PENDING.value,
            since=shard.since,
        )
    )
    return shard._replace(stop=stop)


def _next_pending(conn: Connection, database: Database, device: Device, lease_s: float) -> _Pending | None:
    """The first pending shard of the job whose turn it is; one that failed here goes elsewhere first, if it can."""
    job_ids = _turns(conn, device)
    for job_id in job_ids:
        row = conn.execute(_UNTRIED, {"job": job_id, "name": device.name, "host": device.host}).first()
        if row is not None:
            return _Pending(*row)
    peers = devices.live(conn, database, lease_s) if job_ids else []
    for job_id in job_ids:
        for row in conn.execute(_PENDING.limit(16), {"job": job_id}).all():
            shard = _Pending(*row)
            if not any(_may_try(conn, shard, peer) for peer in peers):
                return shard
    return None


def _may_try(conn: Connection, shard: _Pending, device: Device) -> bool:
    """Whether a device serves a shard's job and has not failed at the shard."""
    suited = select(tables.job.c.id).where(tables.job.c.id == shard.job_id, jobs.suits())
    failed = select(a.id).join(tables.device, d.name == a.device)
    failed = failed.where(a.shard_id == shard.id, a.no > shard.since, _FAILED_FOR)
    there = {"name": device.name, "host": device.host}
    return (
        conn.execute(suited, jobs.suiting(device)).first() is not None and conn.execute(failed, there).first() is None
    )


def _turns(conn: Connection, device: Device) -> list[int]:
    """
    Jobs with pending shards that a device may serve, the one whose turn it is first.

    The highest priority goes first. Equals share the devices: a device stays with its job, whose model it has loaded,
    while that job holds no more of the farm than others do; and on its own it gives way to a job that nobody serves.
    Of those submitted together, each waits until the one before has nothing pending.
    """
    found = conn.execute(_FITTING, jobs.suiting(device)).all()
    firsts: dict[int, Any] = {}
    for row in found:
        firsts.setdefault(row.submission, row)
    rows = list(firsts.values())
    equals = [row.id for row in rows if row.priority == rows[0].priority]
    if len(equals) > 1:
        live = dict.fromkeys(equals, 0)
        counts = select(a.job_id, func.count()).where(one_of(a.state, LIVE), a.job_id.in_(equals)).group_by(a.job_id)
        live |= {row[0]: row[1] for row in conn.execute(counts)}
        newest = select(func.max(a.id)).scalar_subquery()
        past = select(a.job_id).where(a.device == device.name, a.id > newest - 4096).order_by(a.id.desc())
        latest = list(conn.execute(past.limit(STREAK)).scalars())
        mine, least = (latest[0] if latest else None), min(live.values())
        tired = latest == [mine] * STREAK and least == 0
        stays = mine in live and live[mine] <= least + WINDOW and not tired
        equals.sort(key=lambda job_id: (not (stays and job_id == mine), live[job_id], tired and job_id == mine, job_id))
    return equals + [row.id for row in rows if row.id not in equals]


def _attempt(conn: Connection, now: float, row: _Pending, device: Device, *, second: bool = False) -> Ring:
    """A new attempt of a shard; a `second` one beside one that runs."""
    job = jobs.get(conn, row.job_id)
    tries = conn.execute(_TRIES, {"shard": row.id}).all()
    number = tries[-1].no + 1 if tries else 1
    past = [each.failure for each in tries if each.no > row.since]
    isolating = sum(failure in _BREAKING for failure in past) >= ISOLATE_AFTER
    attempt_id = conn.execute(
        _NEW,
        {
            "job_id": job.id,
            "shard_id": row.id,
            "no": number,
            "device": device.name,
            "incarnation": device.incarnation,
            "state": AttemptState.ASSIGNED.value,
            "isolating": isolating,
            "assigned": now,
            "rung": now,
        },
    ).scalar_one()
    if not second:
        conn.execute(_GIVEN, {"shard": row.id})
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
            attempt=number,
            start=row.start,
            stop=row.stop,
            isolating=isolating,
            non_finite_before=Failure.NON_FINITE.value in past,
        ),
    )


def start(
    conn: Connection, database: Database, attempt_id: int, device: str, incarnation: int, *, again: bool = False
) -> Started | None:
    """
    Take up an assigned attempt. None when there is nothing to take up: it ended, runs already, is another
    incarnation's, or was never there. A doorbell may ring twice, late, or for nobody.

    `again` is for who does not know what became of its first try: one that runs is taken up, too.
    """
    mine = {"attempt": attempt_id, "me": device, "mine": incarnation}
    _hold(conn, _ITS_SHARD, mine)
    if conn.execute(_STARTS[again], {**mine, "now": database.now(conn)}).rowcount != 1:
        return None
    held = {each.attempt_id: each for each in _assignments(conn, _STARTED, mine)}
    assignment = held.pop(attempt_id)
    conn.execute(_RUNS, {"shard": assignment.shard_id})
    return Started(assignment=assignment, waiting=next(iter(held.values()), None))


def complete(
    database: Database, assignment: Assignment, device: str, incarnation: int, result: ShardResult, lease_s: float
) -> list[Ring] | None:
    """
    Write an attempt's rows, its end and the device's next assignment in one transaction, or nothing at all.

    None when the attempt is not live any more: another one has the shard, the rows are dropped. An answer to a canary
    that is wrong ends the attempt as failed, and the device is in quarantine. Raises `InvariantBroken` when the rows
    are not one a sample.
    """
    try:
        with database.write() as conn:
            now = database.now(conn)
            rings = _judge(conn, database, assignment, device, incarnation, result.canary, lease_s)
            if rings is not None:
                return rings
            _win(conn, now, assignment, device, incarnation, result)
            results.insert(conn, assignment, result.samples)
            devices.clear_strikes(conn, device)
            return assign(conn, database, lease_s, only=[device])
    except _Fenced:
        with database.write() as conn:
            _fence(conn, database.now(conn), assignment, device, incarnation)
        return None


def _judge(
    conn: Connection,
    database: Database,
    assignment: Assignment,
    device: str,
    incarnation: int,
    canary: Canary | None,
    lease_s: float,
) -> list[Ring] | None:
    """What follows when a device's answer condemns it; None when it may go on."""
    if canary is None:
        return None
    if answer(conn, database, device, incarnation, canary, during=assignment.attempt_id) is not Verdict.DISAGREES:
        return None
    found = devices.get(conn, device)
    reason = found.reason if found else ""
    return fail(conn, database, assignment, device, Failure.DEVICE, reason, lease_s, blame=False)


def answer(
    conn: Connection, database: Database, device: str, incarnation: int, canary: Canary, during: int = 0
) -> Verdict:
    """
    Write down what a device said to a canary, `during` an attempt perhaps.

    Devices that are found out by it are in quarantine afterwards, what they won since they were last right is open
    again, and what they are running counts no more.
    """
    verdict, condemned = canaries.judge(conn, database, device, incarnation, canary)
    if condemned:
        _take_back(conn, database, and_(a.device.in_(condemned), a.id != during), "its device computes wrongly")
    return verdict


def _fence(conn: Connection, now: float, assignment: Assignment, device: str, incarnation: int) -> None:
    """Say that an attempt came too late; nothing for an attempt that is another's, or still to be taken up."""
    _hold(conn, [assignment.shard_id])
    fenced = conn.execute(
        update(tables.attempt)
        .where(
            a.id == assignment.attempt_id,
            a.device == device,
            a.incarnation == incarnation,
            one_of(a.state, [AttemptState.RUNNING, AttemptState.LOST]),
        )
        .values(state=AttemptState.FENCED.value, ended=func.coalesce(a.ended, now))
    )
    if fenced.rowcount:
        _reopen(conn, [assignment.shard_id])
        _event(conn, now, "fenced", assignment, device, "came back after its shard was taken away")


def _win(
    conn: Connection, now: float, assignment: Assignment, device: str, incarnation: int, result: ShardResult
) -> None:
    import numpy as np  # loaded already where there is a result; who assigns and rings does without

    _hold(conn, [assignment.shard_id])
    won = conn.execute(
        _WIN,
        {
            "attempt": assignment.attempt_id,
            "me": device,
            "mine": incarnation,
            "ended": now,
            "batch_ms": np.asarray(result.batch_ms, dtype="<f4").tobytes(),
            "budget": json.dumps({key: round(value, 3) for key, value in asdict(result.budget).items()}),
        },
    )
    done = conn.execute(_DONE, {"shard": assignment.shard_id, "attempt": assignment.attempt_id})
    if won.rowcount != 1 or done.rowcount != 1:
        raise _Fenced
    conn.execute(_BEATEN, {"shard": assignment.shard_id, "now": now})


def fail(
    conn: Connection,
    database: Database,
    assignment: Assignment,
    device: str,
    failure: Failure,
    reason: str,
    lease_s: float,
    *,
    blame: bool = True,
) -> list[Ring]:
    """End an attempt that broke, blame whom it concerns, and give the device something else to do."""
    now = database.now(conn)
    jobs.hold(conn, assignment.job.id)  # before its shards, for it may end with this
    _hold(conn, [assignment.shard_id])
    ended = conn.execute(
        update(tables.attempt)
        .where(a.id == assignment.attempt_id, one_of(a.state, LIVE))
        .values(state=AttemptState.FAILED.value, ended=now, failure=failure.value, reason=reason)
    )
    if ended.rowcount != 1:
        fail_late(conn, database, assignment.attempt_id, device, failure, reason)
        return []
    _event(conn, now, f"attempt_{failure.value}", assignment, device, reason)
    _reopen(conn, [assignment.shard_id])
    if failure is Failure.JOB:
        jobs.fail(conn, database, assignment.job.id, reason)
    elif blame and failure is not Failure.HOST:
        _blame(conn, database, assignment, device, failure, reason, lease_s)
    return assign(conn, database, lease_s, only=[device])


def fail_late(
    conn: Connection, database: Database, attempt_id: int, device: str, failure: Failure, reason: str
) -> None:
    """A strike for a device that broke at a shard which another has done meanwhile: the shard is not to blame."""
    winner = tables.attempt.alias()
    beaten = conn.execute(
        select(a.job_id, a.shard_id)
        .join(tables.shard, s.id == a.shard_id)
        .join(winner, winner.c.id == s.winner)
        .where(a.id == attempt_id, a.state == AttemptState.LOST.value, winner.c.device != device)
    ).first()
    if beaten is None or failure.value not in (*_BREAKING, Failure.DEVICE.value):
        return
    events.record(
        conn, database.now(conn), f"attempt_{failure.value}", reason,
        job_id=beaten.job_id, shard_id=beaten.shard_id, attempt_id=attempt_id, device=device,
    )  # fmt: skip
    devices.strike(conn, database, device, 1, reason)
    _release_quarantined(conn, database, device)


def decline(
    conn: Connection, database: Database, assignment: Assignment, name: str, reason: str, lease_s: float
) -> list[Ring]:
    """
    Hand an attempt back because its device's host cannot do the job, and ask none of that host's devices again.

    It costs the shard no attempt. When no host is left that is there and could do the job, the job fails.
    """
    now, job_id, device = database.now(conn), assignment.job.id, devices.get(conn, name)
    if device is None:
        return []
    jobs.hold(conn, job_id)  # devices of a host find out together; the last host to decline must see the others
    known = conn.execute(select(u.host).where(u.job_id == job_id, u.host == device.host)).first()
    if known is None:
        conn.execute(insert(tables.unfit).values(job_id=job_id, host=device.host, reason=reason, at=now))
        text = f"{device.host} cannot do it: {reason}"
        events.record(conn, now, "host_unfit", text, job_id=job_id, device=device.name)
    there = select(d.name).where(d.host == device.host)
    waiting = and_(a.state == AttemptState.ASSIGNED.value, a.device.in_(there))
    _take_back(conn, database, and_(a.job_id == job_id, or_(a.id == assignment.attempt_id, waiting)), reason)
    if not hosts_left(conn, database, assignment.job, lease_s):
        reasons = [f"{unfit.host}: {unfit.reason}" for unfit in jobs.unfit_hosts(conn, job_id)]
        jobs.fail(conn, database, job_id, f"no host can do it; {'; '.join(reasons)}")
    return assign(conn, database, lease_s, only=[name])


def hosts_left(conn: Connection, database: Database, job: Job, lease_s: float) -> set[str]:
    """Hosts with devices that were there within the last lease and may serve a job."""
    horizon = database.now(conn) - lease_s
    there = [device for device in devices.everything(conn) if device.heartbeat >= horizon]
    serving = devices.matching(there, job.spec.artifact, job.spec.devices)
    return {device.host for device in serving} - {unfit.host for unfit in jobs.unfit_hosts(conn, job.id)}


def hosts_tried(conn: Connection, assignment: Assignment) -> set[str]:
    """Hosts whose bins of a shard could not be used."""
    query = select(d.host).join(tables.attempt, a.device == d.name).join(tables.shard, s.id == a.shard_id)
    return set(
        conn.execute(
            query.where(s.id == assignment.shard_id, a.no > s.since, a.failure == Failure.HOST.value)
        ).scalars()
    )


def last_job(conn: Connection, device: str) -> Job | None:
    """The job a device worked on last."""
    job_id = conn.scalar(select(a.job_id).where(a.device == device).order_by(a.id.desc()).limit(1))
    return None if job_id is None else jobs.get(conn, job_id)


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
        select(a.device, a.failure)
        .join(tables.shard, s.id == a.shard_id)
        .where(s.id == assignment.shard_id, a.no > s.since, a.state == AttemptState.FAILED.value)
    ).all()
    where = "its batches" if spec.loop else f"samples {assignment.start} to {assignment.stop - 1}"
    if failure is Failure.DEVICE:
        refusals = [row.device for row in broken if row.failure == Failure.DEVICE.value]
        there = devices.heard(conn, database, lease_s)
        serving = {d.name for d in devices.matching(there, spec.artifact, spec.devices)}
        if len(refusals) >= ISOLATE_AFTER and serving <= set(refusals):
            for name in set(refusals):
                devices.strike(conn, database, name, -refusals.count(name), "")
            jobs.fail(conn, database, assignment.job.id, f"no device can do {where}: {reason}")
        else:
            devices.strike(conn, database, device, 1, reason)
    elif failure.value in _BREAKING:
        others = {row.device for row in broken if row.failure in _BREAKING} - {device}
        peers = devices.matching(devices.live(conn, database, lease_s), spec.artifact, spec.devices)
        for other in others:
            devices.strike(conn, database, other, -1, "")
        if not others and len(peers) > 1:
            devices.strike(conn, database, device, 1, reason)
    _release_quarantined(conn, database, device)
    # What a device did wrong costs the shard no attempt: another device has yet to fail at it.
    if sum(row.failure not in (Failure.DEVICE.value, Failure.HOST.value) for row in broken) >= MAX_FAILED:
        jobs.fail(conn, database, assignment.job.id, f"{where} failed {MAX_FAILED} times, last on {device}: {reason}")


def _release_quarantined(conn: Connection, database: Database, device: str) -> None:
    found = devices.get(conn, device)
    if found is not None and found.state is DeviceState.QUARANTINED:
        _take_back(conn, database, and_(a.device == device, a.state == AttemptState.ASSIGNED.value), "quarantined")


def drain(conn: Connection, database: Database, names: Collection[str]) -> None:
    """Give devices no more work, until `devices.set_drained` ends it; what they run, they finish."""
    devices.set_drained(conn, database, names, drained=True)
    _take_back(
        conn, database, and_(a.device.in_(names), a.state == AttemptState.ASSIGNED.value), "its device is drained"
    )


def hand_back(conn: Connection, database: Database, device: str, incarnation: int) -> int:
    """Return what a leaving worker holds; the answer is how many attempts that were."""
    mine = and_(a.device == device, a.incarnation == incarnation)
    return _take_back(conn, database, mine, "handed back by its worker")


def abandon(conn: Connection, database: Database, device: str) -> int:
    """Take back what earlier incarnations of a device hold, before the next one registers and is heard of."""
    return _take_back(conn, database, a.device == device, "its device vanished")


def orphans(conn: Connection, database: Database, lease_s: float) -> list[int]:
    """Live attempts whose device is gone, started anew, or was not heard of for a lease."""
    return list(conn.execute(_ORPHANS, {"horizon": database.now(conn) - lease_s}).scalars())


def rescue(conn: Connection, database: Database, lease_s: float) -> int:
    """Take orphans' shards back; the answer is how many."""
    found = orphans(conn, database, lease_s)
    return _take_back(conn, database, a.id.in_(found), "its device vanished") if found else 0


def _take_back(conn: Connection, database: Database, which: ColumnElement[bool], reason: str) -> int:
    now = database.now(conn)
    found = conn.execute(
        select(a.id, a.shard_id, a.job_id, a.device, a.assigned, a.started, d.heartbeat)
        .join(tables.device, d.name == a.device)
        .where(one_of(a.state, LIVE), which)
        .order_by(a.id)
    ).all()
    _hold(conn, [row.shard_id for row in found])
    taken = 0
    for row in found:
        # Its device was last at work when it was last heard of, which may have been yesterday.
        ended = min(now, max(row.heartbeat, row.started or row.assigned))
        lost = conn.execute(
            update(tables.attempt)
            .where(a.id == row.id, one_of(a.state, LIVE))
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


def _hold(
    conn: Connection, shard_ids: Sequence[int] | Select[tuple[int]], parameters: Mapping[str, Any] | None = None
) -> None:
    """
    Have shards to oneself until the transaction ends: who ends one attempt must see what became of the others.

    First thing a verb does to a shard, and before its attempts: all take these locks in one order.
    """
    if locks_rows(conn):
        conn.execute(select(s.id).where(s.id.in_(shard_ids)).order_by(s.id).with_for_update(key_share=True), parameters)


def _reopen(conn: Connection, shard_ids: Sequence[int]) -> None:
    """Back to pending, unless the shard has ended or another attempt of it is live."""
    other = select(a.id).where(a.shard_id == s.id, one_of(a.state, LIVE)).exists()
    conn.execute(
        update(tables.shard)
        .where(s.id.in_(shard_ids), one_of(s.state, [ShardState.ASSIGNED, ShardState.RUNNING]), ~other)
        .values(state=ShardState.PENDING.value)
    )


def unheard(conn: Connection, database: Database, ring_again_s: float) -> list[Ring]:
    """Assigned attempts whose idle device seems not to have heard the bell."""
    rows = conn.execute(_UNHEARD, {"horizon": database.now(conn) - ring_again_s}).all()
    if not rows:
        return []
    late = _ASSIGNED.where(a.id.in_([row.id for row in rows]))
    found = {assignment.attempt_id: assignment for assignment in _assignments(conn, late)}
    return [Ring(device=row.device, assignment=found[row.id]) for row in rows]


def rang(conn: Connection, database: Database, rings: Sequence[Ring]) -> None:
    ids = [ring.assignment.attempt_id for ring in rings]
    conn.execute(update(tables.attempt).where(a.id.in_(ids)).values(rung=database.now(conn)))


def _assignments(conn: Connection, query: Select[Any], parameters: Mapping[str, Any] | None = None) -> list[Assignment]:
    """What a query of `_ASSIGNED` finds."""
    rows = conn.execute(query, parameters).all()
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


def with_room(conn: Connection, database: Database, lease_s: float) -> list[str]:
    """Devices whose window could take a shard that is pending."""
    free = _free(conn, database, lease_s, WINDOW)
    if not free or conn.execute(_WANTING).first() is None:
        return []
    choosy = conn.execute(_WANTING_SOME).first() is not None
    found: list[str] = []
    wanted: dict[tuple[str, ...], bool] = {}
    for device in free:
        alike = (device.host, device.soc, *device.backends)  # devices of a host are, unless jobs name some
        if choosy or alike not in wanted:
            wanted[alike] = conn.execute(_WANTING_ONE, jobs.suiting(device)).first() is not None
        if wanted[alike]:
            found.append(device.name)
    return found


def _free(conn: Connection, database: Database, lease_s: float, fewer: int) -> list[Device]:
    """Devices that take work and hold fewer shards than that."""
    held = {row[0]: row[1] for row in conn.execute(_HELD_BY_ALL)}
    return [device for device in devices.live(conn, database, lease_s) if held.get(device.name, 0) < fewer]


class Slow(NamedTuple):
    """A running attempt that takes long beside what others took, while a device is idle that could do the shard."""

    attempt_id: int
    device: str
    idle: Device
    shard: _Pending


def slow(conn: Connection, database: Database, lease_s: float) -> list[Slow]:
    """
    At the end of a job, when nothing is pending: which shards should have a second attempt, and where.

    One a shard and one a device. A shard that is being taken apart to find a sample is left alone.
    """
    now = database.now(conn)
    running = conn.execute(_RUNNING_LONG, {"horizon": now - SLOW_S}).all()
    if not running:
        return []
    idle = _free(conn, database, lease_s, 1)
    found: list[Slow] = []
    for row in running:
        usual = _usual_s(conn, row.job_id) if idle else None
        if usual is None or now - row.started < SLOW_FACTOR * usual * (row.stop - row.start):
            continue
        live = conn.scalar(select(func.count()).where(a.shard_id == row.shard_id, one_of(a.state, LIVE)))
        shard = _Pending(row.shard_id, row.job_id, row.idx, row.start, row.stop, row.since)
        other = next((x for x in idle if x.name != row.device and _may_try(conn, shard, x)), None)
        if live == 1 and other is not None:
            idle.remove(other)
            found.append(Slow(row.id, row.device, other, shard))
    return found


def speculate(conn: Connection, database: Database, lease_s: float) -> list[Ring]:
    """Give slow shards a second attempt on idle devices, and what waits behind them; the first to commit wins."""
    now = database.now(conn)
    rings: list[Ring] = []
    for each in slow(conn, database, lease_s):
        devices.hold(conn, each.idle.name)
        # Two that tick must not both do it; one that ends it at this moment is not waited for.
        if conn.execute(select(s.id).where(s.id == each.shard.id).with_for_update(skip_locked=True)).first() is None:
            continue
        live = conn.execute(select(a.id).where(a.shard_id == each.shard.id, one_of(a.state, LIVE))).scalars().all()
        if live != [each.attempt_id]:
            continue
        ring = _attempt(conn, now, each.shard, each.idle, second=True)
        _event(conn, now, "speculated", ring.assignment, each.idle.name, f"{each.device} takes long")
        behind = and_(a.device == each.device, a.state == AttemptState.ASSIGNED.value)
        _take_back(conn, database, behind, "moved to an idle device")
        rings += [ring, *_fill(conn, database, now, each.idle, lease_s)]
    _begin(conn, rings)
    return rings


def _usual_s(conn: Connection, job_id: int) -> float | None:
    """Seconds a sample of a job's latest shards: the median; None before there are some."""
    return _pace(conn.execute(_LATEST_OF_JOB, {"job": job_id}).all())


def _pace(rows: Sequence[Any]) -> float | None:
    times = [(row.ended - row.started) / (row.stop - row.start) for row in rows if row.stop > row.start]
    return statistics.median(times) if times else None
