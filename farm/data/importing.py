"""
Bins that the published scripts made, taken over: looked into, linked and listed like the farm's own.

That they are what the recipe gives is a claim. What can be seen is checked in each of them: its size, and that every
value is one that the recipe's normalisation gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from farm.data import ade20k, bins, disk, imagenet, manifest, slide
from farm.data.bins import Failure, Make, Outcome, Task
from farm.data.manifest import Windows
from farm.data.prepare import Dataset, Prepared, Progress, fulfil
from farm.data.recipes import Array, Recipe, Segmentation, normalisation
from farm.data.slide import Size, WindowName
from farm.errors import DataError, UsageError

EXTENSION = ".bin"
#: Files looked into before anything is written: bins of another recipe are refused as a whole.
PROBED = 8


class _Stranger(DataError):
    """A bin that no recipe of this name has made."""


def import_bins(
    folder: Path,
    truth: Path,
    recipe: Recipe,
    data_dir: Path,
    *,
    subset: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Take over a folder of bins; `truth` is the file of labels or, for segmentation, the folder of annotations.

    They are hard links to the files where possible, else copies. Like `prepare_dataset` otherwise: one that cannot be
    used is listed and holds up nothing. `DataError` for bins that are not of this recipe; nothing was written.
    """
    files = imagenet.files(folder, (EXTENSION,), "bins")
    if not files:
        raise UsageError(f"no bins in {folder}, expected files *{EXTENSION} directly in it")
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    labels = {}
    make: Make
    if isinstance(recipe, Segmentation):
        tasks = _images(files, folder, truth, directory, subset)
        make = partial(take_windows, recipe=recipe)
    else:
        pictures = imagenet.pair(imagenet.by_name(files), folder, truth, subset=subset)
        tasks = [Task(name=p.name, sources=(p.path,), directory=directory) for p in pictures]
        labels = {p.name: p.label for p in pictures}
        make = partial(take, recipe=recipe)
    _probe(files, recipe)
    dataset = Dataset(recipe=recipe, directory=directory, source=folder, tasks=tasks, labels=labels, make=make)
    return fulfil(dataset, processes=processes, progress=progress)


def take(task: Task, recipe: Recipe) -> Outcome:
    """Take over one bin of classification."""
    (source,) = task.sources
    try:
        sources = bins.stamps(task.files)
        data = _checked(source, recipe)
    except DataError as exc:
        return Failure(name=task.name, problem=str(exc))
    except OSError as exc:
        return bins.unreadable(task, exc)
    _place(source, manifest.bin_path(task.directory, task.name), data, task)
    return bins.finished(task, sources, bins.xxh3(data))


def take_windows(task: Task, recipe: Segmentation) -> Outcome:
    """Take over an image's windows and its annotation, if it has all of them."""
    if task.annotation is None:
        return Failure(name=task.name, problem="has no annotation of its name")
    try:
        sources = bins.stamps(task.files)
        original, resized = _sizes(task.sources)
        labels = task.annotation.read_bytes()
        ade20k.check_annotation(labels, original)
        by_window = {slide.parse_name(path.name).window: path for path in task.sources}
        ordered = [by_window[window] for window in slide.windows(resized)]
        data = [_checked(path, recipe) for path in ordered]
    except DataError as exc:
        return Failure(name=task.name, problem=str(exc))
    except OSError as exc:
        return bins.unreadable(task, exc)
    for path, content in zip(ordered, data, strict=True):
        _place(path, task.directory / path.name, content, task)
    bins.write(manifest.annotation_path(task.directory, task.name), labels, task)
    windows = Windows(
        original=original, resized=resized, annotation=bins.xxh3(labels), xxh3=tuple(map(bins.xxh3, data))
    )
    return bins.finished(task, sources, str(windows))


