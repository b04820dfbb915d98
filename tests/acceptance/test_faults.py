"""Devices and samples that misbehave, on request: one attempt each, named, and the others go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farm.data import manifest
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import name_of, write_bins

COUNT = 96
CULPRIT = name_of(11)


@pytest.fixture
def faulty(farm: Farm) -> Farm:
    """A farm whose simulated devices get little patience."""
    write_bins(farm.home / "data", COUNT)
    farm.env["FARM_DEADLINE_S"] = "0.5"
    return farm


def simulate(farm: Farm, *faults: dict[str, Any]) -> None:
    farm.env["FARM_SIMULATED"] = json.dumps({"compute_ms": 10, "faults": faults})


def xxh3_of(farm: Farm, name: str) -> str:
    samples = manifest.read(manifest.bins_dir(farm.home / "data", "lvvit")).samples
    return next(sample.xxh3 for sample in samples if sample.name == name)


def submit(farm: Farm, code: int = 0) -> dict[str, Any]:
    return farm.submit("--bs", "4", "--backend", "simulated", code=code)


@pytest.mark.parametrize("kind", ["hang", "crash"])
def test_a_device_process_that_breaks_costs_one_attempt(faulty: Farm, tmp_path: Path, kind: str) -> None:
    simulate(faulty)
    undisturbed = submit(faulty)
    simulate(faulty, {"kind": kind, "batch": 3, "once": str(tmp_path / "once")})
    report = submit(faulty)
    assert report["state"] == "done"
    assert report["digest"] == undisturbed["digest"]
    assert report["attempts"][kind] == 1
    shown = faulty.run("status", str(report["job"])).stdout
    assert f"1 {kind}" in shown
    assert "try 1 on localhost:" in shown


@pytest.mark.parametrize("kind", ["crash", "hang", "nan"])
def test_a_sample_that_always_breaks_is_named_and_the_others_are_scored(faulty: Farm, kind: str) -> None:
    simulate(faulty, {"kind": kind, "sample": xxh3_of(faulty, CULPRIT)})
    report = submit(faulty, code=3)
    assert report["state"] == "done_with_errors"
    assert [failed["name"] for failed in report["failed"]] == [CULPRIT]
    assert report["samples"] == {"total": COUNT, "scored": COUNT - 1, "failed": 1}
    assert_one_row_a_sample(faulty, 1, [name_of(i) for i in range(1, COUNT + 1)])
    assert CULPRIT in faulty.run("report", "1", code=3).stdout


def test_two_culprits_in_one_batch_are_both_named(faulty: Farm) -> None:
    others = [name_of(9), name_of(12)]
    simulate(faulty, *({"kind": "crash", "sample": xxh3_of(faulty, name)} for name in others))
    report = submit(faulty, code=3)
    assert [failed["name"] for failed in report["failed"]] == others


def test_the_scored_samples_of_a_shard_with_a_culprit_keep_their_digits(faulty: Farm) -> None:
    simulate(faulty)
    submit(faulty)
    simulate(faulty, {"kind": "crash", "sample": xxh3_of(faulty, CULPRIT)})
    submit(faulty, code=3)
    columns = "name, class1, class2, class3, class4, class5, score1, score5"
    query = f"SELECT {columns} FROM result WHERE job_id = ? AND name <> ? ORDER BY name"
    assert faulty.sql(query, 1, CULPRIT) == faulty.sql(query, 2, CULPRIT)


def test_a_device_that_fails_everything_is_quarantined_and_worked_around(faulty: Farm) -> None:
    longer = {"kind": "slow", "device": "localhost:0"}  # the job lasts until the other one has failed three times
    simulate(faulty, {"kind": "error", "device": "localhost:1"}, longer)
    report = submit(faulty)
    assert report["state"] == "done"
    assert [line["device"] for line in report["devices"]] == ["localhost:0"]
    assert "quarantined" in faulty.run("status", "1").stdout


def test_a_hang_that_outlasts_its_attempt_is_a_strike_all_the_same(faulty: Farm, tmp_path: Path) -> None:
    """The other device has done the shard, and the job is over, when the deadline passes: the heartbeat has to tell."""
    once = tmp_path / "once"
    simulate(faulty, {"kind": "hang", "device": "localhost:1", "batch": 3, "once": str(once)})
    faulty.env |= {"FARM_DEADLINE_S": "10", "FARM_HEARTBEAT_S": "0.3"}
    faulty.run("up")
    report = submit(faulty)
    strikes = "SELECT strikes FROM device WHERE name = 'localhost:1'"
    assert once.exists()
    assert (report["state"], faulty.sql(strikes)) == ("done", [(0,)])
    wait_for(lambda: faulty.sql(strikes) == [(1,)], 25, "localhost:1 gets its strike")
    assert "attempt_hang" in faulty.run("events", str(report["job"])).stdout
    faulty.run("down")


def test_what_every_device_refuses_fails_the_job_and_quarantines_none(faulty: Farm) -> None:
    simulate(faulty, {"kind": "error", "sample": xxh3_of(faulty, CULPRIT)})
    report = submit(faulty, code=1)
    assert report["state"] == "failed"
    assert "no device can do" in report["error"]
    assert CULPRIT in report["error"]
    assert {state for (state,) in faulty.sql("SELECT state FROM device")} == {"gone"}


def test_a_slow_device_takes_fewer_samples(faulty: Farm) -> None:
    simulate(faulty, {"kind": "slow", "device": "localhost:1", "factor": 8})
    faulty.run("up")  # or the slow one might be there long before the other
    samples = {line["device"]: line["samples"] for line in submit(faulty)["devices"]}
    faulty.run("down")
    assert samples["localhost:0"] > 2 * samples["localhost:1"]


def test_every_view_of_a_simulated_job_says_simulated(faulty: Farm) -> None:
    simulate(faulty)
    done = faulty.run("submit", "lvvit", "--bs", "4", "--backend", "simulated")
    assert "SIMULATED" in done.stdout
    assert faulty.json("report", "1")["simulated"] is True
    assert "simulated" in faulty.run("jobs").stdout
    assert "simulated" in faulty.run("status", "1").stdout
    dry = faulty.run("submit", "lvvit", "--bs", "4", "--backend", "simulated", "--dry-run")
    assert "simulated" in dry.stdout


def test_a_description_of_no_device_fails_the_job_with_its_text(faulty: Farm) -> None:
    faulty.env["FARM_SIMULATED"] = '{"colour": "red"}'
    report = submit(faulty, code=1)
    assert report["state"] == "failed"
    assert "FARM_SIMULATED" in str(report["error"])
