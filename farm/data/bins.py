"""One bin: an image's array in a file of its own. Runs in a process of the pool, hence imports little."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import xxhash

from farm.data import disk
from farm.data.recipes import Recipe, UnusableImage, prepare

PARTIAL_GLOB = ".*.partial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A bin to be made."""

    name: str
    image: Path
    bin: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """A finished bin, and the image as it was when read."""

    name: str
    image_bytes: int
    image_mtime_ns: int
    mtime_ns: int
    xxh3: str  #: of the bin, 16 hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An image that gives no bin."""

    name: str
    problem: str  #: without the path, so that it reads the same on every host


def make(task: Task, recipe: Recipe) -> Bin | Failure:
    """Write the bin of one image, whole or not at all. `StorageError` when the disk refuses."""
    try:
        # Looked at before it is read: an image that changes meanwhile is then made again next time.
        status = task.image.stat()
        array = prepare(task.image, recipe)
    except OSError as exc:
        return Failure(name=task.name, problem=f"cannot be read: {exc.strerror}")
    except UnusableImage as exc:
        return Failure(name=task.name, problem=exc.problem)
    data = array.data.cast("B")
    disk.replace(task.bin, data, partial=task.bin.with_name(f".{os.getpid()}.partial"))
    with disk.writing(task.bin):
        mtime_ns = task.bin.stat().st_mtime_ns
    return Bin(
        name=task.name,
        image_bytes=status.st_size,
        image_mtime_ns=status.st_mtime_ns,
        mtime_ns=mtime_ns,
        xxh3=xxh3(data),
    )


def xxh3(data: bytes | memoryview) -> str:
    """The hash of a bin's bytes that the manifest holds."""
    return xxhash.xxh3_64_hexdigest(data)
