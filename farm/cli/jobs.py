"""farm submit, wait, retry, resume, jobs, status, report, cancel: a job from its user's side."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.arguments import Input, batch_sizes, check_backend, check_input, names

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from sqlalchemy import Connection

    from db.engine import Database
    from farm.settings import Settings
    from tasks.submission import Plan

JobId = Annotated[int, typer.Argument(help="The number farm submit printed.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end and print the report.")]

#: Exit codes: nothing wrong, a job failed or was cancelled, samples failed.
DONE, FAILED, WITH_ERRORS, DETACHED = 0, 1, 3, 130
#: Between pictures of farm status --watch.
REDRAW_S = 0.5
#: Bytes of raw outputs that are not kept without asking.
MUCH = 10e9


def submit(
    model: Annotated[str, typer.Argument(help="e.g. lvvit")],
    bs: Annotated[str, typer.Option(help="Batch size, or several: a job each.")] = "1",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples.")] = None,
    devices: Annotated[str | None, typer.Option(help="Only these: host:0,host:1.")] = None,
    artifact: Annotated[str | None, typer.Option(help="sha256 (or its beginning) or file, where several fit.")] = None,
    backend: Annotated[str | None, typer.Option(help="acl, ort or simulated.")] = None,
    head: Annotated[str | None, typer.Option(help="Of swin: full, small or deployed.")] = None,
    input_dtype: Input = None,
    allow_failed: Annotated[int, typer.Option(min=0, help="Exit 0 with up to N failed samples.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the job would be and what is missing.")] = False,
    priority: Annotated[int, typer.Option(help="Higher goes first; equals share the devices.")] = 0,
    keep_logits: Annotated[
        bool, typer.Option("--keep-logits", help="Keep raw outputs on the workers' disks, for farm results.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, however much is kept.")] = False,
    wait: Wait = True,
    as_json: Json = False,
) -> None:
    """Evaluate a model on all devices that match, and print the report."""
    from farm.settings import load_settings
    from tasks import local

    settings = load_settings()
    check_backend(backend)
    check_input(input_dtype)
    sizes = batch_sizes(bs)
    wanted = {
        "model": model,
        "limit": limit,
        "devices": names(devices),
        "artifact": artifact,
        "backend": backend,
        "head": head,
        "dtype": input_dtype,
        "priority": priority,
        "allow_failed": allow_failed,
        "keep_logits": keep_logits,
    }
    if dry_run or not wait:
        database = _open(settings)
        plans = _plans(settings, database, sizes, **wanted)
        if dry_run:
            _show_plans(plans, settings, as_json)
        else:
            _check_room(plans, settings, yes=yes)
            _warn(plans)
            _show_submitted(create(settings, database, plans), settings, as_json)
        return
    # The farm starts while this process is still importing and planning.
    with local.joined(settings) as keep_farm:
        database = _open(settings)
        plans = _plans(settings, database, sizes, **wanted)
        _check_room(plans, settings, yes=yes)
        _warn(plans)
        job_ids = create(settings, database, plans)
        code = _wait_and_report(settings, database, job_ids, keep_farm, as_json)
    raise typer.Exit(code)


def wait(job: JobId, as_json: Json = False) -> None:
    """Wait for a job as submit does; a farm is started for it if none is up."""
    from farm.settings import load_settings
    from tasks import local

    settings = load_settings()
    database = _open(settings)
    if _job(database, job).state.is_final:
        raise typer.Exit(_report_all(database, [job], as_json))
    with local.joined(settings) as keep_farm:
        code = _wait_and_report(settings, database, [job], keep_farm, as_json)
    raise typer.Exit(code)


def retry(job: JobId, wait: Wait = True, as_json: Json = False) -> None:
    """Evaluate the failed samples of a finished job again, with all of their shards."""
    from db import reopen

    _again(job, reopen.retry, "no failed samples", wait=wait, as_json=as_json)


def resume(job: JobId, wait: Wait = True, as_json: Json = False) -> None:
    """Go on with a job that failed or was cancelled; an interrupted one needs no more than a farm."""
    from db import reopen

    _again(job, reopen.resume, "nothing to go on with", wait=wait, as_json=as_json)


def _again(
    job: int, verb: Callable[[Connection, Database, int], int], nothing: str, *, wait: bool, as_json: bool
) -> None:
    """Reopen shards of a job, then wait for its end as submit does."""
    from farm.settings import load_settings
    from tasks import local

    settings = load_settings()
    database = _open(settings)
    with database.write() as conn:
        shards = verb(conn, database, job)
    if not shards:
        print(f"job {job} has {nothing}", file=sys.stderr)
    if _job(database, job).state.is_final:
        raise typer.Exit(_report_all(database, [job], as_json))
    if not wait:
        wake(settings, database)
        _show_submitted([job], settings, as_json, f"{shards} shards are open again")
        return
    with local.joined(settings) as keep_farm:
        wake(settings, database)
        code = _wait_and_report(settings, database, [job], keep_farm, as_json)
    raise typer.Exit(code)


def jobs(limit: Annotated[int, typer.Option(min=1)] = 20, as_json: Json = False) -> None:
    """List the newest jobs."""
    from rich.table import Table

    from db import jobs as stored
    from db import overview
    from farm.settings import load_settings

    database = _open(load_settings())
    with database.read() as conn:
        found = overview.progress(conn, stored.recent(conn, limit))
    if as_json:
        _print_json([_progress_json(progress) for progress in found])
        return
    ranked = any(p.job.spec.priority for p in found)
    table = Table("job", "model", "bs", "backend", *(["prio"] if ranked else []), "state", box=None, pad_edge=False)
    for title in ("samples", "failed", "submitted"):
        table.add_column(title, no_wrap=True)
    for p in found:
        spec = p.job.spec
        table.add_row(
            str(p.job.id),
            spec.model,
            str(spec.bs),
            spec.artifact.backend,
            *([str(spec.priority)] if ranked else []),
            p.job.state.value,
            "speed" if spec.loop else f"{p.finished_samples}/{spec.samples}",
            str(p.failed_samples),
            datetime.fromtimestamp(p.job.created).strftime("%Y-%m-%d %H:%M"),
        )
    _console(stderr=False).print(table if found else "no jobs yet: farm submit MODEL --bs N")


def status(
    job: Annotated[
        int | None, typer.Argument(help="The number farm submit printed; else all active jobs.", min=1)
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on showing it, until the job ends or Ctrl-C.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how far jobs are, what broke on the way, and which devices are there."""
    from farm.errors import UsageError
    from farm.reports import status as reports
    from farm.reports.watch import render
    from farm.settings import load_settings

    if watch and as_json:
        raise UsageError("--watch is for people, --json for machines: choose one")
    settings = load_settings()
    database = _open(settings)
    console = _console(stderr=False)
    if watch and console.is_terminal:
        _watch(settings, database, job, console)
        return
    found = reports.build_all(database, settings) if job is None else reports.build(database, settings, job)
    if as_json:
        _print_json(found)
    elif job is None:
        console.print(render(found, height=1000))
    else:
        reports.show(found, console)
    _say_no_farm(settings, found)


