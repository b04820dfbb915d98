"""Bins: an image's arrays, each in a file of its own. Runs in a process of the pool, hence imports little."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from farm.data import disk, manifest
from farm.data.decoding import UnusableImage
from farm.data.recipes import Recipe, prepare

PARTIAL_GLOB = ".*.partial"


class Stamp(NamedTuple):
    """What tells whether a file is still the one it was."""

    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A sample's bins to be made."""

    name: str
    sources: tuple[Path, ...]  #: the image, or bins that somebody else made of it
    annotation: Path | None = None
    directory: Path  #: of the bins

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it is made from."""
        return self.sources if self.annotation is None else (*self.sources, self.annotation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A sample's finished bins, and the files they come from as they were when read."""

    name: str
    sources: tuple[Stamp, ...]
    mtimes_ns: tuple[int, ...]  #: of the files made
    xxh3: str  #: as in `manifest.Sample`


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An image that gives no bin."""

    name: str
    problem: str  #: without the path, so that it reads the same on every host


Outcome = Bin | Failure
#: Makes a sample's bins, each whole or not at all. `StorageError` when the disk refuses.
Make = Callable[[Task], Outcome]


def make(task: Task, recipe: Recipe) -> Outcome:
    """Write the one bin of an image."""
    try:
        # Looked at before it is read: an image that changes meanwhile is then made again next time.
        sources = stamps(task.files)
        array = prepare(task.sources[0], recipe)
    except OSError as exc:
        return unreadable(task, exc)
    except UnusableImage as exc:
        return Failure(name=task.name, problem=exc.problem)
    data = array.data.cast("B")
    write(manifest.bin_path(task.directory, task.name), data, task)
    return finished(task, sources, xxh3(data))


def write(path: Path, data: bytes | memoryview, task: Task) -> None:
    """Give one of the task's files its bytes."""
    disk.replace(path, data, partial=partial_path(task))


def partial_path(task: Task) -> Path:
    """Where this process writes what is not finished."""
    return task.directory / f".{os.getpid()}.partial"


def finished(task: Task, sources: tuple[Stamp, ...], xxh3: str) -> Bin:
    """What to note of a task whose files are in place."""
    paths = manifest.paths(task.directory, task.name, xxh3)
    with disk.writing(task.directory):
        mtimes_ns = tuple(stamp.mtime_ns for stamp in stamps(paths))
    return Bin(name=task.name, sources=sources, mtimes_ns=mtimes_ns, xxh3=xxh3)


def unreadable(task: Task, exc: OSError) -> Failure:
    return Failure(name=task.name, problem=f"cannot be read: {exc.strerror}")


def stamps(paths: tuple[Path, ...]) -> tuple[Stamp, ...]:
    """`OSError` if one cannot be looked at."""
    return tuple(Stamp(status.st_size, status.st_mtime_ns) for status in map(os.stat, paths))


def xxh3(data: bytes | memoryview) -> str:
    """The hash of a file's bytes that the manifest holds."""
    return xxhash.xxh3_64_hexdigest(data)
