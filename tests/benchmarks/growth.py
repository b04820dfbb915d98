"""
What the farm's verbs cost as there are more samples, devices and shards: whether they grow with what they do not touch.

    python -m tests.benchmarks.growth [--postgres] [--runs 40] [--short]

One job under way, some of its shards done and their rows there; no worker runs. A commit is a shard of 160 rows (of
one, where shards grow) with its device's next assignment, a claim what its worker asks then, a tick's part what a
coordinator asks when there is nothing to do. Cost is this process's CPU, medians of many runs; with `--postgres`, which
works elsewhere, wall time. The limit is the cost at the smallest size: claim, commit and tick may be 1.5 times that at
the largest, and what reads all rows, shards or devices may cost 1.5 times as much for each as at the size before. Of
`farm submit` at each size: seconds, and the most memory it took. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from sqlalchemy import Connection, text, update

from db import jobs, overview, shards, tables
from db.engine import Database
from farm.data import manifest, recipes
from farm.data.manifest import Header, Sample
from farm.jobs import Assignment, Budget, JobState, ResultState, SampleResult, ShardResult
from farm.reports import report, status
from farm.settings import Settings
from tests.benchmarks.many_jobs import register, write_job
from tests.benchmarks.utilisation import FARM
from tests.servers import Postgres

#: What grows, to what: samples that are done, with others to do; devices registered; shards of one sample, half of them
#: done.
SIZES = {
    "samples": (1_000, 10_000, 100_000, 1_000_000),
    "devices": (1, 8, 64),
    "shards": (100, 1_000, 10_000, 100_000),
}
SHORT = {"samples": (1_000, 4_000), "devices": (1, 8), "shards": (100, 400)}
#: Samples of a shard, unless shards grow, and of those that are done, unless samples do.
EACH, USUAL = 160, 10_000
LEASE_S = 3600.0
#: Runs a command and prints the CPU seconds and the most megabytes that it took.
_USED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024])
"""
#: Must not grow, and what may grow with the job's samples or shards.
FLAT = ("claim", "commit", "orphans", "unheard", "finished_but_open", "with_room", "slow")
LINEAR = ("progress", "status_job", "jobs", "report")
TIMES = 1.5
#: A difference below this is none, in ms.
NOISE_MS = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", action="store_true", help="Postgres instead of SQLite")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--short", action="store_true", help="small sizes, 5 runs: shows that it runs")
    arguments = parser.parse_args()
    sizes, runs = (SHORT, 5) if arguments.short else (SIZES, arguments.runs)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as servers:
        postgres = servers.enter_context(Postgres()) if arguments.postgres else None
        found: dict[str, dict[int, dict[str, float]]] = {}
        for what, several in sizes.items():
            found[what] = {}
            for size in several:
                name = f"{what}{size}"
                url = postgres.create_database(name) if postgres else f"sqlite:///{scratch}/{name}.db"
                found[what][size] = _measure(Path(scratch), url, what, size, runs, postgres)
                print(what, size, found[what][size], file=sys.stderr)
        submitted = {size: _submit(Path(scratch), size) for size in sizes["samples"]}
    result = {
        "benchmark": "growth",
        "store": "postgres" if arguments.postgres else "sqlite",
        "ms": found,
        "submit": submitted,
        "targets": {} if arguments.short else dict(_targets(found)),
    }
    print(json.dumps(result))