def _watch(settings: Settings, database: Database, job: int | None, console: Console) -> None:
    """Redraw until Ctrl-C, or until the job has ended; what was shown last stays."""
    from time import sleep

    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from farm.cli.progress import Patience
    from farm.reports import status as reports
    from farm.reports.watch import render

    def look() -> dict[str, Any]:
        if job is None:
            return reports.build_all(database, settings)
        return reports.build(database, settings, job, limit=reports.LISTED)

    def say(said: str) -> None:
        note = Text(said, style="bold red", no_wrap=True, overflow="ellipsis")
        live.update(Group(note, render(found, console.height - 2)), refresh=True)

    with suppress(KeyboardInterrupt):
        found, patient = look(), Patience(say)
        try:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    live.update(render(found, console.height - 1), refresh=True)
                    if found.get("state", "running") not in ("pending", "running"):
                        break
                    sleep(REDRAW_S)
                    found = patient(look)
        finally:
            console.print(render(found, console.height - 1))


def _say_no_farm(settings: Settings, found: dict[str, Any]) -> None:
    """Where nothing goes on because no farm is up."""
    from tasks import local

    open_jobs = [line["job"] for line in found.get("jobs", [found]) if line["state"] in ("pending", "running")]
    if open_jobs and settings.is_embedded and not local.is_up(settings):
        print(f"no farm is up: farm wait {open_jobs[0]} or farm up goes on with it", file=sys.stderr)


