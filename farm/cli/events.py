"""farm events: what happened."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def events(
    job: Annotated[int | None, typer.Argument(help="Only what concerns this job.", min=1)] = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="A list of JSON objects on stdout.")] = False,
) -> None:
    """Print what happened to jobs, shards, attempts and devices, newest last."""
    from db.engine import open_database
    from farm.reports import events as reports
    from farm.settings import load_settings

    found = reports.build(open_database(load_settings()), job, limit)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for line in found:
            print(reports.text(line))
