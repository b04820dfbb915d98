"""What happened, in order: the log's rows, and from the attempts' own what needs no row in the log."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from db import jobs, overview
from db.engine import Database
from db.overview import Attempt, Event
from farm.jobs import LIVE, AttemptState

Line = dict[str, Any]


def build(database: Database, job_id: int | None, limit: int) -> list[Line]:
    """The newest `limit` things that happened, to one job or to all, newest last."""
    with database.read() as conn:
        if job_id is not None:
            jobs.get(conn, job_id)
        log = overview.events(conn, job_id, limit)
        attempts = overview.transitions(conn, job_id, limit)
    told = {(each.attempt_id, each.kind) for each in log}
    lines = [_of_the_log(each) for each in log]
    lines += [line for attempt in attempts for line in _of_an_attempt(attempt, told)]
    return [line for _, line in sorted(lines, key=lambda each: each[0])[-limit:]]


def _of_the_log(event: Event) -> tuple[tuple[float, int, int], Line]:
    name = None if event.job_id is None else overview.name_of(event.job_id, event.shard, event.no)
    line = _line(event.at, event.kind, name, event.job_id, event.device, event.text)
    return (event.at, 1, event.id), line


def _of_an_attempt(
    attempt: Attempt, told: set[tuple[int | None, str]]
) -> Iterator[tuple[tuple[float, int, int], Line]]:
    """Its transitions; of its end only what the log does not tell."""

    def line(at: float, kind: str, text: str, order: int) -> tuple[tuple[float, int, int], Line]:
        return (at, order, attempt.id), _line(at, kind, attempt.name, attempt.job_id, attempt.device, text)

    samples = f"samples {attempt.start} to {attempt.stop - 1}" if attempt.stop > attempt.start else ""
    yield line(attempt.assigned, "assigned", samples, 2)
    if attempt.started is not None:
        yield line(attempt.started, "started", "looks for the sample that breaks it" if attempt.isolating else "", 3)
    if attempt.ended is None or attempt.state in LIVE:
        return
    if attempt.has_won:
        yield line(attempt.ended, "won", "", 0)
        return
    state = attempt.state.value
    kind = f"attempt_{attempt.failure}" if attempt.state is AttemptState.FAILED else f"attempt_{state}"
    if told.isdisjoint({(attempt.id, kind), (attempt.id, state)}):
        yield line(attempt.ended, kind, attempt.reason, 0)


def _line(at: float, kind: str, name: str | None, job_id: int | None, device: str | None, text: str) -> Line:
    return {"at": at, "kind": kind, "name": name, "job": job_id, "device": device, "text": text}


def text(line: Line) -> str:
    """One line: time, what it is about, device, what happened."""
    at = datetime.fromtimestamp(line["at"]).isoformat(sep=" ", timespec="milliseconds")
    said = f"{line['kind']}: {line['text']}" if line["text"] else line["kind"]
    return f"{at}  {line['name'] or '-':<14} {line['device'] or '-':<14} {said}"
