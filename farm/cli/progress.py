"""Following a job until it ends: progress with rate and ETA from rows, and what stands in its way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import monotonic, sleep

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from db import devices, jobs
from db.engine import Database
from farm.settings import Settings

#: Between looks at the job's state, which is one cheap row, and between counts, which are not.
POLL_S, COUNT_S = 0.1, 0.5
#: Between lines where there is no terminal.
SAY_S = 5.0


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
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), transient=True) as bar:
        now = _progress(database, job_id)
        task = bar.add_task(str(now.job), total=now.job.spec.samples, rate="", note="")
        began, first, said = monotonic(), now.finished_samples, monotonic()
        while not _ended_within(COUNT_S if not bar.disable else SAY_S / 5, database, job_id):
            keep_farm()
            now = _progress(database, job_id)
            rate = (now.finished_samples - first) / (monotonic() - began)
            note = watch.note(now)
            if now.failed_samples:
                note = f"{now.failed_samples} failed {note}"
            bar.update(task, completed=now.finished_samples, rate=f"{rate:.1f}/s", note=note)
            if bar.disable and monotonic() - said > SAY_S:
                said = monotonic()
                done = f"{now.finished_samples}/{now.job.spec.samples}"
                console.print(f"{now.job}: {done}, {rate:.1f}/s {note}", highlight=False)


def _ended_within(seconds: float, database: Database, job_id: int) -> bool:
    """Whether the job has ended; waits up to so long for it."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        with database.read() as conn:
            if jobs.state(conn, job_id).is_final:
                return True
        sleep(POLL_S)
    return False


class _Watch:
    """Tells why nothing happens, once nothing has happened for a while."""

    PATIENCE_S = 10.0

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._last = (-1, monotonic())
        self._note = ""

    def note(self, now: jobs.Progress) -> str:
        if now.finished_samples != self._last[0]:
            self._last, self._note = (now.finished_samples, monotonic()), ""
        elif monotonic() - self._last[1] > self.PATIENCE_S and not now.live_attempts:
            spec = now.job.spec
            with self._database.read() as conn:
                up = devices.live(conn, self._database, self._settings.lease_s)
                known = {d.name: d.state.value for d in devices.everything(conn)}
            if not devices.matching(up, spec.artifact.backend, spec.devices):
                listing = ", ".join(f"{name} {state}" for name, state in known.items()) or "none registered"
                self._note = f"waiting: no device takes work ({listing})"
        return self._note


def _progress(database: Database, job_id: int) -> jobs.Progress:
    with database.read() as conn:
        return jobs.progress(conn, job_id)
