"""farm bench: how fast devices are, with nothing but them in the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.arguments import Input, batch_sizes, check_backend, check_input, names

if TYPE_CHECKING:
    from rich.console import Console

    from db.engine import Database
    from farm.jobs import Job, JobSpec
    from farm.settings import Settings

POLL_S = 0.1
#: A worker has a record of each sample.
MOST_BATCHES = 10_000


def bench(
    model: Annotated[str, typer.Argument(help="e.g. lvvit")],
    bs: Annotated[str, typer.Option(help="Batch sizes: 1,4,8.")] = "1",
    loop: Annotated[int, typer.Option(min=2, max=MOST_BATCHES, help="Timed batches a run.")] = 20,
    devices: Annotated[str | None, typer.Option(help="Only these: host:0,host:1.")] = None,
    one_by_one: Annotated[bool, typer.Option("--one-by-one", help="A device at a time, not all at once.")] = False,
    artifact: Annotated[str | None, typer.Option(help="sha256 (or its beginning) or file, where several fit.")] = None,
    backend: Annotated[str | None, typer.Option(help="acl, ort or simulated.")] = None,
    head: Annotated[str | None, typer.Option(help="Of swin: full, small or deployed.")] = None,
    input_dtype: Input = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list on stdout.")] = False,
) -> None:
    """Time pure inference on every device: copy to it, compute, copy back; device fps by the guides' formula.

    Needs no data. A batch size that does not fit into the memory is a result. Exit 1 if nothing could be timed.

    farm bench lvvit --bs 1,4,8,16,32,64 --loop 20
    """
    from rich.console import Console

    from farm.reports.speed import show
    from farm.settings import load_settings
    from tasks.submission import Request, plan_speed

    settings, sizes = load_settings(), batch_sizes(bs)
    check_backend(backend)
    check_input(input_dtype)
    wanted: dict[str, Any] = {
        "devices": names(devices),
        "artifact": artifact,
        "backend": backend,
        "head": head,
        "dtype": input_dtype,
    }
    console = Console(stderr=True)
    speeds: list[dict[str, Any]] = []
    with farm(settings, console) as (database, keep_farm):
        planned = [plan_speed(settings, database, Request(model=model, bs=size, **wanted), loop) for size in sizes]
        for specs in planned:
            turns = [[spec] for spec in specs] if one_by_one else [specs]
            for turn in turns:
                speeds += measure(settings, database, turn, keep_farm, console)
    if as_json:
        print(json.dumps(speeds, indent=2))
    else:
        show(speeds)
    raise typer.Exit(0 if any(speed["fps"] for speed in speeds) else 1)


@contextmanager
def farm(settings: Settings, console: Console) -> Iterator[tuple[Database, Callable[[], None]]]:
    """A farm that works as long as one waits, and its database."""
    from db.engine import open_database
    from farm.cli.progress import ticking
    from tasks import local

    with local.joined(settings) as keep_farm:
        database = open_database(settings)
        with ticking(settings, console):
            yield database, keep_farm


def measure(
    settings: Settings,
    database: Database,
    specs: Sequence[JobSpec],
    keep_farm: Callable[[], None],
    console: Console,
) -> list[dict[str, Any]]:
    """Time devices, all at once; those that do not settle, again. What was run before stays in the database."""
    from farm.cli.jobs import wake
    from farm.errors import StorageError
    from farm.reports.speed import MOST_RUNS, build, has_settled
    from tasks.submission import submit_speed

    found: dict[str, dict[str, Any]] = {}
    everybody = tuple(name for spec in specs for name in spec.devices)
    left = [replace(spec, together=everybody) for spec in specs]
    for run in range(1, MOST_RUNS + 1):
        written: list[Job] = []
        try:
            written = submit_speed(database, left)
            wake(settings, database)
            again = f", run {run}" if run > 1 else ""
            line = f"timing {specs[0].model} bs {specs[0].bs}: {len(left)} devices, {specs[0].loop} batches each{again}"
            console.print(line, highlight=False)
            _wait(settings, database, written, keep_farm, console)
        except BaseException:
            with suppress(StorageError):  # what went wrong before counts
                _cancel(database, [job.id for job in written])
            raise
        found |= {job.spec.devices[0]: {**build(database, job.id), "runs": run} for job in written}
        left = [spec for spec in left if not has_settled(found[spec.devices[0]])]
        if not left:
            break
    return [found[spec.devices[0]] for spec in specs]


def _wait(
    settings: Settings, database: Database, written: Sequence[Job], keep_farm: Callable[[], None], console: Console
) -> None:
    """Until all have ended; one whose device takes no work for a lease is given up, with that for its error."""
    from db import devices, jobs
    from farm.cli.progress import Patience

    patient = Patience(partial(console.print, markup=False, highlight=False))
    resting: dict[int, float] = {}

    def look() -> bool:
        with database.read() as conn:
            left = [job for job in written if not jobs.state(conn, job.id).is_final]
            working = {d.name for d in devices.live(conn, database, settings.lease_s)}
        for job in left:
            if job.spec.devices[0] in working:
                resting.pop(job.id, None)
            elif monotonic() - resting.setdefault(job.id, monotonic()) > settings.lease_s:
                with database.write() as conn:
                    jobs.fail(conn, database, job.id, f"{job.spec.devices[0]} takes no work: see farm devices")
        return bool(left)

    while patient(look):
        keep_farm()
        sleep(POLL_S)


def _cancel(database: Database, job_ids: Sequence[int]) -> None:
    """Nobody will ask for them."""
    from db import jobs

    with database.write() as conn:
        for job_id in job_ids:
            jobs.cancel(conn, database, job_id)
