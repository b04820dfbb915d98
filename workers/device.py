"""
The worker's end of a device process: start it, load a model, feed it, and SIGKILL it when it does not answer.

Not thread-safe but for `send`: the pipeline's device thread owns it. Children are started from one thread that stays,
because the kernel ties their leash to the thread that started them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
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
        self._sending = threading.Lock()
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
            ring.start()
            socket.send_fds(self._link, [json.dumps(message).encode()], [ring.fd])
        except OSError as exc:
            raise self._crashed() from exc
        answer = self.receive(LOAD_S)
        if answer["op"] != "loaded":
            self.kill()  # what failed half-way may leak, and a vendor's runtime comes up once a process
            raise _error(answer)

    def send(self, group: int, batches: Sequence[tuple[Buffer, Buffer]]) -> None:
        """
        Have batches run, from buffer to buffer, after those sent before. Any thread may.

        A process that is gone is `finished`'s to find.
        """
        places = [(given.offset, wanted.offset) for given, wanted in batches]
        message = json.dumps({"op": "run", "group": group, "batches": places}).encode()
        with self._sending:
            if self._link is None:
                return
            try:
                self._link.send(message)
            except OSError:
                with suppress(OSError):  # who waits for the answer hears at once that there will be none
                    self._link.shutdown(socket.SHUT_RDWR)

    def finished(self, timeout_s: float) -> tuple[int, list[Times]] | None:
        """
        The next finished group: its number and its batches' times; None if there is none for so long.

        Raises `DeviceCrashed` (the process is gone then), or what the backend raised.
        """
        answer = self._hear(timeout_s)
        if answer is None:
            return None
        if answer["op"] == "error":
            raise _error(answer)
        return answer["group"], [Times(*times) for times in answer["ms"]]

    def hung(self, patience_s: float) -> DeviceHung:
        """The error of a device that did not answer for so long; its process is gone then."""
        self.kill()
        return DeviceHung(f"no answer within {patience_s:.1f} s; its process was killed")

    def receive(self, timeout_s: float) -> Mapping[str, Any]:
        """What the process says next. `DeviceHung` if that is nothing for so long, `DeviceCrashed` if it is gone."""
        message = self._hear(timeout_s)
        if message is None:
            raise self.hung(timeout_s)
        return message

    def _hear(self, timeout_s: float) -> Mapping[str, Any] | None:
        if self._link is None:
            raise self._crashed()
        self._link.settimeout(max(timeout_s, 0.001))
        try:
            data = self._link.recv(MESSAGE_BYTES)
        except TimeoutError:
            return None
        except OSError as exc:
            raise self._crashed() from exc
        if not data:
            raise self._crashed()
        message: Mapping[str, Any] = json.loads(data)
        return message

    def kill(self) -> None:
        """End the process with SIGKILL. `DeviceError` if the kernel cannot end it (state D): the device is stuck."""
        process, self._process = self._process, None
        self._ready = False
        self._hang_up()
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
            self._hang_up()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
        self.kill()
        self._starter.shutdown()

    def _hang_up(self) -> None:
        with self._sending:  # else a message might reach what gets this descriptor's number next
            link, self._link = self._link, None
        if link is not None:
            link.close()

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
