"""The report of a job, computed from its rows alone: at any time, by anybody, with the same result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db import jobs, overview, results
from db.engine import Database
from db.overview import Canaries
from db.results import AttemptTimes
from farm import zoo
from farm.data.ade20k_classes import NAMES
from farm.digest import answers_digest
from farm.jobs import JobState, Verdict
from farm.metrics import miou, topk

SCHEMA = 1
Report = dict[str, Any]


def build(database: Database, job_id: int) -> Report:
    """All of a job's figures. Percentages are of the scored samples; a failed one is never scored as wrong."""
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        rows = list(results.answers(conn, job_id))
        times = results.attempt_times(conn, job_id)
        spent = results.spent(conn, job_id)
        attempts = results.attempts_by_state(conn, job_id)
        lost = overview.lost(conn, job_id)
        quarantined = overview.quarantined(conn, job_id)
        forced = overview.forced(conn, job_id)
        canaries = overview.canaries(conn, job)
        areas = results.areas(conn, job_id) if job.spec.windows else None
    spec = job.spec
    scored = [row for row in rows if row.reason is None]
    failed = [row for row in rows if row.reason is not None]
    wall_s = _covered(spent)
    devices = _devices(times, spec.bs, wall_s, canaries)
    complete = job.state in (JobState.DONE, JobState.DONE_WITH_ERRORS)
    reference = zoo.get(spec.model)
    return {
        "schema": SCHEMA,
        "job": job.id,
        "state": job.state.value,
        "error": job.error,
        "simulated": job.simulated,
        "model": spec.model,
        "bs": spec.bs,
        "backend": spec.artifact.backend,
        "artifact": spec.artifact.sha256,
        **(classified(row.rank for row in scored) if areas is None else segmented(areas)),
        "samples": {"total": spec.samples, "scored": len(scored), "failed": len(failed)},
        "windows": spec.windows,
        "failed": [{"name": row.name, "reason": row.reason} for row in failed],
        "fps": {
            "device": _device_fps(times, spec.bs),
            "wall": len(rows) / wall_s if wall_s else None,
        },
        "wall_s": wall_s,
        "busy": float(np.mean([d["busy"] for d in devices])) if devices else None,
        "devices": devices,
        "quarantined": [{"device": device, "reason": reason} for device, reason in quarantined],
        "forced": [{"device": device, "reason": reason} for device, reason in forced],
        "canaries": _canary_cost(times, canaries),
        "attempts": attempts,
        "lost": lost,
        "budget_ms": _budget(times),
        "digest": answers_digest((row.name, row.answer) for row in rows) if complete else None,
        "reference": {
            "metrics": dict(reference.reference),
            "device_fps": reference.reference_fps.get(spec.bs),
        },
        "provenance": {
            **spec.provenance,
            "artifact": spec.artifact.model_dump(mode="json", exclude={"max_abs_diff"}),
            "allow_failed": spec.allow_failed,
        },
    }


def classified(ranks: Iterable[int | None]) -> Report:
    """Accuracy, from the labels' ranks in the scores of all scored samples; None is below the fifth."""
    found = list(ranks)
    correct = {f"top{k}": sum(rank is not None and rank <= k for rank in found) for k in (1, 5)}
    return {
        "metrics": {name: topk.percent(count, len(found)) for name, count in correct.items()},
        "interval": {name: topk.interval(count, len(found)) for name, count in correct.items()},
    }


def segmented(areas: NDArray[np.int64]) -> Report:
    """Accuracy, from pixels by class of all scored images, [3, 150]; classes that no pixel speaks of have None."""
    found = miou.metrics(areas) if areas.size else None
    names = ("miou", "aacc", "macc")
    return {
        "metrics": {name: _number(getattr(found, name)) if found else None for name in names},
        # Pixels of an image are not independent of each other: no interval that is easily computed would be true.
        "interval": dict.fromkeys(names),
        "classes": [
            {"class": name, "iou": _number(iou), "acc": _number(acc)}
            for name, iou, acc in (zip(NAMES, found.iou, found.acc, strict=True) if found else ())
        ],
    }


def _number(value: float) -> float | None:
    return None if isnan(value) else float(value)


def _device_fps(times: Iterable[AttemptTimes], bs: int) -> float | None:
    """The reference's formula, 1000 * bs / mean(compute ms): device time only, padding counts as work."""
    compute = [ms for t in times for ms in t.batch_ms[:, 1]]
    return float(1000.0 * bs / np.mean(compute)) if compute else None


def _devices(times: Sequence[AttemptTimes], bs: int, wall_s: float, canaries: Mapping[str, Canaries]) -> list[Report]:
    lines = []
    for name in sorted({t.device for t in times}, key=_by_host_and_index):
        own = [t for t in times if t.device == name]
        batches = np.concatenate([t.batch_ms for t in own])
        lines.append(
            {
                "device": name,
                "verified": _verified(canaries.get(name), max(t.ended for t in own)),
                "samples": sum(t.samples for t in own),
                "batches": len(batches),
                "fps": _device_fps(own, bs),
                "busy": float(batches.sum()) / 1000 / wall_s if wall_s else 0.0,
                **_mean_ms(batches),
            }
        )
    return lines


def _by_host_and_index(device: str) -> tuple[str, int]:
    host, index = device.rsplit(":", 1)
    return host, int(index)


def _verified(canaries: Canaries | None, until: float) -> bool | None:
    """
    Whether a device's answers to canaries are those of its kind, asked when it had done all that counts, or later.

    None where there was nothing to compare them with, or it was not asked any more.
    """
    after = [verdict for at, verdict in canaries.verdicts if at >= until] if canaries else []
    if Verdict.AGREES in after:
        return True
    return False if {Verdict.DISAGREES, Verdict.DISPUTED}.intersection(after) else None


def _canary_cost(times: Iterable[AttemptTimes], canaries: Mapping[str, Canaries]) -> dict[str, float | None]:
    """What the canaries took while the job ran, and as a share of the devices' time."""
    ms = sum(each.ms for each in canaries.values())
    device_ms = ms + float(sum(t.batch_ms.sum() for t in times))
    batches = sum(each.batches for each in canaries.values())
    return {"batches": batches, "ms": round(ms, 3), "share": ms / device_ms if device_ms else None}


def _mean_ms(batches: NDArray[np.float32]) -> dict[str, float | None]:
    """Means of `batches`, float32 [n, 3], and the compute time that one in a hundred exceeds."""
    if not len(batches):
        return {"h2d_ms": None, "compute_ms": None, "d2h_ms": None, "compute_p99_ms": None}
    h2d, compute, d2h = batches.mean(axis=0).tolist()
    p99 = float(np.percentile(batches[:, 1], 99))
    return {"h2d_ms": h2d, "compute_ms": compute, "d2h_ms": d2h, "compute_p99_ms": p99}


def _budget(times: Sequence[AttemptTimes]) -> dict[str, float]:
    """Where the winning attempts' time went, in ms a sample."""
    samples = sum(t.samples for t in times)
    if not samples:
        return {}
    names = ("read_ms", "wait_ms", "device_ms", "post_ms", "load_ms")
    return {name: round(sum(getattr(t.budget, name) for t in times) / samples, 4) for name in names}


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds during which at least one attempt ran: a job that was interrupted overnight did not run overnight."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
