"""
A database with many jobs: what listings, the tick and a claim cost on SQLite and on Postgres.

    python -m tests.benchmarks.many_jobs [--jobs 1000] [--runs 20] [--short]

Half of the jobs are done, their rows are there; the others wait, and 64 devices are idle. No worker runs: a claim is
what a device's commit does for the next shard, a window filled and its first shard started. The limit is 100 ms each,
of the 95th percentile. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from sqlalchemy import Connection, insert, text

from db import devices, jobs, overview, shards, tables
from db.devices import Registration
from db.engine import Database
from farm import artifacts, zoo
from farm.jobs import AttemptState, JobSpec, JobState, ResultState, ShardState
from farm.reports import status
from farm.reports.watch import render
from farm.settings import Settings
from tasks.app import make_app
from tasks.coordinator import tick
from tests.servers import Postgres, Valkey

SHARDS, SAMPLES, DEVICES = 100, 4, 64
LIMIT_MS = 100.0
LEASE_S = 3600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="60 jobs, 5 runs: shows that it runs")
    arguments = parser.parse_args()
    count, runs = (60, 5) if arguments.short else (arguments.jobs, arguments.runs)
    with tempfile.TemporaryDirectory() as scratch, Valkey() as valkey, Postgres() as postgres:
        stores = {
            "sqlite": f"sqlite:///{scratch}/farm.db",
            "postgres": postgres.create_database("farm"),
        }
        found = {name: _measure(Path(scratch), url, valkey.url(), count, runs) for name, url in stores.items()}
    print(json.dumps(_summary(count, runs, found)))


def _measure(home: Path, url: str, broker_url: str, count: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run of each thing."""
    settings = Settings(home=home, broker_url=broker_url, database_url=url, lease_s=LEASE_S)
    database, app = Database(url), make_app(broker_url)
    database.ensure_schema()
    with database.write() as conn:
        for index in range(DEVICES):
            register(conn, database, index)
        for done in range(count):
            _write_shards(conn, database.now(conn), done=done % 2 == 0)
    with database.write() as conn:
        if not database.is_sqlite:  # rows were written with numbers of their own
            for table in ("shard", "attempt"):
                conn.execute(text(f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), max(id)) FROM {table}"))
        conn.execute(text("ANALYZE"))
    screen = Console(file=(home / "screen").open("w"), width=140, height=40)

    def listing() -> None:
        with database.read() as conn:
            overview.progress(conn, jobs.recent(conn, 20))

    def claim(index: int) -> None:
        device = f"h:{index}"
        with database.write() as conn:
            first = shards.assign(conn, database, LEASE_S, only=[device])[0]
        with database.write() as conn:
            assert shards.start(conn, database, first.assignment.attempt_id, device, 1) is not None

    things: Mapping[str, Callable[[int], object]] = {
        "jobs": lambda _: listing(),
        "status": lambda _: screen.print(render(status.build_all(database, settings), 39)),
        "status_job": lambda _: status.show(status.build(database, settings, count), screen),
        "claim": claim,
        "tick": lambda _: tick(database, app, settings),
    }
    found = {}
    for name, thing in things.items():
        if name == "tick":
            began = perf_counter()
            tick(database, app, settings)  # fills all windows at once, and rings for each: not the usual one
            found["tick_that_fills"] = [1000 * (perf_counter() - began)]
        found[name] = [_timed(thing, run) for run in range(runs)]
    database.close()
    print({name: f"{statistics.median(each):.1f}" for name, each in found.items()}, file=sys.stderr)
    return found


def _timed(thing: Callable[[int], object], run: int) -> float:
    began = perf_counter()
    thing(run)
    return 1000 * (perf_counter() - began)


def _summary(count: int, runs: int, found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    figures = {
        f"{store}_{name}_ms": {"median": round(statistics.median(each), 1), "p95": round(_p95(each), 1)}
        for store, things in found.items()
        for name, each in things.items()
    }
    targets = {
        name: {"value": figure["p95"], "target": LIMIT_MS, "met": figure["p95"] <= LIMIT_MS}
        for name, figure in figures.items()
        if "that_fills" not in name
    }
    return {
        "benchmark": "many_jobs",
        "jobs": count,
        "shards": count * SHARDS,
        "devices": DEVICES,
        "runs": runs,
        **figures,
        "targets": targets,
    }


def _p95(values: list[float]) -> float:
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


def register(conn: Connection, database: Database, index: int) -> None:
    registration = Registration(
        name=f"h:{index}",
        host="h",
        index=index,
        soc="cpu",
        backends=("ort", "simulated"),
        pid=1,
        pid_started=0.0,
        kind="cpu",
        info={},
    )
    devices.register(conn, database, registration, LEASE_S)


def write_job(conn: Connection, now: float, state: JobState, *, bs: int, samples: int) -> int:
    """A job's own row, without shards."""
    spec = JobSpec(
        model="lvvit",
        bs=bs,
        artifact=artifacts.simulated(zoo.get("lvvit"), bs),
        dataset="imagenet",
        recipe="lvvit",
        dtype="float32",
        manifest_digest="0" * 64,
        samples=samples,
        provenance={},
    )
    job_id: int = conn.execute(
        insert(tables.job)
        .values(
            state=state.value,
            model=spec.model,
            bs=spec.bs,
            backend="simulated",
            artifact_sha256=spec.artifact.sha256,
            samples=spec.samples,
            spec=TypeAdapter(JobSpec).dump_json(spec).decode(),
            created=now - 1000,
            finished=now if state.is_final else None,
        )
        .returning(tables.job.c.id)
    ).scalar_one()
    return job_id


def _write_shards(conn: Connection, now: float, *, done: bool) -> None:
    """A job in bulk, as no verb writes it."""
    job_state = JobState.DONE if done else JobState.PENDING
    job_id = write_job(conn, now, job_state, bs=SAMPLES, samples=SHARDS * SAMPLES)
    state = (ShardState.DONE if done else ShardState.PENDING).value
    base = job_id * SHARDS
    conn.execute(
        insert(tables.shard),
        [
            {
                "id": base + idx,
                "job_id": job_id,
                "idx": idx,
                "start": SAMPLES * idx,
                "stop": SAMPLES * (idx + 1),
                "state": state,
                "winner": base + idx if done else None,
            }
            for idx in range(SHARDS)
        ],
    )
    if done:
        _write_rows(conn, now, job_id, base)


def _write_rows(conn: Connection, now: float, job_id: int, base: int) -> None:
    conn.execute(
        insert(tables.attempt),
        [
            {
                "id": base + idx,
                "job_id": job_id,
                "shard_id": base + idx,
                "no": 1,
                "device": f"h:{idx % DEVICES}",
                "incarnation": 1,
                "state": AttemptState.WON.value,
                "isolating": False,
                "assigned": now - 900,
                "rung": now - 900,
                "started": now - 800,
                "ended": now - 700,
                "batch_ms": b"\0" * 12,
                "budget": "{}",
            }
            for idx in range(SHARDS)
        ],
    )
    conn.execute(
        insert(tables.result),
        [
            {
                "job_id": job_id,
                "name": f"s{number:05d}",
                "attempt_id": base + number // SAMPLES,
                "state": (ResultState.FAILED if number % 50 == 0 else ResultState.SCORED).value,
                "label": 7,
                "rank": None if number % 50 == 0 else 1,
            }
            for number in range(SHARDS * SAMPLES)
        ],
    )


if __name__ == "__main__":
    main()
