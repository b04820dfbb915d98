"""farm worker, farm coordinator: the services of a farm of many hosts."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from db.engine import Database
    from farm.settings import Settings


def worker(
    devices: Annotated[str, typer.Option(help="all, or some of this host's: 0,2.")] = "all",
) -> None:
    """Serve this host's devices until SIGTERM, which lets running shards finish and hands back what waits."""
    from db import devices as stored
    from db.engine import open_database
    from farm.errors import UsageError
    from farm.settings import make_home
    from tasks import host
    from workers.devices import discover

    settings = _settings()
    make_home(settings)
    local = discover(settings)
    wanted = [str(d.index) for d in local] if devices == "all" else [part.strip() for part in devices.split(",")]
    unknown = [index for index in wanted if index not in {str(d.index) for d in local}]
    if unknown:
        known = ", ".join(str(d.index) for d in local)
        raise UsageError(f"--devices {devices}: no device {', '.join(unknown)} here, this host has {known}")
    database = open_database(settings)
    _refuse_lone_file(settings, database)
    with database.read() as conn:
        stored.refuse_second_host(conn, database, settings.host_name, settings.lease_s)
    chosen = [d for d in local if str(d.index) in wanted]
    logging.info("serving %s, logs in %s", ", ".join(d.name for d in chosen), settings.log_dir)
    database.close()
    host.serve(settings, chosen)


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
