"""Result rows: one a sample that counts, kept when superseded; and what attempts tell about speed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, func, select, text
from sqlalchemy import insert as sql_insert

from db import tables
from farm.errors import InvariantBroken
from farm.jobs import LIVE, Assignment, AttemptState, Budget, ResultState, SampleResult, Segments

if TYPE_CHECKING:  # who only looks at states does without
    import numpy as np
    from numpy.typing import NDArray

_K = 5
_CLASSES = [f"class{i}" for i in range(1, _K + 1)]
_SCORES = [f"score{i}" for i in range(1, _K + 1)]
_STATES = {state.value: state for state in ResultState}


class Row(NamedTuple):
    """A result row as reports use it. A tuple: a report makes one of each sample."""

    name: str
    state: ResultState
    label: int
    rank: int | None
    classes: tuple[int, ...]
    scores: tuple[float, ...]
    sha256: str | None  #: of a label map's uint8 values
    reason: str
    device: str


class Answer(NamedTuple):
    """What the report needs of a result row, and no more: there may be a million."""

    name: str
    rank: int | None
    reason: str | None  #: why it failed; None of a scored sample
    answer: str | None  #: what the digest has of it: nothing, of a failed sample


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptTimes:
    """What one winning attempt tells about its device."""

    device: str
    started: float
    ended: float
    samples: int
    batch_ms: NDArray[np.float32]  #: [batches, 3]: h2d, compute, d2h
    budget: Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """Whose rows are a shard's rows, and where it ran."""

    shard: int  #: position in the job
    attempt_id: int
    host: str
    samples: int


def insert(conn: Connection, assignment: Assignment, samples: Sequence[SampleResult]) -> None:
    """One row a sample of the shard. The unique key stops a second row that counts; `InvariantBroken` says so."""
    if len(samples) != assignment.stop - assignment.start:
        raise InvariantBroken(
            f"{assignment.task_id} has {len(samples)} rows for {assignment.stop - assignment.start} samples; "
            "nothing was written"
        )
    if not samples:  # of a job of speed
        return
    same, missing = (assignment.job.id, assignment.attempt_id), (None,) * _K
    conn.exec_driver_sql(
        _in_words_of(conn.dialect.paramstyle),
        [
            (
                *same,
                *(sample.name, sample.state.value, sample.label, sample.rank, sample.reason),
                *(sample.classes or missing),
                *(sample.scores or missing),
            )
            for sample in samples
        ],
    )
    segmented = [
        {"job_id": assignment.job.id, "name": sample.name, "superseded": 0, **asdict(sample.segments)}
        for sample in samples
        if sample.segments is not None
    ]
    if segmented:
        conn.execute(sql_insert(tables.segments), segmented)


@cache
def _in_words_of(paramstyle: str) -> str:
    """A row, in the driver's own words: a shard has hundreds, and what SQLAlchemy does for each costs most of it."""
    columns = ("job_id", "attempt_id", "name", "state", "label", "rank", "reason", *_CLASSES, *_SCORES, "superseded")
    assert {column.name for column in tables.result.columns} == set(columns)
    mark = "?" if paramstyle == "qmark" else "%s"
    return f"INSERT INTO result ({', '.join(columns)}) VALUES ({f'{mark}, ' * (len(columns) - 1)}0)"  # noqa: S608


def rows(conn: Connection, job_id: int, *, state: ResultState | None = None, limit: int | None = None) -> Iterator[Row]:
    """The rows that count, in name order."""
    r = tables.result.c
    query = _counting(
        job_id,
        *(r.name, r.state, r.label, r.rank, r.reason, tables.attempt.c.device, tables.segments.c.sha256),
        *(r[column] for column in (*_CLASSES, *_SCORES)),
    )
    query = query.join(tables.attempt, tables.attempt.c.id == r.attempt_id).limit(limit)
    if state is not None:
        query = query.where(r.state == state.value)
    _take_time(conn)
    for some in conn.execute(query).partitions(1000):
        for name, state_, label, rank, reason, device, sha256, *best in some:
            classes, scores = (tuple(best[:_K]), tuple(best[_K:])) if rank is not None else ((), ())
            yield Row(name, _STATES[state_], label, rank, classes, scores, sha256, reason, device)


def answers(conn: Connection, job_id: int) -> Iterator[Answer]:
    """The same rows, as the report needs them."""
    r = tables.result.c
    columns = (r.name, r.rank, r.state, r.reason, tables.segments.c.sha256, *(r[column] for column in _CLASSES))
    _take_time(conn)
    for some in conn.execute(_counting(job_id, *columns)).partitions(1000):
        for name, rank, state, reason, sha256, *classes in some:
            answer = sha256 if rank is None else ",".join(map(str, classes))
            yield Answer(name, rank, reason if state == ResultState.FAILED.value else None, answer)


def _counting(job_id: int, *columns: ColumnElement[Any]) -> Select[Any]:
    """Of a job's rows that count, and their segments if they have any, in name order."""
    r, s = tables.result.c, tables.segments.c
    return (
        select(*columns)
        .select_from(tables.result)
        .outerjoin(tables.segments, (s.job_id == r.job_id) & (s.name == r.name) & (s.superseded == r.superseded))
        .where(r.job_id == job_id, r.superseded == 0)
        .order_by(r.name)
    )


