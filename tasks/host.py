"""One host of a farm of many: a worker for each of its devices, kept running until the host is told to leave."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from time import sleep

from farm.settings import Settings
from workers import supervisor
from workers.devices import LocalDevice
from workers.supervisor import Child

POLL_S = 0.1
#: A running shard has so long to come to its end when its worker is told to leave.
GRACE_S = 30.0


def worker(settings: Settings, device: LocalDevice) -> Child:
    """A device's worker as a child process."""
    log_file = settings.log_dir / f"worker-{device.index}.log"
    # One core a device: a numeric library's own threads would only get in its way.
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tasks.worker", device.name]
    return Child(name=device.name, command=command, log_file=log_file, env=env)


def serve(settings: Settings, devices: Sequence[LocalDevice]) -> None:
    """Keep the devices' workers running; on SIGTERM or SIGINT let them finish their shards, and return."""
    children = [worker(settings, device) for device in devices]

    def watch() -> None:
        for child in children:
            child.watch()

    try:
        until_told(watch)
    finally:
        supervisor.stop(children, GRACE_S)


def until_told(look: Callable[[], None]) -> None:
    """
    Call `look` now and then until SIGTERM or SIGINT.

    A second signal changes nothing: what it wants has begun.
    """
    told: list[int] = []  # no Event: setting one in a handler can meet its own lock
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    while not told:
        look()
        sleep(POLL_S)
