"""
What can go wrong, and which test shows that the farm withstands it. Here are also the tests that fit nowhere else:
processes that die at one certain instruction, and the farm without one of its protections, which must be found out.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import sleep

import pytest

from db import shards
from db.engine import Database
from farm.jobs import JobState
from farm.settings import Settings
from tasks import coordinator
from tasks.app import make_app, worker_name
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.cluster import mutate, simulate
from tests.contract.conftest import LEASE_S, Fleet
from tests.datasets import name_of, write_bins
from workers import broker

ROOT = Path(__file__).parents[2]

_ACCEPTANCE, _CONTRACT, _INTEGRATION = "tests/acceptance/test_", "tests/contract/test_", "tests/integration/test_"


def _tests(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}{name}" for name in names]


#: What can go wrong: the tests of it, each FILE::FUNCTION.
CHECKLIST: Mapping[str, list[str]] = {
    "1 a worker is killed before its start, mid-shard, or after its commit": [
        *_tests(_ACCEPTANCE, "checklist.py::test_a_worker_killed_at_the_worst_moment_leaves_one_row_a_sample"),
        *_tests(_ACCEPTANCE, "kills.py::test_workers_killed_five_times_each_and_the_broker_once_change_no_digit"),
        *_tests(_CONTRACT, "storage.py::test_a_new_incarnation_orphans_the_old_ones_attempts_at_once"),
        *_tests(_CONTRACT, "storage.py::test_a_device_not_heard_of_for_a_lease_is_an_orphan"),
    ],
    "2 a device process dies; it dies with its worker": [
        *_tests(_ACCEPTANCE, "faults.py::test_a_device_process_that_breaks_costs_one_attempt"),
        *_tests(_INTEGRATION, "pipeline.py::test_a_device_process_that_was_killed_is_replaced"),
        *_tests(_INTEGRATION, "pipeline.py::test_a_hanging_device_process_dies_with_its_killed_worker"),
        *_tests(
            _ACCEPTANCE, "cluster.py::test_killed_workers_device_processes_and_services_cost_attempts_and_no_digit"
        ),
    ],
    "3 a call into the device hangs": [
        *_tests(_ACCEPTANCE, "checklist.py::test_a_worker_whose_device_hangs_beats_and_answers_meanwhile"),
        *_tests(_INTEGRATION, "pipeline.py::test_a_batch_that_hangs_is_cut_off_and_named"),
    ],
    "4 a worker is stopped beyond its lease and comes back": [
        *_tests(_ACCEPTANCE, "cluster.py::test_a_worker_stopped_beyond_its_lease_is_fenced_when_it_comes_back"),
        *_tests(_ACCEPTANCE, "kills.py::test_a_stopped_worker_is_killed_after_its_lease_and_its_shard_done_elsewhere"),
        *_tests(_ACCEPTANCE, "checklist.py::test_a_worker_stopped_inside_a_write_transaction_holds_nobody_up_for_long"),
        *_tests(_INTEGRATION, "postgres.py::test_what_a_silent_host_has_locked_is_free_before_its_lease_is_over"),
    ],
    "5 a message is lost, or comes five times": [
        *_tests(_ACCEPTANCE, "checklist.py::test_bells_that_are_lost_or_ring_five_times_change_nothing"),
        *_tests(_CONTRACT, "storage.py::test_a_bell_that_rings_twice_starts_once"),
        *_tests(_CONTRACT, "storage.py::test_an_idle_device_that_does_not_answer_is_rung_again"),
    ],
    "6 a message of an attempt that ended comes late": [
        *_tests(_ACCEPTANCE, "cluster.py::test_messages_of_attempts_that_ended_do_nothing"),
        *_tests(_CONTRACT, "storage.py::test_an_attempt_that_is_not_started_is_not_touched"),
    ],
    "7 the broker is killed, restarted, wiped": [
        *_tests(_ACCEPTANCE, "cluster.py::test_a_broker_that_breaks_costs_time_and_no_sample"),
        *_tests(_ACCEPTANCE, "chaos.py::test_random_faults_lose_nothing_double_nothing_and_leave_nothing"),
        *_tests(_INTEGRATION, "broker.py::test_what_the_broker_was_told_survives_its_death"),
    ],
    "8 the coordinator is killed at the worst moment; several tick at once": [
        *_tests(_ACCEPTANCE, "checklist.py::test_a_coordinator_killed_at_the_worst_moment_is_made_up_for"),
        *_tests(_CONTRACT, "storage.py::test_four_coordinators_at_once_assign_every_shard_once"),
        *_tests(_CONTRACT, "storage.py::test_four_settlers_at_once_settle_once"),
    ],
    "9 the database is locked, restarted, out of disk; a host cut off holds row locks": [
        *_tests(_ACCEPTANCE, "local_farm.py::test_a_database_locked_by_others_for_longer_than_a_lease_kills_no_worker"),
        *_tests(_ACCEPTANCE, "cluster.py::test_a_database_that_restarts_costs_time_and_no_sample"),
        *_tests(_INTEGRATION, "postgres.py::test_a_restart_before_the_commit_is_a_storage_error_that_leaves_nothing"),
        *_tests(_INTEGRATION, "postgres.py::test_what_a_silent_host_has_locked_is_free_before_its_lease_is_over"),
        *_tests(_INTEGRATION, "migrations.py::test_a_commit_that_the_disk_refused_left_nothing_and_can_be_done_again"),
        *_tests(_ACCEPTANCE, "bad_input.py::test_a_full_disk_stops_a_job_that_goes_on_when_there_is_room"),
    ],
    "10 a device vanishes and returns; all do": [
        *_tests(
            _ACCEPTANCE, "cluster.py::test_a_host_that_is_cut_off_loses_its_shards_and_works_again_when_it_is_back"
        ),
        *_tests(_ACCEPTANCE, "cluster.py::test_with_all_devices_gone_a_job_waits_and_its_client_says_so"),
    ],
    "11 a device is twenty times slower": [
        *_tests(
            _ACCEPTANCE,
            "cluster.py::test_a_device_twenty_times_slower_is_relieved_and_writes_nothing_late",
        ),
        *_tests(_CONTRACT, "many_hosts.py::test_the_slow_one_writes_nothing_when_the_second_attempt_has_won"),
    ],
    "12 a sample breaks the device process, or its scores are no numbers, or rows are missing": [
        *_tests(_ACCEPTANCE, "faults.py::test_a_sample_that_always_breaks_is_named_and_the_others_are_scored"),
        *_tests(_ACCEPTANCE, "faults.py::test_the_scored_samples_of_a_shard_with_a_culprit_keep_their_digits"),
        *_tests(_CONTRACT, "storage.py::test_a_wrong_number_of_rows_is_an_alarm"),
    ],
    "13 a device fails everything, or is wrong": [
        *_tests(_ACCEPTANCE, "cluster.py::test_a_device_that_only_fails_is_quarantined_and_no_job_suffers"),
        *_tests(_CONTRACT, "storage.py::test_three_failures_of_a_device_quarantine_it"),
        *_tests(_CONTRACT, "many_hosts.py::test_a_wrong_answer_costs_the_attempt_and_quarantines_the_device"),
    ],
    "14 a host is told to leave under load": [
        *_tests(_ACCEPTANCE, "cluster.py::test_a_host_told_to_leave_finishes_what_runs_and_hands_back_what_waits"),
        *_tests(_INTEGRATION, "supervisor.py::test_stopping_kills_a_child_that_does_not_listen"),
    ],
    "15 a job is cancelled at any time, twice, and commits come late": [
        *_tests(_CONTRACT, "storage.py::test_cancelling_takes_assigned_and_running_attempts_away"),
        *_tests(_CONTRACT, "storage.py::test_settling_a_cancelled_job_leaves_it_cancelled"),
        *_tests(_CONTRACT, "storage.py::test_cancelling_twice_changes_nothing"),
        *_tests(_ACCEPTANCE, "cluster.py::test_a_cancelled_job_takes_no_late_rows"),
    ],
    "16 a client detaches, is killed, attaches again": [
        *_tests(_ACCEPTANCE, "cluster.py::test_ctrl_c_detaches_and_leaves_the_job_to_the_farm"),
        *_tests(_ACCEPTANCE, "cluster.py::test_the_job_of_a_killed_client_goes_on_and_wait_attaches_to_it"),
        *_tests(_ACCEPTANCE, "local_farm.py::test_a_killed_submit_leaves_no_process_and_farm_up_finishes_its_job"),
    ],
    "17 a host's clock is an hour off": [
        *_tests(_ACCEPTANCE, "cluster.py::test_a_clock_that_is_an_hour_off_loses_nobody_a_shard"),
        *_tests(_INTEGRATION, "postgres.py::test_a_hosts_clock_matters_only_where_it_is_the_one_clock"),
    ],
    "18 a row is deleted by hand": [*_tests(_CONTRACT, "storage.py::test_a_row_that_is_missing_fails_the_job")],
    "19 both sides of the lease; the last attempt allowed; many orphans": [
        *_tests(_CONTRACT, "storage.py::test_a_device_not_heard_of_within_its_lease_is_no_orphan"),
        *_tests(_CONTRACT, "storage.py::test_a_device_not_heard_of_for_a_lease_is_an_orphan"),
        *_tests(_CONTRACT, "storage.py::test_five_failures_of_a_shard_do_not_fail_its_job"),
        *_tests(_CONTRACT, "storage.py::test_six_failures_of_a_shard_fail_its_job"),
        *_tests(_ACCEPTANCE, "checklist.py::test_all_that_a_hundred_devices_held_is_taken_back_at_once"),
    ],
    "20 SQLite with many writers and a long reader, on a network's disk, on a second host": [
        *_tests(_CONTRACT, "storage.py::test_four_devices_at_once_win_every_shard_once"),
        *_tests(_CONTRACT, "storage.py::test_a_reader_blocks_no_writer"),
        *_tests(_CONTRACT, "storage.py::test_a_second_writer_waits_from_its_first_statement"),
        *_tests(_INTEGRATION, "postgres.py::test_sqlite_on_a_network_file_system_is_refused"),
        *_tests(_ACCEPTANCE, "cluster.py::test_a_sqlite_url_on_a_second_host_is_refused"),
    ],
    "21 two farms want one home or one device; stale locks and sockets": [
        *_tests(_ACCEPTANCE, "local_farm.py::test_a_second_submit_joins_and_the_farm_ends_with_the_last"),
        *_tests(_ACCEPTANCE, "local_farm.py::test_up_right_after_a_killed_submit_is_up_for_good"),
        *_tests(_ACCEPTANCE, "cluster.py::test_a_second_service_on_a_host_leaves_the_devices_to_the_first"),
        *_tests(_INTEGRATION, "broker.py::test_what_a_killed_broker_left_is_replaced"),
    ],
    "22 the embedded broker": [
        *_tests(_INTEGRATION, "broker.py::test_what_a_killed_broker_left_is_replaced"),
        *_tests(_INTEGRATION, "broker.py::test_a_broker_of_a_long_home_answers_from_a_short_private_directory"),
        *_tests(_INTEGRATION, "broker.py::test_the_brokers_socket_and_directories_are_private"),
        *_tests(_INTEGRATION, "broker.py::test_the_broker_listens_on_no_port"),
        *_tests(_INTEGRATION, "broker.py::test_a_broker_is_gone_with_its_killed_owner"),
        *_tests(_INTEGRATION, "broker.py::test_what_the_broker_was_told_survives_its_stop"),
    ],
    "23 pickles, unknown tasks, arguments that are no ids, passwords": [
        *_tests(_INTEGRATION, "security.py::test_a_pickle_is_refused_and_the_worker_goes_on"),
        *_tests(_INTEGRATION, "security.py::test_an_unknown_task_is_refused_and_the_worker_goes_on"),
        *_tests(_INTEGRATION, "security.py::test_arguments_that_are_no_ids_are_refused_and_the_worker_goes_on"),
        *_tests(_INTEGRATION, "security.py::test_a_farm_works_under_these_rules_and_its_secrets_are_nowhere"),
        *_tests(_INTEGRATION, "flower.py::test_with_a_password_nothing_is_shown_without_it"),
    ],
    "24 what Flower shows, and how much of it": [
        *_tests(_INTEGRATION, "flower.py::test_flower_shows_the_worker_the_task_and_its_arguments"),
        *_tests(_INTEGRATION, "flower.py::test_metrics_and_the_brokers_memory_do_not_grow_with_shards"),
    ],
    "25 a protection is taken away": [
        *_tests(_ACCEPTANCE, "checklist.py::test_a_protection_that_is_taken_away_is_missed"),
        *_tests(_ACCEPTANCE, "cluster.py::test_without_the_check_at_the_commit_the_unique_key_raises_the_alarm"),
        *_tests(_ACCEPTANCE, "cluster.py::test_without_the_unique_key_either_counting_finds_what_was_written_twice"),
    ],
    # For hours it is a program: python -m tests.benchmarks.chaos --minutes 240
    "26 random faults for long": [
        *_tests(_ACCEPTANCE, "chaos.py::test_random_faults_lose_nothing_double_nothing_and_leave_nothing")
    ],
}


@pytest.mark.parametrize("item", CHECKLIST)
def test_what_can_go_wrong_is_tested_by_tests_that_exist(item: str) -> None:
    for test in CHECKLIST[item]:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


# -- processes that die at one certain instruction ------------------------------------------------------------------

COUNT = 48

_ONCE = """
def _once():
    import os

    try:
        os.unlink(os.environ["TEST_MARK"])
    except FileNotFoundError:
        return False
    return True


