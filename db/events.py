"""The log of what happened: one row a transition, written in the transaction it tells of."""

from __future__ import annotations

from sqlalchemy import Connection, insert

from db.tables import event


def record(
    conn: Connection,
    at: float,
    kind: str,
    text: str = "",
    *,
    job_id: int | None = None,
    shard_id: int | None = None,
    attempt_id: int | None = None,
    device: str | None = None,
) -> None:
    conn.execute(
        insert(event).values(
            at=at, kind=kind, text=text, job_id=job_id, shard_id=shard_id, attempt_id=attempt_id, device=device
        )
    )
