"""
The embedded farm against a bare onnxruntime loop over the same bins, in one run.

    python -m tests.benchmarks.embedded [--samples 1000] [--short]

The peer: two processes, one onnxruntime thread each, that read bins with numpy and keep nothing. Rounds alternate
between peer and farm, because machines drift; ratios are medians over rounds. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from farm import artifacts, zoo
from farm.export.onnx import export
from farm.export.planted import save_weights, seeded_weights
from tests.datasets import write_bins

FARM = Path(sys.executable).with_name("farm")
BS, DEVICES = 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="120 samples, one round: shows that it runs")
    arguments = parser.parse_args()
    samples, rounds = (120, 1) if arguments.short else (arguments.samples, arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        graph = _prepare(home, samples)
        measured = [_round(home, graph, samples) for _ in range(rounds)]
    print(json.dumps(_summary(samples, measured)))


def _prepare(home: Path, samples: int) -> Path:
    spec = zoo.get("lvvit")
    write_bins(home / "data", samples)
    weights = home / "weights.pth"
    save_weights(seeded_weights(spec, 310), weights)
    (exported,) = export(spec, weights, [BS], home / "data")
    return artifacts.directory(home / "data", "lvvit") / exported.artifact.file


def _round(home: Path, graph: Path, samples: int) -> dict[str, float]:
    for stale in home.glob("farm.db*"):
        stale.unlink()
    bare = _bare(home, graph)
    cold_s, cold = _submit(home)
    bare_again = _bare(home, graph)
    _farm(home, "up")
    try:
        up_s, up = _submit(home)
    finally:
        _farm(home, "down")
    loop_fps = samples / statistics.mean([bare["loop_s"], bare_again["loop_s"]])
    found = {
        "bare_loop_fps": loop_fps,
        "bare_with_start_fps": samples / statistics.mean([bare["total_s"], bare_again["total_s"]]),
        "cold_command_fps": samples / cold_s,
        "cold_wall_fps": cold["fps"]["wall"],
        "up_command_fps": samples / up_s,
        "up_wall_fps": up["fps"]["wall"],
        "steady_fps": _steady_fps(home, up["job"]),
        "busy": up["busy"],
    }
    print({key: round(value, 3) for key, value in found.items()}, file=sys.stderr)
    return found


def _summary(samples: int, measured: list[dict[str, float]]) -> dict[str, Any]:
    def ratio(name: str, peer: str) -> float:
        return statistics.median(each[name] / each[peer] for each in measured)

    def target(value: float, wanted: float) -> dict[str, Any]:
        return {"value": round(value, 4), "target": wanted, "met": value >= wanted}

    figures = {key: round(statistics.median(each[key] for each in measured), 3) for key in measured[0]}
    return {
        "benchmark": "embedded",
        "samples": samples,
        "rounds": len(measured),
        **figures,
        "up_command_over_bare_loop": round(ratio("up_command_fps", "bare_loop_fps"), 4),
        "cold_command_over_bare_with_start": round(ratio("cold_command_fps", "bare_with_start_fps"), 4),
        "targets": {
            "steady_over_bare_loop": target(ratio("steady_fps", "bare_loop_fps"), 0.97),
            "cold_command_over_bare_loop": target(ratio("cold_command_fps", "bare_loop_fps"), 0.90),
        },
    }


def _submit(home: Path) -> tuple[float, dict[str, Any]]:
    began = perf_counter()
    out = _farm(home, "submit", "lvvit", "--bs", str(BS), "--json")
    return perf_counter() - began, json.loads(out)


def _farm(home: Path, *arguments: str) -> str:
    env = {**os.environ, "FARM_HOME": str(home), "FARM_CPU_SLOTS": str(DEVICES)}
    return subprocess.run([FARM, *arguments], env=env, stdout=subprocess.PIPE, text=True, check=True).stdout


def _steady_fps(home: Path, job: int) -> float:
    """Samples a second between a tenth and four fifths of the job: no start, no tail."""
    connection = sqlite3.connect(home / "farm.db")
    ended = connection.execute(
        "SELECT a.ended, s.stop - s.start FROM attempt a JOIN shard s ON s.id = a.shard_id"
        " WHERE a.job_id = ? AND a.state = 'won' ORDER BY a.ended",
        (job,),
    ).fetchall()
    connection.close()
    middle = ended[len(ended) // 10 : len(ended) * 8 // 10]
    return float(sum(samples for _, samples in middle[1:]) / (middle[-1][0] - middle[0][0]))


def _bare(home: Path, graph: Path) -> dict[str, float]:
    """Both halves at once; the slower one counts."""
    began = perf_counter()
    halves = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.embedded_peer", str(home / "data"), str(graph), str(half)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for half in range(DEVICES)
    ]
    for half in halves:  # loaded and warm: begin together
        assert half.stdout is not None
        half.stdout.readline()
    for half in halves:
        assert half.stdin is not None
        half.stdin.write("go\n")
        half.stdin.flush()
    loops = [float(half.communicate()[0]) for half in halves]
    return {"loop_s": max(loops), "total_s": perf_counter() - began}


if __name__ == "__main__":
    main()