def _take_time(conn: Connection) -> None:
    """
    Have a server not end this transaction while its rows are worked on: a million take longer than it has patience
    with who may have vanished. Who reads keeps nobody waiting.
    """
    if conn.dialect.name != "sqlite":
        conn.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))


def segments(conn: Connection, job_id: int, name: str | None = None) -> Iterator[tuple[str, Segments]]:
    """Names and segments of a job's scored images, in name order; of one image only, if it is named."""
    query = select(tables.segments).where(tables.segments.c.job_id == job_id, tables.segments.c.superseded == 0)
    if name is not None:
        query = query.where(tables.segments.c.name == name)
    columns = [field.name for field in fields(Segments)]
    _take_time(conn)
    for row in conn.execute(query.order_by(tables.segments.c.name)).mappings():
        yield row["name"], Segments(**{column: row[column] for column in columns})


def areas(conn: Connection, job_id: int) -> NDArray[np.int64]:
    """Pixels intersecting, predicted and labelled by class, [3, 150], over all images of a job; [3, 0] if none is."""
    import numpy as np

    query = select(tables.segments.c.areas).where(tables.segments.c.job_id == job_id, tables.segments.c.superseded == 0)
    packed = [np.frombuffer(row.areas, "<u4").reshape(3, -1) for row in conn.execute(query)]
    return np.sum(packed, axis=0, dtype=np.int64) if packed else np.zeros((3, 0), np.int64)


def attempt_times(conn: Connection, job_id: int) -> list[AttemptTimes]:
    """One record a winning attempt, in the order they started."""
    import numpy as np

    a, s = tables.attempt.c, tables.shard.c
    query = (
        select(a.device, a.started, a.ended, a.batch_ms, a.budget, (s.stop - s.start).label("samples"))
        .join(tables.shard, s.id == a.shard_id)
        .where(a.job_id == job_id, a.state == AttemptState.WON.value)
        .order_by(a.started)
    )
    return [
        AttemptTimes(
            device=row.device,
            started=row.started,
            ended=row.ended,
            samples=row.samples,
            batch_ms=np.frombuffer(row.batch_ms, dtype="<f4").reshape(-1, 3),
            budget=Budget(**json.loads(row.budget)),
        )
        for row in conn.execute(query)
    ]


def winners(conn: Connection, job_id: int) -> list[Winner]:
    """The attempts whose rows count, by shard."""
    a, s, d = tables.attempt.c, tables.shard.c, tables.device.c
    query = (
        select(s.idx, a.id, d.host, s.start, s.stop)
        .join(tables.attempt, a.id == s.winner)
        .join(tables.device, d.name == a.device)
        .where(s.job_id == job_id, a.state == AttemptState.WON.value)
        .order_by(s.idx)
    )
    return [
        Winner(shard=row.idx, attempt_id=row.id, host=row.host, samples=row.stop - row.start)
        for row in conn.execute(query)
    ]


def useless(conn: Connection, attempts: Collection[int]) -> set[int]:
    """Those of them that count nowhere, and never will."""
    a = tables.attempt.c
    counting = [state.value for state in (*LIVE, AttemptState.WON)]
    return set(conn.execute(select(a.id).where(a.id.in_(attempts), a.state.not_in(counting))).scalars())


def spent(conn: Connection, job_id: int) -> list[tuple[float, float]]:
    """(start, end) of all attempts that ran and ended, whatever became of them."""
    a = tables.attempt.c
    query = select(a.started, a.ended).where(a.job_id == job_id, a.started.is_not(None), a.ended.is_not(None))
    return [(row.started, row.ended) for row in conn.execute(query)]


def attempts_by_state(conn: Connection, job_id: int) -> dict[str, int]:
    """How many attempts ended how; failed ones by their failure."""
    a = tables.attempt.c
    kind_of = func.coalesce(a.failure, a.state)
    query = select(kind_of, func.count()).where(a.job_id == job_id).group_by(a.failure, a.state)
    counts: dict[str, int] = {}
    for kind, count in conn.execute(query):
        counts[kind] = counts.get(kind, 0) + count
    return counts


def throughput(conn: Connection, artifact_sha256: str) -> float | None:
    """
    Samples a second one device managed with this artifact in its last 20 shards, copies included; None if never run.
    """
    import numpy as np

    a, j = tables.attempt.c, tables.job.c
    query = (
        select(a.batch_ms, j.bs)
        .join(tables.job, j.id == a.job_id)
        .where(j.artifact_sha256 == artifact_sha256, a.state == AttemptState.WON.value)
        .order_by(a.id.desc())
        .limit(20)
    )
    batches, total_ms, bs = 0, 0.0, 0
    for row in conn.execute(query):
        times = np.frombuffer(row.batch_ms, dtype="<f4").reshape(-1, 3)
        batches, total_ms, bs = batches + len(times), total_ms + float(times.sum()), row.bs
    return 1000.0 * bs * batches / total_ms if total_ms else None
