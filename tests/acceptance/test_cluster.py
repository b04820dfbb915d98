"""A farm of three hosts, each with an address of its own: what it promises, with the real commands and servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import sleep
from typing import Any

import psutil
import pytest

from farm.data import manifest
from tasks.app import SHARD_TASK, make_app, queue_of
from tests.acceptance.conftest import Farm
from tests.benchmarks.chaos import DROP_KEY, FENCE
from tests.cluster import HEAD, SUBMIT, Cluster, mutate, simulate, wait_for
from tests.datasets import name_of

#: Of a job that lasts for some seconds, and of one that only has to touch every device.
SAMPLES, FEW = 1600, 200
DEVICES = {"a:0", "a:1", "b:0", "c:0"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    env = {"FARM_PROBE_S": "1"}
    root = tmp_path_factory.mktemp("cluster")
    with Cluster(root / "c", slots={"a": 2, "b": 1, "c": 1}, samples=SAMPLES, env=env) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The cluster, up and whole before every test; no job of one is left to the next."""
    if shared.host_env.get("c"):
        start_c_anew(shared, {})
    shared.up()
    yield shared
    for host in shared.slots:
        shared.network.heal(host)
    for job, state in shared.sql("SELECT id, state FROM job"):
        if state in ("pending", "running"):
            shared.run("cancel", str(job))


@pytest.fixture
def odd(shared: Cluster) -> Cluster:
    """The cluster, for tests that start host c anew in another way; the next test that minds starts it as it was."""
    shared.up("a", "b")
    return shared


def assert_exact(cluster: Cluster, job: int, samples: int = SAMPLES) -> None:
    count = cluster.count(job, samples)
    assert count.exact, count
    assert not count.failed
    assert count.digest == cluster.expected_digest(samples)


def submit_few(cluster: Cluster) -> dict[str, Any]:
    """The report of a short job, which must be exact."""
    job = cluster.submit_in_background(limit=FEW)
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job, FEW)
    return cluster.report(job)


def start_c_anew(cluster: Cluster, env: Mapping[str, str]) -> None:
    """Have host c serve its device with other settings; what it was before is forgotten."""
    assert cluster.workers["c"].stop() == 0
    cluster.reconfigure(c=env)
    cluster.execute("UPDATE device SET state = 'gone', strikes = 0, quarantines = 0, reason = '' WHERE name = 'c:0'")
    before = _incarnation(cluster)
    cluster.workers["c"].start()
    wait_for(lambda: _incarnation(cluster) > before, 30, lambda: f"the device is up: {cluster.log('c')[-3000:]}")


def _incarnation(cluster: Cluster) -> int:
    return int(cluster.sql("SELECT coalesce(max(incarnation), 0) FROM device WHERE name = 'c:0'")[0][0])


def under_way(cluster: Cluster) -> int:
    """A job nobody waits for, with some rows."""
    job = cluster.submit_in_background()
    wait_for(lambda: cluster.scored(job) >= 24, 60, lambda: f"{cluster.standing(job)}{cluster.logs()}")
    return job


# -- work ------------------------------------------------------------------------------------------------------------


def test_a_job_from_a_host_without_devices_runs_on_all_and_has_the_digest_of_one_machine(
    cluster: Cluster, tmp_path: Path
) -> None:
    report = json.loads(cluster.run(*SUBMIT, "--limit", str(FEW), "--json", host=HEAD).stdout)
    assert {line["device"] for line in report["devices"]} == DEVICES
    assert_exact(cluster, report["job"], FEW)
    assert not cluster.sql("SELECT 1 FROM device WHERE host = :head", head=HEAD)
    alone = Farm(tmp_path / "home", {"FARM_DATA": str(cluster.root / "data"), **simulate(compute_ms=1)})
    assert alone.submit("--bs", "4", "--backend", "simulated", "--limit", str(FEW))["digest"] == report["digest"]