def report(
    job: JobId,
    classes: Annotated[bool, typer.Option("--per-class", help="Of segmentation: IoU and Acc of each class.")] = False,
    form: Annotated[
        str | None,
        typer.Option("--format", help="As published: focal, focal-lines, conformer, twins, lvvit, swin, summary."),
    ] = None,
    as_json: Json = False,
) -> None:
    """
    Print a job's report, as submit did when it ended; of a running job, what is known so far.

    farm report 3 --format conformer > acc_result.json
    """
    from farm.errors import UsageError
    from farm.settings import load_settings

    if form is not None:
        if as_json or classes:
            raise UsageError("--format prints what published scripts do: neither --json nor --per-class goes with it")
        raise typer.Exit(_publish(_open(load_settings()), job, form))
    raise typer.Exit(_report_all(_open(load_settings()), [job], as_json, classes=classes))


def cancel(job: JobId) -> None:
    """End a job; rows written so far are kept."""
    from db import jobs as stored
    from farm.settings import load_settings

    database = _open(load_settings())
    with database.write() as conn:
        state = stored.get(conn, job).state
        cancelled = stored.cancel(conn, database, job)
    print(f"job {job} is cancelled" if cancelled else f"job {job} was {state.value} already")


def _open(settings: Settings) -> Database:
    from db.engine import open_database

    return open_database(settings)


def _plans(settings: Settings, database: Database, sizes: list[int], **wanted: Any) -> list[Plan]:
    from tasks.submission import Request, plan

    return [plan(settings, database, Request(bs=bs, **wanted)) for bs in sizes]


def create(settings: Settings, database: Database, plans: list[Plan]) -> list[int]:
    """Write the jobs, then ring for them; without a farm the rows wait for one."""
    from tasks.submission import submit as write

    job_ids = [job.id for job in write(database, plans)]
    wake(settings, database)
    return job_ids


def wake(settings: Settings, database: Database) -> None:
    """Have devices take up what is open now, not at the next tick."""
    from tasks import dispatch, local

    if settings.is_embedded:
        local.nudge(settings)
    else:
        dispatch.assign_and_ring(settings, database)


def _kept(plans: list[Plan], settings: Settings) -> str:
    from farm import logits

    kept, free = sum(p.logits_bytes for p in plans), logits.free_bytes(settings.data_dir)
    where = "" if settings.is_embedded else ", shared out among the hosts that work"
    return (
        f"raw outputs take {logits.size(kept)} of {settings.data_dir / 'logits'}{where}; "
        f"{logits.size(free)} are free there"
    )


def _check_room(plans: list[Plan], settings: Settings, *, yes: bool) -> None:
    """Say what keeping raw outputs takes, and ask first where that is much. `UsageError` if there is nobody to ask."""
    from farm import logits
    from farm.errors import UsageError

    kept = sum(p.logits_bytes for p in plans)
    if not kept:
        return
    said, much = _kept(plans, settings), kept > min(MUCH, logits.free_bytes(settings.data_dir))
    if much and not yes and not sys.stdin.isatty():
        raise UsageError(f"{said}. Nothing was submitted: say --yes if that is meant")
    print(said, file=sys.stderr)
    if much and not yes and not typer.confirm("Submit it?", err=True):
        print("nothing was submitted", file=sys.stderr)
        raise typer.Exit(FAILED)


def _show_plans(plans: list[Plan], settings: Settings, as_json: bool) -> None:
    if as_json:
        _print_json([p.as_json() for p in plans] if len(plans) > 1 else plans[0].as_json())
        return
    for p in plans:
        mark = " (simulated)" if p.spec.artifact.backend == "simulated" else ""
        print(
            f"{p.spec.model} bs {p.spec.bs}{mark}: {p.spec.extent} in {len(p.shards)} shards on "
            f"{len(p.device_names)} devices ({', '.join(p.device_names)}), {p.bin_bytes / 1e9:.2f} GB to read, "
            f"about {p.expected_s:.0f} s at {p.device_fps:.1f} fps a device, {p.ring_bytes / 1e6:.0f} MB of buffers "
            f"each; artifact {p.spec.artifact}. Nothing is missing."
            + (f" With --keep-logits, {_kept([p], settings)}." if p.logits_bytes else "")
        )
        for line in _unused(p):
            print(line)


def _unused(plan: Plan) -> list[str]:
    return [f"not used: {name}: {why}" for name, why in plan.unused.items()]


