"""What reports ask of many rows at once: one query a question, however many jobs and devices there are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, case, func, select, true

from db import jobs, tables
from db.jobs import Progress
from farm.jobs import LIVE, AttemptState, Job, JobState, ResultState, ShardState, Verdict

_BROKEN = (AttemptState.FAILED, AttemptState.LOST, AttemptState.FENCED)

a = tables.attempt.c
c = tables.canary.c
d = tables.device.c
e = tables.event.c
j = tables.job.c
s = tables.shard.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt as listings name it."""

    id: int
    job_id: int
    shard_id: int
    shard: int
    no: int
    device: str
    state: AttemptState
    failure: str | None
    reason: str
    isolating: bool
    start: int
    stop: int
    assigned: float
    started: float | None
    ended: float | None
    has_won: bool  #: if only once: what it won may have been opened again

    @property
    def name(self) -> str:
        return name_of(self.job_id, self.shard, self.no)

    @property
    def samples(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A row of the log, its shard and attempt by their numbers."""

    id: int
    at: float
    kind: str
    job_id: int | None
    shard: int | None
    no: int | None
    attempt_id: int | None
    device: str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Canaries:
    """What a device said to the canaries of an artifact, and what those cost that were asked during a job."""

    verdicts: Sequence[tuple[float, Verdict]]  #: when and what, in order
    batches: int  #: while the job ran
    ms: float


def name_of(job_id: int, shard: int | None, no: int | None) -> str:
    """``j3.s17.a1``, or as much of it as there is."""
    return f"j{job_id}" + (f".s{shard}" if shard is not None else "") + (f".a{no}" if no is not None else "")


def active(conn: Connection, limit: int) -> tuple[list[Job], int]:
    """Jobs that want work done, in the order they get it, and how many more there are."""
    running_first = case((j.state == JobState.RUNNING.value, 0), else_=1)
    found = jobs.several(conn, jobs.is_active(), (running_first, j.priority.desc(), j.id), limit)
    count = conn.scalar(select(func.count()).select_from(tables.job).where(jobs.is_active())) or 0
    return found, count - len(found)


def progress(conn: Connection, found: Sequence[Job]) -> list[Progress]:
    """How far each of these jobs is, in the same order."""
    ids = [job.id for job in found]
    r = tables.result.c
    by_state = (
        select(s.job_id, s.state, func.count(), func.sum(s.stop - s.start))
        .where(s.job_id.in_(ids))
        .group_by(s.job_id, s.state)
    )
    counted = {(row[0], row[1]): (row[2], int(row[3])) for row in conn.execute(by_state)}
    failed = _counts(conn, r.job_id, and_(r.job_id.in_(ids), r.superseded == 0, r.state == ResultState.FAILED.value))
    live = _counts(conn, a.job_id, and_(a.job_id.in_(ids), tables.one_of(a.state, LIVE)))
    return [
        Progress(
            job=job,
            finished_samples=counted.get((job.id, ShardState.DONE.value), (0, 0))[1],
            failed_samples=failed.get(job.id, 0),
            shards=sum(count for (job_id, _), (count, _) in counted.items() if job_id == job.id),
            open_shards=sum(counted.get((job.id, state.value), (0, 0))[0] for state in jobs.UNFINISHED),
            live_attempts=live.get(job.id, 0),
        )
        for job in found
    ]


def _counts(conn: Connection, by: ColumnElement[int], which: ColumnElement[bool]) -> dict[int, int]:
    return {row[0]: row[1] for row in conn.execute(select(by, func.count()).where(which).group_by(by))}


def live(conn: Connection) -> list[Attempt]:
    """Every attempt that may still win, of all jobs."""
    return _attempts(conn, tables.one_of(a.state, LIVE))


def won_since(conn: Connection, job_ids: Collection[int], since: float) -> list[Attempt]:
    return _attempts(conn, and_(a.job_id.in_(job_ids), a.state == AttemptState.WON.value, a.ended >= since))


def broken(conn: Connection, job_ids: Collection[int], limit: int | None = None) -> list[Attempt]:
    """Attempts whose work did not count, the newest `limit`, newest last."""
    return _attempts(conn, and_(a.job_id.in_(job_ids), tables.one_of(a.state, _BROKEN)), newest=a.id, limit=limit)


def transitions(conn: Connection, job_id: int | None, limit: int) -> list[Attempt]:
    """The attempts that have one of the `limit` newest transitions, and maybe others; each once."""
    which = true() if job_id is None else a.job_id == job_id
    found: dict[int, Attempt] = {}
    for time in (a.assigned, a.started, a.ended):
        found |= {each.id: each for each in _attempts(conn, and_(which, time.is_not(None)), newest=time, limit=limit)}
    return list(found.values())


def _attempts(
    conn: Connection,
    which: ColumnElement[bool],
    *,
    newest: ColumnElement[float] | ColumnElement[int] = a.id,
    limit: int | None = None,
) -> list[Attempt]:
    chosen = select(a.id).where(which).order_by(newest.desc()).limit(limit).subquery()
    rows = conn.execute(
        select(
            a.id, a.job_id, a.shard_id, s.idx, a.no, a.device, a.state, a.failure, a.reason, a.isolating,
            s.start, s.stop, a.assigned, a.started, a.ended, a.batch_ms.is_not(None).label("has_won"),
        )
        .join(chosen, chosen.c.id == a.id)
        .join(tables.shard, s.id == a.shard_id)
        .order_by(newest, a.id)
    )  # fmt: skip
    return [
        Attempt(
            id=row.id,
            job_id=row.job_id,
            shard_id=row.shard_id,
            shard=row.idx,
            no=row.no,
            device=row.device,
            state=AttemptState(row.state),
            failure=row.failure,
            reason=row.reason,
            isolating=row.isolating,
            start=row.start,
            stop=row.stop,
            assigned=row.assigned,
            started=row.started,
            ended=row.ended,
            has_won=row.has_won,
        )
        for row in rows
    ]


def events(conn: Connection, job_id: int | None, limit: int) -> list[Event]:
    """The newest `limit` rows of the log, newest last; of a job, those of the devices it ran on are not among them."""
    rows = conn.execute(
        select(e.id, e.at, e.kind, e.job_id, e.attempt_id, e.device, e.text, s.idx, a.no)
        .outerjoin(tables.shard, s.id == e.shard_id)
        .outerjoin(tables.attempt, a.id == e.attempt_id)
        .where(true() if job_id is None else e.job_id == job_id)
        .order_by(e.id.desc())
        .limit(limit)
    ).all()
    return [
        Event(
            id=row.id,
            at=row.at,
            kind=row.kind,
            job_id=row.job_id,
            shard=row.idx,
            no=row.no,
            attempt_id=row.attempt_id,
            device=row.device,
            text=row.text,
        )
        for row in reversed(rows)
    ]


def verdicts(conn: Connection) -> dict[str, str]:
    """What canaries say of each device since it started: the last verdict of a comparison, if there was one."""
    mine = select(c.verdict).where(c.device == d.name, c.incarnation == d.incarnation).order_by(c.id.desc()).limit(1)
    compared = mine.where(c.verdict != Verdict.UNVERIFIED.value)
    rows = conn.execute(select(d.name, func.coalesce(compared.scalar_subquery(), mine.scalar_subquery())))
    return {name: verdict for name, verdict in rows if verdict is not None}


def lost(conn: Connection, job_id: int) -> dict[str, int]:
    """How many attempts were taken away from their devices for what reason."""
    which = and_(a.job_id == job_id, tables.one_of(a.state, [AttemptState.LOST, AttemptState.FENCED]))
    rows = conn.execute(select(a.reason, func.count()).where(which).group_by(a.reason).order_by(a.reason))
    return {row[0]: row[1] for row in rows}


def quarantined(conn: Connection, job_id: int) -> list[tuple[str, str]]:
    """Devices, and why, that were put in quarantine between a job's first attempt and its end."""
    began, devices = select(func.min(a.assigned)).where(a.job_id == job_id), select(a.device).where(a.job_id == job_id)
    until = conn.scalar(select(j.finished).where(j.id == job_id))
    rows = conn.execute(
        select(e.device, e.text)
        .where(e.kind == "device_quarantined", e.device.in_(devices), e.at >= began.scalar_subquery())
        .where(true() if until is None else e.at <= until)
        .order_by(e.id)
    )
    return [(row.device, row.text) for row in rows]


def forced(conn: Connection, job_id: int) -> list[tuple[str, str]]:
    """Devices, and why not to, that were used all the same for a job."""
    took_part = {
        (row.device, f"incarnation {row.incarnation}")
        for row in conn.execute(select(a.device, a.incarnation).where(a.job_id == job_id).distinct())
    }
    rows = conn.execute(select(e.device, e.text).where(e.kind == "device_forced").order_by(e.id))
    said = [(row.device, *row.text.split(": ", 1)) for row in rows]
    return [(device, why) for device, incarnation, why in said if (device, incarnation) in took_part]


def canaries(conn: Connection, job: Job) -> dict[str, Canaries]:
    """Of the devices whose answers a job keeps, by device."""
    took_part = select(a.device).join(tables.shard, s.winner == a.id).where(s.job_id == job.id).distinct()
    began, ended = conn.execute(select(func.min(a.started), func.max(a.ended)).where(a.job_id == job.id)).one()
    rows = conn.execute(
        select(c.device, c.verdict, c.at, c.ms)
        .where(c.artifact_sha256 == job.spec.artifact.sha256, c.device.in_(took_part))
        .order_by(c.id)
    ).all()
    meanwhile = [row for row in rows if began <= row.at <= (ended or row.at)]
    return {
        device: Canaries(
            verdicts=[(row.at, Verdict(row.verdict)) for row in rows if row.device == device],
            batches=sum(row.device == device for row in meanwhile),
            ms=sum(row.ms for row in meanwhile if row.device == device),
        )
        for device in {row.device for row in rows}
    }
