"""
The farm of one machine, as its users meet it: join the one that is up, or have one for as long as one waits.

Three files in the farm's run directory carry it: `farm.lock`, held by the host process (`tasks.local_host`);
`farm.json`, which says who that is; `waiters.lock`, shared by all who wait. The kernel drops a lock with its process,
whatever ended it, so nobody needs to be told of a death.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from farm.errors import FarmError, UsageError
from farm.leash import ROOT
from farm.settings import Settings, make_home

if TYPE_CHECKING:
    from workers.devices import LocalDevice

#: A host that is not up by then has said why in its log.
START_S = 20.0


def lock_path(settings: Settings) -> Path:
    return settings.run_dir / "farm.lock"


def info_path(settings: Settings) -> Path:
    return settings.run_dir / "farm.json"


def waiters_path(settings: Settings) -> Path:
    return settings.run_dir / "waiters.lock"


def log_path(settings: Settings) -> Path:
    return settings.log_dir / "farm.log"


def is_up(settings: Settings) -> bool:
    """Whether a local farm's host process lives."""
    return _is_locked(lock_path(settings), fcntl.LOCK_SH)


def has_waiters(settings: Settings) -> bool:
    return _is_locked(waiters_path(settings), fcntl.LOCK_EX)


@contextmanager
def joined(settings: Settings) -> Iterator[Callable[[], None]]:
    """
    A farm is up inside, or about to be: the one that was there, or an ephemeral one that ends with its last waiter.

    Gives a function to call now and then: it starts another farm when the one that was joined has gone, and raises
    `FarmError` when none can be started. Leaving waits until the ephemeral farm is down, unless others wait for it.
    """
    if not settings.is_embedded:
        yield lambda: None
        return
    make_home(settings)
    if settings.simulate:
        refuse_other_devices(settings)
    with waiters_path(settings).open("a") as waiting:
        fcntl.flock(waiting, fcntl.LOCK_SH)
        host = _Host(settings, ephemeral=True)
        host.ensure()
        try:
            yield host.ensure
        finally:
            fcntl.flock(waiting, fcntl.LOCK_UN)
            host.leave()


class _Host:
    """The host process from its starter's side."""

    def __init__(self, settings: Settings, *, ephemeral: bool) -> None:
        self._settings = settings
        self._ephemeral = ephemeral
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._seen = False  #: up since it was started

    def ensure(self) -> None:
        """Start a host process if there is none, without waiting for it; `FarmError` if the last start failed."""
        if is_up(self._settings):
            self._seen = self._seen or "pid" in _info(self._settings)  # one that finds no usable NPU never opens
            return
        if self._process is not None and not self._seen:
            code = self._process.poll()
            if code is None and monotonic() - self._started < START_S:
                return
            if code is None or code > 0:
                raise FarmError(f"the local farm did not start: {_last_words(self._settings)}")
        self._start()

    def wait(self) -> None:
        """Return when a farm is open to signals; `FarmError` if none comes up."""
        deadline = monotonic() + START_S
        while not (is_up(self._settings) and "pid" in _info(self._settings)):
            if monotonic() > deadline:
                raise FarmError(f"the local farm did not start: {_last_words(self._settings)}")
            self.ensure()
            sleep(0.02)

    def leave(self) -> None:
        """Wait for the end of an ephemeral farm that nobody else waits for."""
        if is_ephemeral(self._settings):
            _wait_for(lambda: not is_up(self._settings) or has_waiters(self._settings), 10.0)
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(0 if is_up(self._settings) else 1)

    def _start(self) -> None:
        """It runs in a session of its own: Ctrl-C here is not meant for it."""
        settings = self._settings
        command = [sys.executable, "-m", "tasks.local_host", *(["--ephemeral"] if self._ephemeral else [])]
        with log_path(settings).open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=ROOT,
                env={
                    **os.environ,
                    "FARM_HOME": str(settings.home),
                    "FARM_DATA": str(settings.data_dir),
                    "FARM_FORCE": str(settings.force),
                    "FARM_SIMULATE": settings.simulate,
                },
            )
        self._started = monotonic()
        self._seen = False


