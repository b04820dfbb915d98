"""One host of a farm of many: a worker for each of its devices, kept running until the host is told to leave."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import sleep

from farm.errors import DeviceError, StorageError
from farm.settings import Settings
from workers import npu_smi, supervisor
from workers.devices import LocalDevice, npus, usable
from workers.supervisor import Child

POLL_S = 0.1
#: A running shard has so long to come to its end when its worker is told to leave.
GRACE_S = 30.0
#: Between looks at a host's NPUs.
LOOK_S = 15.0

log = logging.getLogger(__name__)


class Workers:
    """
    The workers of a host's devices, kept running by `watch`.

    NPUs are looked at now and then, all by one call: how they are goes into the database, and one that has become
    usable gets its worker. One that works is left to it, sick or not, but not started again until it is well.
    """

    def __init__(
        self, settings: Settings, devices: Sequence[LocalDevice], wanted: Callable[[LocalDevice], bool] = lambda _: True
    ) -> None:
        self.children = [_worker(settings, device, len(devices)) for device in devices]
        self._settings = settings
        self._wanted = wanted
        self._news: Sequence[LocalDevice] = ()
        self._unusable: frozenset[str] = frozenset()
        self._has_npus = any(device.place for device in devices)
        self._looking = threading.Thread(target=self._look, name="npu-smi", daemon=True)

    def watch(self) -> None:
        """Never waits for the NPUs. From one thread that stays: the children's leash ends with it."""
        news, self._news = self._news, ()
        if news:
            self._take(news)
        for child in self.children:
            if child.pid is not None or child.name not in self._unusable:
                child.watch()
        if self._has_npus and not self._looking.ident:
            self._looking.start()

    def _take(self, news: Sequence[LocalDevice]) -> None:
        well = usable(self._settings, filter(self._wanted, news))
        self._unusable = frozenset(device.name for device in news if device not in well)
        known = {child.name: child for child in self.children}
        for device in well:
            if device.name in known:  # what its next worker says of it is what we know now
                known[device.name].command = _command(device, len(self.children))
            else:
                log.info("%s can be used now", device.name)
                self.children.append(_worker(self._settings, device, len(self.children) + 1))

    def _look(self) -> None:
        from db import devices
        from db.engine import open_database

        said, database = "", None
        while True:
            sleep(LOOK_S)
            try:
                self._news = there = npus(self._settings, npu_smi.read_info())
                database = database or open_database(self._settings)
                for each in there:  # a transaction each: others lock several devices in an order of their own
                    with database.write() as conn:
                        devices.observe(conn, each.name, {**each.info, "unusable": each.unusable})
                said = ""
            except (DeviceError, StorageError) as exc:
                if str(exc) != said:
                    log.warning("%s", exc)
                said = str(exc)
            except Exception:
                log.exception("the look at the NPUs failed; it goes on")


def _worker(settings: Settings, device: LocalDevice, peers: int) -> Child:
    """A device's worker as a child process."""
    log_file = settings.log_dir / f"worker-{device.index}.log"
    # One core a device: a numeric library's own threads would only get in its way.
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return Child(name=device.name, command=_command(device, peers), log_file=log_file, env=env)


def _command(device: LocalDevice, peers: int) -> Sequence[str]:
    told = [str(peers), json.dumps(asdict(device))] if device.place else []  # it need not ask npu-smi again
    return [sys.executable, "-m", "tasks.worker", device.name, *told]


def serve(settings: Settings, devices: Sequence[LocalDevice], wanted: Callable[[LocalDevice], bool]) -> None:
    """
    Keep the devices' workers running; on SIGTERM or SIGINT let them finish their shards, and return.

    Of NPUs that are sick or in use by others, those `wanted` get theirs when they can be used.
    """
    workers = Workers(settings, devices, wanted)
    try:
        until_told(workers.watch)
    finally:
        supervisor.stop(workers.children, GRACE_S)


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