def _end(number=9):
    import os

    os.kill(os.getpid(), number)

"""


@pytest.fixture
def simulated(farm: Farm, tmp_path: Path) -> Farm:
    """A farm of two simulated devices, with short times and a file that a changed process looks for."""
    write_bins(farm.home / "data", COUNT)
    times = {"FARM_HEARTBEAT_S": "0.3", "FARM_LEASE_S": "5", "FARM_SHARD_S": "0.2"}
    farm.env.update(times, **simulate(compute_ms=20), TEST_MARK=str(tmp_path / "mark"))
    return farm


def change(farm: Farm, tmp_path: Path, module: str, code: str) -> None:
    """Have this code at the end of a module, in every process of the farm."""
    farm.env.update(mutate(tmp_path / "changed", [(module, "", _ONCE + code)]))
    Path(farm.env["TEST_MARK"]).touch()


def submit_changed(farm: Farm) -> dict[str, object]:
    """The report of a job in which the change has struck and left no trace in the rows."""
    report = farm.submit("--bs", "4", "--backend", "simulated")
    assert report["state"] == "done"
    assert not Path(farm.env["TEST_MARK"]).exists(), "the change was never met"
    assert_one_row_a_sample(farm, 1, [name_of(number) for number in range(1, COUNT + 1)])
    return report


_BEFORE = "_real = {0}\ndef {0}(*a, **k):\n    _once() and _end()\n    return _real(*a, **k)"
_AFTER = "_real = {0}\ndef {0}(*a, **k):\n    found = _real(*a, **k)\n    _once() and _end()\n    return found"


@pytest.mark.parametrize(
    ("moment", "lost"),
    [(_BEFORE.format("start"), 1), (_AFTER.format("start"), 1), (_AFTER.format("complete"), 0)],
    ids=["before its start", "mid-shard", "after its commit"],
)
def test_a_worker_killed_at_the_worst_moment_leaves_one_row_a_sample(
    simulated: Farm, tmp_path: Path, moment: str, lost: int
) -> None:
    change(simulated, tmp_path, "db.shards", moment)
    submit_changed(simulated)
    ((found,),) = simulated.sql("SELECT count(*) FROM attempt WHERE state = 'lost'")
    assert found >= lost
    assert max(simulated.sql("SELECT incarnation FROM device")) == (2,)


def test_a_worker_stopped_inside_a_write_transaction_holds_nobody_up_for_long(simulated: Farm, tmp_path: Path) -> None:
    stop = "_insert = insert\ndef insert(*a):\n    _insert(*a)\n    _once() and _end(19)"
    change(simulated, tmp_path, "db.results", stop)
    submit_changed(simulated)
    assert "is stopped and its lease is over: killed" in simulated.logs()


@pytest.mark.parametrize(
    "ringing",
    ["def ring(app, rings):\n    return [_ring(app, rings) for _ in range(5)][0]",
     "def ring(app, rings):\n    return len(rings) if rings and _once() else _ring(app, rings)"],
    ids=["five times", "lost"],
)  # fmt: skip
def test_bells_that_are_lost_or_ring_five_times_change_nothing(simulated: Farm, tmp_path: Path, ringing: str) -> None:
    change(simulated, tmp_path, "tasks.dispatch", f"_ring = ring\n{ringing}")
    if "_once" not in ringing:
        Path(simulated.env["TEST_MARK"]).unlink()
    report = submit_changed(simulated)
    assert set(report["attempts"]) == {"won"}  # type: ignore[call-overload]


def test_a_worker_whose_device_hangs_beats_and_answers_meanwhile(simulated: Farm, tmp_path: Path) -> None:
    hang = {"kind": "hang", "batch": 2, "device": "localhost:1", "once": str(tmp_path / "hung")}
    simulated.env.update(simulate(hang, compute_ms=20), FARM_DEADLINE_S="6")
    command = simulated.start("submit", "lvvit", "--bs", "4", "--backend", "simulated", "--json")
    wait_for((tmp_path / "hung").exists, 60, "a device hangs")
    settings = Settings(home=simulated.home)
    with make_app(broker.url(settings)) as app:
        beats = set()
        for _ in range(3):
            beats |= set(simulated.sql("SELECT heartbeat FROM device WHERE name = 'localhost:1'"))
            name = worker_name("localhost:1")
            assert app.control.ping(destination=[name], timeout=2, limit=1) == [{name: {"ok": "pong"}}]
            sleep(0.4)
    assert len(beats) > 1
    running = "SELECT count(*) FROM attempt WHERE device = 'localhost:1' AND state = 'running'"
    assert simulated.sql(running) == [(1,)], "it hung all the while"
    stdout, stderr = command.communicate(timeout=60)
    assert command.returncode == 0, stderr
    assert json.loads(stdout)["state"] == "done"
    reasons = {reason for (reason,) in simulated.sql("SELECT reason FROM attempt WHERE state = 'lost'")}
    assert "its device vanished" not in reasons
    assert max(simulated.sql("SELECT incarnation FROM device")) == (1,)


# -- the coordinator -------------------------------------------------------------------------------------------------

TICK = """
import sys
from db.engine import Database
from farm.settings import Settings
from tasks import coordinator
from tasks.app import make_app

