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

from farm.data import ade20k, bins, disk, imagenet, journal, manifest, pool
from farm.data.bins import Bin, Failure, Make, Outcome, Stamp, Task
from farm.data.manifest import UNPREPARED, Header, Manifest, Sample
from farm.data.recipes import Recipe, Segmentation
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


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is to become bins of a recipe, and how."""

    recipe: Recipe
    directory: Path  #: of the bins
    source: Path  #: where it comes from
    tasks: Sequence[Task]  #: a sample each, in byte order of the names
    labels: Mapping[str, int]  #: of the samples that have one
    make: Make  #: travels between processes


def prepare_dataset(
    images: Path,
    labels: Path | None,
    recipe: Recipe,
    data_dir: Path,
    *,
    subset: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Make the bins of classification that are missing or outdated, then the manifest.

    Without a file of labels the images lie in class folders. Interrupted at any point, by whatever means, it goes on
    from there when called again. An image that does not decode is listed, in the result as in the manifest, and holds
    up nothing.

    `UsageError`: no such images or labels, or another preparation is at work. `DataError`: labels that are malformed
    or do not fit the images; nothing was written. `StorageError`: the disk refuses; finished bins are kept.
    """
    pictures = imagenet.load(images, labels, subset=subset)
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    dataset = Dataset(
        recipe=recipe,
        directory=directory,
        source=images,
        tasks=[Task(name=p.name, sources=(p.path,), directory=directory) for p in pictures],
        labels={p.name: p.label for p in pictures},
        make=partial(bins.make, recipe=recipe),
    )
    return fulfil(dataset, processes=processes, progress=progress)


