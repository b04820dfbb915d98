"""
How long commands and workers take to begin, and what a device's processes hold before they have a model.

    python -m tests.benchmarks.startup [--runs 7] [--short]

`farm --help`; `farm status` on a farm of 8 simulated devices; a worker from its process's start to its first batch on
the device, a job waiting for it; RSS of a worker and its device process. The peers are interpreters that do nothing,
and that import numpy. Bytecode is cached, as it is for any user from the second run on. Medians; the last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import CLOCK_BOOTTIME, clock_gettime, perf_counter, sleep, time
from typing import Any

import psutil

from farm.data import made_up, recipes

FARM = Path(sys.executable).with_name("farm")
DEVICES, SAMPLES = 8, 400
TARGETS = {"help_s": 0.3, "status_s": 0.6, "first_batch_s": 2.0, "rss_mb": 140.0}
#: After this a worker that came up has nothing to do.
QUIET_S = 3.0
KINDS = {"tasks.worker": "worker", "workers.device_process": "device_process"}
_TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="2 devices, 2 runs: shows that it runs")
    arguments = parser.parse_args()
    devices, runs = (2, 2) if arguments.short else (DEVICES, arguments.runs)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        made_up.make(recipes.get("lvvit", "float32"), home / "data", SAMPLES)
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"FARM_HOME": str(home), "PYTHONPYCACHEPREFIX": str(Path(scratch) / "bytecode")}
        found = {
            "python": _timed(runs, env, sys.executable, "-c", "pass"),
            "numpy": _timed(runs, env, sys.executable, "-c", "import numpy"),
            "help": _timed(runs, env, FARM, "--help"),
        }
        with _farm_of(env, devices):
            sleep(QUIET_S)  # bytecode is written, which takes time and memory once
        with _farm_of(env, devices):
            found["status"] = _timed(runs, env, FARM, "status")
            sleep(QUIET_S)
            memory = {kind: sum(_rss_mb(home, word)) / devices for word, kind in KINDS.items()}
        first_batch = [_first_batch_s(home, env, run) for run in range(runs + 1)][1:]
    print(json.dumps(_summary(devices, runs, found, first_batch, memory)))


def _summary(
    devices: int,
    runs: int,
    found: Mapping[str, tuple[float, float]],
    first_batch: list[float],
    memory: Mapping[str, float],
) -> dict[str, Any]:
    values = {
        "help_s": found["help"][0],
        "status_s": found["status"][0],
        "first_batch_s": statistics.median(first_batch),
        "rss_mb": sum(memory.values()),
    }
    return {
        "benchmark": "startup",
        "simulated": True,
        "devices": devices,
        "runs": runs,
        **{f"{name}_s": round(wall_s, 3) for name, (wall_s, _) in found.items()},
        **{f"{name}_cpu_s": round(cpu_s, 3) for name, (_, cpu_s) in found.items()},
        "first_batch_s": [round(each, 2) for each in first_batch],
        **{f"{kind}_rss_mb": round(mb, 1) for kind, mb in memory.items()},
        "targets": {
            name: {"value": round(value, 3), "target": TARGETS[name], "met": value <= TARGETS[name]}
            for name, value in values.items()
        },
    }


def _timed(runs: int, env: Mapping[str, str], *command: Path | str) -> tuple[float, float]:
    """Median seconds a command takes, and those of CPU, after a first one that does not count."""
    took = [_time(env, *command) for _ in range(runs + 1)][1:]
    return statistics.median(wall_s for wall_s, _ in took), statistics.median(cpu_s for _, cpu_s in took)


def _time(env: Mapping[str, str], *command: Path | str) -> tuple[float, float]:
    before, began = os.times(), perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    wall_s, after = perf_counter() - began, os.times()
    return wall_s, sum(after[2:4]) - sum(before[2:4])


def _first_batch_s(home: Path, env: Mapping[str, str], run: int) -> float:
    """From the start of a worker's process to its first batch, at which the device makes a file."""
    mark = home / f"first-batch-{run}"
    fault = {"kind": "slow", "factor": 1.0, "batch": 1, "once": str(mark)}
    env = {**env, "FARM_SIMULATE": "1x310P3", "FARM_SIMULATED": json.dumps({"faults": [fault]})}
    job = ["lvvit", "--bs", "4", "--limit", str(SAMPLES), "--no-wait"]
    subprocess.run([FARM, "submit", *job], env=env, stdout=subprocess.DEVNULL, check=True)
    with _farm_of(env, 1):
        _wait_for(mark.exists)
        (worker,) = _pids(home, "tasks.worker")
        # Clock ticks since the machine started: `psutil.Process.create_time` is as exact as the time of that, a second.
        began = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[19]) / _TICKS
        return mark.stat().st_mtime - (time() - (clock_gettime(CLOCK_BOOTTIME) - began))


@contextmanager
def _farm_of(env: Mapping[str, str], devices: int) -> Iterator[None]:
    def farm(*arguments: str) -> None:
        subprocess.run([FARM, *arguments], env=env, stdout=subprocess.DEVNULL, check=True)

    farm("up", "--simulate", f"{devices}x310P3", "--timeout", "120")
    try:
        yield
    finally:
        farm("down")


def _rss_mb(home: Path, word: str) -> list[float]:
    return [psutil.Process(pid).memory_info().rss / 1e6 for pid in _pids(home, word)]


def _pids(home: Path, word: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if word in process.cmdline() and process.environ().get("FARM_HOME") == str(home):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = perf_counter() + 60
    while not condition():
        assert perf_counter() < deadline, "no batch came to the device"
        sleep(0.02)


if __name__ == "__main__":
    main()
