"""Images and labels to bins and a manifest: on all cores, resumable, never half done. Knows no model."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from farm.data import bins, disk, imagenet, journal, manifest, pool
from farm.data.bins import Bin, Failure, Task
from farm.data.imagenet import Picture
from farm.data.manifest import UNPREPARED, Header, Manifest, Sample
from farm.data.recipes import Recipe
from farm.errors import DataError, UsageError

#: Told how many of all images are settled: once with those that already were, then at each one.
Progress = Callable[[int, int], None]

LOCK_NAME = ".lock"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a preparation came to."""

    directory: Path  #: of the bins and the manifest
    manifest: Manifest
    done: int  #: bins made now
    reused: int  #: bins that were there
    failures: tuple[Failure, ...]  #: in byte order of the names
    seconds: float

    @property
    def failed(self) -> int:
        return len(self.failures)


def prepare_dataset(
    images: Path,
    labels: Path,
    recipe: Recipe,
    data_dir: Path,
    *,
    subset: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Make the bins that are missing or outdated, then the manifest.

    Interrupted at any point, by whatever means, it goes on from there when called again. An image that does not
    decode is listed, in the result as in the manifest, and holds up nothing.

    `UsageError`: no such images or labels, or another preparation is at work. `DataError`: labels that are malformed
    or do not fit the images; nothing was written. `StorageError`: the disk refuses; finished bins are kept.
    """
    started = time.monotonic()
    tell = progress or _tell_nobody
    pictures = imagenet.load(images, labels, subset=subset)
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    with _claimed(directory):
        noted = journal.read(directory / journal.FILE_NAME, recipe.digest)
        finished = _finished(directory, pictures, recipe, noted)
        tasks = [_task(directory, picture) for picture in pictures if picture.name not in finished]
        reused = len(finished)
        failures = []
        tell(reused, len(pictures))
        with closing(_make_bins(directory, tasks, recipe, noted, processes or _cores())) as outcomes:
            for settled, outcome in enumerate(outcomes, start=reused + 1):
                if isinstance(outcome, Bin):
                    finished[outcome.name] = outcome
                else:
                    failures.append(outcome)
                tell(settled, len(pictures))
        written = manifest.write(directory, _header(recipe, images), _samples(pictures, finished, failures))
    return Prepared(
        directory=directory,
        manifest=written,
        done=len(finished) - reused,
        reused=reused,
        failures=tuple(sorted(failures, key=lambda failure: failure.name.encode())),
        seconds=time.monotonic() - started,
    )


def _tell_nobody(_settled: int, _total: int) -> None:
    pass


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Hold a directory against other preparations, and leave no partial file in it."""
    path = directory / LOCK_NAME
    with disk.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    with file:
        with disk.writing(path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                file.seek(0)
                holder = f" (process {pid})" if (pid := file.read().strip()) else ""
                raise UsageError(f"another farm prepare{holder} is at work in {directory}: wait for it to end") from exc
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        try:
            yield
        finally:
            _remove_partials(directory)


def _remove_partials(directory: Path) -> None:
    for path in directory.glob(bins.PARTIAL_GLOB):
        with disk.writing(path):
            path.unlink(missing_ok=True)


def _finished(directory: Path, pictures: Sequence[Picture], recipe: Recipe, noted: Mapping[str, Bin]) -> dict[str, Bin]:
    """The bins that need not be made again, by name."""
    with disk.writing(directory), os.scandir(directory) as entries:
        there = {entry.name: entry.stat() for entry in entries if entry.name.endswith(".bin")}
    finished = {}
    for picture in pictures:
        entry = noted.get(picture.name)
        status = there.get(manifest.bin_path(directory, picture.name).name)
        if entry and status and _is_untouched(entry, status, recipe.nbytes) and _is_of(entry, picture.path):
            finished[picture.name] = entry
    return finished


def _is_untouched(entry: Bin, status: os.stat_result, nbytes: int) -> bool:
    """Whether nobody wrote to a bin since it was finished, as far as size and time tell."""
    return (status.st_size, status.st_mtime_ns) == (nbytes, entry.mtime_ns)


def _is_of(entry: Bin, image: Path) -> bool:
    """Whether the image is the one the bin was made from, as far as size and time tell."""
    try:
        status = image.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (entry.image_bytes, entry.image_mtime_ns)


def _task(directory: Path, picture: Picture) -> Task:
    return Task(name=picture.name, image=picture.path, bin=manifest.bin_path(directory, picture.name))


def _make_bins(
    directory: Path, tasks: Sequence[Task], recipe: Recipe, noted: Mapping[str, Bin], processes: int
) -> Generator[Bin | Failure, None, None]:
    """Make these bins and note each in the journal."""
    if not tasks:
        return
    _withdraw_manifest(directory, {task.name for task in tasks})
    path = directory / journal.FILE_NAME
    journal.rewrite(path, recipe.digest, noted.values())
    with (
        journal.appending(path, recipe.digest) as note,
        closing(pool.each(partial(bins.make, recipe=recipe), tasks, processes=processes, died=_died)) as outcomes,
    ):
        for outcome in outcomes:
            if isinstance(outcome, Bin):
                note(outcome)
            yield outcome


def _died(task: Task) -> Failure:
    return Failure(name=task.name, problem="ends the process that decodes it")


def _withdraw_manifest(directory: Path, names: set[str]) -> None:
    """Remove a manifest that vouches for bins about to be replaced: after an interrupt it would be wrong."""
    try:
        present = manifest.read(directory)
    except DataError:
        return
    if any(sample.name in names and sample.xxh3 != UNPREPARED for sample in present.samples):
        path = directory / manifest.FILE_NAME
        with disk.writing(path):
            path.unlink()


def _header(recipe: Recipe, images: Path) -> Header:
    return Header(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        dtype=recipe.dtype,
        shape=recipe.shape,
        classes=imagenet.CLASSES,
        source=str(images.absolute()),
    )


def _samples(pictures: Sequence[Picture], finished: Mapping[str, Bin], failures: Sequence[Failure]) -> Iterator[Sample]:
    problems = {failure.name: failure.problem for failure in failures}
    for picture in pictures:
        if picture.name in finished:
            yield Sample(picture.name, picture.label, finished[picture.name].xxh3)
        else:
            yield Sample(picture.name, picture.label, UNPREPARED, problems[picture.name])
