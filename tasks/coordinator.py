"""The tick: takes back what vanished devices held, fills windows, rings again, ends finished jobs."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress

import psutil
from celery import Celery

from db import devices, jobs, shards
from db.engine import Database
from db.shards import Ring
from farm.jobs import DeviceState
from farm.settings import Settings
from tasks.dispatch import ring

#: An assigned attempt whose device does nothing is rung again after so long.
RING_AGAIN_S = 2.0

log = logging.getLogger(__name__)


def tick(database: Database, app: Celery, settings: Settings) -> int:
    """
    One round; returns how many changes it made. Any process may run it, several at once do no harm.

    Reads first and writes only what it found to do, so that an idle farm takes no write lock.
    """
    lease_s = settings.lease_s
    with database.read() as conn:
        orphans = shards.orphans(conn, database, lease_s)
        again = shards.unheard(conn, database, RING_AGAIN_S)
        finished = jobs.finished_but_open(conn)
        wanting = shards.has_room(conn, database, lease_s)
    rings: list[Ring] = []
    if database.is_sqlite:
        _kill_stale_workers(database, settings)
    if orphans or wanting:
        with database.write() as conn:
            shards.rescue(conn, database, lease_s)
            rings = shards.assign(conn, database, lease_s)
    if again:
        with database.write() as conn:
            shards.rang(conn, database, again)
    for job_id in finished:
        with database.write() as conn:
            jobs.settle(conn, database, job_id)
    ring(app, [*rings, *again])
    return len(orphans) + len(rings) + len(again) + len(finished)


def _kill_stale_workers(database: Database, settings: Settings) -> None:
    """A worker stopped inside a write transaction blocks every writer: end it when its lease is over."""
    with database.read() as conn:
        horizon = database.now(conn) - settings.lease_s
        stale = [
            d
            for d in devices.everything(conn)
            if d.host == settings.host_name and d.state is not DeviceState.GONE and d.heartbeat < horizon
        ]
    for device in stale:
        with suppress(psutil.Error):
            process = psutil.Process(device.pid)
            stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            if stopped and abs(process.create_time() - device.pid_started) < 1:
                log.warning("worker %d of %s is stopped and its lease is over: killed", device.pid, device.name)
                os.kill(device.pid, signal.SIGKILL)
