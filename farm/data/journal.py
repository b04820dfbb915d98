"""
The journal: which bins are finished, so that an interrupted preparation goes on where it was.

One line a sample, appended after its bin is in place:
``name<TAB>image's bytes<TAB>image's mtime in ns<TAB>bin's mtime in ns<TAB>xxh3<TAB>recipe digest``; where there are
several files, commas part their numbers. A bin without a line is made again; so is one whose line was torn, or belongs
to another recipe.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from farm.data import disk, manifest
from farm.data.bins import Bin, Stamp

FILE_NAME = "journal"


def read(path: Path, recipe_digest: str) -> dict[str, Bin]:
    """Finished bins of this recipe by name, each as its last line says. Lines that are none are passed over."""
    with disk.writing(path):
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    entries = (_parse(line, recipe_digest) for line in lines[:-1])
    return {entry.name: entry for entry in entries if entry}


def rewrite(path: Path, recipe_digest: str, entries: Iterable[Bin]) -> None:
    """Leave these lines and no others: none torn, none of another recipe, one a bin."""
    disk.replace(path, b"".join(_line(entry, recipe_digest) for entry in entries), partial=path.with_suffix(".tmp"))


@contextmanager
def appending(path: Path, recipe_digest: str) -> Iterator[Callable[[Bin], None]]:
    """A function that notes one finished bin. It raises `StorageError` when the disk refuses."""
    with disk.writing(path):
        # Unbuffered: each line is in the file when the function returns, whatever ends this process.
        file = path.open("ab", buffering=0)

    def append(entry: Bin) -> None:
        line = _line(entry, recipe_digest)
        with disk.writing(path):
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with file:
        yield append


def _line(entry: Bin, recipe_digest: str) -> bytes:
    sizes, times = zip(*entry.sources, strict=True)
    fields = entry.name, _join(sizes), _join(times), _join(entry.mtimes_ns), entry.xxh3, recipe_digest
    return ("\t".join(fields) + "\n").encode()


def _parse(line: bytes, recipe_digest: str) -> Bin | None:
    try:
        name, sizes, times, mtimes_ns, xxh3, digest = line.decode().split("\t")
        if digest != recipe_digest or not manifest.is_prepared(xxh3):
            return None
        return Bin(
            name=name,
            sources=tuple(map(Stamp, _split(sizes), _split(times))),
            mtimes_ns=_split(mtimes_ns),
            xxh3=xxh3,
        )
    except ValueError:
        return None


def _join(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def _split(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