def stay(settings: Settings) -> None:
    """Have a farm that outlives its waiters: a new one, or the ephemeral one from now on."""
    make_home(settings)
    host = _Host(settings, ephemeral=False)
    deadline = monotonic() + START_S
    while is_ephemeral(settings):
        host.wait()
        if monotonic() > deadline:
            raise FarmError(f"the local farm does not stay: {_last_words(settings)}")
        with suppress(ProcessLookupError):
            os.kill(host_pid(settings), signal.SIGUSR1)
        sleep(0.05)


def nudge(settings: Settings) -> None:
    """Have a farm that is up look at the database now."""
    pid = _info(settings).get("pid")
    if is_up(settings) and pid:  # one that is not open yet will look by itself
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGUSR2)


def stop(settings: Settings, timeout_s: float) -> None:
    """End the farm after its running shards; `UsageError` when none is up."""
    if not is_up(settings):
        raise UsageError(f"no local farm is up in {settings.home}")
    with suppress(ProcessLookupError):
        os.kill(host_pid(settings), signal.SIGTERM)
    if not _wait_for(lambda: not is_up(settings), timeout_s):
        raise FarmError(f"the local farm did not end within {timeout_s:.0f} s: see {log_path(settings)}")


def host_pid(settings: Settings) -> int:
    """The host process of a farm that is up."""
    if not _wait_for(lambda: "pid" in _info(settings), START_S):
        raise FarmError(f"{info_path(settings)} does not say who hosts the farm; end its process by hand")
    return int(_info(settings)["pid"])


def is_ephemeral(settings: Settings) -> bool:
    return bool(_info(settings).get("ephemeral", True))


def simulates(settings: Settings) -> str:
    """What the farm that is up simulates; nothing if its devices are this machine's."""
    return str(_info(settings).get("simulate", ""))


def refuse_other_devices(settings: Settings) -> None:
    """`UsageError` where a farm is up that simulates other devices than asked for, or none."""
    info = _info(settings)
    if is_up(settings) and info and (there := info.get("simulate", "")) != settings.simulate:
        what = there or "this machine's own devices"
        raise UsageError(f"a farm of {what} is up in {settings.home}: farm down ends it")


def devices(settings: Settings) -> list[LocalDevice]:
    """This host's devices, as the farm that is up here has them."""
    from workers.devices import discover

    if not settings.simulate and (simulated := simulates(settings)):
        settings = settings.model_copy(update={"simulate": simulated})
    return discover(settings)


def write_info(settings: Settings, *, ephemeral: bool) -> None:
    """Say who hosts; only the holder of the farm's lock may."""
    partial = info_path(settings).with_suffix(".tmp")
    partial.write_text(json.dumps({"pid": os.getpid(), "ephemeral": ephemeral, "simulate": settings.simulate}))
    os.replace(partial, info_path(settings))


def _info(settings: Settings) -> dict[str, Any]:
    """What the host wrote of itself; nothing if that is left over from one that is gone."""
    try:
        found: dict[str, Any] = json.loads(info_path(settings).read_text())
        command = Path(f"/proc/{found['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return found if b"tasks.local_host" in command else {}


def _last_words(settings: Settings) -> str:
    lines = log_path(settings).read_text(errors="replace").splitlines()
    return f"{lines[-1] if lines else 'no word of it'} ({log_path(settings)})"


def _is_locked(path: Path, kind: int) -> bool:
    """Whether somebody holds a lock that `kind` cannot be had beside."""
    try:
        with path.open("a") as file:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = monotonic() + timeout_s
    while not condition():
        if monotonic() > deadline:
            return False
        sleep(0.02)
    return True
