"""Jobs and devices on one screen, whatever its size: what is in trouble is shown before what is well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from farm.reports.status import Status, at_risk, device_state, quarantine_line, unfit_line

#: Lines of trouble that always find room, and devices.
TROUBLES, DEVICES = 2, 4
_COLOURS = {"up": "green", "gone": "dim", "agrees": "green", "unverified": "dim"}


def render(found: Status, height: int) -> RenderableType:
    """Of what `farm.reports.status` built, as much as fits into so many lines."""
    lines = found.get("jobs", [found])
    titles = _titles(lines)
    risk = [Text(at_risk(lines))] if any(line["state"] in ("pending", "running") for line in lines) else []
    bars, more_jobs = _bars(lines, max(1, height // 3), found.get("more_jobs", 0))
    head: list[RenderableType] = [*titles, *([bars] if bars.row_count else []), *more_jobs, *risk]
    troubles = _troubles(found)
    # Beside these there are an empty line and the devices' titles.
    left = height - len(titles) - bars.row_count - len(more_jobs) - len(risk) - 2
    wanted = min(len(troubles), max(TROUBLES, left - len(found["devices"])))
    devices, more = _devices(found["devices"], max(min(DEVICES, left), left - wanted))
    shown = max(0, left - devices.row_count - len(more))
    foot = [Text(each, no_wrap=True, overflow="ellipsis", style="red") for each in troubles[:shown]]
    return Group(*head, Text(), devices, *more, *foot)


def _troubles(found: Status) -> list[str]:
    """Hosts and devices that do not work, what failed, and last what was merely taken away, each newest first."""
    newest = found["broken"][::-1]
    broken = [each for each in newest if each["failure"]] + [each for each in newest if not each["failure"]]
    return [
        *(unfit_line(each) for each in found["unfit"]),
        *(quarantine_line(each) for each in found["devices"] if each["reason"]),
        *(f"{x['name']} {x['failure'] or x['state']} on {x['device']}: {x['reason']}" for x in broken),
    ]


def _titles(lines: Sequence[Mapping[str, Any]]) -> list[Text]:
    if not lines:
        return [Text("no job wants work done: farm submit MODEL --bs N")]
    if len(lines) > 1:
        return []
    (line,) = lines
    priority = f", priority {line['priority']}" if line["priority"] else ""
    error = [Text(line["error"], style="red", no_wrap=True, overflow="ellipsis")] if line["error"] else []
    return [Text(f"{line['title']}: {line['state']}{priority}", style="bold", no_wrap=True), *error]


def _bars(lines: Sequence[Mapping[str, Any]], room: int, more: int) -> tuple[Table, list[Text]]:
    """A row a job, and a line that counts those there is no room for."""
    shown = lines if len(lines) + bool(more) <= room else lines[: room - 1]
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1, min_width=8)
    for _ in range(3):
        grid.add_column(justify="right", no_wrap=True)
    for line in shown:
        samples = line["samples"]
        mark = " (simulated)" if line["simulated"] else ""
        failed = f", {samples['failed']} failed" if samples["failed"] else ""
        grid.add_row(
            f"job {line['job']} {line['model']} bs {line['bs']}{mark}",
            ProgressBar(total=max(1, samples["total"]), completed=samples["finished"]),
            f"{samples['finished']}/{samples['total']}{failed}",
            f"{line['rate']:.1f}/s",
            line["state"] if line["eta_s"] is None else f"ETA {timedelta(seconds=round(line['eta_s']))}",
        )
    hidden = len(lines) - len(shown) + more
    return grid, [Text(f"and {hidden} more", style="dim")] if hidden else []


def _devices(lines: Sequence[Status], room: int) -> tuple[Table, list[Text]]:
    """A row a device; where there are too many, those in trouble first, and a line that counts the rest."""
    shown, more = list(lines), []
    if len(lines) > room:
        chosen = sorted(range(len(lines)), key=lambda i: (_rank(lines[i]), i))[: max(0, room - 1)]
        shown = [lines[i] for i in sorted(chosen)]
        hidden = Counter(device_state(line) for i, line in enumerate(lines) if i not in chosen)
        listing = ", ".join(f"{count} {state}" for state, count in sorted(hidden.items()))
        more = [Text(f"and {listing}", style="dim")]
    warm = any(line["temperature_c"] is not None for line in lines)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("device", "state", "rate", "runs", "since", *(["°C"] if warm else []), "canary"):
        table.add_column(title, justify="right" if title in ("rate", "since", "°C") else "left", no_wrap=True)
    for line in shown:
        state = device_state(line)
        verdict = line["canary"] or "-"
        table.add_row(
            line["device"],
            Text(state, style=_COLOURS.get(state, "yellow")),
            f"{line['rate']:.1f}/s" if line["rate"] else "-",
            line["running"] or "-",
            "-" if line["running_s"] is None else f"{line['running_s']:.1f} s",
            *([f"{line['temperature_c'] or '-'}"] if warm else []),
            Text(verdict, style=_COLOURS.get(verdict, "red" if line["canary"] else "dim")),
        )
    return table, more


def _rank(line: Mapping[str, Any]) -> int:
    """In trouble, at work, idle, gone."""
    state = device_state(line)
    if state == "up" and line["canary"] not in ("disagrees", "disputed"):
        return 1 if line["running"] else 2
    return 3 if state == "gone" else 0
