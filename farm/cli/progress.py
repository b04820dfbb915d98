"""Following a job until it ends: progress with rate and ETA from rows, and what stands in its way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread
from time import monotonic, sleep
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sqlalchemy.exc import InterfaceError, OperationalError

from db import devices, jobs
from db.engine import Database
from farm.errors import StorageError
from farm.jobs import Job
from farm.settings import Settings

#: Between looks at the job's state, which is one cheap row, and between counts, which are not; how much of the time
#: that has passed may be lost by looking late; and how much of what seems to be left passes until the next look.
POLL_S, COUNT_S, LATE, AHEAD = 0.1, 0.5, 0.005, 0.1
#: Between lines, and counts, where there is no terminal; and between looks whether the farm is still there.
SAY_S, KEEP_S = 5.0, 1.0
#: Between looks at a database that does not answer.
AGAIN_S = 1.0

T = TypeVar("T")


def follow(
    settings: Settings, database: Database, job_id: int, keep_farm: Callable[[], None], console: Console
) -> None:
    """Return when the job has ended. Talks to stderr: a bar on a terminal, else a line now and then."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    watch = _Watch(settings, database)
    patient = Patience(partial(console.print, markup=False, highlight=False))
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        now = patient(lambda: _progress(database, job_id))
        task = bar.add_task(str(now.job), total=now.job.spec.samples, rate="", note="")
        began, first, said = monotonic(), now.finished_samples, monotonic()
        wait_s, ends = COUNT_S if not bar.disable else KEEP_S, 0.0

        def ended() -> bool:
            at = monotonic()
            return _ended_within(wait_s, max(POLL_S, LATE * (at - began), AHEAD * (ends - at)), database, job_id)

        while not patient(ended):
            keep_farm()
            if bar.disable and monotonic() - said < SAY_S:
                continue
            now, note = patient(lambda: watch.look(job_id))
            said, done = monotonic(), now.finished_samples
            rate = (done - first) / (said - began)
            ends = said + (now.job.spec.samples - done) / rate if rate else 0.0
            if now.failed_samples:
                note = f"{now.failed_samples} failed {note}"
            bar.update(task, completed=done, rate=f"{rate:.1f}/s", note=note)
            if bar.disable:
                console.print(f"{now.job}: {done}/{now.job.spec.samples}, {rate:.1f}/s {note}", highlight=False)


class Patience:
    """Asks a database that does not answer again and again, and says so; Ctrl-C is the way out."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def __call__(self, look: Callable[[], T]) -> T:
        said = False
        while True:
            try:
                found = look()
            except StorageError as exc:
                if not is_away(exc):
                    raise
                if not said:
                    self._say(f"the database does not answer, trying again: {exc}")
                said = True
                sleep(AGAIN_S)
            else:
                if said:
                    self._say("the database answers again")
                return found


def is_away(error: StorageError) -> bool:
    """Whether the database may answer later; what it says of a broken file or table it will say again."""
    return isinstance(error.__cause__, (OperationalError, InterfaceError))


@contextmanager
def ticking(settings: Settings, console: Console) -> Iterator[None]:
    """Be a coordinator while waiting: a farm of many hosts may have no other. One of one machine has its own."""
    if settings.is_embedded:
        yield
        return
    from tasks.coordinator import Coordinator

    over, wake = Event(), Event()
    handler = _Said(console)
    logging.getLogger("tasks").addHandler(handler)
    coordinator = Coordinator(settings, wake)
    thread = Thread(target=coordinator.run, kwargs={"until": over.is_set}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        wake.set()
        thread.join(2.0)  # a server that is away may hold it longer
        logging.getLogger("tasks").removeHandler(handler)


class _Said(logging.Handler):
    """Warnings of the tick, each kind once; what concerns the database is said by who waits for it."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._kinds = {"%s"}

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg not in self._kinds:
            self._kinds.add(record.msg)
            self._console.print(record.getMessage(), markup=False, highlight=False)


def _ended_within(seconds: float, poll_s: float, database: Database, job_id: int) -> bool:
    """Whether the job has ended; waits up to so long for it."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        with database.read() as conn:
            if jobs.state(conn, job_id).is_final:
                return True
        sleep(min(poll_s, seconds))
    return False


class _Watch:
    """Tells why nothing happens, once nothing has happened for a while."""

    PATIENCE_S = 10.0

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._last = (-1, monotonic())
        self._note = ""

    def look(self, job_id: int) -> tuple[jobs.Progress, str]:
        """How far the job is, and what it waits for."""
        now = _progress(self._database, job_id)
        if now.finished_samples != self._last[0]:
            self._last, self._note = (now.finished_samples, monotonic()), ""
        elif monotonic() - self._last[1] > self.PATIENCE_S and not now.live_attempts:
            self._note = waits_for(self._database, self._settings, now.job)
        return now, self._note


def waits_for(database: Database, settings: Settings, job: Job) -> str:
    """Why no device takes work of a job; empty when one does."""
    from farm.reports.status import device_lines, device_state

    spec = job.spec
    with database.read() as conn:
        unfit = {each.host: each.reason for each in jobs.unfit_hosts(conn, job.id)}
        up = devices.matching(devices.live(conn, database, settings.lease_s), spec.artifact, spec.devices)
    if any(device.host not in unfit for device in up):
        return ""
    lines = [line for line in device_lines(database, settings) if not spec.devices or line["device"] in spec.devices]
    listing = ", ".join(f"{line['device']} {device_state(line)}" for line in lines) or "none registered"
    because = "".join(f"; {host} is skipped: {reason}" for host, reason in unfit.items())
    return f"waiting: no device takes work ({listing}{because})"


def _progress(database: Database, job_id: int) -> jobs.Progress:
    with database.read() as conn:
        return jobs.progress(conn, job_id)
