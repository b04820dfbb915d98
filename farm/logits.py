"""
Raw outputs that a job keeps, a file an attempt: written as batches come off a device, read by who wants them all.

``FARM_DATA/logits/JOB-CREATED/SHARD.ATTEMPT.bin``: the outputs one after another, then an index, JSON that names each
and has its hash, then the index' length in 8 bytes. A file has this name only when it is complete and on the disk;
until then it is a ``.part`` beside it. Only the file of a shard's winner counts. Knows neither devices nor databases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from farm.data import slide
from farm.data.manifest import Sample
from farm.errors import DataError, HostError
from farm.jobs import Job

Array = NDArray[Any]

_LENGTH = 8
_ATTEMPT = re.compile(r"\d+\.(\d+)\.bin")


@dataclass(frozen=True, slots=True)
class Row:
    """One output in a file."""

    sample: str
    stem: str  #: of the bin that it is the answer to
    xxh3: str


def directory(data_dir: Path, job: Job) -> Path:
    """Of a job's files on this host. Another farm on the same FARM_DATA has a job of this number, too."""
    return data_dir / "logits" / f"{job.id}-{1000 * job.created:.0f}"


def file_name(shard: int, attempt_id: int) -> str:
    return f"{shard}.{attempt_id}.bin"


def stem_of(sample: Sample, part: int) -> str:
    """The name of a sample's bin, or of the bin of one of its windows, without its suffix."""
    windows = sample.windows
    if windows is None:
        return sample.name
    window = slide.windows(windows.resized)[part]
    return slide.bin_name(sample.name, window, windows.original, windows.resized).removesuffix(".bin")


def free_bytes(data_dir: Path) -> int:
    """What the disk has room for where files would be."""
    there = next(path for path in (data_dir, *data_dir.parents) if path.exists())
    return shutil.disk_usage(there).free


def size(nbytes: int) -> str:
    """For a sentence."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def check_room(data_dir: Path, needed: int) -> None:
    """`HostError` where there is no room for so many bytes."""
    if (free := free_bytes(data_dir)) < needed:
        raise HostError(
            f"no room for the raw outputs in {data_dir}: {size(needed)} are needed for a shard, {size(free)} are free. "
            "Free some; farm resume goes on with a job that failed for it"
        )


class Writer:
    """
    One attempt's file. `append` and `finish` are for one thread at a time; `discard` may come from another.

    No descriptor stays open from batch to batch: whatever becomes of the attempt, there is nothing to close.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part: Path | None = None
        self._rows: list[Row] = []
        self.is_discarded = False

    def append(self, outputs: Iterable[tuple[Sample, int, Array]]) -> None:
        """Add the outputs for parts of samples; `HostError` when the disk refuses."""
        with self._refusing(), self._opened() as file:
            for sample, part, output in outputs:
                data = np.ascontiguousarray(output).data.cast("B")
                file.write(data)
                self._rows.append(Row(sample.name, stem_of(sample, part), xxhash.xxh3_64_hexdigest(data)))

    def finish(self) -> None:
        """Have the file stand under its name, with all that was added, whatever happens from now on."""
        index = json.dumps({"rows": [list(asdict(row).values()) for row in self._rows]}).encode()
        with self._refusing():
            with self._opened() as file:
                file.write(index + len(index).to_bytes(_LENGTH, "little"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self._path)
            for folder in (self._path.parent, self._path.parent.parent):
                _sync(folder)

    def discard(self) -> None:
        self.is_discarded = True
        if self._part is not None:
            with suppress(OSError):
                self._part.unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        """At its end. Never made a second time: what was discarded meanwhile stays away."""
        if self._part is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(".part", f"{self._path.name}.", self._path.parent)
            os.close(handle)
            self._part = Path(name)
        file = self._part.open("r+b")
        file.seek(0, os.SEEK_END)
        return file

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            self.discard()
            raise HostError(
                f"cannot keep the raw outputs in {self._path.parent}: {exc.strerror or exc}. "
                "Free or open up the place; farm resume goes on with a job that failed for it"
            ) from exc


class Reader:
    """A finished file. `DataError` for one that is none, or that was cut off."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        """`dtype` and `shape` are those of one output."""
        self._path, self._dtype, self._shape = path, np.dtype(dtype), shape
        self._nbytes = int(np.prod(shape)) * self._dtype.itemsize
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _LENGTH))
                length = int.from_bytes(file.read(), "little")
                if length > size - _LENGTH:
                    raise ValueError("it was cut off")
                file.seek(size - _LENGTH - length)
                self.rows = [Row(*fields) for fields in json.loads(file.read(length))["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DataError(f"{path} holds no raw outputs: {exc}") from exc
        if size != len(self.rows) * self._nbytes + length + _LENGTH:
            raise DataError(f"{path} has {size} bytes, which {len(self.rows)} outputs of {shape} do not come to")

    def outputs(self) -> Iterator[tuple[Row, Array | None]]:
        """All of them in order, each with what it is, as the device gave it; None for one that was altered since."""
        with self._path.open("rb") as file:
            for row in self.rows:
                data = file.read(self._nbytes)
                sound = xxhash.xxh3_64_hexdigest(data) == row.xxh3
                yield row, np.frombuffer(data, self._dtype).reshape(self._shape) if sound else None


def tidy(directory: Path, useless: Callable[[Collection[int]], Collection[int]]) -> None:
    """Remove the files, finished or not, of those attempts that are `useless`."""
    try:
        found = {path: int(match[1]) for path in directory.iterdir() if (match := _ATTEMPT.match(path.name))}
    except OSError:
        return
    gone = useless(set(found.values()))  # asked after that: files of attempts that begin now are not among them
    for path in found:
        if found[path] in gone:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
