"""A job's metrics against other labels, from its rows: nothing is evaluated again, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from db import jobs, results
from db.engine import Database
from farm.errors import DataError, UsageError
from farm.jobs import Job, ResultState, Segments
from farm.reports.report import SCHEMA, Report, classified, segmented


def rescore(database: Database, job_id: int, labels: Path) -> Report:
    """
    Metrics of the scored samples against a file of labels, or against a folder of annotations.

    `UsageError`: no such job, or nothing scored yet. `DataError` names the sample whose label is missing or misfits.
    """
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        if job.spec.windows:
            areas = list(_areas(results.segments(conn, job_id), labels))
            found, scored = segmented(np.sum([np.zeros((3, 150), np.int64), *areas], axis=0)), len(areas)
        else:
            ranks = list(_ranks(results.rows(conn, job_id, state=ResultState.SCORED), labels))
            found, scored = classified(ranks), len(ranks)
    if not scored:
        raise UsageError(f"{job} has no scored samples yet: farm status {job_id}")
    return {
        "schema": SCHEMA,
        "job": job.id,
        "simulated": job.simulated,
        "model": job.spec.model,
        "bs": job.spec.bs,
        "labels": str(labels),
        "samples": {"scored": scored},
        **found,
    }


def _ranks(rows: Iterator[results.Row], labels: Path) -> Iterator[int | None]:
    """Of each row's new label among the five classes that were kept."""
    from farm.data import imagenet

    known = imagenet.read_labels(labels)
    for row in rows:
        if row.name not in known:
            raise DataError(f"{labels} has no label for {row.name}")
        label = known[row.name]
        yield row.classes.index(label) + 1 if label in row.classes else None


def _areas(images: Iterator[tuple[str, Segments]], folder: Path) -> Iterator[NDArray[np.int64]]:
    """[3, 150] of each image."""
    from farm.data import ade20k
    from farm.data.slide import Size
    from farm.metrics import miou

    known = ade20k.find_annotations(folder)
    for name, segments in images:
        if name not in known:
            raise DataError(f"{folder} has no annotation for {name}, expected {name}{ade20k.EXTENSION}")
        try:
            annotation = ade20k.check_annotation(known[name].read_bytes(), Size(segments.height, segments.width))
        except DataError as exc:
            raise DataError(f"{known[name]}: {exc}") from exc
        yield miou.areas(label_map(segments), annotation)


def label_map(segments: Segments) -> NDArray[np.uint8]:
    """[height, width], classes 0 to 149."""
    import io

    from PIL import Image

    with Image.open(io.BytesIO(segments.label_map), formats=("PNG",)) as image:
        return np.array(image)


def of_sample(database: Database, job_id: int, name: str) -> tuple[Job, Segments]:
    """One image's segments; `UsageError` for a job of classification, or a sample without a label map."""
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        if not job.spec.windows:
            raise UsageError(f"{job} is no segmentation: farm show is for label maps")
        found = list(results.segments(conn, job_id, name))
    if not found:
        raise UsageError(f"{job} has no label map of {name!r}: it failed, is still to come, or is none of its samples")
    return job, found[0][1]
