"""Ringing: telling devices of attempts that are in the database already."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from db import shards
from db.engine import Database
from db.shards import Ring
from farm.settings import Settings
from workers import broker

if TYPE_CHECKING:
    from celery import Celery

log = logging.getLogger(__name__)


def ring(app: Celery, rings: Sequence[Ring]) -> int:
    """
    Send one message a ring; the answer is how many went out.

    A broker that is away costs time, never work: the coordinator rings again for what was not heard.
    """
    from kombu.exceptions import OperationalError

    from tasks.app import SHARD_TASK, queue_of

    for sent, each in enumerate(rings):
        assignment = each.assignment
        try:
            app.send_task(
                SHARD_TASK,
                args=[assignment.shard_id, assignment.attempt_id],
                queue=queue_of(each.device),  # no exchange: a broker that was wiped has forgotten what is bound to one
                task_id=assignment.task_id,
                argsrepr=str(assignment),
                kwargsrepr="",
            )
        except (OperationalError, OSError) as exc:
            log.warning("could not ring %s for %s: %s", each.device, assignment.task_id, exc)
            return sent
    return len(rings)


def assign_and_ring(settings: Settings, database: Database) -> None:
    """Fill the windows of the devices that are up, and tell them."""
    from tasks.app import make_app

    with database.write() as conn:
        rings = shards.assign(conn, database, settings.lease_s)
    ring(make_app(broker.url(settings)), rings)
