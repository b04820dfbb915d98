"""The Celery task: an id comes in, a shard is evaluated, rows are committed, the next bell is rung."""

from __future__ import annotations

from celery import shared_task

from tasks.app import SHARD_TASK


@shared_task(name=SHARD_TASK, ignore_result=True)
def run_shard(shard_id: int, attempt_id: int) -> str:
    """What became of the attempt, for the log and Flower; the truth is in the database."""
    from tasks.worker import current

    for value in (shard_id, attempt_id):
        if type(value) is not int or value < 1:
            return f"refused: {value!r:.50} is no id"
    return current().evaluate(attempt_id)
