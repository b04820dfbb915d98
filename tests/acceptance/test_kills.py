"""SIGKILL for everything that can die; the digits do not notice."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep, time

import numpy as np
import psutil
import pytest

from farm import artifacts
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import expected_digest, name_of, session_of, write_bins, write_tiny_onnx

COUNT = 640
KILLS = 5
#: So long that the job outlives the killing.
BATCH_MS = 300


@pytest.fixture
def data(farm: Farm) -> Path:
    """Bins, and a graph that takes BATCH_MS a batch on this machine."""
    data_dir = farm.home / "data"
    write_bins(data_dir, COUNT)
    trial = farm.home / "trial"
    ms = _batch_ms(artifacts.directory(trial, "lvvit") / write_tiny_onnx(trial, 4, work=1000).file)
    write_tiny_onnx(data_dir, 4, work=int(1000 * BATCH_MS / ms))
    return data_dir


def _batch_ms(path: Path) -> float:
    session = session_of(path)
    batch = {"image": np.ones((4, 3, 224, 224), np.float32)}
    session.run(None, batch)
    began = perf_counter()
    session.run(None, batch)
    return 1000 * (perf_counter() - began)


def test_workers_killed_five_times_each_and_the_broker_once_change_no_digit(farm: Farm, data: Path) -> None:
    rng = random.Random(310)
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    victims = ["tasks.worker localhost:0", "tasks.worker localhost:1"] * KILLS
    victims += ["valkey-server", "workers.device_process"]
    rng.shuffle(victims)
    for victim in victims:
        sleep(rng.uniform(0.0, 0.5))
        _kill_one(farm, victim, command)
    _, stderr = command.communicate(timeout=240)
    assert command.returncode == 0, stderr + farm.logs()
    report = farm.json("report", "1")
    assert report["digest"] == expected_digest(data, COUNT)
    assert report["attempts"].get("lost", 0) > 0, "the kills hit something"
    assert_one_row_a_sample(farm, 1, [name_of(i) for i in range(1, COUNT + 1)])
    incarnations = dict(farm.sql("SELECT name, incarnation FROM device"))
    assert min(incarnations.values()) > KILLS


def test_a_stopped_worker_is_killed_after_its_lease_and_its_shard_done_elsewhere(farm: Farm, data: Path) -> None:
    farm.env["FARM_LEASE_S"] = "2"
    farm.env["FARM_HEARTBEAT_S"] = "0.5"
    command = farm.start("submit", "lvvit", "--bs", "4", "--limit", "160", "--json")
    wait_for(lambda: farm.pids("tasks.worker localhost:1"), 60, "the worker is there")
    (worker,) = farm.pids("tasks.worker localhost:1")
    wait_for(lambda: _works(farm), 60, "the worker has a shard")
    os.kill(worker, signal.SIGSTOP)
    command.communicate(timeout=120)
    assert command.returncode == 0
    assert not psutil.pid_exists(worker)
    report = farm.json("report", "1")
    assert report["digest"] == expected_digest(data, 160)
    assert report["attempts"]["lost"] >= 1
    assert_one_row_a_sample(farm, 1, [name_of(i) for i in range(1, 161)])


def _works(farm: Farm) -> bool:
    try:
        query = "SELECT count(*) FROM attempt WHERE device = 'localhost:1' AND state = 'running'"
        return bool(farm.sql(query)[0][0])
    except Exception:  # no table yet
        return False


def _grown_up(pids: list[int]) -> list[int]:
    """Those that had time to get something done: killed sooner, nobody ever would."""
    grown_up = []
    for pid in pids:
        with suppress(psutil.Error):
            if time() - psutil.Process(pid).create_time() > 2.5:
                grown_up.append(pid)
    return grown_up


def _registered(farm: Farm) -> set[int]:
    try:
        return {pid for (pid,) in farm.sql("SELECT pid FROM device")}
    except sqlite3.Error:  # no table yet
        return set()


def _kill_one(farm: Farm, victim: str, command: subprocess.Popen[str]) -> None:
    def found() -> list[int]:
        assert command.poll() is None, "the job ended too soon for this machine"
        grown_up = _grown_up(farm.pids(victim))
        return [pid for pid in grown_up if pid in _registered(farm)] if "tasks.worker" in victim else grown_up

    os.kill(wait_for(found, 60, f"{victim} runs: {farm.logs()}")[0], signal.SIGKILL)
