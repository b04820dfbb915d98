"""farm devices, farm doctor: what there is, what is wrong with it, and which devices shall work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.arguments import since as parse_since

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from db.engine import Database

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Names = Annotated[list[str], typer.Argument(help="HOST:N, or HOST for all its devices.", metavar="HOST[:N]...")]

app = typer.Typer(help="List the devices, or say which shall work.", invoke_without_command=True)


@app.callback()
def devices(context: typer.Context, as_json: Json = False) -> None:
    """List the devices the farm knows, and those of this host it has not met yet; or say which shall work."""
    if context.invoked_subcommand is None:
        _list(as_json)


def _list(as_json: bool) -> None:
    from rich.console import Console

    from db.engine import open_database
    from farm.errors import DeviceError
    from farm.reports.status import device_lines, how_it_is, show_devices, unfit_line
    from farm.settings import load_settings
    from tasks import local
    from workers.devices import usable

    settings = load_settings()
    lines = device_lines(open_database(settings), settings)
    known = {line["device"]: line for line in lines}
    cannot_tell: DeviceError | None = None
    try:
        here = local.devices(settings)
    except DeviceError as exc:  # what the others are, is known all the same
        here, cannot_tell = [], exc
    chosen = usable(settings, here)
    for d in here:
        now = how_it_is({**d.info, "unusable": d.unusable})
        if d.name in known:
            known[d.name].update(now)
            continue
        lines.append(
            {
                **dict.fromkeys(_OF_A_WORKER),
                "device": d.name,
                "host": d.host,
                "state": "not started" if d in chosen else "not used",
                "drained": False,
                "reason": "",
                "soc": d.soc,
                "backends": list(d.backends),
                "incarnation": 0,
                "strikes": 0,
                "unfit": [],
                "waiting": 0,
                "rate": 0.0,
                **now,
            }
        )
    if as_json:
        print(json.dumps(lines, indent=2))
    else:
        show_devices(lines, Console())
        unfit = {unfit_line({**each, "host": line["host"]}) for line in lines for each in line["unfit"]}
        for said in sorted(unfit):
            print(said)
    if cannot_tell is not None:
        raise cannot_tell


#: What only a device has whose worker was there.
_OF_A_WORKER = ("age_s", "heard_s_ago", "pid", "canary", "running", "running_s")


@app.command()
def drain(names: Names) -> None:
    """Have devices finish what they run and take no more work, whatever restarts."""
    _set_drained(names, drained=True)


@app.command()
def undrain(names: Names) -> None:
    """Have drained devices take work again."""
    _set_drained(names, drained=False)


@app.command()
def distrust(
    name: Annotated[str, typer.Argument(help="The device.", metavar="HOST:N")],
    since: Annotated[str, typer.Option(help="How long ago, e.g. 2h, or when: 2026-11-20T10:00.")],
    as_json: Json = False,
) -> None:
    """Compute again what a device answered since then, on other devices, and drain it.

    farm devices distrust node7:3 --since 2h
    """
    from db import reopen, shards

    database = _open()
    with database.write() as conn:
        (device,) = _named(conn, [name], whole_hosts=False)
        start = parse_since(since, database.now(conn))
        shards.drain(conn, database, [device])
        found = reopen.distrust(conn, database, device, start, "its user says so")
    _wake()
    if as_json:
        print(json.dumps({"device": device, **asdict(found)}, indent=2))
        return
    listing = ", ".join(map(str, found.jobs))
    again = f"{found.samples} samples in {found.shards} shards of job {listing} are computed again"
    print(f"{device} is drained; {again if found.shards else 'it won no shard since then, nothing is computed again'}")


def _set_drained(names: list[str], *, drained: bool) -> None:
    from db import devices as stored
    from db import shards

    database = _open()
    with database.write() as conn:
        chosen = _named(conn, names)
        if drained:
            shards.drain(conn, database, chosen)
        else:
            stored.set_drained(conn, database, chosen, drained=False)
    _wake()
    print(f"{'drained, no work until farm devices undrain' if drained else 'drained no more'}: {', '.join(chosen)}")


def _named(conn: Connection, names: Sequence[str], *, whole_hosts: bool = True) -> list[str]:
    """The devices of these names, and of the hosts of these names; `UsageError` lists what there is."""
    from db import devices as stored
    from farm.errors import UsageError

    known = stored.everything(conn)
    chosen: list[str] = []
    for name in names:
        found = [d.name for d in known if d.name == name or (whole_hosts and d.host == name)]
        if not found:
            listing = ", ".join(d.name for d in known) or "none yet"
            raise UsageError(f"no device {name}: the farm knows {listing}")
        chosen += [each for each in found if each not in chosen]
    return chosen


def _open() -> Database:
    from db.engine import open_database
    from farm.settings import load_settings

    return open_database(load_settings())


def _wake() -> None:
    """Have a farm that is up look at the database now; others look by themselves."""
    from farm.settings import load_settings
    from tasks import local

    settings = load_settings()
    if settings.is_embedded:
        local.nudge(settings)


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
