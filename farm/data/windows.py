"""The bins of segmentation: an image's windows and its annotation. Runs in a process of the pool."""

from __future__ import annotations

import cv2

from farm.data import ade20k, bins, manifest, seg, slide
from farm.data.bins import Failure, Outcome, Task
from farm.data.decoding import UnusableImage
from farm.data.manifest import Windows
from farm.data.recipes import Segmentation
from farm.errors import DataError


def make(task: Task, recipe: Segmentation) -> Outcome:
    """Write the windows of an image under their published names, and its annotation as it is."""
    cv2.setNumThreads(1)  # the pool has a process a core
    image, annotation = task.sources[0], task.annotation
    if annotation is None:
        return Failure(name=task.name, problem="has no annotation of its name")
    try:
        sources = bins.stamps(task.files)
        pixels = seg.decode(image)
        labels = annotation.read_bytes()
        ade20k.check_annotation(labels, seg.size_of(pixels))
        resized = seg.resize(pixels, image)
    except UnusableImage as exc:
        return Failure(name=task.name, problem=exc.problem)
    except DataError as exc:
        return Failure(name=task.name, problem=str(exc))
    except OSError as exc:
        return bins.unreadable(task, exc)
    original, size = seg.size_of(pixels), seg.size_of(resized)
    hashes = []
    for window, array in seg.cut(resized, recipe):
        data = array.data.cast("B")
        bins.write(task.directory / slide.bin_name(task.name, window, original, size), data, task)
        hashes.append(bins.xxh3(data))
    bins.write(manifest.annotation_path(task.directory, task.name), labels, task)
    windows = Windows(original=original, resized=size, annotation=bins.xxh3(labels), xxh3=tuple(hashes))
    return bins.finished(task, sources, str(windows))
