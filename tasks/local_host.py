"""
The process that hosts a local farm: broker, one worker a device, and the coordinator's tick.

    python -m tasks.local_host [--ephemeral]

An ephemeral one ends when nobody waits any more; SIGUSR1 makes it stay, SIGUSR2 makes it look at the
database now, SIGTERM ends it. Its children die with it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
from time import monotonic, sleep

from farm.errors import FarmError
from farm.settings import Settings, load_settings, make_home
from tasks import host, local
from workers import broker, supervisor
from workers.devices import serving

POLL_S = 0.1
#: An ephemeral farm's end is awaited by somebody: what has not ended by then is killed, and taken up again later.
EPHEMERAL_GRACE_S = 2.5
#: Starting workers fill their own windows; the tick's imports would only slow them down.
FIRST_TICK_S = 1.5

log = logging.getLogger(__name__)


class LocalHost:
    """Children, tick and the reasons to end."""

    def __init__(self, settings: Settings, *, ephemeral: bool) -> None:
        self._settings = settings
        self._ephemeral = ephemeral
        self._told_to_stop = False
        self._ended = False
        self._wake = threading.Event()

    def run(self) -> None:
        settings = self._settings
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._stay)
        signal.signal(signal.SIGUSR2, self._look)
        server = broker.child(settings)
        workers = host.Workers(settings, serving(settings))
        local.write_info(settings, ephemeral=self._ephemeral)  # the farm is open; from now on signals may come
        ticking = threading.Thread(target=self._tick, daemon=True)
        opened = monotonic()
        try:
            while not self._over():
                server.watch()
                workers.watch()
                if not ticking.ident and monotonic() - opened > FIRST_TICK_S:
                    ticking.start()
                sleep(POLL_S)
        finally:
            self._ended = True
            local.info_path(settings).unlink(missing_ok=True)  # closed: whoever comes now must wait for the next one
            self._wake.set()
            # Workers first: they hand back what waits, which needs the database and no broker.
            supervisor.stop(workers.children, EPHEMERAL_GRACE_S if self._ephemeral else host.GRACE_S)
            supervisor.stop([server], 1.0)
            broker.clean_up(settings)

    def _over(self) -> bool:
        return self._told_to_stop or (self._ephemeral and not local.has_waiters(self._settings))

    def _stop(self, *_: object) -> None:
        self._told_to_stop = True

    def _stay(self, *_: object) -> None:
        if not self._ended:
            self._ephemeral = False
            local.write_info(self._settings, ephemeral=False)

    def _look(self, *_: object) -> None:
        self._wake.set()

    def _tick(self) -> None:
        from tasks.coordinator import Coordinator

        Coordinator(self._settings, self._wake).run(until=lambda: self._ended)


def _take_lock(settings: Settings) -> bool:
    """
    Take the farm's lock for as long as this process lives; False when another host has it.

    The descriptor is never closed: that the lock is free shall mean that the process is gone. Whoever only looks
    holds the lock for a moment, so try again.
    """
    descriptor = os.open(local.lock_path(settings), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = monotonic() + 0.5
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > deadline:
                return False
            sleep(0.01)
        else:
            return True


def main() -> int:
    """Host a farm until it is over."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = load_settings()
        make_home(settings)
        if not _take_lock(settings):
            return 0
        local.info_path(settings).unlink(missing_ok=True)
        LocalHost(settings, ephemeral="--ephemeral" in sys.argv).run()
    except FarmError as exc:
        log.error("%s", exc)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
