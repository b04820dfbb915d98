"""Reading bins: straight into the ring, and believed only when size and hash are the manifest's."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

from farm.data.manifest import UNPREPARED, Sample, bin_file, window_paths
from farm.errors import DataError
from workers.backends.base import Array

#: Room for a byte that a bin should not have.
_BEYOND = bytearray(1)


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
        path, xxh3 = f"{directory}/{bin_file(sample.name)}", sample.xxh3
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        raise DataError(f"{exc.strerror}: {path}. Run farm prepare again.") from exc
    target, done, got = out.data.cast("B"), 0, 1
    try:
        while got and done < out.nbytes:
            got = os.preadv(descriptor, [target[done:], _BEYOND], done)
            done += got
        if done != out.nbytes:
            size = os.fstat(descriptor).st_size
            raise DataError(f"bin has {size} bytes, expected {out.nbytes}: {path}. Run farm prepare again.")
    except OSError as exc:
        raise DataError(f"{exc.strerror}: {path}. Run farm prepare again.") from exc
    finally:
        os.close(descriptor)
    found = xxhash.xxh3_64_hexdigest(target)
    if found != xxh3:
        raise DataError(
            f"bin was altered after it was prepared (xxh3 {found}, the manifest says {xxh3}): {path}. "
            "Run farm prepare again."
        )
