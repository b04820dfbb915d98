"""
What the published tools print and write, byte for byte: the result files of five deployment guides, and ais_bench's.

Values come from a job's rows. Only scored samples are in them, as in a folder that lacks the results of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db import jobs, results
from db.engine import Database
from farm.errors import UsageError
from farm.jobs import Job, JobState, ResultState
from farm.metrics import topk
from farm.reports.report import segmented
from farm.reports.terminal import per_class

IMAGENET, ADE20K = "imagenet", "ade20k"
#: Formats, and the dataset each is of; "" is any.
FORMATS = {
    "focal": IMAGENET,
    "focal-lines": IMAGENET,
    "conformer": IMAGENET,
    "twins": IMAGENET,
    "lvvit": IMAGENET,
    "swin": ADE20K,
    "summary": "",
}
#: Names of ais_bench's three times, in the order of a job's.
TIMES = ("H2D_latency", "NPU_compute_time", "D2H_latency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A job in one of the formats."""

    job: Job
    text: str  #: without the last end of line
    failed: Sequence[tuple[str, str]]  #: samples that are not in it, and why
    said: Sequence[str]  #: what the script prints beside the file it writes


def result_stems(stems: Iterable[str]) -> dict[str, str]:
    """
    What ais_bench calls the results of bins, by their names: up to the first dot. `UsageError` where two were called
    the same; there the one would have overwritten the other without a word.
    """
    named: dict[str, str] = {}
    taken: dict[str, str] = {}
    for stem in stems:
        named[stem] = stem.partition(".")[0]
        if (other := taken.setdefault(named[stem], stem)) != stem:
            raise UsageError(
                f"results of {other} and {stem} would both be called {named[stem]}_0, for published names end at the "
                "first dot: rename the images and prepare them again"
            )
    return named


def check_finished(job: Job) -> None:
    """`UsageError` for a job that has not ended with a row a sample."""
    if job.state not in (JobState.DONE, JobState.DONE_WITH_ERRORS):
        hint = f"farm resume {job.id}" if job.state.is_final else f"farm wait {job.id}"
        raise UsageError(f"job {job.id} is {job.state.value}: published results are of finished jobs; {hint} first")


def build(database: Database, job_id: int, form: str) -> Published:
    """`UsageError`: no such job or format, a format of another dataset, or a job that is not done."""
    if form not in FORMATS:
        raise UsageError(f"--format {form}: expected {', '.join(FORMATS)}")
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        check_finished(job)
        if job.spec.loop and form != "summary":
            raise UsageError(f"--format {form} is not for a job of speed: expected summary")
        if FORMATS[form] not in ("", job.spec.dataset):
            fitting = [name for name, dataset in FORMATS.items() if dataset in ("", job.spec.dataset)]
            raise UsageError(f"--format {form} is not for {job.spec.model}: expected {', '.join(fitting)}")
        rows = list(results.rows(conn, job_id))
        scored = [row for row in rows if row.state is ResultState.SCORED]
        if not (scored or job.spec.loop):
            raise UsageError(f"job {job_id} has no scored sample")
        if form == "swin":
            text = per_class(segmented(results.areas(conn, job_id)))
        elif form == "summary":
            batches = np.concatenate([each.batch_ms for each in results.attempt_times(conn, job_id)])
            text = "\n".join(performance(batches, job.spec.bs))
        else:
            text = _classified(form, scored, job.spec.artifact.output.shape[-1])
    means = np.mean([_hits(row) for row in scored], axis=0).tolist() if form == "focal" else []
    return Published(
        job=job,
        text=text,
        failed=[(row.name, row.reason) for row in rows if row.state is ResultState.FAILED],
        said=[f"Acc@1: {means[0]}", f"Acc@5: {means[1]}"] if form == "focal" else [],
    )