def prepare_segmentation(
    images: Path,
    annotations: Path,
    recipe: Segmentation,
    data_dir: Path,
    *,
    subset: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Make the bins of the images' windows, copy the annotations, then write the manifest; like `prepare_dataset`.

    An image whose annotation is missing or does not fit is listed too.
    """
    from farm.data import windows  # it brings OpenCV, which classification does without

    pictures = ade20k.load(images, annotations, subset=subset)
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    dataset = Dataset(
        recipe=recipe,
        directory=directory,
        source=images,
        tasks=[Task(name=p.name, sources=(p.path,), annotation=p.annotation, directory=directory) for p in pictures],
        labels={},
        make=partial(windows.make, recipe=recipe),
    )
    return fulfil(dataset, processes=processes, progress=progress)


def look(recipe: Recipe, data_dir: Path) -> Prepared:
    """What was prepared before; `DataError` says what is missing of it. Hashes are checked when bins are read."""
    started = time.monotonic()
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    found = manifest.read(directory)
    if found.header.recipe_digest != recipe.digest:
        raise DataError(f"the bins in {directory} are of another version of the recipe: run farm prepare again")
    whole = [sample for sample in found.samples if sample.xxh3 != UNPREPARED]
    if missing := [sample.name for sample in whole if not _has_bins(directory, sample, recipe.nbytes)]:
        raise DataError(
            f"{len(missing)} of {len(whole)} samples in {directory} lack bins ({imagenet.some(missing)}): run farm "
            "prepare again"
        )
    return Prepared(
        directory=directory,
        manifest=found,
        done=0,
        reused=len(whole),
        failures=tuple(Failure(name=s.name, problem=s.problem) for s in found.samples if s.xxh3 == UNPREPARED),
        seconds=time.monotonic() - started,
    )


def fulfil(dataset: Dataset, *, processes: int | None = None, progress: Progress | None = None) -> Prepared:
    """Have all bins of a dataset made that are not there as they should be, and list them in the manifest."""
    started = time.monotonic()
    tell = progress or _tell_nobody
    total = len(dataset.tasks)
    with _claimed(dataset):
        noted = journal.read(dataset.directory / journal.FILE_NAME, dataset.recipe.digest)
        finished = _finished(dataset, noted)
        tasks = [task for task in dataset.tasks if task.name not in finished]
        reused = len(finished)
        failures = []
        tell(reused, total)
        with closing(_make_bins(dataset, tasks, noted, processes or _cores())) as outcomes:
            for settled, outcome in enumerate(outcomes, start=reused + 1):
                if isinstance(outcome, Bin):
                    finished[outcome.name] = outcome
                else:
                    failures.append(outcome)
                tell(settled, total)
        written = manifest.write(dataset.directory, _header(dataset), _samples(dataset, finished, failures))
    return Prepared(
        directory=dataset.directory,
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
def _claimed(dataset: Dataset) -> Iterator[None]:
    """Hold a directory against other preparations, and leave no partial file in it."""
    directory = dataset.directory
    path = directory / LOCK_NAME
    with disk.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(dataset.recipe, Segmentation):
            manifest.annotation_path(directory, "").parent.mkdir(exist_ok=True)
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


def _finished(dataset: Dataset, noted: Mapping[str, Bin]) -> dict[str, Bin]:
    """The samples whose bins need not be made again, by name."""
    return {
        task.name: entry
        for task in dataset.tasks
        if (entry := noted.get(task.name)) and _is_of(entry, task) and _is_untouched(entry, task, dataset.recipe.nbytes)
    }


def _is_of(entry: Bin, task: Task) -> bool:
    """Whether the files it was made from are still the same, as far as size and time tell."""
    try:
        return bins.stamps(task.files) == entry.sources
    except OSError:
        return False


def _is_untouched(entry: Bin, task: Task, nbytes: int) -> bool:
    """Whether nobody wrote to the files made since they were finished, as far as size and time tell."""
    paths = manifest.paths(task.directory, task.name, entry.xxh3)
    sizes = [nbytes] * len(paths)
    if task.annotation is not None:
        sizes[-1] = entry.sources[-1].size
    try:
        return bins.stamps(paths) == tuple(map(Stamp, sizes, entry.mtimes_ns))
    except OSError:
        return False


def _has_bins(directory: Path, sample: Sample, nbytes: int) -> bool:
    """Whether all files of a sample are there, and its bins as large as they should be."""
    try:
        sizes = [stamp.size for stamp in bins.stamps(manifest.paths(directory, sample.name, sample.xxh3))]
    except OSError:
        return False
    return all(size == nbytes for size in (sizes[:-1] if sample.windows else sizes))


def _make_bins(
    dataset: Dataset, tasks: Sequence[Task], noted: Mapping[str, Bin], processes: int
) -> Generator[Outcome, None, None]:
    """Make these bins and note each in the journal."""
    if not tasks:
        return
    _withdraw_manifest(dataset.directory, {task.name for task in tasks})
    path = dataset.directory / journal.FILE_NAME
    journal.rewrite(path, dataset.recipe.digest, noted.values())
    with (
        journal.appending(path, dataset.recipe.digest) as note,
        closing(pool.each(dataset.make, tasks, processes=processes, died=_died)) as outcomes,
    ):
        for outcome in outcomes:
            if isinstance(outcome, Bin):
                note(outcome)
            yield outcome


def _died(task: Task) -> Outcome:
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


def _header(dataset: Dataset) -> Header:
    recipe = dataset.recipe
    return Header(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        dtype=recipe.dtype,
        shape=recipe.shape,
        classes=ade20k.CLASSES if isinstance(recipe, Segmentation) else imagenet.CLASSES,
        source=str(dataset.source.absolute()),
    )


def _samples(dataset: Dataset, finished: Mapping[str, Bin], failures: Sequence[Failure]) -> Iterator[Sample]:
    problems = {failure.name: failure.problem for failure in failures}
    for task in dataset.tasks:
        label = dataset.labels.get(task.name, 0)
        if task.name in finished:
            yield Sample(task.name, label, finished[task.name].xxh3)
        else:
            yield Sample(task.name, label, UNPREPARED, problems[task.name])
