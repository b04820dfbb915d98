"""The report as a person reads it."""

from __future__ import annotations

from prettytable import PrettyTable
from rich.console import Console
from rich.table import Table

from farm.data.manifest import MADE_UP
from farm.reports.report import Report

#: Failed samples listed by name before the rest is only counted.
NAMED = 10


def show(report: Report, console: Console) -> None:
    """Print a report; a simulated one says so first."""
    model, bs, backend = report["model"], report["bs"], report["backend"]
    if report["simulated"]:
        console.print("[bold yellow]SIMULATED[/]: outputs and times of a device that is none; no accuracy here is real")
    console.print(f"[bold]job {report['job']}[/]: {model} bs {bs} on {backend}, {report['state']}", highlight=False)
    if report["error"]:
        console.print(f"  {report['error']}", markup=False, highlight=False)
    console.print(_figures(report))
    if report["devices"]:
        console.print(_devices(report))
    _failures(report, console)
    _canaries(report, console)
    provenance = report["provenance"]
    made_by = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    made_up = ", of made-up samples: no accuracy here is real" if provenance.get("source") == MADE_UP else ""
    for line in (
        f"artifact  {report['artifact']}",
        f"manifest  {provenance['manifest']}{made_up}",
        f"recipe    {provenance['recipe']} {provenance['recipe_digest']}",
        f"digest    {report['digest'] or 'none before the job is complete'}",
        f"made by   {made_by}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figures(report: Report) -> Table:
    table = Table("", "measured", "95 % interval", "310P3 reference", box=None, pad_edge=False)
    reference = report["reference"]
    for name, value in report["metrics"].items():
        given = reference["metrics"].get(name)
        between = report["interval"][name]
        table.add_row(
            name,
            "-" if value is None else f"{value:.3f} %",
            "-" if between is None else f"{between[0]:.3f} to {between[1]:.3f}",
            "-" if given is None else f"{given} %",
        )
    samples = report["samples"]
    table.add_row("samples", f"{samples['scored']} scored, {samples['failed']} failed of {samples['total']}", "", "")
    mark = " simulated" if report["simulated"] else ""
    given = reference["device_fps"]
    table.add_row("device fps", _number(report["fps"]["device"]) + mark, "", "-" if given is None else f"{given}")
    what = f" images/s, {_number(_windows_a_s(report))} windows/s" if report["windows"] else ", all devices"
    table.add_row("wall fps", f"{_number(report['fps']['wall'])}{what}{mark}", "", "")
    table.add_row("wall time", f"{report['wall_s']:.1f} s", "", "")
    busy = report["busy"]
    table.add_row("device busy", "-" if busy is None else f"{100 * busy:.1f} %", "", "")
    return table


def show_metrics(found: Report, console: Console) -> None:
    """A job's metrics against other labels than its own."""
    mark = " (simulated)" if found["simulated"] else ""
    console.print(
        f"job {found['job']}: {found['model']} bs {found['bs']}{mark} against {found['labels']}", highlight=False
    )
    console.print(_metrics(found, f"{found['samples']['scored']} scored"))


def show_ingested(found: Report, console: Console) -> None:
    """What results that others wrote are worth."""
    mark = " (simulated)" if found["simulated"] else ""
    about = f"{found['folder']}: {found['model']}, {found['format']}{mark} against {found['labels']} samples"
    console.print(about, markup=False, highlight=False, soft_wrap=True)
    samples = found["samples"]
    partial = ": PARTIAL" if found["partial"] else ""
    console.print(_metrics(found, f"{samples['scored']} scored of {samples['total']}{partial}"))
    console.print(f"digest    {found['digest']}", highlight=False, soft_wrap=True)


def _metrics(found: Report, samples: str) -> Table:
    table = Table("", "measured", "95 % interval", box=None, pad_edge=False)
    for name, value in found["metrics"].items():
        between = found["interval"][name]
        span = "-" if between is None else f"{between[0]:.3f} to {between[1]:.3f}"
        table.add_row(name, "-" if value is None else f"{value:.3f} %", span)
    table.add_row("samples", samples, "")
    return table


def _windows_a_s(report: Report) -> float | None:
    """Of all devices, over wall time, if the images that are through have as many windows as the others."""
    wall = report["fps"]["wall"]
    return wall * report["windows"] / report["samples"]["total"] if wall else None


def per_class(report: Report) -> str:
    """The tables that segmentation toolboxes print: percent, two decimals at most, in the order of the dataset."""
    classes = PrettyTable(["Class", "IoU", "Acc"])
    classes.add_rows([[line["class"], _rounded(line["iou"]), _rounded(line["acc"])] for line in report["classes"]])
    summary = PrettyTable(["aAcc", "mIoU", "mAcc"])
    summary.add_row([_rounded(report["metrics"][name]) for name in ("aacc", "miou", "macc")])
    return f"per class results:\n{classes}\n\nSummary:\n{summary}"


def _rounded(percent: float | None) -> str:
    return "nan" if percent is None else str(round(percent, 2))


def _devices(report: Report) -> Table:
    table = Table("device", box=None, pad_edge=False)
    for title in ("samples", "batches", "device fps", "busy", "compute ms", "p99", "verified"):
        table.add_column(title, justify="right")
    for line in report["devices"]:
        table.add_row(
            line["device"],
            str(line["samples"]),
            str(line["batches"]),
            _number(line["fps"]),
            f"{100 * line['busy']:.1f} %",
            _number(line["compute_ms"]),
            _number(line["compute_p99_ms"]),
            {True: "yes", False: "NO", None: "-"}[line["verified"]],
        )
    return table


def _failures(report: Report, console: Console) -> None:
    lost = {kind: count for kind, count in report["attempts"].items() if kind not in ("won", "running", "assigned")}
    if lost:
        listing = ", ".join(f"{count} {kind}" for kind, count in sorted(lost.items()))
        console.print(f"attempts whose work did not count: {listing}", highlight=False)
    for reason, count in report["lost"].items():
        console.print(f"lost  {count} for: {reason}", markup=False, highlight=False, soft_wrap=True)
    for each in report["quarantined"]:
        said = f"quarantined  {each['device']}: {each['reason']}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    for each in report["forced"]:
        said = f"forced  {each['device']} was used although {each['reason']}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    failed = report["failed"]
    for sample in failed[:NAMED]:
        console.print(f"failed  {sample['name']}: {sample['reason']}", markup=False, highlight=False, soft_wrap=True)
    if len(failed) > NAMED:
        console.print(f"failed  and {len(failed) - NAMED} more: farm report {report['job']} --json", highlight=False)


def _canaries(report: Report, console: Console) -> None:
    cost = report["canaries"]
    if cost["batches"]:
        share = f"{100 * cost['share']:.2f} % of the devices' time"
        console.print(f"canaries  {cost['batches']} batches, {cost['ms']:.1f} ms, {share}", highlight=False)
    if wrong := [line["device"] for line in report["devices"] if line["verified"] is False]:
        console.print(
            f"[bold red]NOT VERIFIED[/]: {', '.join(wrong)} gave canaries other answers than its kind: "
            "farm devices distrust DEVICE --since TIME computes again what it did",
            highlight=False,
            soft_wrap=True,
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
