"""Reading bins: straight into the ring, and believed only when size and hash are the manifest's."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from farm.data.manifest import UNPREPARED, Sample, bin_file, window_paths
from farm.errors import DataError
from workers.backends.base import Array


def read_bin(directory: Path, sample: Sample, out: Array, part: int = 0) -> None:
    """
    Fill `out` with the bytes of a sample's bin, or of the bin of one of its windows.

    `DataError` says why the sample cannot be used; `out` is then arbitrary.
    """
    if sample.xxh3 == UNPREPARED:
        raise DataError(f"was not prepared: {sample.problem}")
    path: str | Path
    if windows := sample.windows:
        path, xxh3 = window_paths(directory, sample.name, windows)[part], windows.xxh3[part]
    else:
        path, xxh3 = os.path.join(directory, bin_file(sample.name)), sample.xxh3
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise DataError(f"{exc.strerror}: {path}. Run farm prepare again.") from exc
    try:
        size = os.fstat(descriptor).st_size
        if size != out.nbytes:
            raise DataError(f"bin has {size} bytes, expected {out.nbytes}: {path}. Run farm prepare again.")
        target, done = out.data.cast("B"), 0
        while done < out.nbytes:
            got = os.preadv(descriptor, [target[done:]], done)
            if got == 0:
                raise DataError(f"bin ended at byte {done} while it was read: {path}")
            done += got
    except OSError as exc:
        raise DataError(f"{exc.strerror}: {path}") from exc
    finally:
        os.close(descriptor)
    found = xxhash.xxh3_64_hexdigest(target)
    if found != xxh3:
        raise DataError(
            f"bin was altered after it was prepared (xxh3 {found}, the manifest says {xxh3}): {path}. "
            "Run farm prepare again."
        )
