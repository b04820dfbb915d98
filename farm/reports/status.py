"""The state of jobs and devices, from rows: true right after any restart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console
from sqlalchemy import Connection

from db import devices, jobs, overview, results
from db.devices import Device
from db.engine import Database
from db.jobs import Progress
from db.overview import Attempt
from farm.jobs import AttemptState, DeviceState, Job
from farm.settings import Settings

#: Broken attempts and hosts listed before the rest is only counted.
LISTED = 10
#: Active jobs an overview shows.
JOBS = 20
#: A rate is that of so many seconds.
RATE_S = 30.0

Status = dict[str, Any]


def build(database: Database, settings: Settings, job_id: int, *, limit: int | None = None) -> Status:
    """A job: progress, rate, attempts by outcome, broken ones (the newest `limit`) with reasons, and the devices."""
    with database.read() as conn:
        found = _Found(conn, database, [jobs.get(conn, job_id)], limit)
        by_state = results.attempts_by_state(conn, job_id)
        return {
            **found.job_line(found.progress[0]),
            "attempts": by_state,
            "broken": [_attempt_line(each) for each in found.broken],
            "live": [_attempt_line(each) for each in found.live if each.job_id == job_id],
            "unfit": found.unfit_lines(),
            "devices": found.device_lines(settings),
        }


def build_all(database: Database, settings: Settings) -> Status:
    """The jobs that want work done, what broke last, and the devices."""
    with database.read() as conn:
        active, more = overview.active(conn, JOBS)
        found = _Found(conn, database, active, LISTED)
        return {
            "jobs": [found.job_line(each) for each in found.progress],
            "more_jobs": more,
            "broken": [_attempt_line(each) for each in found.broken],
            "unfit": found.unfit_lines(),
            "devices": found.device_lines(settings),
        }


def device_lines(database: Database, settings: Settings) -> list[Status]:
    """Every registered device as the database sees it now; one not heard of for a lease is ``lost``."""
    with database.read() as conn:
        return _Found(conn, database, overview.active(conn, JOBS)[0], 0).device_lines(settings)


class _Found:
    """What one look at the database found of some jobs, and of all devices."""

    def __init__(self, conn: Connection, database: Database, found: Sequence[Job], limit: int | None) -> None:
        self.now = database.now(conn)
        ids = [job.id for job in found]
        self.progress = overview.progress(conn, found)
        self.live = overview.live(conn)
        self.won = overview.won_since(conn, ids, self.now - RATE_S)
        self.broken = overview.broken(conn, ids, limit) if limit != 0 else []
        self.unfit = [each for each in jobs.unfit_hosts(conn) if each.job_id in ids]
        self.devices = devices.everything(conn)
        self.verdicts = overview.verdicts(conn)

    def job_line(self, progress: Progress) -> Status:
        job = progress.job
        own = [each for each in self.won if each.job_id == job.id]
        live = [each for each in self.live if each.job_id == job.id]
        rate = self._rate(own, live)
        left = job.spec.samples - progress.finished_samples
        return {
            "job": job.id,
            "state": job.state.value,
            "simulated": job.simulated,
            "error": job.error,
            "title": str(job),
            "model": job.spec.model,
            "bs": job.spec.bs,
            "priority": job.spec.priority,
            "samples": {
                "total": job.spec.samples,
                "finished": progress.finished_samples,
                "failed": progress.failed_samples,
            },
            "shards": {"total": progress.shards, "open": progress.open_shards},
            "rate": rate,
            "eta_s": left / rate if rate and not job.state.is_final else None,
            "at_risk": sum({each.shard_id: each.samples for each in live if _runs(each)}.values()),
        }

    def _rate(self, won: Sequence[Attempt], live: Sequence[Attempt]) -> float:
        """Samples a second of the last 30 s, or of as much of them as there was work."""
        began = [each.started for each in (*won, *live) if each.started is not None]
        span = self.now - max(self.now - RATE_S, min(began, default=self.now))
        # A shard may have begun before; what counts is when its samples were there.
        return sum(each.samples for each in won) / span if span > 0 else 0.0

    def unfit_lines(self) -> list[Status]:
        return [{"job": each.job_id, "host": each.host, "reason": each.reason} for each in self.unfit]

    def device_lines(self, settings: Settings) -> list[Status]:
        return [self._device_line(each, settings.lease_s) for each in self.devices]

    def _device_line(self, d: Device, lease_s: float) -> Status:
        held = [each for each in self.live if each.device == d.name]
        running = next((each for each in held if _runs(each)), None)
        heard = self.now - d.heartbeat
        return {
            "device": d.name,
            "host": d.host,
            "state": "lost" if heard > lease_s and d.state is not DeviceState.GONE else d.state.value,
            "drained": d.drained,
            "reason": d.reason if d.state is DeviceState.QUARANTINED else "",
            "soc": d.soc,
            "backends": list(d.backends),
            "incarnation": d.incarnation,
            "age_s": round(self.now - d.registered, 1),
            "strikes": d.strikes,
            "heard_s_ago": round(heard, 1),
            "pid": d.pid,
            "canary": self.verdicts.get(d.name),
            "unfit": [{"job": each.job_id, "reason": each.reason} for each in self.unfit if each.host == d.host],
            "running": running and running.name,
            "running_s": running and round(self.now - (running.started or self.now), 1),
            "waiting": len(held) - (running is not None),
            "rate": self._rate([each for each in self.won if each.device == d.name], held),
            **how_it_is(d.info),
        }


def how_it_is(info: Mapping[str, Any]) -> Status:
    """What `npu-smi` said last of an NPU; nothing of other devices."""
    numbers = ("health", "temperature_c", "memory_used_mb", "memory_total_mb")
    return {
        **{name: info.get(name) for name in numbers},
        "foreign": info.get("foreign", []),
        "unusable": info.get("unusable", info.get("forced", "")),
    }


def _runs(attempt: Attempt) -> bool:
    return attempt.state is AttemptState.RUNNING


def _attempt_line(attempt: Attempt) -> Status:
    return {
        "name": attempt.name,
        "no": attempt.no,
        "device": attempt.device,
        "state": attempt.state.value,
        "failure": attempt.failure,
        "reason": attempt.reason,
        "isolating": attempt.isolating,
        "idx": attempt.shard,
        "start": attempt.start,
        "stop": attempt.stop,
    }


def at_risk(found: Collection[Mapping[str, Any]]) -> str:
    """What a power failure would cost these jobs: rows are safe, only what runs is done again."""
    samples = sum(line["at_risk"] for line in found)
    return f"if power failed now: {samples} samples would be done again, 0 lost"


def broken_line(attempt: Mapping[str, Any]) -> str:
    what = attempt["failure"] or attempt["state"]
    return f"{what}: shard {attempt['idx']} try {attempt['no']} on {attempt['device']}: {attempt['reason']}"


def unfit_line(line: Mapping[str, Any]) -> str:
    return f"{line['host']} is skipped for job {line['job']}: {line['reason']}"


def quarantine_line(line: Mapping[str, Any]) -> str:
    return f"{line['device']} is quarantined: {line['reason']}"


def device_state(line: Mapping[str, Any]) -> str:
    """As a person reads it: a device that takes no work because it was told so is not just up."""
    state: str = line["state"]
    if line.get("drained"):
        return "drained" if state == "up" else f"{state}, drained"
    return state


def show(status: Status, console: Console) -> None:
    """Print what `build` found."""
    samples, shards = status["samples"], status["shards"]
    console.print(f"[bold]{status['title']}[/]: {status['state']}", highlight=False)
    if status["error"]:
        console.print(f"  {status['error']}", markup=False, highlight=False)
    console.print(
        f"  {samples['finished']} of {samples['total']} samples finished, {samples['failed']} failed; "
        f"{shards['open']} of {shards['total']} shards open",
        highlight=False,
    )
    listing = ", ".join(f"{count} {kind}" for kind, count in sorted(status["attempts"].items()))
    console.print(f"  attempts: {listing or 'none yet'}", highlight=False)
    if status["state"] in ("pending", "running"):
        console.print(f"  {status['rate']:.1f} samples/s; {at_risk([status])}", highlight=False)
    for attempt in status["broken"][-LISTED:]:
        console.print(f"  {broken_line(attempt)}", markup=False, highlight=False, soft_wrap=True)
    if len(status["broken"]) > LISTED:
        console.print(f"  and {len(status['broken']) - LISTED} earlier ones: --json", highlight=False)
    for line in status["unfit"]:
        console.print(f"  {unfit_line(line)}", markup=False, highlight=False, soft_wrap=True)
    show_devices(status["devices"], console)


def show_devices(lines: list[Status], console: Console) -> None:
    """One line a device, and why some do not work."""
    is_npu = any(line["health"] is not None for line in lines)
    rows = [_titles(is_npu)]
    for line in lines:
        heard = "-" if line["heard_s_ago"] is None or line["state"] == "gone" else f"{ago(line['heard_s_ago'])} ago"
        started = "-" if line["age_s"] is None else f"{ago(line['age_s'])} ago"
        backends = ",".join(line["backends"])
        strikes = str(line["strikes"])
        canary = line["canary"] or "-"
        rows.append(
            (line["device"], device_state(line), line["soc"], backends, strikes, started, canary, heard)
            + (_npu_cells(line) if is_npu else ())
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):  # a table of rich's takes a millisecond a line
        said = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(said, style=None if number else "bold", markup=False, highlight=False, soft_wrap=True)
    for line in lines:
        if line["reason"]:
            console.print(quarantine_line(line), markup=False, highlight=False, soft_wrap=True)
        if line["unusable"]:
            serves = line["state"] in ("up", "quarantined")
            said = f"{line['device']} {'works although' if serves else 'is not used:'} {line['unusable']}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def _titles(is_npu: bool) -> tuple[str, ...]:
    titles = ("device", "state", "soc", "backends", "strikes", "started", "canary", "heard")
    return (*titles, "health", "°C", "memory") if is_npu else titles


def _npu_cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    memory = f"{line['memory_used_mb']} of {line['memory_total_mb']} MB" if line["memory_total_mb"] else "-"
    return line["health"] or "-", "-" if line["temperature_c"] is None else str(line["temperature_c"]), memory


def ago(seconds: float) -> str:
    """``12 s``, ``5 min``, ``3 h`` or ``2 d``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
