"""
What a device's worker and device process take of memory on segmentation jobs, together.

    python -m tests.benchmarks.segmentation_memory [--images 200] [--short]

The real farm on one CPU slot, a graph with swin's tensors and next to no weights, images of ADE20K's sizes. Memory is
the proportional set size of both processes, twenty times a second, so that what they share counts once. The limit is
the ring, as `--dry-run` states it, and 0.5 GB; beyond the model, which here is nothing. Growth is what the last quarter
of the time takes beyond the third. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep
from typing import Any

import psutil

from tests.datasets import write_ade, write_swin_onnx

FARM = Path(sys.executable).with_name("farm")
SIZES = Path(__file__).parents[1] / "golden" / "ade20k_val_sizes.csv"
#: Peak in GB at batch size 1, by head.
TARGETS = {"full": 1.3, "small": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--short", action="store_true", help="16 images: shows that it runs")
    arguments = parser.parse_args()
    images = 16 if arguments.short else arguments.images
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        _prepare(Path(scratch), home, images)
        found = {head: _measure(home, head) for head in TARGETS}
    targets: dict[str, Any] = {}
    for head, figures in found.items():
        least = {"peak_gb": TARGETS[head], "beyond_ring_gb": 0.5, "growth_gb": 0.05}
        for name, target in least.items():
            value = round(figures[name], 3)
            targets[f"{head}_{name}"] = {"value": value, "target": target, "met": value <= target}
    print(json.dumps({"benchmark": "segmentation_memory", "images": images, "heads": found, "targets": targets}))


def _prepare(scratch: Path, home: Path, count: int) -> None:
    with SIZES.open() as file:
        rows = list(csv.DictReader(file))
    chosen = random.Random(0).sample(rows, count)
    folders = write_ade(scratch, [(int(row["height"]), int(row["width"])) for row in chosen])
    for head in TARGETS:
        write_swin_onnx(home / "data", 1, head)
    _farm(home, "prepare", "swin", "--images", str(folders[0]), "--annotations", str(folders[1]), "--json")


def _measure(home: Path, head: str) -> dict[str, float]:
    plan = json.loads(_farm(home, "submit", "swin", "--head", head, "--dry-run", "--json"))
    child = subprocess.Popen(
        [FARM, "submit", "swin", "--head", head, "--json"], env=_environment(home), stdout=subprocess.PIPE, text=True
    )
    seen: list[float] = []
    while child.poll() is None:
        seen.append(_pss(home))
        sleep(0.05)
    assert child.stdout is not None
    report = json.loads(child.stdout.read())
    assert report["samples"]["failed"] == 0
    peak, quarter = max(seen), max(1, len(seen) // 4)
    ring = plan["ring_bytes"] / 1e9
    found = {
        "peak_gb": peak,
        "ring_gb": ring,
        "beyond_ring_gb": peak - ring,
        "growth_gb": max(seen[-quarter:]) - max(seen[-2 * quarter : -quarter] or [peak]),
        "windows_a_s": report["windows"] / report["wall_s"],
    }
    print(head, {key: round(value, 3) for key, value in found.items()}, file=sys.stderr)
    return found


def _pss(home: Path) -> float:
    """Of the worker and the device process of this home, in GB."""
    total = 0
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            ours = "tasks.worker" in line or "workers.device_process" in line
            if ours and process.environ().get("FARM_HOME") == str(home):
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e9


def _farm(home: Path, *arguments: str) -> str:
    return subprocess.run(
        [FARM, *arguments], env=_environment(home), stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _environment(home: Path) -> dict[str, str]:
    return {**os.environ, "FARM_HOME": str(home), "FARM_CPU_SLOTS": "1"}


if __name__ == "__main__":
    main()