def test_a_host_whose_bins_are_missing_is_skipped_and_says_why_until_it_has_them(odd: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    start_c_anew(odd, {"FARM_DATA": str(data)})
    report = submit_few(odd)
    job = report["job"]
    assert {line["device"] for line in report["devices"]} == DEVICES - {"c:0"}
    assert "failed" not in {state for (state,) in odd.sql("SELECT state FROM attempt WHERE job_id = :j", j=job)}
    ((host, reason),) = odd.sql("SELECT host, reason FROM unfit WHERE job_id = :job", job=job)
    assert host == "c"
    assert str(data) in reason
    assert "c:" in odd.run("status", str(job)).stdout

    job = odd.submit_in_background(devices=("a:0", "c:0"))
    wait_for(lambda: odd.sql("SELECT 1 FROM unfit WHERE job_id = :j", j=job), 30, "the host is found unfit")
    shutil.copytree(odd.root / "data", data, copy_function=os.link)
    wait_for(lambda: odd.running("c:0"), 30, lambda: f"the host works again: {odd.log('c')[-3000:]}")
    assert odd.finish(job) == "done"
    assert_exact(odd, job)


def test_bins_that_are_missing_on_one_host_are_read_by_the_others(odd: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(odd.root / "data", data, copy_function=os.link)
    directory = manifest.bins_dir(data, "lvvit")
    for number in range(1, SAMPLES + 1, 10):
        manifest.bin_path(directory, name_of(number)).unlink()
    start_c_anew(odd, {"FARM_DATA": str(data)})
    submit_few(odd)


def test_a_sqlite_url_on_a_second_host_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    before = dict(cluster.host_env)
    cluster.host_env["b"] = {"FARM_DATABASE_URL": f"sqlite:///{tmp_path / 'farm.db'}", "FARM_HOME": str(tmp_path)}
    try:
        refused = cluster.run("worker", host="b", code=2)
    finally:
        cluster.host_env = before
    assert "SQLite serves one host only" in refused.stderr
    assert "FARM_DATABASE_URL=postgresql" in refused.stderr


def test_a_second_service_on_a_host_leaves_the_devices_to_the_first(cluster: Cluster) -> None:
    before = cluster.sql("SELECT name, incarnation FROM device WHERE host = 'c'")
    second = cluster.start("worker", host="c")
    try:
        wait_for(lambda: "in use by process" in cluster.log("c"), 30, "the second says why")
        submit_few(cluster)
    finally:
        second.terminate()
        second.communicate(timeout=40)
    assert second.returncode == 0
    assert cluster.sql("SELECT name, incarnation FROM device WHERE host = 'c'") == before


def test_messages_of_attempts_that_ended_do_nothing(cluster: Cluster) -> None:
    job = submit_few(cluster)["job"]
    every = "SELECT id, shard_id, device, state, started, ended FROM attempt WHERE job_id = :job ORDER BY id"
    before = cluster.sql(every, job=job)
    with make_app(cluster.valkey.url()) as app:
        for attempt, shard, device, *_ in before:
            app.send_task(SHARD_TASK, args=[shard, attempt], queue=queue_of(device))
    wait_for(lambda: not cluster.waiting(), 30, "the messages are taken")
    assert cluster.sql(every, job=job) == before
    submit_few(cluster)


# -- users -----------------------------------------------------------------------------------------------------------


def test_the_job_of_a_killed_client_goes_on_and_wait_attaches_to_it(cluster: Cluster) -> None:
    command = cluster.start(*SUBMIT, "--json")
    job = wait_for(lambda: cluster.sql("SELECT id FROM job WHERE state = 'running'"), 30, "the job runs")[0][0]
    command.kill()
    command.communicate()
    report = json.loads(cluster.run("wait", str(job), "--json").stdout)
    assert report["state"] == "done"
    assert_exact(cluster, job)


def test_ctrl_c_detaches_and_leaves_the_job_to_the_farm(cluster: Cluster) -> None:
    command = cluster.start(*SUBMIT, "--json")
    job = wait_for(lambda: cluster.sql("SELECT id FROM job WHERE state = 'running'"), 30, "the job runs")[0][0]
    wait_for(lambda: cluster.scored(job) >= 24, 30, "some rows are there")
    command.send_signal(signal.SIGINT)
    stdout, stderr = command.communicate(timeout=30)
    assert command.returncode == 130
    assert stdout == ""
    assert f"farm wait {job}" in stderr
    assert cluster.finish(job) == "done"


def test_a_cancelled_job_takes_no_late_rows(cluster: Cluster) -> None:
    job = under_way(cluster)
    cluster.run("cancel", str(job))
    kept = cluster.scored(job)
    assert 0 < kept < SAMPLES
    assert "already" in cluster.run("cancel", str(job)).stdout
    submit_few(cluster)  # what still ran of the cancelled one has ended meanwhile
    assert cluster.scored(job) == kept
    assert cluster.report(job)["state"] == "cancelled"


def test_with_all_devices_gone_a_job_waits_and_its_client_says_so(cluster: Cluster) -> None:
    command = cluster.start(*SUBMIT, "--json")
    wait_for(lambda: cluster.sql("SELECT id FROM job WHERE state = 'running'"), 30, "the job runs")
    cluster.stop_workers()
    assert command.stderr is not None
    said = ""
    while "a:0 gone" not in said:  # lines are as wide as a terminal
        line = command.stderr.readline()
        assert line, f"it ended: {said}"
        said += line
    assert "waiting: no device takes work" in " ".join(said.split())
    cluster.up()
    _, stderr = command.communicate(timeout=120)
    assert command.returncode == 0, stderr


# -- hosts, workers and servers that break -----------------------------------------------------------------------------


def test_a_host_that_is_cut_off_loses_its_shards_and_works_again_when_it_is_back(cluster: Cluster) -> None:
    if not cluster.network.can_cut:
        pytest.skip("needs root and ip: hosts on one loopback cannot be cut off")
    job = under_way(cluster)
    cluster.network.partition("b")
    lost = "SELECT 1 FROM attempt WHERE job_id = :job AND device LIKE 'b:%' AND reason = 'its device vanished'"
    wait_for(lambda: cluster.sql(lost, job=job), 30, lambda: f"what it held is taken back: {cluster.standing(job)}")
    assert cluster.live() == DEVICES - {"b:0"}
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job)
    cluster.network.heal("b")
    wait_for(lambda: cluster.live() >= DEVICES, 60, lambda: f"the host is back: {cluster.log('b')[-2000:]}")
    assert {line["device"] for line in submit_few(cluster)["devices"]} == DEVICES
    assert_exact(cluster, job)


def test_killed_workers_device_processes_and_services_cost_attempts_and_no_digit(cluster: Cluster) -> None:
    job = under_way(cluster)
    os.kill(cluster.worker_pid("a:0"), signal.SIGKILL)
    os.kill(cluster.device_pids("b")[0], signal.SIGKILL)
    devices = cluster.device_pids("c")
    cluster.workers["c"].kill()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in devices), 2, "no device process outlives its service")
    cluster.coordinator.kill()
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job)


