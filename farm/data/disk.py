"""Files that appear whole or not at all, and a disk's refusals as sentences."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from farm.errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an `OSError` from inside as a `StorageError` that names `path`."""
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"cannot write {path}: {exc.strerror or exc}. What was finished is kept: free or open up the place, "
            "or set FARM_DATA to another, then run the same command again"
        ) from exc


def replace(path: Path, data: bytes | memoryview, *, partial: Path, durable: bool = False) -> None:
    """Give `path` these bytes by way of `partial`, a file beside it; `StorageError` leaves `path` as it was.

    `durable` waits for the disk, so that the bytes also outlive a loss of power.
    """
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise
