"""A farm of simulated chips, as a user plans with it: up, a job, timings, and the guides' table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import Farm

COUNT = 96
CHIPS = [f"localhost:{index}" for index in range(3)]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Three chips, one of which is slow, and samples of noise."""
    faults = [{"kind": "slow", "device": CHIPS[2], "factor": 2.0}]
    home = Farm(tmp_path_factory.mktemp("simulated") / "home", env={"FARM_SIMULATED": json.dumps({"faults": faults})})
    home.run("prepare", "conformer", "--synthetic", str(COUNT))
    home.run("prepare", "swin", "--synthetic", "4")
    said = home.run("up", "--simulate", "3x310P3").stdout
    assert "SIMULATED localhost:0, localhost:1, localhost:2" in said
    yield home
    home.run("down")


def test_devices_say_that_they_are_none(farm: Farm) -> None:
    assert {(line["device"], line["soc"]) for line in farm.json("devices")} == {
        (name, "simulated 310P3") for name in CHIPS
    }
    assert "simulated 310P3" in farm.run("doctor", code=None).stdout


def test_a_job_needs_no_artifact_and_says_that_it_is_simulated(farm: Farm) -> None:
    report = farm.submit("--bs", "8", model="conformer")

    assert farm.sql("SELECT soc FROM job WHERE id = ?", report["job"]) == [("simulated 310P3",)]
    assert (report["simulated"], report["backend"]) == (True, "simulated")
    assert report["samples"] == {"total": COUNT, "scored": COUNT, "failed": 0}
    assert report["provenance"]["source"] == "made up"
    shown = farm.run("report", str(report["job"])).stdout
    assert "SIMULATED" in shown
    assert "of made-up samples: no accuracy here is real" in shown


def test_chips_take_pixels_where_they_are_asked_to(farm: Farm) -> None:
    missing = farm.run("submit", "conformer", "--bs", "8", "--input", "uint8", code=1).stderr
    assert "farm prepare conformer --synthetic 2000 --input uint8" in missing
    farm.run("prepare", "conformer", "--synthetic", str(COUNT), "--input", "uint8")

    dry = farm.json("submit", "conformer", "--bs", "8", "--input", "uint8", "--dry-run")
    report = farm.submit("--bs", "8", "--input", "uint8", model="conformer")

    assert dry["bytes"] == COUNT * 3 * 224 * 224
    assert report["samples"] == {"total": COUNT, "scored": COUNT, "failed": 0}
    assert (report["provenance"]["artifact"]["input"]["dtype"], report["artifact"]) == ("uint8", dry["artifact"])
    assert report["digest"] != farm.submit("--bs", "8", model="conformer")["digest"]
    speed = json.loads(farm.run("bench", "conformer", "--bs", "8", "--input", "uint8", "--json").stdout)
    assert {line["artifact"] for line in speed} == {dry["artifact"]}
    few = ("suite", "--models", "conformer", "--bs", "8", "--limit", "40", "--dry-run")
    assert ", 0.02 GB, " in farm.run(*few).stdout
    assert ", 0.01 GB, " in farm.run(*few, "--input", "uint8").stdout


def test_what_works_on_a_classifier_loads_nothing_for_pictures_or_models(farm: Farm) -> None:
    farm.submit("--bs", "8", model="conformer")

    working = farm.pids("tasks.worker") + farm.pids("workers.device_process")
    assert len(working) == 2 * len(CHIPS)
    for pid in working:
        mapped = Path(f"/proc/{pid}/maps").read_text()
        assert "/numpy/" in mapped
        assert not re.search(r"/(PIL|cv2|llvmlite|numba|onnxruntime|psycopg\w*|scipy|torch)/", mapped)


def test_timings_are_the_references_and_the_slow_chips_are_not(farm: Farm) -> None:
    found = {line["device"]: line for line in json.loads(farm.run("bench", "conformer", "--bs", "8", "--json").stdout)}

    assert list(found) == CHIPS
    for name in CHIPS[:2]:
        assert found[name]["fps"] == pytest.approx(257.7437, rel=0.02)
    assert found[CHIPS[2]]["fps"] == pytest.approx(257.7437 / 2, rel=0.02)
    assert all(line["simulated"] and line["batches"] == 20 and line["runs"] == 1 for line in found.values())
    compute = found[CHIPS[0]]["compute_ms"]
    assert compute["min"] < compute["median"] < compute["p99"] <= compute["max"]
    job = found[CHIPS[0]]["job"]
    assert farm.sql("SELECT count(*) FROM result WHERE job_id = ?", job) == [(0,)]
    assert farm.json("report", str(job))["fps"] == found[CHIPS[0]]["fps"]
    assert f"throughput 1000*batchsize(8)/NPU_compute_time.mean({compute['mean']}" in (
        summary := farm.run("report", str(job), "--format", "summary").stdout
    ), summary
    assert "expected summary" in farm.run("report", str(job), "--format", "conformer", code=2).stderr


def test_a_batch_size_without_memory_is_a_result(farm: Farm) -> None:
    done = farm.run("bench", "swin", "--bs", "1,16", "--loop", "2", "--devices", "localhost:0,localhost:1", "--json")

    found = json.loads(done.stdout)
    assert [(line["bs"], line["state"]) for line in found] == [(1, "done")] * 2 + [(16, "failed")] * 2
    assert all("out of memory" in line["error"] for line in found[2:])
    assert farm.run("bench", "swin", "--bs", "16", "--loop", "2", code=1).stdout.startswith("SIMULATED")


def test_a_device_that_takes_no_work_is_left_out_or_given_up(farm: Farm) -> None:
    hasty = Farm(farm.home, env={**farm.env, "FARM_LEASE_S": "4"})
    farm.run("devices", "drain", CHIPS[0])
    try:
        others = json.loads(farm.run("bench", "conformer", "--loop", "2", "--json").stdout)
        (alone,) = json.loads(
            hasty.run("bench", "conformer", "--loop", "2", "--devices", CHIPS[0], "--json", code=1).stdout
        )
    finally:
        farm.run("devices", "undrain", CHIPS[0])

    assert [line["device"] for line in others] == CHIPS[1:]
    assert (alone["state"], alone["fps"]) == ("failed", None)
    assert f"{CHIPS[0]} takes no work" in alone["error"]


def test_the_table_is_filled_once_and_printed_in_every_form(farm: Farm) -> None:
    command = ["suite", "--models", "conformer,swin", "--bs", "8,16", "--head", "small", "--loop", "2"]
    forecast = farm.run(*command, "--dry-run").stdout
    assert "swin bs 16: out of memory, says the guide" in forecast

    text = farm.run(*command, "--format", "table").stdout
    before = farm.sql("SELECT count(*) FROM job")
    rows = list(csv.DictReader(io.StringIO(farm.run(*command, "--format", "csv").stdout)))
    cells = json.loads(farm.run(*command, "--format", "json").stdout)
    markdown = farm.run(*command, "--format", "md").stdout

    assert farm.sql("SELECT count(*) FROM job") == before, "what was measured is measured again"
    assert text.startswith("SIMULATED")
    assert "SIMULATED" in markdown
    assert {row["simulated"] for row in rows if row["device fps"] != "-"} == {"yes"}
    by_cell = {(cell["model"], cell["bs"]): cell for cell in cells}
    conformer = by_cell["conformer", 8]
    assert conformer["over_baseline"] == pytest.approx(conformer["device_fps"] / 218.5971)
    assert any("devices differ: localhost:2" in note for note in conformer["notes"])
    assert by_cell["swin", 8]["metric"] == "miou"
    assert by_cell["swin", 16]["missing"] == "out of memory, says the guide"
    assert "is there" in farm.run(*command, "--dry-run").stdout


def test_what_lacks_is_named_in_its_cell(farm: Farm) -> None:
    done = farm.run("suite", "--models", "lvvit", "--bs", "64", "--loop", "2", "--devices", CHIPS[0], "--dry-run")
    assert "MISSING: no prepared data" in done.stdout
    assert "farm prepare lvvit" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "--simulate", "8x910B"], "expected how many of which chip, e.g. 8x310P3"),
        (["up", "--simulate", "2x310P3"], "a farm of 3x310P3 is up"),
        (["suite", "--backend", "gpu"], "expected acl, ort or simulated"),
        (["suite", "--format", "xml"], "expected table, md, json, csv"),
        (["bench", "conformer", "--loop", "1"], "--loop"),
        (["prepare", "conformer", "--synthetic", "5", "--images", "/tmp"], "choose one"),
    ],
)
def test_what_cannot_be_is_refused(farm: Farm, arguments: list[str], sentence: str) -> None:
    assert sentence in farm.run(*arguments, code=2).stderr


def test_other_devices_than_those_that_are_up_are_not_used_unasked(farm: Farm) -> None:
    other = Farm(farm.home, env={**farm.env, "FARM_SIMULATE": "2x310P3"})

    assert "a farm of 3x310P3 is up" in other.run("submit", "conformer", "--bs", "8", code=2).stderr
