"""farm flower: Celery's dashboard for the farm's broker."""

from __future__ import annotations

import logging
import os
import signal
import sys
from ipaddress import ip_address
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tornado.web import Application

    from farm.settings import Settings

#: Flower keeps its tasks in memory, about 6.5 KiB each; the database is the history.
MAX_TASKS = 20_000
#: A worker that was not heard of for so long, in seconds, leaves the list and the metrics.
FORGET_WORKERS_S = 600

#: USER:PASSWORD. From the environment alone: everybody on a machine can read the arguments of its processes.
AUTH = "FARM_FLOWER_AUTH"


def flower(
    address: Annotated[str, typer.Option(help=f"Where to listen; beyond this machine only with {AUTH}.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 5555,
) -> None:
    """
    Watch the farm's workers and tasks in a browser, until SIGTERM: Flower, read only.

    FARM_FLOWER_AUTH=USER:PASSWORD asks for these; put TLS in front of it where others share the network.
    """
    from farm.settings import load_settings

    settings = load_settings()
    auth = settings.flower_auth.get_secret_value()
    _refuse(settings, address, auth)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _serve(settings, address, port, auth)


def _refuse(settings: Settings, address: str, auth: str) -> None:
    """`UsageError` for what would show nothing, or show it to everybody."""
    from farm.errors import UsageError
    from tasks import local

    user, _, password = auth.partition(":")
    if auth and not (user and password and auth.isascii() and auth.isprintable()):
        raise UsageError(f"{AUTH} is not of the form USER:PASSWORD, both not empty and of ASCII characters")
    if not auth and not _is_loopback(address):
        raise UsageError(
            f"--address {address} is open to other machines, and everybody there would see the farm: "
            f"set {AUTH}=USER:PASSWORD, or listen on 127.0.0.1"
        )
    if settings.is_embedded and not local.is_up(settings):
        raise UsageError(
            f"no local farm is up in {settings.home}, so there is nothing to watch: start one with farm up, or name "
            "a broker in FARM_BROKER_URL"
        )


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _serve(settings: Settings, address: str, port: int, auth: str) -> None:
    """
    Flower inside this process, so that the broker's password reaches no command line.

    Its own command would do nothing else, but read more options from files and the environment.
    """
    from flower.app import Flower  # type: ignore[import-untyped]
    from flower.options import options  # type: ignore[import-untyped]
    from flower.urls import settings as flower_settings  # type: ignore[import-untyped]

    from farm.errors import UsageError
    from tasks.app import make_app
    from workers import broker

    options.address, options.port = address, port
    options.basic_auth = [auth] if auth else []
    options.read_only = True  # a farm is steered with its own commands, which write down what they did
    options.persistent = False  # its file would be a pickle
    options.max_tasks = MAX_TASKS
    options.purge_offline_workers = FORGET_WORKERS_S
    options.tasks_columns = "uuid,state,args,result,received,started,runtime,worker"
    logging.getLogger("tornado.access").setLevel(logging.WARNING)
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)  # warns of every farm without workers

    app = Flower(capp=make_app(broker.url(settings)), options=options, **flower_settings)
    _guard_metrics(app)
    try:
        taken = app.start_http_server()
    except OSError as exc:
        raise UsageError(f"cannot listen on {address}:{port}: {exc.strerror}; choose --address and --port") from exc
    loop = app.io_loop.asyncio_loop
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.stop)
    host = f"[{address}]" if ":" in address else address
    print(f"Flower is at http://{host}:{taken}, broker {app.broker_uri}", flush=True)
    app.start()
    sys.stdout.flush()
    os._exit(0)  # its threads may still wait for a broker that is away, and nothing is to be saved


def _guard_metrics(app: Application) -> None:
    """Flower leaves /metrics open whatever its password, and names of workers are in it. (/healthcheck says OK.)"""
    from flower.views.monitor import Metrics  # type: ignore[import-untyped]
    from tornado.web import authenticated

    class Guarded(Metrics):  # type: ignore[misc]
        @authenticated
        async def get(self) -> None:
            await super().get()

    app.add_handlers(".*", [(r"/metrics", Guarded)])
