"""The state of a job and of the devices, from rows: true right after any restart."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import select

from db import devices, jobs, results, tables
from db.engine import Database
from farm.jobs import LIVE, AttemptState
from farm.settings import Settings

#: Broken attempts listed before the rest is only counted.
LISTED = 10


def build(database: Database, settings: Settings, job_id: int) -> dict[str, Any]:
    """Progress, attempts by outcome, each broken attempt with its reason, and the devices."""
    a, s = tables.attempt.c, tables.shard.c
    attempts = (
        select(a.no, a.device, a.state, a.failure, a.reason, a.isolating, s.idx, s.start, s.stop)
        .join(tables.shard, s.id == a.shard_id)
        .where(a.job_id == job_id)
        .order_by(a.id)
    )
    broken = attempts.where(
        a.state.in_([AttemptState.FAILED.value, AttemptState.LOST.value, AttemptState.FENCED.value])
    )
    with database.read() as conn:
        progress = jobs.progress(conn, job_id)
        by_state = results.attempts_by_state(conn, job_id)
        lost = [dict(row) for row in conn.execute(broken).mappings()]
        live = [dict(row) for row in conn.execute(attempts.where(a.state.in_([x.value for x in LIVE]))).mappings()]
    return {
        "job": job_id,
        "state": progress.job.state.value,
        "simulated": progress.job.simulated,
        "error": progress.job.error,
        "title": str(progress.job),
        "samples": {
            "total": progress.job.spec.samples,
            "finished": progress.finished_samples,
            "failed": progress.failed_samples,
        },
        "shards": {"total": progress.shards, "open": progress.open_shards},
        "attempts": by_state,
        "broken": lost,
        "live": live,
        "devices": device_lines(database, settings),
    }


def device_lines(database: Database, settings: Settings) -> list[dict[str, Any]]:
    """Every registered device as the database sees it now; one not heard of for a lease is ``lost``."""
    with database.read() as conn:
        now = database.now(conn)
        found = devices.everything(conn)
    return [
        {
            "device": d.name,
            "state": d.state.value if d.heartbeat >= now - settings.lease_s or d.state.value == "gone" else "lost",
            "soc": d.soc,
            "backends": list(d.backends),
            "incarnation": d.incarnation,
            "strikes": d.strikes,
            "heard_s_ago": round(now - d.heartbeat, 1),
            "pid": d.pid,
        }
        for d in found
    ]


def show(status: dict[str, Any], console: Console) -> None:
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
    for attempt in status["broken"][-LISTED:]:
        what = attempt["failure"] or attempt["state"]
        where = f"shard {attempt['idx']} try {attempt['no']} on {attempt['device']}"
        console.print(f"  {what}: {where}: {attempt['reason']}", markup=False, highlight=False, soft_wrap=True)
    if len(status["broken"]) > LISTED:
        console.print(f"  and {len(status['broken']) - LISTED} earlier ones: --json", highlight=False)
    show_devices(status["devices"], console)


def show_devices(lines: list[dict[str, Any]], console: Console) -> None:
    """One line a device."""
    table = Table("device", "state", "soc", "backends", "strikes", "heard", box=None)
    for line in lines:
        heard = "-" if line["state"] == "gone" else f"{line['heard_s_ago']} s ago"
        backends = ", ".join(line["backends"])
        table.add_row(line["device"], line["state"], line["soc"], backends, str(line["strikes"]), heard)
    console.print(table)