def _warn(plans: list[Plan]) -> None:
    """Of devices here that do not take part though one would expect it."""
    for line in _unused(plans[0]):
        print(line, file=sys.stderr)


def _show_submitted(job_ids: list[int], settings: Settings, as_json: bool, what: str = "submitted") -> None:
    from tasks import local

    if as_json:
        _print_json({"jobs": job_ids})
        return
    hint = "" if not settings.is_embedded or local.is_up(settings) else " No farm is up: farm up, or farm wait JOB."
    print(f"{what}: job {', '.join(map(str, job_ids))}.{hint}")


def _wait_and_report(settings: Settings, database: Database, job_ids: list[int], keep_farm: Any, as_json: bool) -> int:
    from farm.cli.progress import Patience, follow, ticking
    from farm.reports.report import build

    console = _console(stderr=True)
    try:
        with ticking(settings, console):
            for job_id in job_ids:
                follow(settings, database, job_id, keep_farm, console)
        patient = Patience(partial(console.print, markup=False, highlight=False))
        reports = patient(lambda: [build(database, job_id) for job_id in job_ids])
    except KeyboardInterrupt:
        listing = ", ".join(map(str, job_ids))
        console.print(
            f"detached; job {listing} stays as it is: farm wait {job_ids[0]} or farm up goes on with it",
            highlight=False,
        )
        return DETACHED
    return _show_reports(reports, as_json)


def _report_all(database: Database, job_ids: list[int], as_json: bool, *, classes: bool = False) -> int:
    from farm.reports.report import build

    if any(_job(database, job_id).spec.loop for job_id in job_ids):
        return _report_speed(database, job_ids, as_json)
    return _show_reports([build(database, job_id) for job_id in job_ids], as_json, classes=classes)


def _report_speed(database: Database, job_ids: list[int], as_json: bool) -> int:
    from farm.reports.speed import build, show

    found = [build(database, job_id) for job_id in job_ids]
    if as_json:
        _print_json(found[0] if len(found) == 1 else found)
    else:
        show(found)
    return FAILED if any(speed["state"] in ("failed", "cancelled") for speed in found) else DONE


def _publish(database: Database, job: int, form: str) -> int:
    """Print a job as a published script would; what that has no words for goes to stderr."""
    from farm.reports.published import build

    found = build(database, job, form)
    if found.job.simulated:
        print("simulated: outputs and times of a device that is none", file=sys.stderr)
    for name, reason in found.failed:
        print(f"not in it: {name}, which failed: {reason}", file=sys.stderr)
    for line in found.said:
        print(line, file=sys.stderr)
    print(found.text)
    return WITH_ERRORS if len(found.failed) > found.job.spec.allow_failed else DONE


def _show_reports(reports: list[dict[str, Any]], as_json: bool, *, classes: bool = False) -> int:
    """Print them; the answer is the exit code they come to."""
    from farm.errors import UsageError
    from farm.reports.terminal import per_class, show

    if classes and not all(each["windows"] for each in reports):
        raise UsageError("--per-class is for segmentation: this job's metric has no figures by class")
    if as_json:
        _print_json(reports[0] if len(reports) == 1 else reports)
    else:
        for number, each in enumerate(reports):
            if number:
                print()
            show(each, _console(stderr=False))
            if classes:
                print(f"\n{per_class(each)}")
    codes = [_exit_code(each) for each in reports]
    return next((code for code in (FAILED, WITH_ERRORS) if code in codes), DONE)


def _exit_code(report: dict[str, Any]) -> int:
    if report["state"] in ("failed", "cancelled"):
        return FAILED
    if report["samples"]["failed"] > report["provenance"]["allow_failed"]:
        return WITH_ERRORS
    return DONE


def _job(database: Database, job_id: int) -> Any:
    from db import jobs as stored

    with database.read() as conn:
        return stored.get(conn, job_id)


def _progress_json(progress: Any) -> dict[str, Any]:
    spec = progress.job.spec
    return {
        "job": progress.job.id,
        "state": progress.job.state.value,
        "simulated": progress.job.simulated,
        "model": spec.model,
        "bs": spec.bs,
        "backend": spec.artifact.backend,
        "priority": spec.priority,
        "samples": {"total": spec.samples, "finished": progress.finished_samples, "failed": progress.failed_samples},
        "created": progress.job.created,
        "finished": progress.job.finished,
        "error": progress.job.error,
    }


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
