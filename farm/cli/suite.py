"""farm suite: the whole table, measured."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.arguments import Input, batch_sizes, check_backend, check_input, names
from farm.cli.bench import MOST_BATCHES

if TYPE_CHECKING:
    from rich.console import Console

    from db.engine import Database
    from farm.jobs import JobSpec
    from farm.reports.suite import Cell
    from farm.settings import Settings
    from tasks.submission import Plan, Request

#: Batches beside a job's own, on each device: a canary when the model is loaded and one in the end, or one to warm up.
CANARIES = 2
FORMATS = ("table", "md", "json", "csv")


def suite(
    models: Annotated[str | None, typer.Option(help="lvvit,twins; default: all that a guide describes.")] = None,
    bs: Annotated[str | None, typer.Option(help="Batch sizes; default: those of the guides.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples of each.")] = None,
    loop: Annotated[int, typer.Option(min=2, max=MOST_BATCHES, help="Timed batches a device.")] = 20,
    devices: Annotated[str | None, typer.Option(help="Only these: host:0,host:1.")] = None,
    head: Annotated[str | None, typer.Option(help="Of swin: full, small or deployed.")] = None,
    input_dtype: Input = None,
    backend: Annotated[str | None, typer.Option(help="acl, ort or simulated.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, md, json or csv.")] = "table",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what was measured before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how long it takes and what is missing.")] = False,
) -> None:
    """Accuracy and speed of every model and batch size on all devices, as the table the guides publish.

    What the database has already is not measured again, so an interrupted suite goes on with the same command. Exit 3
    if a cell is empty that need not be.

    farm suite --models lvvit,conformer --bs 1,4,8 --format md
    """
    from rich.console import Console

    from farm.cli.bench import farm
    from farm.errors import UsageError
    from farm.settings import load_settings

    if form not in FORMATS:
        raise UsageError(f"--format {form}: expected {', '.join(FORMATS)}")
    settings, console = load_settings(), Console(stderr=True)
    check_backend(backend)
    check_input(input_dtype)
    wanted = {"limit": limit, "devices": names(devices), "head": head, "backend": backend, "dtype": input_dtype}
    cells = _cells(models, batch_sizes(bs) if bs else None)
    if dry_run:
        from db.engine import open_database

        print(_Suite(settings, open_database(settings), wanted, loop, fresh).forecast(cells))
        return
    try:
        with farm(settings, console) as (database, keep_farm):
            measured = _Suite(settings, database, wanted, loop, fresh)
            for cell in cells:
                measured.fill(cell, keep_farm, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command{' without --fresh' if fresh else ''} goes on from here")
        raise
    _print(cells, form)
    raise typer.Exit(3 if any(cell.missing and cell.bs not in cell.spec.impossible for cell in cells) else 0)


def _cells(models: str | None, sizes: list[int] | None) -> list[Cell]:
    from farm import zoo
    from farm.reports.suite import Cell

    specs = [zoo.get(name) for name in names(models) or zoo.MODELS]
    return [
        Cell(spec, bs, missing=f"{spec.impossible[bs]}, says the guide" if bs in spec.impossible else "")
        for spec in specs
        if models or spec.guide
        for bs in sizes or sorted({*spec.batch_sizes, *spec.impossible})
    ]


@dataclass
class _Suite:
    """What is measured, and what the database has of it."""

    settings: Settings
    database: Database
    wanted: dict[str, Any]  #: the rest of a `Request`
    loop: int
    fresh: bool

    def fill(self, cell: Cell, keep_farm: Callable[[], None], console: Console) -> None:
        """Measure a cell, as far as it can be."""
        from farm.errors import FarmError, StorageError

        if cell.missing:
            return
        for work in (self._evaluate, self._time):
            try:
                work(cell, keep_farm, console)
            except StorageError:  # it would empty all cells that are left
                raise
            except FarmError as exc:
                cell.missing = cell.missing or str(exc)
        cell.missing = cell.missing or cell.lack()

    def forecast(self, cells: list[Cell]) -> str:
        """What is to be done, in lines."""
        from farm.errors import FarmError

        lines, seconds, read = [], 0.0, 0
        for cell in cells:
            title = f"{cell.spec.name} bs {cell.bs}"
            if cell.missing:
                lines.append(f"{title}: {cell.missing}")
                continue
            try:
                plan, specs = self._plan(cell), self._speeds(cell)
            except FarmError as exc:
                lines.append(f"{title}: MISSING: {exc}")
                continue
            there = self._there(plan.spec)
            timed = [spec for spec in specs if self._measured(spec) is None]
            batches = (0 if there else CANARIES) + (self.loop + CANARIES if timed else 0)
            took = (0.0 if there else plan.expected_s) + batches * cell.bs / plan.device_fps
            seconds, read = seconds + took, read + (0 if there else plan.bin_bytes)
            mark = " (simulated)" if plan.spec.artifact.backend == "simulated" else ""
            how = "is there" if there else f"{plan.bin_bytes / 1e9:.2f} GB"
            on = f"on {len(plan.device_names)} devices"
            lines.append(f"{title}{mark}: {plan.spec.extent} {on}, {how}, about {took:.0f} s")
        lines.append(f"together about {seconds / 60:.1f} min, {read / 1e9:.1f} GB to read")
        return "\n".join(lines)

    def _request(self, cell: Cell) -> Request:
        from tasks.submission import Request

        head = self.wanted["head"] if cell.spec.heads else None
        return Request(model=cell.spec.name, bs=cell.bs, **{**self.wanted, "head": head})

    def _plan(self, cell: Cell) -> Plan:
        from tasks.submission import plan

        return plan(self.settings, self.database, self._request(cell))

    def _speeds(self, cell: Cell) -> list[JobSpec]:
        from tasks.submission import plan_speed

        return plan_speed(self.settings, self.database, self._request(cell), self.loop)

    def _there(self, spec: JobSpec) -> int | None:
        """A job that has done the same or is about to."""
        from db import jobs

        with self.database.read() as conn:
            found = jobs.alike(conn, spec)
        return found[0].id if found and not self.fresh else None

    def _measured(self, spec: JobSpec) -> dict[str, Any] | None:
        from farm.reports.speed import latest

        return None if self.fresh else latest(self.database, spec)

    def _evaluate(self, cell: Cell, keep_farm: Callable[[], None], console: Console) -> None:
        from farm.cli.jobs import create
        from farm.cli.progress import follow
        from farm.reports.report import build

        plan = self._plan(cell)
        cell.of_samples = plan.of_samples
        job_id = self._there(plan.spec) or create(self.settings, self.database, [plan])[0]
        follow(self.settings, self.database, job_id, keep_farm, console)
        report = build(self.database, job_id)
        if report["state"] in ("failed", "cancelled"):
            cell.missing = report["error"] or report["state"]
        else:
            cell.report = report

    def _time(self, cell: Cell, keep_farm: Callable[[], None], console: Console) -> None:
        from farm.cli.bench import measure

        known = {spec.devices[0]: (spec, self._measured(spec)) for spec in self._speeds(cell)}
        left = [spec for spec, found in known.values() if found is None]
        new = measure(self.settings, self.database, left, keep_farm, console) if left else []
        cell.speeds = [found for _, found in known.values() if found is not None] + new


def _print(cells: list[Cell], form: str) -> None:
    from rich.console import Console

    from farm.reports import suite as reports

    if form == "table":
        if said := reports.mark(cells):
            print(said)
        Console(width=None if sys.stdout.isatty() else 250).print(reports.terminal(cells))
    else:
        print({"md": reports.markdown, "json": reports.as_json, "csv": reports.as_csv}[form](cells))