def _targets(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for what, by_size in found.items():
        sizes = sorted(by_size)
        first, before, last = by_size[sizes[0]], by_size[sizes[-2]], by_size[sizes[-1]]
        for name in FLAT:
            if (what, name) == ("devices", "with_room"):  # which asks for all of them
                continue
            times = last[name] / max(first[name], NOISE_MS)
            yield f"{name}_by_{what}", {"value": round(times, 2), "target": TIMES, "met": times <= TIMES}
        for name in ("with_room",) if what == "devices" else LINEAR:
            times = last[name] / max(before[name], NOISE_MS) * sizes[-2] / sizes[-1]
            yield f"{name}_by_{what}", {"value": round(times, 2), "target": TIMES, "met": times <= TIMES}


def _measure(home: Path, url: str, what: str, size: int, runs: int, postgres: Postgres | None) -> dict[str, float]:
    """Milliseconds of each thing; of Postgres also its own CPU, of a claim and a commit together; bytes a row."""
    each = 1 if what == "shards" else EACH
    done = size // 2 if what == "shards" else (size if what == "samples" else USUAL) // EACH
    count = size if what == "shards" else done + 2 * runs
    there = size if what == "devices" else 8
    clock = process_time if url.startswith("sqlite") else perf_counter
    settings = Settings(home=home, database_url=url, lease_s=LEASE_S)
    with closing(Database(url)) as database, (home / "screen").open("w") as file:
        database.ensure_schema()
        with database.write() as conn:
            for index in range(there):
                register(conn, database, index)
            job = _write_job(conn, database.now(conn), count, done, each, there)
        if not database.is_sqlite:  # it does so by itself, a moment later
            with database.write() as conn:
                conn.execute(text("ANALYZE"))
        screen = Console(file=file, width=140, height=40)
        before = _server_ms(postgres)
        found = _cycle(database, clock, runs)
        if postgres:
            found["server_cpu"] = (_server_ms(postgres) - before) / runs
        if what == "samples":
            found["bytes_a_row"] = _bytes(database) / (done * each + runs * each)
        things: Mapping[str, Callable[[Connection], object]] = {
            "orphans": lambda conn: shards.orphans(conn, database, LEASE_S),
            "unheard": lambda conn: shards.unheard(conn, database, LEASE_S),
            "finished_but_open": jobs.finished_but_open,
            "with_room": lambda conn: shards.with_room(conn, database, LEASE_S),
            "slow": lambda conn: shards.slow(conn, database, LEASE_S),
            "progress": lambda conn: jobs.progress(conn, job),
            "jobs": lambda conn: overview.progress(conn, jobs.recent(conn, 20)),
        }
        for name, thing in things.items():

            def ask(thing: Callable[[Connection], object] = thing) -> None:
                with database.read() as conn:
                    thing(conn)

            found[name] = _median_ms(ask, clock, runs)
        found["status_job"] = _median_ms(
            lambda: status.show(status.build(database, settings, job), screen), clock, min(runs, 5)
        )
        with database.write() as conn:
            conn.execute(update(tables.job).values(state=JobState.DONE.value))
        found["report"] = _median_ms(lambda: report.build(database, job), clock, 1 if size > 100_000 else min(runs, 3))
    return {name: round(ms, 3) for name, ms in found.items()}


def _cycle(database: Database, clock: Callable[[], float], runs: int) -> dict[str, float]:
    """A device's shards one after another, as its worker asks for them."""
    device = "h:0"
    with database.write() as conn:
        first, _ = shards.assign(conn, database, LEASE_S, only=[device])
    found: dict[str, list[float]] = {"claim": [], "commit": []}
    assignment = first.assignment
    for _ in range(runs):
        result = _result(assignment)
        began = clock()
        with database.write() as conn:
            started = shards.start(conn, database, assignment.attempt_id, device, 1)
        claimed = clock()
        assert started is not None
        assert started.waiting is not None
        rings = shards.complete(database, assignment, device, 1, result, LEASE_S)
        found["claim"].append(1000 * (claimed - began))
        found["commit"].append(1000 * (clock() - claimed))
        assert rings
        assignment = started.waiting
    return {name: statistics.median(each) for name, each in found.items()}


def _server_ms(postgres: Postgres | None) -> float:
    """CPU of a server and its processes so far."""
    if postgres is None:
        return 0.0
    server = psutil.Process(postgres.pid)
    times = [process.cpu_times() for process in (server, *server.children())]
    return 1000 * sum(each.user + each.system for each in times)


def _bytes(database: Database) -> int:
    """Of the result rows; on SQLite of the whole database, of which they are the most."""
    size = "SELECT pg_total_relation_size('result')"
    if database.is_sqlite:
        size = "SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()"
    with database.read() as conn:
        return int(conn.execute(text(size)).scalar_one())


def _median_ms(thing: Callable[[], object], clock: Callable[[], float], runs: int) -> float:
    found = []
    for _ in range(runs):
        began = clock()
        thing()
        found.append(1000 * (clock() - began))
    return statistics.median(found)


def _result(assignment: Assignment) -> ShardResult:
    size = assignment.stop - assignment.start
    return ShardResult(
        samples=[
            SampleResult(
                name=f"s{10_000_000 + number}",
                state=ResultState.SCORED,
                label=7,
                rank=1,
                classes=(7, 1, 2, 3, 4),
                scores=(0.5, 0.25, 0.125, 0.0625, 0.03125),
            )
            for number in range(assignment.start, assignment.stop)
        ],
        batch_ms=[(0.0, 13.1, 0.0)] * -(-size // 4),
        budget=Budget(read_ms=1.0),
    )


def _write_job(conn: Connection, now: float, count: int, done: int, each: int, devices: int) -> int:
    """A job of `count` shards of so many samples `each`, the first ones done: in bulk, as no verb does."""
    job = write_job(conn, now, JobState.RUNNING, bs=min(each, 4), samples=count * each)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i + 1 < :count) "
    for statement, values in (
        (
            f"""INSERT INTO shard (job_id, idx, start, stop, state) {numbers}
            SELECT :job, i, i * :each, (i + 1) * :each, CASE WHEN i < :done THEN 'done' ELSE 'pending' END FROM n""",
            {"count": count},
        ),
        (
            """INSERT INTO attempt
            (job_id, shard_id, no, device, incarnation, state, isolating, assigned, rung, started,
            ended, batch_ms, budget)
            SELECT :job, id, 1, 'h:' || CAST(idx % :devices AS VARCHAR), 1, 'won', false,
            :now + idx, :now + idx, :now + idx, :now + idx + 1, :batch_ms, '{}' FROM shard WHERE idx < :done""",
            {"now": now - 1e6, "devices": devices, "batch_ms": np.full(3 * -(-each // 4), 5, "<f4").tobytes()},
        ),
        ("UPDATE shard SET winner = id WHERE idx < :done", {}),  # numbered alike
        (
            f"""INSERT INTO result
            (job_id, name, attempt_id, state, label, rank, class1, class2, class3, class4, class5,
            score1, score2, score3, score4, score5) {numbers}
            SELECT :job, 's' || CAST(10000000 + i AS VARCHAR),
            1 + i / :each, 'scored', 7, 1, 7, 1, 2, 3, 4, 0.5, 0.25, 0.125, 0.0625, 0.03125 FROM n""",
            {"count": done * each},
        ),
    ):
        wanted = {"job": job, "each": each, "done": done} | values
        conn.execute(text(statement), {name: value for name, value in wanted.items() if f":{name}" in statement})
    return job


def _submit(home: Path, samples: int) -> dict[str, float]:
    """`farm submit` of a job that nobody takes up, its manifest but no bins written."""
    recipe = recipes.get("lvvit", "float32")
    home = home / f"submit{samples}"
    lines = [Sample(f"s{10_000_000 + number}", number % 1000, f"{number:016x}") for number in range(samples)]
    header = Header(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        dtype=recipe.dtype,
        shape=recipe.shape,
        classes=1000,
        source=manifest.MADE_UP,
    )
    directory = manifest.bins_dir(home / "data", recipe.name)
    directory.mkdir(parents=True)
    manifest.write(directory, header, lines)
    del lines
    command = [str(FARM), "submit", "lvvit", "--bs", "4", "--no-wait", "--json"]
    env = {**os.environ, "FARM_HOME": str(home), "FARM_SIMULATE": "8x310P3"}
    began = perf_counter()
    # By way of a process that is small: a child's peak begins with what its parent has.
    told = subprocess.run([sys.executable, "-c", _USED, *command], env=env, stdout=subprocess.PIPE, check=True).stdout
    cpu_s, rss_mb = json.loads(told)
    return {"s": round(perf_counter() - began, 2), "cpu_s": round(cpu_s, 2), "rss_mb": round(rss_mb, 1)}


if __name__ == "__main__":
    main()
