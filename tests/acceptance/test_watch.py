"""What a user sees of jobs, devices and hosts, and the commands that act on them."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from select import select
from time import monotonic
from typing import Any

import pytest
from sqlalchemy import insert

from db import overview, shards, tables
from db.engine import Database
from farm.cli.arguments import since
from farm.cli.progress import waits_for
from farm.data import manifest
from farm.errors import UsageError
from farm.jobs import DeviceState
from farm.settings import Settings
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.cluster import SUBMIT, Cluster
from tests.contract.conftest import Fleet
from tests.datasets import name_of, write_bins

COUNT = 96
NAMES = [name_of(i) for i in range(1, COUNT + 1)]
CULPRIT = name_of(11)
JOB = ("submit", "lvvit", "--bs", "4", "--backend", "simulated")


@pytest.fixture
def simulated(farm: Farm) -> Farm:
    write_bins(farm.home / "data", COUNT)
    simulate(farm)
    farm.env |= {"FARM_SHARD_S": "0.3", "FARM_DEADLINE_S": "0.5"}
    return farm


def simulate(farm: Farm, *faults: Mapping[str, Any], compute_ms: float = 20) -> None:
    farm.env["FARM_SIMULATED"] = json.dumps({"compute_ms": compute_ms, "faults": faults})


def evaluate(farm: Farm, *arguments: str, code: int = 0) -> dict[str, Any]:
    return farm.submit("--bs", "4", "--backend", "simulated", *arguments, code=code)


def spoilt(farm: Farm) -> dict[str, str]:
    """A fault that leaves one sample failed."""
    samples = manifest.read(manifest.bins_dir(farm.home / "data", "lvvit")).samples
    return {"kind": "nan", "sample": next(sample.xxh3 for sample in samples if sample.name == CULPRIT)}


class Screen:
    """A command on a terminal of 80 x 24."""

    def __init__(self, farm: Farm, *arguments: str) -> None:
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [*farm.command, *arguments],
            env={**farm.environment(), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = b""

    @property
    def text(self) -> str:
        """All that was shown, one picture below the other."""
        text = re.sub(r"\x1b\[(H|\?1049[hl])", "\n", self._shown.decode(errors="ignore"))
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

    def read_until(self, pattern: str, timeout: float = 60.0) -> None:
        """Read until `pattern` was shown or the command has ended."""
        deadline = monotonic() + timeout
        while not re.search(pattern, self.text):
            assert monotonic() < deadline, f"no {pattern}: {self.text[-3000:]}"
            if select([self._terminal], [], [], 0.2)[0]:
                try:
                    self._shown += os.read(self._terminal, 65536)
                except OSError:  # the other end is closed
                    break

    def close(self) -> int:
        """Its exit code."""
        self.read_until(r"\Z(?<!\Z)")
        os.close(self._terminal)
        return self.process.wait(30)


def test_a_watch_shows_jobs_and_devices_until_ctrl_c(simulated: Farm) -> None:
    simulate(simulated, compute_ms=300)
    simulated.run("up")
    simulated.run(*JOB, "--no-wait")
    screen = Screen(simulated, "status", "--watch")
    screen.read_until(r"(?s)j1\.s\d+\.a1.*j1\.s\d+\.a1.*\d\d/96")
    screen.process.send_signal(signal.SIGINT)
    assert screen.close() == 0
    last = screen.text[screen.text.rindex("job 1 ") :]
    assert "job 1 lvvit bs 4 (simulated)" in last
    assert re.search(r"if power failed now: \d+ samples would be done again, 0 lost", last)
    assert re.search(r"localhost:1 +up", last)
    assert max(len(line) for line in screen.text.splitlines()) <= 80
    assert "0 lost" in simulated.run("status", "--watch").stdout, "where there is no terminal, once"
    simulated.run("down")


def test_a_watch_of_a_job_ends_with_it(simulated: Farm) -> None:
    simulate(simulated, compute_ms=100)
    simulated.run(*JOB, "--no-wait")
    screen = Screen(simulated, "status", "1", "--watch")
    screen.read_until("lvvit bs 4, 96 samples .simulated.: pending")
    simulated.run("wait", "1")
    screen.read_until(": done")
    assert screen.close() == 0


def test_what_a_power_failure_would_cost_is_what_runs(simulated: Farm) -> None:
    simulate(simulated, compute_ms=5000)
    simulated.env["FARM_DEADLINE_S"] = "60"
    simulated.run("up")
    simulated.run(*JOB, "--no-wait")
    running = (
        "SELECT a.device, 'j1.s' || s.idx || '.a' || a.no, s.stop - s.start"
        " FROM attempt a JOIN shard s ON s.id = a.shard_id WHERE a.state = 'running' ORDER BY 1"
    )
    wait_for(lambda: len(simulated.sql(running)) == 2, 60, "both run")
    expected = simulated.sql(running)
    found = simulated.json("status")
    assert [job["at_risk"] for job in found["jobs"]] == [sum(samples for _, _, samples in expected)]
    assert simulated.json("status", "1")["at_risk"] == found["jobs"][0]["at_risk"]
    assert [(each["device"], each["running"]) for each in found["devices"]] == [row[:2] for row in expected]
    simulated.run("cancel", "1")
    assert simulated.json("status")["jobs"] == []
    simulated.run("down", "--timeout", "60")


def test_every_transition_of_every_attempt_is_among_the_events(simulated: Farm, tmp_path: Path) -> None:
    simulate(simulated, {"kind": "crash", "batch": 3, "once": str(tmp_path / "once")})
    evaluate(simulated)
    events = simulated.json("events", "1", "--limit", "10000")
    told = [(event["name"], event["kind"]) for event in events]
    rows = simulated.sql(
        "SELECT s.idx, a.no, a.state, a.failure FROM attempt a JOIN shard s ON s.id = a.shard_id WHERE a.job_id = 1"
    )
    assert {row[2] for row in rows} == {"won", "failed"}
    for idx, number, state, failure in rows:
        name = f"j1.s{idx}.a{number}"
        ended = "won" if state == "won" else f"attempt_{failure}"
        assert [kind for each, kind in told if each == name] == ["assigned", "started", ended]
    assert told[0] == ("j1", "job_submitted")
    assert told[-1] == ("j1", "job_done")
    assert [event["at"] for event in events] == sorted(event["at"] for event in events)
    assert simulated.json("events", "1", "--limit", "7") == events[-7:]
    assert re.search(r"j1\.s\d+\.a1 +localhost:\d +attempt_crash: its process", simulated.run("events").stdout)


def test_retry_evaluates_failed_samples_again_and_the_old_rows_count_no_more(simulated: Farm) -> None:
    expected = evaluate(simulated)["digest"]
    simulate(simulated, spoilt(simulated))
    assert [each["name"] for each in evaluate(simulated, code=3)["failed"]] == [CULPRIT]
    simulate(simulated)
    again = json.loads(simulated.run("retry", "2", "--json").stdout)
    assert (again["state"], again["samples"]["failed"], again["digest"]) == ("done", 0, expected)
    assert sum(line["samples"] for line in again["devices"]) == COUNT
    assert_one_row_a_sample(simulated, 2, NAMES)
    assert simulated.sql("SELECT count(*) FROM result WHERE superseded > 0")[0][0] > 0
    assert "has no failed samples" in simulated.run("retry", "2").stderr


def test_resume_goes_on_with_a_cancelled_job(simulated: Farm) -> None:
    simulated.run(*JOB, "--no-wait")
    assert "not finished yet" in simulated.run("retry", "1", code=2).stderr
    simulated.run("cancel", "1")
    assert "farm resume" in simulated.run("retry", "1", code=2).stderr
    assert "No farm is up" in simulated.run("resume", "1", "--no-wait").stdout
    assert simulated.json("status", "1")["state"] == "running"
    simulated.run("cancel", "1")
    assert json.loads(simulated.run("resume", "1", "--json").stdout)["state"] == "done"
    assert_one_row_a_sample(simulated, 1, NAMES)
    assert "job 1 is done" in simulated.run("resume", "1", code=2).stderr


def test_the_job_of_higher_priority_goes_first(simulated: Farm) -> None:
    simulated.run(*JOB, "--no-wait")
    simulated.run(*JOB, "--no-wait", "--priority", "5")
    simulated.run("wait", "1")
    order = [job for (job,) in simulated.sql("SELECT job_id FROM attempt ORDER BY id")]
    first = order.index(1)
    assert first > 0
    assert 2 not in order[first + 4 :], "only the last shards of the other job run beside it"
    assert [line["priority"] for line in simulated.json("jobs")] == [5, 0]


def test_a_drained_device_takes_no_work_until_it_is_undrained(simulated: Farm) -> None:
    simulated.run("up")
    assert "localhost:1" in simulated.run("devices", "drain", "localhost:1").stdout
    assert [line["device"] for line in evaluate(simulated)["devices"]] == ["localhost:0"]
    assert [line["drained"] for line in simulated.json("devices")] == [False, True]
    simulated.run("devices", "undrain", "localhost")
    assert [line["drained"] for line in simulated.json("devices")] == [False, False]
    assert len(evaluate(simulated)["devices"]) == 2
    simulated.run("down")


def test_what_a_distrusted_device_answered_is_computed_again_elsewhere(simulated: Farm) -> None:
    before = evaluate(simulated)
    (mine,) = (line["samples"] for line in before["devices"] if line["device"] == "localhost:0")
    found = json.loads(simulated.run("devices", "distrust", "localhost:0", "--since", "1h", "--json").stdout)
    assert found["jobs"] == [1]
    assert found["samples"] == mine
    after = json.loads(simulated.run("wait", "1", "--json").stdout)
    assert [(line["device"], line["samples"]) for line in after["devices"]] == [("localhost:1", COUNT)]
    assert after["digest"] == before["digest"]
    said = simulated.run("devices", "distrust", "localhost:0", "--since", "2020-01-01T10:00").stdout
    assert "nothing is computed again" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retry", "17"], "there is no job 17"),
        (["resume", "17"], "there is no job 17"),
        (["events", "17"], "there is no job 17"),
        (["status", "--watch", "--json"], "choose one"),
        (["devices", "drain", "mars:0"], "no device mars:0"),
        (["devices", "undrain", "mars"], "no device mars"),
        (["devices", "distrust", "localhost", "--since", "2h"], "no device localhost"),
        (["submit", "lvvit", "--priority", "high"], "--priority"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_exit_code_2(farm: Farm, arguments: list[str], said: str) -> None:
    assert said in farm.run(*arguments, code=2).stderr


@pytest.mark.parametrize("text", ["yesterday", "2x", "2026-13-01", "2999-01-01T00:00"])
def test_a_time_that_is_none_or_to_come_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--since"):
        since(text, 1e9)


def test_a_time_is_so_long_ago_or_local() -> None:
    local = datetime(2001, 2, 3, 4, 5).timestamp()
    assert [since(text, 1e9) for text in ("90s", "1.5m", "2h", "1d")] == [1e9 - ago for ago in (90, 90, 7200, 86400)]
    assert [since(text, 1e9) for text in ("2001-02-03T04:05", "2001-02-03T04:05:00")] == [local, local]


def findings(farm: Farm) -> dict[str, tuple[bool, str]]:
    done = farm.run("doctor", "--json", code=None)
    return {each["what"]: (each["ok"], each["text"]) for each in json.loads(done.stdout)}


def test_the_doctor_finds_what_keeps_many_hosts_apart(farm: Farm, postgres_url: str) -> None:
    farm.env |= {"FARM_BROKER_URL": "redis://farm:geheim@127.0.0.1:1/0"}
    found = findings(farm)
    assert not found["broker"][0]
    assert "redis://farm:**@127.0.0.1:1/0" in found["broker"][1]
    assert "geheim" not in str(found)
    assert not found["database"][0]
    assert "other hosts cannot use" in found["database"][1]

    farm.env |= {"FARM_DATABASE_URL": postgres_url}
    found = findings(farm)
    assert found["database"][0]
    assert found["clock"][0]
    farm.env |= {"FARM_CLOCK_OFFSET_S": "-3600"}
    ok, said = findings(farm)["clock"]
    assert not ok
    assert re.search(r"3(600|599)\.\d s behind", said)


def test_the_report_names_a_device_whose_answers_are_wrong_and_who_is_verified(simulated: Farm) -> None:
    simulated.env["FARM_CPU_SLOTS"] = "3"
    simulate(simulated, {"kind": "wrong", "device": "localhost:2"}, compute_ms=100)
    report = evaluate(simulated)
    assert [line["device"] for line in report["quarantined"]] == ["localhost:2"]
    reason = report["quarantined"][0]["reason"]
    assert "canary" in reason
    assert [(line["device"], line["verified"]) for line in report["devices"]] == [
        ("localhost:0", True),
        ("localhost:1", True),
    ]
    assert report["canaries"]["batches"] >= 2
    assert 0 < report["canaries"]["share"] < 1
    assert f"quarantined  localhost:2: {reason}" in simulated.run("report", "1").stdout
    assert f"localhost:2 is quarantined: {reason}" in simulated.run("devices").stdout
    assert {line["device"]: line["canary"] for line in simulated.json("devices")}["localhost:0"] == "agrees"


def test_a_comparison_outweighs_a_later_answer_that_nobody_else_has_given_yet(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'farm.db'}")) as database:
        database.ensure_schema()
        fleet = Fleet(database)
        answers = [
            (fleet.worker(0), 1, "agrees"),
            (fleet.worker(0), 2, "disagrees"),  # a later incarnation is another matter
            (fleet.worker(1), 1, "disagrees"),
            (fleet.worker(1), 2, "unverified"),
            (fleet.worker(2), 1, "agrees"),
            (fleet.worker(2), 2, "agrees"),
            (fleet.worker(3), 1, "agrees"),
        ]
        values = {"artifact_sha256": "0", "number": 0, "kind": "cpu", "at": 0.0, "digest": "", "ms": 1.0}
        with database.write() as conn:
            for worker, incarnation, verdict in answers:
                own = {"device": worker.name, "incarnation": incarnation, "verdict": verdict}
                conn.execute(insert(tables.canary).values(values | own))
            conn.execute(insert(tables.canary).values(values | own | {"verdict": "unverified"}))
        with database.read() as conn:
            found = overview.verdicts(conn)
    assert found == {"h:0": "disagrees", "h:1": "unverified", "h:2": "agrees", "h:3": "agrees"}


def test_a_job_that_waits_says_for_what(tmp_path: Path) -> None:
    with closing(Database(f"sqlite:///{tmp_path / 'farm.db'}")) as database:
        database.ensure_schema()
        fleet, settings = Fleet(database), Settings(home=tmp_path)
        job = fleet.job()
        assert waits_for(database, settings, job) == "waiting: no device takes work (none registered)"
        fleet.worker(0)
        assert waits_for(database, settings, job) == ""
        with database.write() as conn:
            shards.drain(conn, database, ["h:0"])
        fleet.put(fleet.worker(1), DeviceState.QUARANTINED)
        assert waits_for(database, settings, job) == "waiting: no device takes work (h:0 drained, h:1 quarantined)"
        fleet.worker(2)
        with database.write() as conn:
            conn.execute(insert(tables.unfit).values(job_id=job.id, host="h", reason="no bins", at=0.0))
        assert waits_for(database, settings, job).endswith("h:2 up; h is skipped: no bins)")


# -- a farm of two hosts without a coordinator ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), slots={"a": 1, "b": 1}) as cluster:
        for worker in cluster.workers.values():
            worker.start()
        wait_for(lambda: len(cluster.live()) == 2, 60, "both devices are up")
        yield cluster


def submitted(cluster: Cluster) -> tuple[subprocess.Popen[str], int]:
    """A command that waits, and its job, which runs on host b."""
    wait_for(lambda: len(cluster.live()) == 2, 60, "both devices are up")
    last = cluster.sql("SELECT coalesce(max(id), 0) FROM job")[0][0]
    command = cluster.start(*SUBMIT, "--json")
    ((job,),) = wait_for(lambda: cluster.sql("SELECT id FROM job WHERE id > :last", last=last), 60, "the job is there")
    wait_for(lambda: cluster.scored(job) > 0 and cluster.running("b:0"), 60, "the job runs")
    return command, job


def test_who_waits_goes_on_when_the_database_is_back(cluster: Cluster) -> None:
    command, job = submitted(cluster)
    cluster.postgres.stop()
    assert command.stderr is not None
    said = ""
    while "the database does not answer" not in said:
        said += (line := command.stderr.readline())
        assert line, f"it ended: {said}"
    cluster.postgres.start()
    stdout, stderr = command.communicate(timeout=120)
    assert command.returncode == 0, said + stderr
    assert "the database answers again" in said + stderr
    assert json.loads(stdout)["state"] == "done"
    assert cluster.count(job).exact


def test_who_waits_takes_back_what_a_vanished_host_held(cluster: Cluster) -> None:
    command, job = submitted(cluster)
    cluster.workers["b"].wanted = False  # nobody starts it again
    cluster.workers["b"].kill()
    stdout, stderr = command.communicate(timeout=120)
    assert command.returncode == 0, stderr + cluster.logs()
    assert json.loads(stdout)["lost"]["its device vanished"] > 0
    assert cluster.count(job).exact
