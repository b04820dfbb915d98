"""The Celery task: an id comes in, a shard is evaluated, rows are committed, the next bell is rung."""

from __future__ import annotations

import logging

from celery import shared_task

from tasks.app import SHARD_TASK

#: The largest id that a database can be asked for.
MAX_ID = 2**63 - 1

log = logging.getLogger(__name__)


class AttemptFailed(Exception):
    """For Celery's events, so that Flower counts it; the database has been told already."""


class Refused(Exception):
    """The message is none of the farm's."""


@shared_task(name=SHARD_TASK, ignore_result=True, throws=(AttemptFailed, Refused))
def run_shard(shard_id: int, attempt_id: int) -> str:
    """What became of the attempt, for the log and Flower; the truth is in the database."""
    from tasks.worker import current

    for value in (shard_id, attempt_id):
        if type(value) is not int or not 1 <= value <= MAX_ID:
            log.warning("refused a message: %.50r is no id", value)
            raise Refused(f"{value!r:.50} is no id")
    outcome = current().evaluate(attempt_id)
    if outcome.startswith("failed"):
        raise AttemptFailed(outcome)
    return outcome
