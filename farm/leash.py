"""
Dying with one's parent, whatever kills it.

``python -m farm.leash PARENT_PID COMMAND...`` puts a foreign program on the leash: the setting survives exec.
The kernel sends the signal when the *thread* that started the child ends, so start children from one that stays.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1

#: Where our packages are. ``python -m`` looks in its working directory first, and a user's may well hold a tasks/ of
#: its own: give every child of ours this one.
ROOT = Path(__file__).resolve().parents[1]


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL for this process once its parent is gone; at once if it is gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  no shell wanted
