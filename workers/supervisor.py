"""
Child processes that are kept running: restarted with back-off when they end, ended with their parent.

Starts children from the thread that calls `watch` (their leash ends with it), which must live as long as they do.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from farm.leash import ROOT

#: A child that lived so long gets its next start at once.
STEADY_S = 3.0
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 10.0

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Child:
    """A command, its log, and the process that runs it now."""

    name: str
    command: Sequence[str]
    log_file: Path
    env: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0
    _delay_s: float = FIRST_DELAY_S
    _next_start: float = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def watch(self) -> None:
        """Start it if it does not run and its back-off is over."""
        now = monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            self._process = None
            self._delay_s = FIRST_DELAY_S if now - self._started > STEADY_S else min(2 * self._delay_s, LONGEST_DELAY_S)
            self._next_start = now + self._delay_s
            log.warning("%s ended (%s%s); next start in %.1f s", self.name, code, self._last_words(), self._delay_s)
        if now >= self._next_start:
            self._start(now)

    def _last_words(self) -> str:
        """What a child says that ends at once, for it will say so again."""
        if monotonic() - self._started > STEADY_S:
            return ""
        with suppress(OSError, IndexError), self.log_file.open("rb") as file:
            file.seek(max(0, self.log_file.stat().st_size - 1000))
            return f": {file.read().decode(errors='replace').splitlines()[-1]}"
        return ""

    def terminate(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.terminate()

    def reap(self, timeout_s: float) -> None:
        """Wait for its end; SIGKILL when the time is over."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self, now: float) -> None:
        leash = [sys.executable, "-m", "farm.leash", str(os.getpid())]
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [*leash, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
                cwd=ROOT,
            )
        self._started = now


def stop(children: Sequence[Child], grace_s: float) -> None:
    """End them all: SIGTERM, then SIGKILL when `grace_s` is over."""
    for child in children:
        child.terminate()
    deadline = monotonic() + grace_s
    for child in children:
        child.reap(deadline - monotonic())
