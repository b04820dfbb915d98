"""
The worker's end of a device process: start it, load a model, feed it, and SIGKILL it when it does not answer.

Not thread-safe: the pipeline's device thread owns it. Children are started from one thread that stays, because the
kernel ties their leash to the thread that started them.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from time import monotonic
from typing import Any

from farm import errors
from farm.errors import DeviceCrashed, DeviceError, DeviceHung, FarmError
from farm.leash import ROOT
from workers.backends.base import Load, Times
from workers.device_process import MESSAGE_BYTES
from workers.ring import Buffer, Ring

START_S, LOAD_S, REAP_S = 60.0, 600.0, 10.0


class DeviceProcess:
    """One device process at a time; `ensure` starts the first and every later one."""

    def __init__(self, *backends: str) -> None:
        """`backends` are those that it will most likely need."""
        self._backends = backends
        self._starter = ThreadPoolExecutor(1, "device-starter", schedule, (os.sched_getscheduler(0),))
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._ready = False
        self.starts = 0
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ensure(self) -> None:
        """Have a process, without waiting for it to be ready. `DeviceError` when it cannot be started."""
        if self._process is not None and self._link is None:
            self.kill()  # a stuck one: perhaps it has died by now
        if self._closed:
            raise DeviceError("the device was closed")
        if self._process is None:
            try:
                self._starter.submit(self._start).result()
            except OSError as exc:
                raise DeviceError(f"cannot start a device process: {exc}") from exc

    def load(self, load: Load, ring: Ring) -> None:
        """Load a model over a ring. `JobError`, `HostError` or `DeviceError`, with the backend's sentence."""
        self.ensure()
        if not self._ready:
            self.receive(START_S)
            self._ready = True
        if self._link is None:
            raise self._crashed()
        message = {"op": "load", "load": asdict(load), "bytes": ring.nbytes}
        try:
            socket.send_fds(self._link, [json.dumps(message).encode()], [ring.fd])
        except OSError as exc:
            raise self._crashed() from exc
        answer = self.receive(LOAD_S)
        if answer["op"] != "loaded":
            self.kill()  # what failed half-way may leak, and a vendor's runtime comes up once a process
            raise _error(answer)

    def send(self, batch: int, given: Buffer, wanted: Buffer) -> None:
        """Have a batch run after those sent before. `DeviceCrashed` if nobody is there."""
        message = {"op": "run", "batch": batch, "in": given.offset, "out": wanted.offset}
        if self._link is None:
            raise self._crashed()
        try:
            self._link.send(json.dumps(message).encode())
        except OSError as exc:
            raise self._crashed() from exc

    def finished(self, deadline: float) -> tuple[int, Times]:
        """
        The next finished batch: its number and times. `deadline` is in `time.monotonic` seconds.

        Raises `DeviceHung` or `DeviceCrashed` (the process is gone then), or what the backend raised.
        """
        answer = self.receive(deadline - monotonic())
        if answer["op"] == "error":
            raise _error(answer)
        return answer["batch"], Times(*answer["ms"])

    def rung(self, bell: int, deadline: float) -> bool:
        """Wait until there is something for `finished`, or the bell, an eventfd, is rung; whether it was that alone."""
        link = self._link
        if link is None or link.fileno() < 0:  # closed meanwhile: `finished` says so
            return False
        both = select.poll()
        both.register(link, select.POLLIN)
        both.register(bell, select.POLLIN)
        heard = [descriptor for descriptor, _ in both.poll(max(0.0, 1000 * (deadline - monotonic())))]
        if bell in heard:
            os.eventfd_read(bell)
        return heard == [bell]

    def receive(self, timeout_s: float) -> Mapping[str, Any]:
        if self._link is None:
            raise self._crashed()
        self._link.settimeout(max(timeout_s, 0.001))
        try:
            data = self._link.recv(MESSAGE_BYTES)
        except TimeoutError as exc:
            self.kill()
            raise DeviceHung(f"no answer within {max(timeout_s, 0):.1f} s; its process was killed") from exc
        except OSError as exc:
            raise self._crashed() from exc
        if not data:
            raise self._crashed()
        message: Mapping[str, Any] = json.loads(data)
        return message

    def kill(self) -> None:
        """End the process with SIGKILL. `DeviceError` if the kernel cannot end it (state D): the device is stuck."""
        process, link = self._process, self._link
        self._process = self._link = None
        self._ready = False
        if link is not None:
            link.close()
        if process is None:
            return
        process.kill()
        try:
            process.wait(REAP_S)
        except subprocess.TimeoutExpired as exc:
            self._process = process  # never start a second session beside a stuck one
            raise DeviceError(f"device process {process.pid} does not die; the device is stuck") from exc

    def close(self) -> None:
        """End the process, gently if it listens, for good."""
        self._closed = True
        if self._link is not None and self._process is not None:
            self._link.close()
            self._link = None
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
        self.kill()
        self._starter.shutdown()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "workers.device_process", str(os.getpid()), str(theirs.fileno())]
            command += self._backends
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=ROOT
                )
            except BaseException:
                ours.close()
                raise
        self._link = ours
        self._ready = False
        self.starts += 1

    def _crashed(self) -> DeviceCrashed:
        process = self._process
        code = None
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(REAP_S)
        self.kill()
        return DeviceCrashed(f"its process ended by itself ({_ending(code)})")


def schedule(policy: int) -> None:
    """
    Have the kernel treat the calling thread so, and what it starts.

    A thread of `SCHED_BATCH` that wakes up takes no core from who is at work; otherwise it gets its share as ever.
    """
    with suppress(OSError):  # where that is not allowed, it goes on as it was
        os.sched_setscheduler(0, policy, os.sched_param(0))


def _ending(code: int | None) -> str:
    if code is None:
        return "and closed its socket"
    try:
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    except ValueError:  # a real-time signal has no name
        return f"signal {-code}"


def _error(answer: Mapping[str, Any]) -> FarmError:
    """The backend's error again, of its own class."""
    error: type[FarmError] = getattr(errors, answer["error"], DeviceError)
    return error(answer["text"])