settings = Settings(home=sys.argv[1], broker_url="redis://127.0.0.1:1/0", clock_offset_s=float(sys.argv[3]))
coordinator.tick(Database(sys.argv[2], clock_offset_s=settings.clock_offset_s), make_app(settings.broker_url), settings)
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    database = Database(f"sqlite:///{tmp_path / 'farm.db'}")
    database.ensure_schema()
    return Fleet(database)


def tick_changed(fleet: Fleet, tmp_path: Path, module: str, code: str) -> int:
    """A coordinator's tick, its source changed, in a process of its own: its exit code."""
    (tmp_path / "mark").touch()
    env = {**mutate(tmp_path / "changed", [(module, "", _ONCE + code)]), "TEST_MARK": str(tmp_path / "mark")}
    command = [sys.executable, "-c", TICK, str(tmp_path), str(fleet.database.url), str(fleet.database.clock_offset_s)]
    return subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, check=False, timeout=60).returncode


def _end_at(kind: str) -> str:
    """Code for `db.events`: the end comes right after an event of this kind was written."""
    name = "record(c, at, kind, *a, **k)"
    return f"_record = record\ndef {name}:\n    _{name}\n    kind == '{kind}' and _end()"


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("tasks.coordinator", "def ring(*a):\n    _end()"),
        ("db.events", _end_at("attempt_lost")),
        ("db.events", _end_at("job_done")),
    ],
    ids=["between commit and ring", "during a rescue", "while it settles"],
)
def test_a_coordinator_killed_at_the_worst_moment_is_made_up_for(
    fleet: Fleet, tmp_path: Path, module: str, code: str
) -> None:
    worker, done, half = fleet.worker(), fleet.job(samples=1), fleet.job(samples=2)
    worker.complete(worker.take())
    worker.take()
    fleet.later(LEASE_S + 1)
    returned = fleet.worker(1)  # one device vanished, another is there: there is something to rescue, ring and settle
    assert tick_changed(fleet, tmp_path, module, code) == -9
    fleet.later(coordinator.RING_AGAIN_S + 1)
    returned.beat()
    assert tick_changed(fleet, tmp_path, "tasks.coordinator", "") == 0
    assert fleet.state_of(done) is JobState.DONE
    assert len(fleet.events("job_done")) == 1
    assert len(fleet.events("attempt_lost")) == 2
    assert len(fleet.held(returned)) == 2
    assert fleet.state_of(half) is JobState.RUNNING


