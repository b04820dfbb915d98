"""A farm that comes and goes with who waits for it, and one that stays."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path
from time import sleep

import pytest

from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import name_of, write_bins, write_tiny_onnx

COUNT = 120
NAMES = [name_of(i) for i in range(1, COUNT + 1)]


@pytest.fixture
def data(farm: Farm) -> Path:
    """Bins and a tiny real graph, about 3 s of work on two devices."""
    data_dir = farm.home / "data"
    write_bins(data_dir, COUNT)
    write_tiny_onnx(data_dir, 4, work=2000)
    return data_dir


def interrupted_at(farm: Farm, done: int) -> None:
    """Wait until some rows are there."""
    database = farm.home / "farm.db"
    wait_for(lambda: database.exists() and _rows(farm) >= done, 60, f"{done} rows")


def _rows(farm: Farm) -> int:
    try:
        return int(farm.sql("SELECT count(*) FROM result")[0][0])
    except Exception:  # no table yet
        return 0


def test_a_submit_with_nothing_configured_brings_a_farm_and_takes_it_away(farm: Farm, data: Path) -> None:
    report = farm.submit("--bs", "4")
    assert report["state"] == "done"
    assert report["samples"] == {"total": COUNT, "scored": COUNT, "failed": 0}
    assert {line["device"] for line in report["devices"]} == {"localhost:0", "localhost:1"}
    assert_one_row_a_sample(farm, report["job"], NAMES)
    assert farm.processes() == []


def test_the_digest_is_the_same_on_one_and_on_two_devices(farm: Farm, data: Path) -> None:
    both = farm.submit("--bs", "4")
    one = farm.submit("--bs", "4", "--devices", "localhost:1")
    assert {line["device"] for line in one["devices"]} == {"localhost:1"}
    assert one["digest"] == both["digest"]
    assert one["metrics"] == both["metrics"]


def test_ctrl_c_detaches_and_wait_goes_on(farm: Farm, data: Path) -> None:
    expected = farm.submit("--bs", "4")["digest"]
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    interrupted_at(farm, COUNT + 10)
    command.send_signal(signal.SIGINT)
    stdout, stderr = command.communicate(timeout=30)
    assert command.returncode == 130, stderr
    assert stdout == ""
    assert "farm wait 2" in stderr
    wait_for(lambda: not farm.processes(), 1.0, "no process after the command has ended")
    assert farm.json("status", "2")["state"] == "running"

    resumed = farm.json("wait", "2")
    assert resumed["state"] == "done"
    assert resumed["digest"] == expected
    assert_one_row_a_sample(farm, 2, NAMES)


def test_a_killed_submit_leaves_no_process_and_farm_up_finishes_its_job(farm: Farm, data: Path) -> None:
    expected = farm.submit("--bs", "4")["digest"]
    command = farm.start("submit", "lvvit", "--bs", "4")
    interrupted_at(farm, COUNT + 10)
    command.kill()
    command.communicate()
    wait_for(lambda: not farm.processes(), 5.0, "the ephemeral farm ends with its last waiter")

    farm.run("up")
    wait_for(lambda: farm.json("report", "2")["state"] == "done", 60, "the job ends")
    assert farm.json("report", "2")["digest"] == expected
    assert_one_row_a_sample(farm, 2, NAMES)
    farm.run("down")


def test_a_second_submit_joins_and_the_farm_ends_with_the_last(farm: Farm, data: Path) -> None:
    first = farm.start("submit", "lvvit", "--bs", "4", "--json")
    interrupted_at(farm, 1)
    second = farm.start("submit", "lvvit", "--bs", "4", "--json")
    wait_for(lambda: len(farm.sql("SELECT id FROM job")) == 2, 30, "the second job is there")
    assert len(farm.pids("tasks.local_host")) == 1
    assert first.wait(60) == 0
    assert farm.pids("tasks.local_host"), "the second still waits"
    assert second.wait(60) == 0
    assert {i for (i,) in farm.sql("SELECT incarnation FROM device")} == {1}
    first.communicate()
    second.communicate()


def test_a_waiter_outlives_the_farm_it_joined(farm: Farm, data: Path) -> None:
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    interrupted_at(farm, 1)
    (host,) = farm.pids("tasks.local_host")
    os.kill(host, signal.SIGKILL)
    _, stderr = command.communicate(timeout=90)
    assert command.returncode == 0, stderr
    assert_one_row_a_sample(farm, 1, NAMES)


def test_submit_uses_the_farm_that_is_up_and_leaves_it_up(farm: Farm, data: Path) -> None:
    farm.run("up")
    hosts = farm.pids("tasks.local_host")
    assert farm.submit("--bs", "4")["state"] == "done"
    assert farm.pids("tasks.local_host") == hosts
    assert {i for (i,) in farm.sql("SELECT incarnation FROM device")} == {1}
    farm.run("up")
    assert farm.pids("tasks.local_host") == hosts, "up again changes nothing"
    farm.run("down")
    assert farm.processes() == []


def test_up_makes_an_ephemeral_farm_stay(farm: Farm, data: Path) -> None:
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    interrupted_at(farm, 1)
    farm.run("up")
    assert command.wait(60) == 0
    command.communicate()
    assert len(farm.pids("tasks.local_host")) == 1
    farm.run("down")


def test_a_killed_farm_leaves_no_process(farm: Farm, data: Path) -> None:
    farm.run("up")
    (host,) = farm.pids("tasks.local_host")
    os.kill(host, signal.SIGKILL)
    wait_for(lambda: not farm.processes(), 5.0, "children die with the host")
    farm.run("up")
    farm.run("down")


def test_down_without_a_farm_says_so(farm: Farm) -> None:
    done = farm.run("down", code=2)
    assert "no local farm is up" in done.stderr


def test_a_folder_of_the_users_named_tasks_is_not_imported(farm: Farm, data: Path, tmp_path: Path) -> None:
    trap = tmp_path / "tasks"
    trap.mkdir()
    (trap / "__init__.py").write_text("raise SystemExit('imported the wrong tasks')")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert farm.submit("--bs", "4", "--limit", "8")["state"] == "done"
    finally:
        os.chdir(before)


def test_no_wait_leaves_the_job_for_the_next_farm(farm: Farm, data: Path) -> None:
    done = farm.run("submit", "lvvit", "--bs", "4", "--no-wait")
    assert "farm up" in done.stdout
    assert farm.json("status", "1")["state"] == "pending"
    assert farm.json("wait", "1")["state"] == "done"


def test_a_cancelled_job_ends_its_submit_and_keeps_its_rows(farm: Farm, data: Path) -> None:
    farm.env["FARM_SIMULATED"] = '{"compute_ms": 1000}'  # so long that cancelling, a command too, cannot come too late
    command = farm.start("submit", "lvvit", "--bs", "4", "--backend", "simulated", "--json")
    interrupted_at(farm, 10)
    farm.run("cancel", "1")
    command.communicate(timeout=30)
    assert command.returncode == 1
    kept = _rows(farm)
    assert 10 <= kept < COUNT
    assert farm.json("report", "1")["state"] == "cancelled"
    assert "already" in farm.run("cancel", "1").stdout


@pytest.mark.parametrize("name", ["a?b c", "b#c", "b%20c"])
def test_a_home_with_any_name_works_and_is_private(farm: Farm, name: str) -> None:
    farm.home = farm.home / name
    write_bins(farm.home / "data", 8)
    write_tiny_onnx(farm.home / "data", 4)
    assert farm.submit("--bs", "4")["state"] == "done"
    assert (farm.home / "farm.db").stat().st_mode & 0o077 == 0


def test_up_right_after_a_killed_submit_is_up_for_good(farm: Farm, data: Path) -> None:
    command = farm.start("submit", "lvvit", "--bs", "4")
    interrupted_at(farm, 1)
    command.kill()
    command.communicate()
    sleep(0.4)  # the ephemeral farm is on its way out, its lock still held
    farm.run("up")
    sleep(4)
    assert len(farm.pids("tasks.local_host")) == 1
    farm.run("down")


def test_a_database_locked_by_others_for_longer_than_a_lease_kills_no_worker(farm: Farm, data: Path) -> None:
    farm.env.update(FARM_HEARTBEAT_S="0.5", FARM_LEASE_S="2")
    farm.run("up")
    command = farm.start("submit", "lvvit", "--bs", "4", "--json")
    interrupted_at(farm, 1)
    with sqlite3.connect(farm.home / "farm.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        sleep(5)
        other.execute("ROLLBACK")
    other.close()
    assert command.wait(90) == 0
    command.communicate()
    assert {i for (i,) in farm.sql("SELECT incarnation FROM device")} == {1}
    assert_one_row_a_sample(farm, 1, NAMES)
    farm.run("down")


def test_a_relative_home_is_the_one_in_this_folder(farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bins(farm.home / "data", 8)
    write_tiny_onnx(farm.home / "data", 4)
    farm.env["FARM_HOME"] = farm.home.name
    assert farm.submit("--bs", "4")["state"] == "done"
    assert farm.sql("SELECT state FROM job") == [("done",)]