def test_a_host_told_to_leave_finishes_what_runs_and_hands_back_what_waits(cluster: Cluster) -> None:
    job = under_way(cluster)
    wait_for(lambda: cluster.running("b:0"), 30, "the host is busy")
    cluster.workers["b"].signal(signal.SIGTERM)
    sleep(0.2)
    assert cluster.workers["b"].stop() == 0, "a second SIGTERM is harmless"
    on_b = "SELECT state, started IS NULL, reason FROM attempt WHERE job_id = :job AND device LIKE 'b:%'"
    ended = cluster.sql(on_b, job=job)
    assert {state for state, *_ in ended} <= {"won", "lost"}, ended
    assert all(never_started for state, never_started, _ in ended if state == "lost"), "nothing that ran is redone"
    assert not cluster.pids("tasks.worker", "b")
    assert not cluster.device_pids("b")
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job)


@pytest.mark.parametrize("how", ["killed", "wiped", "flushed"])
def test_a_broker_that_breaks_costs_time_and_no_sample(cluster: Cluster, how: str) -> None:
    job = under_way(cluster)
    if how == "flushed":
        cluster.valkey.flushall()
    else:
        cluster.valkey.kill()
        sleep(3)
        if how == "wiped":
            cluster.valkey.wipe()
        cluster.valkey.start()
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job)
    submit_few(cluster)  # an idle farm answers again, too


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_restarts_costs_time_and_no_sample(cluster: Cluster, mode: str) -> None:
    command = cluster.start(*SUBMIT, "--json")
    running = "SELECT id FROM job WHERE state = 'running'"
    job = wait_for(lambda: cluster.sql(running), 30, "the job runs")[0][0]
    wait_for(lambda: cluster.scored(job) >= 24, 30, "some rows are there")
    cluster.postgres.restart(mode)
    assert cluster.finish(job) == "done"
    assert_exact(cluster, job)
    _, stderr = command.communicate(timeout=60)
    assert command.returncode == 0, stderr


def test_a_clock_that_is_an_hour_off_loses_nobody_a_shard(odd: Cluster) -> None:
    start_c_anew(odd, {"FARM_CLOCK_OFFSET_S": "-3600"})
    report = submit_few(odd)
    assert set(report["attempts"]) == {"won"}
    assert {line["device"] for line in report["devices"]} == DEVICES


# -- devices that misbehave --------------------------------------------------------------------------------------------


def test_a_device_twenty_times_slower_is_relieved_and_writes_nothing_late(odd: Cluster) -> None:
    start_c_anew(odd, simulate({"kind": "slow", "factor": 20}))
    job = submit_few(odd)["job"]
    # Others do its last shard, too, or it was not given a whole one: what was cut off is numbered after the samples.
    helped = odd.sql("SELECT 1 FROM event WHERE job_id = :job AND kind = 'speculated'", job=job)
    spared = odd.sql("SELECT 1 FROM shard JOIN job ON job.id = job_id WHERE job_id = :job AND idx > samples", job=job)
    assert helped or spared
    ((shards,),) = odd.sql("SELECT count(*) FROM attempt WHERE job_id = :job AND device = 'c:0'", job=job)
    assert shards
    twice = "SELECT shard_id FROM attempt WHERE job_id = :job AND state = 'won' GROUP BY 1 HAVING count(*) > 1"
    assert not odd.sql(twice, job=job)


