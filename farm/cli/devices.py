"""farm devices, farm doctor: what there is, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def devices(as_json: Json = False) -> None:
    """List the devices the farm knows, and those of this host it has not met yet."""
    from rich.console import Console

    from db.engine import open_database
    from farm.reports.status import device_lines, show_devices
    from farm.settings import load_settings
    from workers.devices import discover

    settings = load_settings()
    lines = device_lines(open_database(settings), settings)
    known = {line["device"] for line in lines}
    lines += [
        {
            "device": d.name,
            "state": "not started",
            "soc": d.soc,
            "backends": list(d.backends),
            "incarnation": 0,
            "strikes": 0,
            "heard_s_ago": None,
            "pid": None,
        }
        for d in discover(settings)
        if d.name not in known
    ]
    if as_json:
        print(json.dumps(lines, indent=2))
    else:
        show_devices(lines, Console())


def doctor(as_json: Json = False) -> None:
    """Check this machine: directories, database, broker, devices, data, artifacts. Exit 1 if something is wrong."""
    from farm.reports.doctor import examine
    from farm.settings import load_settings

    findings = examine(load_settings())
    if as_json:
        print(json.dumps([f.as_json() for f in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.text}")
    raise typer.Exit(0 if all(f.ok for f in findings) else 1)