def _classified(form: str, rows: Sequence[results.Row], classes: int) -> str:
    hits = [sum(row.rank is not None and row.rank <= k for row in rows) for k in range(1, topk.K + 1)]
    if form == "lvvit":
        return f"accuracy: {hits[0] / len(rows)}"
    if form == "twins":
        return f"Accuracy of the network on the {len(rows)} val images: {100 * hits[0] / len(rows):.1f}%"
    if form == "conformer":
        return _conformer([hit / len(rows) for hit in hits], len(rows), classes)
    # In the order of the results' names, which is not always that of the samples'.
    stems = result_stems(row.name for row in rows)
    named = sorted(((f"{stems[row.name]}_0.txt", row) for row in rows), key=itemgetter(0))
    return _focal(named) if form == "focal" else _focal_lines([row for _, row in named])


def _conformer(accuracies: Sequence[float], images: int, classes: int) -> str:
    value = [{"key": "Number of images", "value": str(images)}, {"key": "Number of classes", "value": str(classes)}]
    value += [
        {"key": f"Top{k} accuracy", "value": f"{round(accuracy * 100, 2)}%"} for k, accuracy in enumerate(accuracies, 1)
    ]
    return json.dumps({"title": "Overall statistical evaluation", "value": value})


def _focal(named: Sequence[tuple[str, results.Row]]) -> str:
    entries = {name: dict(zip(("Acc@1", "Acc@5"), _hits(row), strict=True)) for name, row in named}
    means = np.mean([_hits(row) for _, row in named], axis=0).tolist()
    return json.dumps({**entries, "summary": dict(zip(("Acc@1", "Acc@5"), means, strict=True))})


def _focal_lines(rows: Sequence[results.Row]) -> str:
    lines, sums = [], np.zeros(2)
    for count, row in enumerate(rows, 1):
        own = _hits(row)
        sums += own
        parts = [f"Acc@{k} {hit:.3f} ({mean:.3f})" for k, hit, mean in zip((1, 5), own, sums / count, strict=True)]
        lines.append(f"val index {row.name} {' '.join(parts)}")
    return "\n".join(lines)


def _hits(row: results.Row) -> tuple[float, float]:
    """Whether the label is the best class, and among the five best: 100 or 0."""
    rank = row.rank or topk.K + 1
    return 100.0 * (rank <= 1), 100.0 * (rank <= topk.K)


def performance(batch_ms: NDArray[np.float32], bs: int) -> list[str]:
    """The lines of ais_bench's Performance Summary, with all times; `batch_ms` is [batches, 3]."""
    found = timings(batch_ms, bs)
    lines = ["-----------------Performance Summary------------------"]
    for name in TIMES:
        values = ", ".join(f"{key} = {value}" for key, value in found[name].items() if key != "count")
        lines.append(f"{name} (ms): {values}")
    mean = found["NPU_compute_time"]["mean"]
    lines.append(f"throughput 1000*batchsize({bs})/NPU_compute_time.mean({mean}): {found['throughput']}")
    lines.append("------------------------------------------------------")
    return [f"[INFO] {line}" for line in lines]


def timings(batch_ms: NDArray[np.float32], bs: int) -> Mapping[str, Any]:
    """What ais_bench's summary file has of times. Padding counts as work, copies do not count as device time."""
    columns = dict(zip(TIMES, batch_ms.T.astype(np.float64), strict=True))
    found: dict[str, Any] = {
        name: {**_spread(columns[name]), "count": len(batch_ms)}
        for name in ("NPU_compute_time", "H2D_latency", "D2H_latency")
    }
    mean = found["NPU_compute_time"]["mean"]
    return {
        **found,
        "npu_compute_time_list": columns["NPU_compute_time"].tolist(),
        "throughput": 1000 * bs / mean if mean else 0,
    }


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    """All 0 without any."""
    some = values if len(values) else np.zeros(1)
    found = (some.min(), some.max(), some.mean(), np.median(some), np.percentile(some, 99))
    return dict(zip(("min", "max", "mean", "median", "percentile(99%)"), map(float, found), strict=True))
