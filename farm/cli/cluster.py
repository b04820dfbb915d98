"""farm worker, farm coordinator: the services of a farm of many hosts."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.arguments import Force

if TYPE_CHECKING:
    from db.engine import Database
    from farm.settings import Settings
    from workers.devices import LocalDevice


def worker(
    devices: Annotated[str, typer.Option(help="all, or some of this host's: 0,2.")] = "all",
    force: Force = False,
) -> None:
    """Serve this host's devices until SIGTERM, which lets running shards finish and hands back what waits."""
    from db import devices as stored
    from db.engine import open_database
    from farm.settings import make_home
    from tasks import host

    settings = _settings()
    settings = settings.model_copy(update={"force": settings.force or force})
    make_home(settings)
    names, chosen = _chosen(settings, devices)
    database = open_database(settings)
    _refuse_lone_file(settings, database)
    with database.read() as conn:
        stored.refuse_second_host(conn, database, settings.host_name, settings.lease_s)
    logging.info("serving %s, logs in %s", ", ".join(d.name for d in chosen), settings.log_dir)
    database.close()
    host.serve(settings, chosen, lambda device: not names or device.name in names)


def _chosen(settings: Settings, devices: str) -> tuple[set[str], list[LocalDevice]]:
    """The names that were typed, none for all, and the devices to serve."""
    from farm.errors import UsageError
    from workers.devices import discover, serving, usable

    if devices == "all":
        return set(), serving(settings)
    local = {str(d.index): d for d in discover(settings) if d.index >= 0}
    wanted = [part.strip() for part in devices.split(",")]
    if unknown := [index for index in wanted if index not in local]:
        raise UsageError(
            f"--devices {devices}: no device {', '.join(unknown)} here, this host has {', '.join(local) or 'none'}"
        )
    chosen = [local[index] for index in dict.fromkeys(wanted)]
    if refused := [f"{d.name}: {d.unusable}" for d in chosen if d not in usable(settings, chosen)]:
        raise UsageError(f"--devices {devices}: not to be used, {'; '.join(refused)}. --force uses it all the same")
    return {d.name for d in chosen}, chosen


def coordinator() -> None:
    """Rescue, assign and settle for the whole farm until SIGTERM. Several at once do no harm."""
    from threading import Event, Thread

    from tasks.coordinator import Coordinator
    from tasks.host import until_told

    settings = _settings()
    wake, over = Event(), Event()
    ticking = Thread(target=Coordinator(settings, wake).run, kwargs={"until": over.is_set}, daemon=True)
    logging.info("coordinating, as %s", settings.host_name)
    until_told(lambda: ticking.start() if not ticking.ident else None)
    over.set()
    wake.set()
    ticking.join()


def _settings() -> Settings:
    """Of a service: it logs to stderr, and needs a broker that others reach."""
    from farm.errors import UsageError
    from farm.settings import load_settings

    settings = load_settings()
    if settings.is_embedded:
        raise UsageError(
            "FARM_BROKER_URL is not set: this command is for farms of several hosts and needs their broker "
            "(redis://...); on one machine farm up does it all"
        )
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return settings


def _refuse_lone_file(settings: Settings, database: Database) -> None:
    """Hosts that share a broker share a database, or they never hear of each other's jobs."""
    from urllib.parse import urlsplit

    from farm.errors import UsageError

    there = urlsplit(settings.broker_url).hostname
    if database.is_sqlite and there not in (None, "localhost", "127.0.0.1", "::1"):
        raise UsageError(
            f"the broker is at {there}, yet the database is {database}, and SQLite serves one host only: set "
            "FARM_DATABASE_URL=postgresql+psycopg://..."
        )
