"""What a device's timed batches say of its speed, computed from a job's rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from db import devices, jobs, results
from db.engine import Database
from farm import zoo
from farm.jobs import JobSpec, JobState

#: Of the table: a figure cut off for a narrow terminal says nothing.
WIDTH = 160
STAGES = ("h2d_ms", "compute_ms", "d2h_ms")
#: A run has settled when the mean of its second half is that of its first, within this.
DRIFT = 0.01
#: Runs of a device that does not settle.
MOST_RUNS = 3
#: A device's health is looked at so often, about.
NEWS_S = 60.0

Speed = dict[str, Any]


def build(database: Database, job_id: int) -> Speed:
    """
    Of a job of speed: min, max, mean, median and 99th percentile of each stage in ms, and device fps.

    `fps` is the reference's formula, 1000 * bs / mean(compute ms). Without times, `error` says why.
    """
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        times = results.attempt_times(conn, job_id)
        device = devices.get(conn, job.spec.devices[0])
        is_new = job.finished is not None and database.now(conn) - job.finished < NEWS_S
    spec = job.spec
    ms = np.concatenate([t.batch_ms for t in times]) if times else np.zeros((0, 3), np.float32)
    reference = zoo.get(spec.model).reference_fps.get(spec.bs)
    fps = float(1000 * spec.bs / ms[:, 1].mean()) if ms[:, 1].any() else None
    return {
        "job": job.id,
        "state": job.state.value,
        "error": job.error,
        "simulated": job.simulated,
        "model": spec.model,
        "bs": spec.bs,
        "backend": spec.artifact.backend,
        "artifact": spec.artifact.sha256,
        "device": spec.devices[0],
        "batches": len(ms),
        **{name: _spread(ms[:, column]) if len(ms) else None for column, name in enumerate(STAGES)},
        "fps": fps,
        "drift": _drift(ms[:, 1]),
        # How it is now says something of a run that has just ended.
        **{key: device.info.get(key) if device and is_new else None for key in ("health", "temperature_c", "foreign")},
        "reference_fps": reference,
        "over_reference": fps / reference if fps and reference else None,
    }


def has_settled(speed: Speed) -> bool:
    """Whether the device was as fast in the end as in the beginning; what has failed will not change."""
    return bool(speed["state"] != JobState.DONE.value or abs(speed["drift"]) <= DRIFT)


def latest(database: Database, spec: JobSpec) -> Speed | None:
    """The newest measurement of an artifact on a device that was as long and has settled, or that never would."""
    with database.read() as conn:
        found = [
            job for job in jobs.of_speed(conn, spec.artifact.sha256, spec.devices[0]) if job.spec.loop >= spec.loop
        ]
    speeds = [build(database, each.id) for each in found]
    settled = [speed for speed in speeds if has_settled(speed)]
    return settled[0] if settled else speeds[0] if len(speeds) >= MOST_RUNS else None


def show(speeds: Sequence[Speed]) -> None:
    """Print them as a person reads them; what is simulated is said first."""
    console = Console(width=WIDTH)
    if any(speed["simulated"] for speed in speeds):
        console.print("SIMULATED: times of a device that is none", highlight=False)
    console.print(_table(speeds))


def _table(speeds: Sequence[Speed]) -> Table:
    """A line a device and batch size."""
    shown = Table("model", "bs", "device", box=None, pad_edge=False)
    for title in ("compute ms", "min", "max", "median", "p99", "h2d", "d2h", "device fps", "310P3", "ratio"):
        shown.add_column(title, justify="right")
    shown.add_column("", overflow="fold")
    for speed in speeds:
        compute, h2d, d2h = speed["compute_ms"], speed["h2d_ms"], speed["d2h_ms"]
        figures = [compute[key] for key in ("mean", "min", "max", "median", "p99")] if compute else [None] * 5
        figures += [h2d["mean"], d2h["mean"]] if compute else [None] * 2
        ratio = speed["over_reference"]
        shown.add_row(
            speed["model"],
            str(speed["bs"]),
            speed["device"],
            *("-" if value is None else f"{value:.3f}" for value in figures),
            "-" if speed["fps"] is None else f"{speed['fps']:.2f}",
            "-" if speed["reference_fps"] is None else f"{speed['reference_fps']:.2f}",
            "-" if ratio is None else f"{ratio:.3f}",
            escape(_remark(speed)),
        )
    return shown


def _remark(speed: Speed) -> str:
    said = ["simulated"] if speed["simulated"] else []
    return str(speed["error"]) or ", ".join([*said, *explained(speed)])


def explained(speed: Speed) -> list[str]:
    """What may be the matter with a figure, in phrases."""
    said = []
    if not has_settled(speed):
        slower, celsius = speed["drift"] > 0, speed["temperature_c"]
        why = f", throttled perhaps: {celsius:.0f} °C" if slower and celsius else ""
        said.append(f"did not settle: batches took {100 * speed['drift']:+.1f} % in the second half{why}")
    if speed["health"] not in (None, "OK"):
        said.append(f"health {speed['health']}")
    return said + [f"process {p['pid']} ({p['name']}) is on it, too" for p in speed["foreign"] or ()]


def _drift(compute: NDArray[np.float32]) -> float:
    """By how much the second half's mean differs from the first's."""
    half = len(compute) // 2
    return float(compute[half:].mean() / compute[:half].mean() - 1) if compute[:half].any() else 0.0


def _spread(ms: NDArray[np.float32]) -> dict[str, float]:
    found = {
        "min": ms.min(),
        "max": ms.max(),
        "mean": ms.mean(dtype=np.float64),
        "median": np.median(ms),
        "p99": np.percentile(ms, 99),
    }
    return {key: float(value) for key, value in found.items()}
