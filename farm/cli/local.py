"""farm up, farm down: the farm of one machine."""

from __future__ import annotations

import os
import sys
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.arguments import Force

if TYPE_CHECKING:
    from farm.settings import Settings


def up(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the devices.")] = 30.0,
    simulate: Annotated[
        str | None,
        typer.Option(metavar="8x310P3", help="Devices that are none, as fast as so many of these; reports say so."),
    ] = None,
    force: Force = False,
) -> None:
    """Start a local farm that stays, in the background; farm submit uses it from then on.

    farm up --simulate 8x310P3 is a farm to plan and try things with: times of the reference table, outputs made up.
    """
    from farm.errors import UsageError
    from farm.settings import load_settings
    from tasks import local

    if simulate is not None:
        os.environ["FARM_SIMULATE"] = simulate  # where it is checked
    settings = load_settings()
    if not settings.is_embedded:
        raise UsageError("FARM_BROKER_URL is set, and farm up is for a farm of one machine: unset it")
    local.refuse_other_devices(settings)
    if force:
        if local.is_up(settings):
            raise UsageError(f"the farm in {settings.home} is up already, without --force: farm down first")
        settings = settings.model_copy(update={"force": True})
    local.stay(settings)
    mark = "SIMULATED " if settings.simulate else ""
    print(f"the farm is up in {settings.home}: {mark}{', '.join(_wait_for_devices(settings, timeout))}")


def down(
    timeout: Annotated[float, typer.Option(help="Seconds to wait for running shards.")] = 60.0,
) -> None:
    """End the local farm: running shards are finished, what waits goes on when a farm is up again."""
    from farm.settings import load_settings
    from tasks import local

    settings = load_settings()
    local.stop(settings, timeout)
    if local.has_waiters(settings):
        print("somebody still waits for a job here and starts a farm of its own: end it with Ctrl-C", file=sys.stderr)
    print(f"the farm in {settings.home} is down")


def _wait_for_devices(settings: Settings, timeout_s: float) -> list[str]:
    """The names of this host's devices, once each has a worker that lives."""
    import psutil

    from db import devices
    from db.engine import open_database
    from farm.errors import FarmError
    from farm.jobs import DeviceState
    from workers.devices import serving

    database = open_database(settings)
    wanted = [device.name for device in serving(settings)]
    deadline = monotonic() + timeout_s
    while True:
        with database.read() as conn:
            found = {d.name: d for d in devices.everything(conn)}
        missing = [
            name
            for name in wanted
            if name not in found or found[name].state is DeviceState.GONE or not psutil.pid_exists(found[name].pid)
        ]
        if not missing:
            return wanted
        if monotonic() > deadline:
            raise FarmError(f"{', '.join(missing)} did not come up in {timeout_s:.0f} s: see {settings.log_dir}")
        sleep(0.1)
