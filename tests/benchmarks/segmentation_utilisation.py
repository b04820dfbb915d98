"""
How busy the farm keeps simulated devices on segmentation, whose windows it merges, and what of the host that takes.

    python -m tests.benchmarks.segmentation_utilisation [--seconds 20] [--rounds 2] [--short]

Swin at batch size 1 on made-up windows of real size. The limit is the devices': so many of them times the reference's
16.74 windows/s, copies left out unless a case says `copies`; in the middle of a job (15 to 75 %) they are held to it.
A case's whole farm, the commands too, runs on as many cores as it says; CPU is that of all of them, from the command
typed to its end. Maps are white noise, where every class may be a pixel's best (a full head's repeats, and the first
class is the best everywhere), or smooth; windows of an image do not agree where they overlap, as real ones would, so
that more pixels need arithmetic. `device_share` is how much of a device's time its process computes, to make up
outputs: CPU that a card would not take of its host. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from sqlalchemy import text

from db.engine import open_database
from farm import zoo
from farm.data import made_up, recipes
from tests.benchmarks.utilisation import _farm, _processes, _settings

SPEC = zoo.get("swin")
WINDOWS_S = SPEC.reference_fps[1]
#: Windows of an image of the made-up set, about.
PER_IMAGE = 1.85
#: What one core must keep one device at, with the small head.
TARGET = 0.97


class Case(NamedTuple):
    devices: int
    cores: int
    head: str
    smooth: bool
    copies: bool = False


CASES = (
    Case(1, 1, "small", smooth=False),
    Case(1, 1, "small", smooth=True),
    Case(1, 1, "small", smooth=False, copies=True),
    Case(1, 1, "full", smooth=False),
    Case(1, 1, "full", smooth=True),
    Case(1, 1, "full", smooth=True, copies=True),
    Case(4, 2, "small", smooth=False),
    Case(4, 2, "small", smooth=True),
    Case(4, 2, "full", smooth=True),
    Case(4, 2, "full", smooth=True, copies=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2, help="jobs of a case, after a short one that is not counted")
    parser.add_argument("--short", action="store_true", help="one device and core, the small head: shows that it runs")
    arguments = parser.parse_args()
    cases = CASES[:2] if arguments.short else CASES
    seconds, rounds = (4.0, 1) if arguments.short else (arguments.seconds, arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        most = max(case.devices for case in cases)
        made_up.make(recipes.get(SPEC.recipe, "float32"), home / "data", _images(most, seconds))
        measured = []
        for case in cases:
            measured.append(_measure(home, case, seconds, rounds))
            print(measured[-1], file=sys.stderr)
    targets = {
        f"{name}_{'smooth' if each['smooth'] else 'noisy'}": {
            "value": each[name],
            "target": TARGET,
            "met": each[name] >= TARGET,
        }
        for each in measured
        for name in ("busy", "steady_over_limit")
        if each["devices"] == 1 and each["head"] == "small" and not each["copies"]
    }
    result = {"benchmark": "segmentation_utilisation", "simulated": True, "measured": measured}
    print(json.dumps({**result, "targets": {} if arguments.short else targets}))  # which need a job that lasts


def _images(devices: int, seconds: float) -> int:
    return int(devices * seconds * WINDOWS_S / PER_IMAGE)


def _measure(home: Path, case: Case, seconds: float, rounds: int) -> dict[str, Any]:
    simulated = {"smooth": case.smooth} | ({} if case.copies else {"h2d_ms": 0, "d2h_ms": 0})
    env = {
        "FARM_HOME": str(home),
        "FARM_SIMULATE": f"{case.devices}x310P3",
        "FARM_SIMULATED": json.dumps(simulated),
    }
    with _on(case.cores):
        _farm(env, "up", "--timeout", "120")
        try:
            _job(env, case, 4 * case.devices)  # loads, and compiles the merge
            jobs = [_job(env, case, _images(case.devices, seconds)) for _ in range(rounds)]
        finally:
            _farm(env, "down")
    found = {name: round(statistics.median(job[name] for job in jobs), 4) for name in jobs[0]}
    return {**case._asdict(), **found, "runs": [round(job["steady_over_limit"], 4) for job in jobs]}


def _job(env: Mapping[str, str], case: Case, images: int) -> dict[str, float]:
    before = _cpu_s(env)
    submit = ("submit", SPEC.name, "--bs", "1", "--head", case.head, "--limit", str(images), "--json")
    report = json.loads(_farm(env, *submit))
    spent = {kind: seconds - before[kind] for kind, seconds in _cpu_s(env).items()}
    assert report["samples"]["scored"] == images, report
    assert report["simulated"], report
    windows = report["windows"]
    steady = _steady_images_s(env, report["job"]) * windows / images
    times = report["devices"]
    batch_ms = statistics.mean(sum(each[f"{part}_ms"] for part in ("h2d", "compute", "d2h")) for each in times)
    return {
        "windows": windows,
        "busy": report["busy"],
        "steady_windows_s": steady,
        "limit_windows_s": case.devices * 1000 / batch_ms,
        "steady_over_limit": steady * batch_ms / 1000 / case.devices,
        "batch_ms": batch_ms,
        "cpu_ms": 1000 * sum(spent.values()) / windows,
        **{f"cpu_ms_{kind}": 1000 * seconds / windows for kind, seconds in spent.items()},
        "device_share": 1000 * spent["device"] / windows / batch_ms,
    }


def _cpu_s(env: Mapping[str, str]) -> dict[str, float]:
    """By kind of process; commands are those that have ended."""
    found: dict[str, float] = defaultdict(float)
    for kind, process in _processes(env):
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[kind] += times.user + times.system
    mine = psutil.Process().cpu_times()
    found["command"] += mine.children_user + mine.children_system
    return found


def _steady_images_s(env: Mapping[str, str], job: int) -> float:
    with closing(open_database(_settings(env))) as database, database.read() as conn:
        rows = conn.execute(
            text(
                "SELECT a.started, a.ended, s.stop - s.start FROM attempt a JOIN shard s ON s.id = a.shard_id"
                " WHERE a.job_id = :job AND a.state = 'won'"
            ),
            {"job": job},
        ).all()
    begin, end = min(row[0] for row in rows), max(row[1] for row in rows)
    first, last = begin + 0.15 * (end - begin), begin + 0.75 * (end - begin)
    # A device's attempts follow one another: of each, the part that lies in between.
    parts = [max(0.0, min(last, row[1]) - max(first, row[0])) / (row[1] - row[0]) for row in rows]
    return float(sum(part * row[2] for part, row in zip(parts, rows, strict=True)) / (last - first))


@contextmanager
def _on(cores: int) -> Iterator[None]:
    """Have this process, and all that it starts, on so many cores."""
    process = psutil.Process()
    before = process.cpu_affinity()
    process.cpu_affinity(before[-cores:])
    try:
        yield
    finally:
        process.cpu_affinity(before)


if __name__ == "__main__":
    main()
