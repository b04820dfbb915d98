"""The guides' table from what was measured: figures beside the reference's, and remarks that explain them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from farm import zoo
from farm.reports.speed import explained
from farm.reports.suite import COLUMNS, Cell, as_csv, as_json, lines, markdown


def speed_of(device: str, fps: float | None, **said: Any) -> dict[str, Any]:
    return {
        "device": device, "fps": fps, "state": "done" if fps else "failed", "drift": 0.0, "error": "",
        "simulated": False, "backend": "acl", "health": "OK", "temperature_c": None, "foreign": [], **said,
    }  # fmt: skip


def report_of(**said: Any) -> dict[str, Any]:
    return {
        "job": 7, "artifact": "a" * 64, "digest": "d" * 64, "simulated": False, "backend": "acl",
        "metrics": {"top1": 83.0}, "interval": {"top1": (82.5, 83.5)}, "quarantined": [], "forced": [], "devices": [],
        "samples": {"total": 50_000, "scored": 50_000, "failed": 0}, "fps": {"wall": 1400.0}, "provenance": {},
        **said,
    }  # fmt: skip


def cell_of(bs: int = 8, fps: tuple[float, ...] = (250.0, 252.0), **said: Any) -> Cell:
    speeds = [speed_of(f"h:{index}", each) for index, each in enumerate(fps)]
    return Cell(zoo.get("conformer"), bs, **{"report": report_of(), "speeds": speeds, "of_samples": 50_000, **said})


def test_a_cell_has_measured_reference_and_baseline() -> None:
    (line,) = lines([cell_of()])

    assert dict(zip(COLUMNS, line, strict=True)) == {
        "model": "conformer", "bs": "8", "metric": "top1", "reference": "83.85", "measured": "83.000", "+-": "0.500",
        "delta": "-0.850", "310P3 fps": "257.7437", "device fps": "251.00*", "ratio": "0.974", "wall fps": "1400.0",
        "baseline fps": "218.5971", "over it": "1.1482x", "remarks": "",
    }  # fmt: skip


def test_the_best_batch_size_of_each_model_bears_a_star() -> None:
    slow, fast = cell_of(1, (142.0,)), cell_of(8, (250.0,))

    assert [line[8] for line in lines([slow, fast])] == ["142.00", "250.00*"]


@pytest.mark.parametrize(
    ("said", "remark"),
    [
        ({"fps": (250.0, 200.0)}, "devices differ: h:1 200.0 fps, h:0 250.0"),
        ({"report": report_of(backend="ort")}, "onnxruntime on CPUs: its fps is not the card's"),
        ({"report": report_of(provenance={"source": "made up"})}, "made-up samples"),
        ({"of_samples": 60_000}, "the first 50000 of 60000 samples"),
        ({"report": report_of(samples={"total": 50_000, "scored": 49_998, "failed": 2})}, "2 samples failed"),
        ({"report": report_of(quarantined=[{"device": "h:3", "reason": ""}])}, "in quarantine meanwhile: h:3"),
        ({"report": report_of(forced=[{"device": "h:1", "reason": "hot"}])}, "h:1 was used although: hot"),
        ({"speeds": [speed_of("h:0", 250.0, drift=0.04, temperature_c=91.0)]}, "throttled perhaps: 91 °C"),
        (
            {"speeds": [speed_of("h:0", 250.0, foreign=[{"pid": 9, "name": "train"}])]},
            "process 9 (train) is on it, too",
        ),
        ({"speeds": [speed_of("h:0", 250.0, health="Warning")]}, "h:0: health Warning"),
        ({"speeds": [speed_of("h:0", None, error="no memory")]}, "no memory"),
    ],
)
def test_what_explains_a_figure_is_said(said: dict[str, Any], remark: str) -> None:
    assert remark in "; ".join(cell_of(**said).remarks())


def test_a_device_that_is_well_and_settled_needs_no_word() -> None:
    assert explained(speed_of("h:0", 250.0)) == []


def test_an_empty_cell_says_why() -> None:
    (line,) = lines([Cell(zoo.get("swin"), 16, missing="out of memory, says the guide")])

    assert line[-1] == "out of memory, says the guide"
    assert line[COLUMNS.index("measured")] == line[COLUMNS.index("device fps")] == "-"


def test_a_cell_whose_devices_all_failed_says_why() -> None:
    cell = cell_of(speeds=[speed_of("h:0", None, error="no memory")])

    assert cell.lack() == "no memory"
    assert cell_of(speeds=[]).lack() == "no device was timed"
    assert cell_of(report=report_of(metrics={"top1": None}, interval={"top1": None})).lack() == "no sample was scored"
    assert cell_of().lack() == ""


def test_every_form_says_what_is_simulated() -> None:
    cells = [cell_of(report=report_of(simulated=True)), cell_of(4, ())]

    assert markdown(cells).startswith("**SIMULATED")
    assert [row["simulated"] for row in csv.DictReader(io.StringIO(as_csv(cells)))] == ["yes", "no"]
    assert [cell["simulated"] for cell in json.loads(as_json(cells))] == [True, False]
    assert "SIMULATED" not in markdown([cell_of()])


def test_a_remark_cannot_break_the_markdown_table() -> None:
    (*_, line) = markdown([cell_of(report=None, missing="a | b")]).splitlines()

    assert line.count("|") == len(COLUMNS) + 1
