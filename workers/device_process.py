"""
The process that owns a device: it loads a model and runs batches where they lie, in the worker's shared ring.

Apart because a vendor's call may hold Python's GIL, hang, leak or abort. Speaks JSON messages over a SOCK_SEQPACKET
socket (``op``: load, run; answers: ready, loaded, refused, done, error); tensors never pass through it.

    python -m workers.device_process PARENT_PID SOCKET_FD [BACKEND]
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

MESSAGE_BYTES = 1 << 16


def main() -> None:
    parent, descriptor = int(sys.argv[1]), int(sys.argv[2])
    from farm.leash import die_with_parent

    die_with_parent(parent)
    # The terminal's Ctrl-C is the worker's business; it closes the socket when the time has come.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as link:
        _preload(sys.argv[3:])
        _send(link, {"op": "ready"})
        _serve(link)


def _preload(backends: Sequence[str]) -> None:
    """Import what loads will need while the worker is still starting itself."""
    from importlib import import_module

    from workers.backends import BACKENDS

    for name in backends:
        import_module(BACKENDS[name])


def _serve(link: socket.socket) -> None:
    from farm.errors import FarmError

    model: _Model | None = None
    failed = False  #: at a batch: what was sent after it waits for the next process, and how far we got stays as it is
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 1)
        except ConnectionResetError:  # it left without reading our last answer
            break
        if not data:
            break  # the worker is done with us
        message = json.loads(data)
        try:
            if message["op"] == "load":
                if model is not None:
                    model.close()
                    model = None
                model, failed = _Model(message["load"], fds[0], message["bytes"]), False
                _send(link, {"op": "loaded"})
            elif model is not None and not failed:
                times = [model.run(*places) for places in message["batches"]]
                _send(link, {"op": "done", "group": message["group"], "ms": times})
        except FarmError as exc:
            failed = True
            answer = "refused" if message["op"] == "load" else "error"
            _send(link, {"op": answer, "error": type(exc).__name__, "text": str(exc)})
    if model is not None:
        model.close()


class _Model:
    """A loaded backend and its view of the ring."""

    def __init__(self, load: Mapping[str, Any], ring_fd: int, ring_bytes: int) -> None:
        from workers.backends import open_backend
        from workers.backends.base import Load, TensorSpec
        from workers.ring import progress

        try:
            self._ring = mmap.mmap(ring_fd, ring_bytes)
        finally:
            os.close(ring_fd)
        self._input, self._output = (
            TensorSpec(**{**load[role], "shape": tuple(load[role]["shape"])}) for role in ("input", "output")
        )
        self._backend = open_backend(Load(**{**load, "input": self._input, "output": self._output}))
        self._progress = progress(self._ring)
        self._views: dict[tuple[int, int], tuple[Any, Any]] = {}  #: by offsets: the ring's buffers come again and again

    def run(self, input_offset: int, output_offset: int) -> tuple[float, float, float]:
        from workers.ring import view

        where = input_offset, output_offset
        if where not in self._views:
            self._views[where] = (
                view(self._ring, input_offset, self._input),
                view(self._ring, output_offset, self._output),
            )
        times = self._backend.infer(*self._views[where])
        self._progress[:] = self._progress[0] + 1, time.monotonic()
        return times

    def close(self) -> None:
        self._backend.close()


def _send(link: socket.socket, message: Mapping[str, Any]) -> None:
    link.send(json.dumps(message).encode())


if __name__ == "__main__":
    main()
