"""The tick: takes back what vanished devices held, fills windows, helps slow shards, rings again."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from threading import Event

import psutil
from celery import Celery

from db import devices, jobs, shards
from db.engine import Database, open_database
from db.shards import Ring
from farm.errors import StorageError
from farm.jobs import DeviceState
from farm.settings import Settings
from tasks.app import make_app
from tasks.dispatch import ring
from workers import broker

#: An assigned attempt whose device does nothing is rung again after so long.
RING_AGAIN_S = 2.0
#: Between ticks: short while they find something to do, long while they do not.
BUSY_TICK_S, IDLE_TICK_S = 0.2, 1.0
#: Devices whose windows one transaction fills.
AT_ONCE = 4

log = logging.getLogger(__name__)


class Coordinator:
    """Ticks, whatever happens to the database or the broker meanwhile."""

    def __init__(self, settings: Settings, wake: Event) -> None:
        """Setting `wake` has it tick at once."""
        self._settings = settings
        self._wake = wake
        self._app = make_app(broker.url(settings))
        self._database: Database | None = None

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self._wake.clear()
            changes = self.tick()
            if until():
                return
            self._wake.wait(BUSY_TICK_S if changes else IDLE_TICK_S)

    def tick(self) -> int:
        """One round that never raises; returns how many changes it made."""
        try:
            self._database = self._database or open_database(self._settings)
            return tick(self._database, self._app, self._settings)
        except StorageError as exc:
            log.warning("%s", exc)
        except Exception:
            log.exception("the tick failed; it goes on")
        return 0


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
        wanting = shards.with_room(conn, database, lease_s)
        slow = [] if wanting else shards.slow(conn, database, lease_s)
    rings: list[Ring] = []
    if database.is_sqlite:
        _kill_stale_workers(database, settings)
    if orphans:
        with database.write() as conn:
            shards.rescue(conn, database, lease_s)
        with database.read() as conn:
            wanting = shards.with_room(conn, database, lease_s)
    for first in range(0, len(wanting), AT_ONCE):  # others write, too
        with database.write() as conn:
            rings += shards.assign(conn, database, lease_s, only=wanting[first : first + AT_ONCE])
    if slow:
        with database.write() as conn:
            rings += shards.speculate(conn, database, lease_s)
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