def test_all_that_a_hundred_devices_held_is_taken_back_at_once(fleet: Fleet) -> None:
    job = fleet.job(samples=300)
    for index in range(100):
        fleet.worker(index)
    assert len(fleet.assign()) == 200
    fleet.later(LEASE_S + 1)
    assert fleet.rescue() == 200
    assert fleet.shards(job) == ["pending"] * 300


# -- without a protection --------------------------------------------------------------------------------------------


def test_a_coordinator_rings_for_nothing_that_is_not_committed(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.job()
    fleet.worker()
    rung: list[int] = []

    def ring(_: object, rings: list[shards.Ring]) -> None:
        other = Database(fleet.database.url)
        with other.read() as conn:
            for each in rings:
                state = conn.exec_driver_sql(f"SELECT state FROM attempt WHERE id = {each.assignment.attempt_id}")
                assert state.scalar() == "assigned"
                rung.append(each.assignment.attempt_id)
        other.close()

    monkeypatch.setattr(coordinator, "ring", ring)
    settings = Settings(home=tmp_path, broker_url="redis://127.0.0.1:1/0")
    coordinator.tick(fleet.database, make_app(settings.broker_url), settings)
    assert len(rung) == shards.WINDOW


#: What is taken away: a module, its text, another text; and the test that must fail then.
PROTECTIONS = {
    "the live-attempt check at the start": (
        ("db.shards", '.where(a.id == bindparam("attempt"), mine)',
         '.where(a.id == bindparam("attempt"), or_(mine, a.id > 0))'),
        "tests/contract/test_storage.py::test_a_bell_that_rings_twice_starts_once[sqlite]",
    ),
    "the live-attempt check at the commit": (
        ("db.shards", "    if won.rowcount != 1 or done.rowcount != 1:\n        raise _Fenced\n", ""),
        "tests/contract/test_storage.py::test_of_two_live_attempts_the_slower_comes_too_late[sqlite]",
    ),
    "the unique key": (
        ("db.tables", 'Column("name", String(255), primary_key=True),\n    # 0: the row that counts.',
         'Column("name", String(255)),\n    # 0: the row that counts.'),
        "tests/contract/test_storage.py::test_a_second_row_for_a_sample_is_an_alarm[sqlite]",
    ),
    "the commit before the ring": (
        ("tasks.coordinator", "            rings += shards.assign(",
         "            ring(app, shards.assign(conn, database, lease_s))\n            rings += shards.assign("),
        "tests/acceptance/test_checklist.py::test_a_coordinator_rings_for_nothing_that_is_not_committed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_protection_that_is_taken_away_is_missed(protection: str, tmp_path: Path) -> None:
    mutation, test = PROTECTIONS[protection]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    for env, code, said in (({}, 0, "1 passed"), (mutate(tmp_path / "changed", [mutation]), 1, "1 failed")):
        done = subprocess.run(
            command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stdout