def _images(files: Iterable[Path], folder: Path, annotations: Path, directory: Path, subset: bool) -> list[Task]:
    """A task for each image that has windows among the files."""
    windows: dict[str, list[Path]] = {}
    for path in files:
        windows.setdefault(slide.parse_name(path.name).stem, []).append(path)
    if strange := [name for name in windows if not manifest.is_name(name)]:
        raise DataError(f"{folder} holds windows of {strange[0]!r}, a name that cannot be written down: rename them")
    known = ade20k.pair(windows, folder, annotations, subset=subset)
    return [
        Task(name=name, sources=tuple(windows[name]), annotation=known.get(name), directory=directory)
        for name in sorted(windows, key=str.encode)
    ]


def _sizes(paths: Iterable[Path]) -> tuple[Size, Size]:
    """The image's size and the resized one, if the windows of these names are all there are and agree."""
    named: list[WindowName] = [slide.parse_name(path.name) for path in paths]
    sizes = {(name.original, name.resized) for name in named}
    if len(sizes) > 1:
        raise DataError(f"its windows have names with {len(sizes)} different sizes, expected one")
    ((original, resized),) = sizes
    if min(original) < 1 or slide.resized(original) != resized:
        size = "a size" if min(original) < 1 else _by(slide.resized(original))
        raise DataError(f"its windows are of {_by(resized)}, expected {size} for an image of {_by(original)} pixels")
    expected = slide.windows(resized)
    found = {name.window for name in named}
    if found != set(expected):
        raise DataError(
            f"it has {len(found)} windows, {len(found.intersection(expected))} of the {len(expected)} expected"
        )
    return original, resized


def _by(size: Size) -> str:
    return f"{size.height} x {size.width}"


def _probe(files: list[Path], recipe: Recipe) -> None:
    for path in files[:: -(-len(files) // PROBED)]:
        try:
            _checked(path, recipe)
        except _Stranger as exc:
            raise DataError(f"{path}: {exc}. Is it of another recipe, or another --input? Nothing was written") from exc
        except (DataError, OSError):
            continue  # it will be listed


def _checked(path: Path, recipe: Recipe) -> bytes:
    """What is in a bin, if it can be the recipe's. `DataError` without the path says why not."""
    data = path.read_bytes()
    if len(data) != recipe.nbytes:
        raise DataError(f"its bin has {len(data)} bytes, expected {recipe.nbytes}")
    array = np.frombuffer(data, recipe.dtype).reshape(recipe.shape)
    if isinstance(recipe, Segmentation):
        window = slide.parse_name(path.name).window
        _check_padding(array, window.y2 - window.y1, window.x2 - window.x1, recipe)
        array = array[:, : window.y2 - window.y1, : window.x2 - window.x1]
    if recipe.dtype == "float32":
        _check_values(array, recipe)
    return data


def _check_padding(array: Array, height: int, width: int, recipe: Segmentation) -> None:
    padding = np.array(recipe.padding, recipe.dtype).reshape(3, 1, 1)
    if (array[:, height:] != padding).any() or (array[:, :, width:] != padding).any():
        raise DataError(f"its bin does not hold {recipe.padding} beyond the {height} x {width} pixels of the window")


def _check_values(array: Array, recipe: Recipe) -> None:
    """Each value must be that of a pixel: one of 256 in a channel."""
    if not np.isfinite(array).all():
        raise DataError("its bin holds values that are no finite numbers")
    for values, table in zip(array, normalisation(recipe), strict=True):
        # The table is a straight line but for rounding: it tells where in it a value must stand.
        step = (table[-1] - table[0]) / 255
        nearest = np.clip(np.rint((values - table[0]) / step), 0, 255).astype(np.uint8)
        if (strange := table[nearest] != values).any():
            raise _Stranger(
                f"its bin holds {values[strange][0]:g}, which recipe {recipe.name} does not make of any pixel"
            )


def _place(source: Path, path: Path, data: bytes, task: Task) -> None:
    """Make `path` a link to the file or, where the file system refuses, a copy."""
    # Never the name of a partial file that is written into: that would write into the source.
    link = task.directory / f".{os.getpid()}.link.partial"
    link.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), link)
    except OSError:
        bins.write(path, data, task)
        return
    with disk.writing(path):
        # Where `path` is that file already this does nothing, and leaves the link to be cleared away.
        os.replace(link, path)
