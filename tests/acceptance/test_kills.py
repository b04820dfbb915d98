"""SIGKILL for everything that can die; the digits do not notice."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from time import sleep

import pytest

from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import name_of, write_bins, write_tiny_onnx

COUNT = 640
KILLS = 5


@pytest.fixture
def data(farm: Farm) -> Path:
    data_dir = farm.home / "data"
    write_bins(data_dir, COUNT)
    write_tiny_onnx(data_dir, 4, work=3000)
    return data_dir


def test_workers_killed_five_times_each_and_the_broker_once_change_no_digit(farm: Farm, data: Path) -> None:
    expected = farm.submit("--bs", "4")
    rng = random.Random(310)
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    kills = {"localhost:0": 0, "localhost:1": 0}
    brokers = devices = 0
    while min(kills.values()) < KILLS or not brokers or not devices:
        assert command.poll() is None, f"the job ended after {kills}: too short for this machine"
        sleep(rng.uniform(0.2, 1.2))
        device = min(kills, key=lambda name: (kills[name], rng.random()))
        kills[device] += _kill(farm.pids(f"tasks.worker {device}"))
        if kills[device] >= 2 and not brokers:
            brokers += _kill(farm.pids("valkey-server"))
        if kills[device] >= 3 and not devices:
            devices += _kill(farm.pids("workers.device_process"))
    _, stderr = command.communicate(timeout=240)
    assert command.returncode == 0, stderr + farm.logs()
    report = farm.json("report", "2")
    assert report["digest"] == expected["digest"]
    assert report["metrics"] == expected["metrics"]
    assert report["attempts"].get("lost", 0) > 0, "the kills hit something"
    assert_one_row_a_sample(farm, 2, [name_of(i) for i in range(1, COUNT + 1)])
    incarnations = dict(farm.sql("SELECT name, incarnation FROM device"))
    assert all(incarnations[name] > KILLS for name in kills)


def test_a_stopped_worker_loses_its_shard_and_its_late_commit_is_fenced(farm: Farm, data: Path) -> None:
    farm.env["FARM_LEASE_S"] = "2"
    farm.env["FARM_HEARTBEAT_S"] = "0.5"
    expected = farm.submit("--bs", "4", "--limit", "160")["digest"]
    farm.run("up")
    command = farm.start("submit", "lvvit", "--bs", "4", "--limit", "160", "--json")
    wait_for(lambda: farm.sql("SELECT count(*) FROM result WHERE job_id = 2")[0][0] > 8, 60, "the job runs")
    (worker,) = farm.pids("tasks.worker localhost:1")
    os.kill(worker, signal.SIGSTOP)
    try:
        command.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGCONT)
    assert command.returncode == 0
    assert farm.json("report", "2")["digest"] == expected
    assert_one_row_a_sample(farm, 2, [name_of(i) for i in range(1, 161)])
    farm.run("down")


def _kill(pids: list[int]) -> int:
    """SIGKILL the first; 1 if there was one."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return 1
    return 0