@pytest.mark.parametrize("kind", ["error", "hang", "wrong"])
def test_a_device_that_only_fails_is_quarantined_and_no_job_suffers(odd: Cluster, kind: str) -> None:
    start_c_anew(odd, {**simulate({"kind": kind}), "FARM_DEADLINE_S": "0.5"})
    quarantined = "SELECT reason FROM device WHERE name = 'c:0' AND state = 'quarantined'"
    for _ in range(4):
        submit_few(odd)
        if odd.sql(quarantined):
            break
    assert odd.sql(quarantined), odd.log("c")[-3000:]
    assert "quarantined" in odd.run("devices").stdout


# -- a worker that comes back late, and what would happen without protection -----------------------------------------

ALARM = "refused a row that must not exist"
#: A worker that finds the file stops itself right before its commit.
STOP_BEFORE_COMMIT = (
    "db.shards",
    "",
    """
_complete = complete


def complete(*arguments, **named):
    import os, signal

    try:
        os.unlink(os.environ["TEST_STOP"])
    except FileNotFoundError:
        pass
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _complete(*arguments, **named)
""",
)


def come_back_late(cluster: Cluster, tmp_path: Path, *mutations: tuple[str, str, str]) -> tuple[int, int]:
    """A worker, its source changed, stops before a commit until another has won: the job, and the late attempt."""
    mark = tmp_path / "stop"
    env = {**mutate(tmp_path, [STOP_BEFORE_COMMIT, *mutations]), "TEST_STOP": str(mark)}
    start_c_anew(cluster, env)
    mark.touch()
    job = cluster.submit_in_background(limit=FEW)
    worker = psutil.Process(cluster.worker_pid("c:0"))
    wait_for(lambda: worker.status() == psutil.STATUS_STOPPED, 30, "the worker stops before its commit")
    ((attempt, shard),) = cluster.sql("SELECT id, shard_id FROM attempt WHERE device = 'c:0' AND state = 'running'")
    won = "SELECT 1 FROM shard WHERE id = :shard AND state = 'done'"
    alarms = cluster.log("c").count(ALARM)
    wait_for(lambda: cluster.sql(won, shard=shard), 30, lambda: f"another wins: {cluster.standing(job)}")
    worker.send_signal(signal.SIGCONT)
    wait_for(
        lambda: (
            cluster.sql("SELECT 1 FROM attempt WHERE id = :id AND state = 'fenced'", id=attempt)
            or cluster.sql("SELECT 1 FROM result WHERE attempt_id = :id", id=attempt)
            or cluster.log("c").count(ALARM) > alarms
        ),
        30,
        "the worker commits, is fenced, or raises the alarm",
    )
    cluster.finish(job)
    return job, attempt


def test_a_worker_stopped_beyond_its_lease_is_fenced_when_it_comes_back(odd: Cluster, tmp_path: Path) -> None:
    job, attempt = come_back_late(odd, tmp_path)
    assert odd.sql("SELECT state FROM attempt WHERE id = :id", id=attempt) == [("fenced",)]
    assert odd.sql("SELECT device FROM event WHERE kind = 'fenced' AND attempt_id = :id", id=attempt) == [("c:0",)]
    assert not odd.sql("SELECT 1 FROM result WHERE attempt_id = :id", id=attempt)
    assert_exact(odd, job, FEW)


def test_without_the_check_at_the_commit_the_unique_key_raises_the_alarm(odd: Cluster, tmp_path: Path) -> None:
    job, attempt = come_back_late(odd, tmp_path, FENCE)
    assert ALARM in odd.log("c")
    assert odd.sql("SELECT state FROM attempt WHERE id = :id", id=attempt) != [("fenced",)]
    assert not odd.sql("SELECT 1 FROM result WHERE attempt_id = :id", id=attempt)
    assert_exact(odd, job, FEW)


def test_without_the_unique_key_either_counting_finds_what_was_written_twice(odd: Cluster, tmp_path: Path) -> None:
    odd.execute(DROP_KEY)
    try:
        job, _ = come_back_late(odd, tmp_path, FENCE)
        assert odd.count(job, FEW).duplicates > 0
    finally:
        for (job,) in odd.sql("SELECT id FROM job"):
            if odd.count(job, FEW).duplicates:
                odd.execute("DELETE FROM result WHERE job_id = :job", job=job)
        odd.execute("ALTER TABLE result ADD CONSTRAINT pk_result PRIMARY KEY (job_id, name, superseded)")
