"""A device that computes wrongly is found out by the others, and the digits do not move."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from farm import canary
from tests.acceptance.conftest import Farm, assert_one_row_a_sample
from tests.datasets import expected_digest, name_of, session_of, write_bins, write_tiny_onnx

WRONG = "localhost:1"


@pytest.fixture
def three(farm: Farm) -> Farm:
    """A farm of three devices: two agree, whatever the third says."""
    farm.env["FARM_CPU_SLOTS"] = "3"
    return farm


def simulate(farm: Farm, *faults: dict[str, object], compute_ms: float = 20) -> None:
    farm.env["FARM_SIMULATED"] = json.dumps({"compute_ms": compute_ms, "faults": faults})


def digest_of_nothing_wrong(farm: Farm, *arguments: str) -> Any:
    faults, farm.env["FARM_SIMULATED"] = farm.env["FARM_SIMULATED"], '{"compute_ms": 0}'
    digest = farm.submit("--backend", "simulated", *arguments)["digest"]
    farm.env["FARM_SIMULATED"] = faults
    return digest


def test_a_device_that_is_wrong_from_the_start_changes_no_digit(three: Farm) -> None:
    write_bins(three.home / "data", 96)
    simulate(three, {"kind": "wrong", "device": WRONG})
    expected = digest_of_nothing_wrong(three, "--bs", "4")

    report = three.submit("--backend", "simulated", "--bs", "4")

    assert report["digest"] == expected
    assert {line["device"]: line["samples"] for line in report["devices"]}.get(WRONG, 0) == 0
    assert "canary" in three.run("report", "2").stdout
    assert_one_row_a_sample(three, 2, [name_of(number) for number in range(1, 97)])


def test_what_a_device_did_after_it_went_wrong_is_done_again(three: Farm) -> None:
    write_bins(three.home / "data", 720)
    simulate(three, {"kind": "wrong", "device": WRONG, "after": 100}, compute_ms=5)
    expected = digest_of_nothing_wrong(three, "--bs", "1")

    report = three.submit("--backend", "simulated", "--bs", "1")

    assert report["digest"] == expected
    assert three.sql("SELECT count(*) FROM event WHERE kind = 'shard_reopened' AND job_id = 2")[0][0] > 0


def test_an_artifact_whose_answers_are_far_from_its_reference_condemns_the_device(farm: Farm) -> None:
    data = farm.home / "data"
    write_bins(data, 16)
    artifact = data / "artifacts" / "lvvit" / write_tiny_onnx(data, 4).file
    farm.env["FARM_CPU_SLOTS"] = "1"
    assert farm.submit("--bs", "4")["digest"] == expected_digest(data, 16)
    reference = artifact.with_suffix(".canary.npy")
    answers = answers_of(artifact)
    canary.write_reference(artifact, answers)
    assert farm.submit("--bs", "4")["state"] == "done"

    canary.write_reference(artifact, answers + 1)
    assert reference.exists()
    farm.run("submit", "lvvit", "--bs", "4", "--no-wait")
    command = farm.start("wait", "3")
    try:
        from tests.acceptance.conftest import wait_for

        wait_for(lambda: farm.sql("SELECT state FROM device")[0][0] == "quarantined", 60, "it is found out")
    finally:
        farm.run("cancel", "3")
        command.communicate(timeout=60)
    assert "onnxruntime" in farm.sql("SELECT reason FROM device")[0][0]


def answers_of(artifact: Path) -> canary.Array:
    import numpy as np

    given = np.empty((canary.COUNT, 3, 224, 224), np.float32)
    canary.fill(given, 0)
    session = session_of(artifact)
    found: canary.Array = session.run(None, {session.get_inputs()[0].name: given})[0]
    return found
