"""From an image's windows to its row: the label map, and what of it agrees with the annotation."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter

import cv2
import numpy as np
import xxhash

from farm.data import ade20k
from farm.data.manifest import Sample, Windows, annotation_path
from farm.errors import DataError
from farm.jobs import ResultState, SampleResult, Segments
from farm.metrics import miou
from farm.metrics.slide_merge import ImageMerge, Labels
from workers.backends.base import Array
from workers.postprocess import Reducer, Slot

#: Of PNG, 0 to 9: most of the gain comes with the first.
COMPRESSION = 1


@dataclass(eq=False)
class _Open:
    """An image some of whose windows are still to come."""

    merge: ImageMerge
    ms: float = 0.0


class Segmenter(Reducer):
    """Merges windows as they come."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._directory = directory
        self._threads = _executor(threads) if threads > 1 else None
        self._open: dict[str, _Open] = {}

    def take(
        self, outputs: Array, places: Sequence[int], slots: Sequence[Slot], failed: Collection[str]
    ) -> tuple[list[SampleResult], list[Sample]]:
        for name in [name for name in self._open if name in failed]:
            del self._open[name]
        rows: list[SampleResult] = []
        bad: list[Sample] = []
        for place, slot in zip(places, slots, strict=True):
            sample, windows = slot.sample, slot.sample.windows
            if sample.name in failed or windows is None:
                continue
            if slot.part == 0:
                merge = ImageMerge(windows.original, windows.resized, outputs.shape[-1], self._threads)
                self._open[sample.name] = _Open(merge)
            if sample.name not in self._open:
                continue  # an earlier window was not finite
            image = self._open[sample.name]
            with _timed(image):
                image.merge.add(outputs[place])
            if not image.merge.is_finite:
                bad.append(sample)
                del self._open[sample.name]
            elif image.merge.is_complete:
                rows.append(self._row(sample, windows, image))
                del self._open[sample.name]
        return rows, bad

    def held(self) -> list[Array]:
        return [logits for image in self._open.values() for logits in image.merge.held]

    def _row(self, sample: Sample, windows: Windows, image: _Open) -> SampleResult:
        label_map = image.merge.label_map
        try:
            with _timed(image):
                areas = miou.areas(label_map, self._annotation(sample.name, windows))
        except DataError as exc:
            return SampleResult(name=sample.name, state=ResultState.FAILED, label=0, reason=str(exc))
        return SampleResult(
            name=sample.name,
            state=ResultState.SCORED,
            label=0,
            segments=Segments(
                height=label_map.shape[0],
                width=label_map.shape[1],
                label_map=png(label_map),
                sha256=hashlib.sha256(label_map.data).hexdigest(),
                areas=areas.astype("<u4").tobytes(),
                merge_ms=round(image.ms, 3),
            ),
        )

    def _annotation(self, name: str, windows: Windows) -> Labels:
        """[H, W] as stored. `DataError` for one that was altered, or that is gone."""
        path = annotation_path(self._directory, name)
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise DataError(f"{exc.strerror}: {path}. Run farm prepare again.") from exc
        if (found := xxhash.xxh3_64_hexdigest(data)) != windows.annotation:
            raise DataError(
                f"annotation was altered after it was prepared (xxh3 {found}, the manifest says {windows.annotation}): "
                f"{path}. Run farm prepare again."
            )
        return ade20k.check_annotation(data, windows.original)


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    """One for all runs of a process: a run lasts seconds."""
    return ThreadPoolExecutor(threads, "merge")


@contextmanager
def _timed(image: _Open) -> Iterator[None]:
    began = perf_counter()
    yield
    image.ms += 1000 * (perf_counter() - began)


def png(label_map: Labels) -> bytes:
    """uint8 [H, W] as an 8-bit gray PNG."""
    written, data = cv2.imencode(".png", label_map, [cv2.IMWRITE_PNG_COMPRESSION, COMPRESSION])
    assert written
    return np.asarray(data, np.uint8).tobytes()


def reducer(directory: Path, threads: int) -> Reducer:
    cv2.setNumThreads(1)
    return Segmenter(directory, threads)
