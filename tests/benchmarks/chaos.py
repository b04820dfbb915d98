"""
A farm of three hosts under random faults: nothing may be lost, doubled or computed differently.

    python -m tests.benchmarks.chaos [--minutes 5] [--seed 1] [--short] [--mutate fence|fence+key]

Jobs follow one another while workers, device processes, hosts, coordinator, clients, broker and database are killed,
stopped, wiped, restarted and cut off. Then the faults end, every job must, and rows are counted without the farm's own
counting. The limit to compare with is a run nobody disturbs: its digest, and its work. `--mutate` takes the farm's
protection away in the workers (and the database's too), and must be found out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep, time
from typing import Any

import psutil

from tests.cluster import HEAD, SUBMIT, Cluster, mutate, simulate, wait_for

#: Between two faults, in seconds.
PAUSE_S = (0.5, 2.0)
#: A process that is killed sooner after its start never gets anything done.
GROWN_UP_S = 4.0
#: Keys of a broker at rest: who consumes what. Queues come and go.
EXPECTED_KEYS = ("farm:_kombu.binding", "farm:npu.", "farm:unacked", "farm:celery")
#: The coordinator's longest pause.
TICK_S = 1.0


@dataclass
class Chaos:
    """Breaks a cluster, one fault after another, each undone in its time."""

    cluster: Cluster
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    killed: list[tuple[str, float]] = field(default_factory=list)  #: devices whose worker was, and when
    vanished: list[tuple[str, float]] = field(default_factory=list)  #: hosts for longer than a lease, and when
    client_errors: list[str] = field(default_factory=list)
    turned_away: int = 0  #: clients that began while the database was away
    _client: subprocess.Popen[str] | None = None
    _undo: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _touched: dict[str, float] = field(default_factory=dict)
    _broker_is_up: bool = True
    _jobs: int = 0

    def run(self, seconds: float) -> None:
        """Break things for so long, jobs always under way; then mend everything."""
        over = monotonic() + seconds
        next_fault = monotonic() + 1.0
        try:
            while monotonic() < over:
                self._have_a_client()
                for due, undo in list(self._undo):
                    if monotonic() >= due:
                        self._undo.remove((due, undo))
                        undo()
                if monotonic() >= next_fault:
                    self._fault()
                    next_fault = monotonic() + self.rng.uniform(*PAUSE_S)
                sleep(0.05)
        finally:
            for _, undo in self._undo:
                undo()
            self._undo.clear()

    def finish(self, timeout: float = 240) -> list[int]:
        """Wait for the clients and all jobs; the answer is the jobs."""
        jobs = [job for (job,) in self.cluster.sql("SELECT id FROM job ORDER BY id")]
        for job in jobs:
            self.cluster.finish(job, timeout)
        if self._client is not None:
            self._ended(self._client.wait(30))
        return jobs

    # -- clients -----------------------------------------------------------------------------------------------------

    def _have_a_client(self) -> None:
        """Somebody waits for a job, as users do; of one whose client was killed, another."""
        if self._client is not None and (code := self._client.poll()) is None:
            return
        if self._client is not None:
            self._ended(code)
        states = "('pending', 'running')"
        waiting = self.cluster.sql(f"SELECT id FROM job WHERE state IN {states} ORDER BY id") if self._jobs else []
        if waiting:
            self._client = self.cluster.start("wait", str(waiting[0][0]), "--json")
        else:
            self._client = self.cluster.start(*SUBMIT, "--json")
            self._jobs += 1

    def _ended(self, code: int | None) -> None:
        assert self._client is not None
        _, stderr = self._client.communicate()
        if code == 1 and "cannot use the database" in stderr:  # it came while there was none, and was told so
            self.turned_away += 1
        elif code not in (0, -signal.SIGKILL):
            self.client_errors.append(f"exit {code}: {stderr[-300:]}")
        self._client = None

    # -- faults ------------------------------------------------------------------------------------------------------

    def _fault(self) -> None:
        faults: list[tuple[int, Callable[[], str]]] = [
            (6, self._kill_worker),
            (4, self._kill_device_process),
            (3, self._stop_worker),
            (1, self._tell_worker_to_leave),
            (1, self._kill_host),
            (2, self._kill_coordinator),
            (2, self._kill_client),
            (2, self._kill_broker),
            (2, self._flush_broker),
            (1, self._wipe_broker),
            (1, self._restart_postgres),
            (1, self._crash_postgres),
            (1 if self.cluster.network.can_cut else 0, self._cut_shortly),
            (3 if self.cluster.network.can_cut else 0, self._cut_long),
        ]
        weights = [weight for weight, _ in faults]
        for _ in range(8):  # until one finds something to break
            ((_, fault),) = self.rng.choices(faults, weights)
            if kind := fault():
                self.faults[kind] += 1
                return

    def _kill_worker(self) -> str:
        device, pid = self._grown_up_worker()
        return "worker killed" if self._kill(pid, device) else ""

    def _tell_worker_to_leave(self) -> str:
        _, pid = self._grown_up_worker()
        return "worker told to leave" if _signal(pid, signal.SIGTERM) else ""

    def _kill_device_process(self) -> str:
        pids = [pid for pid in self.cluster.device_pids() if _age(pid) > GROWN_UP_S / 2]
        return "device process killed" if _signal(self._one(pids), signal.SIGKILL) else ""

    def _stop_worker(self) -> str:
        """Sometimes for less than a lease, sometimes for more; it comes back as a zombie."""
        _, pid = self._grown_up_worker()
        if not _signal(pid, signal.SIGSTOP):
            return ""
        self._later(self.rng.uniform(0.5, 2.0) * self._lease_s, lambda: _signal(pid, signal.SIGCONT))
        return "worker stopped"

    def _kill_host(self) -> str:
        host = self.rng.choice(list(self.cluster.slots))
        if self._is_too_soon(host, 15.0):
            return ""
        at = time()
        if not _signal(self.cluster.workers[host].pid or 0, signal.SIGKILL):
            return ""
        self.killed += [(device, at) for device in self.cluster.names(host)]
        return "host's service killed"

    def _kill_coordinator(self) -> str:
        return "coordinator killed" if _signal(self.cluster.coordinator.pid or 0, signal.SIGKILL) else ""

    def _kill_client(self) -> str:
        return "client killed" if self._client is not None and _signal(self._client.pid, signal.SIGKILL) else ""

    def _kill_broker(self) -> str:
        if not self._broker_is_up:
            return ""
        self.cluster.valkey.kill()
        self._broker_is_up = False
        self._later(self.rng.uniform(0.2, 3.0), self._start_broker)
        return "broker killed"

    def _flush_broker(self) -> str:
        if not self._broker_is_up:
            return ""
        self.cluster.valkey.flushall()
        return "broker flushed"

    def _wipe_broker(self) -> str:
        if not self._broker_is_up:
            return ""
        self.cluster.valkey.kill()
        self.cluster.valkey.wipe()
        self._broker_is_up = False
        self._later(self.rng.uniform(0.0, 1.0), self._start_broker)
        return "broker wiped"

    def _start_broker(self) -> None:
        self.cluster.valkey.start()
        self._broker_is_up = True

    def _restart_postgres(self) -> str:
        return self._restart("fast", "database restarted")

    def _crash_postgres(self) -> str:
        return self._restart("immediate", "database crashed")

    def _restart(self, mode: str, kind: str) -> str:
        if self._is_too_soon("postgres", 10.0):
            return ""
        self.cluster.postgres.restart(mode)
        return kind

    def _cut_shortly(self) -> str:
        return self._cut(self.rng.uniform(0.2, 0.6) * self._lease_s, "host cut off for less than a lease")

    def _cut_long(self) -> str:
        return self._cut(self.rng.uniform(1.5, 2.0) * self._lease_s, "host cut off for longer than a lease")

    def _cut(self, seconds: float, kind: str) -> str:
        host = self.rng.choice(list(self.cluster.slots))
        if self._is_too_soon("network", 12.0) or self._is_too_soon(host, 6.0):
            return ""
        if seconds > self._lease_s:
            self.vanished.append((host, time()))
        self.cluster.network.partition(host)
        self._later(seconds, lambda: self.cluster.network.heal(host))
        return kind

    # -- means -------------------------------------------------------------------------------------------------------

    @property
    def _lease_s(self) -> float:
        return float(self.cluster.environment(HEAD)["FARM_LEASE_S"])

    def _later(self, seconds: float, undo: Callable[[], object]) -> None:
        self._undo.append((monotonic() + seconds, lambda: void(undo())))

    def _is_too_soon(self, what: str, seconds: float) -> bool:
        """Whether something was broken so short a time ago; if not, it is now."""
        now = monotonic()
        if now - self._touched.get(what, 0.0) < seconds:
            return True
        self._touched[what] = now
        return False

    def _grown_up_worker(self) -> tuple[str, int]:
        found = [pid for pid in self.cluster.pids("tasks.worker") if _age(pid) > GROWN_UP_S]
        pid = self._one(found)
        with suppress(psutil.Error):
            return psutil.Process(pid).cmdline()[-1], pid
        return "", 0

    def _kill(self, pid: int, device: str) -> bool:
        at = time()
        if _signal(pid, signal.SIGKILL):
            self.killed.append((device, at))
            return True
        return False

    def _one(self, pids: list[int]) -> int:
        return self.rng.choice(sorted(pids)) if pids else 0


def void(_: object) -> None:
    """Nothing."""


def _signal(pid: int, number: int) -> bool:
    if pid:
        with suppress(psutil.Error):
            psutil.Process(pid).send_signal(number)
            return True
    return False


def _age(pid: int) -> float:
    try:
        return time() - psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


# -- figures ---------------------------------------------------------------------------------------------------------


def figures(chaos: Chaos, jobs: list[int]) -> dict[str, Any]:
    """What became of the jobs, from the rows alone."""
    cluster = chaos.cluster
    counts = [cluster.count(job) for job in jobs]
    expected = cluster.expected_digest()
    states = Counter(state for (state,) in cluster.sql("SELECT state FROM job"))
    errors = [error for (error,) in cluster.sql("SELECT error FROM job WHERE error <> ''")]
    attempts = dict(cluster.sql("SELECT state, count(*) FROM attempt GROUP BY 1"))
    spent = cluster.sql("SELECT state = 'won', sum(ended - started) FROM attempt WHERE started IS NOT NULL GROUP BY 1")
    times = {bool(won): float(seconds or 0) for won, seconds in spent}
    worker_s, host_s = _worker_recoveries(chaos), _host_recoveries(chaos)
    return {
        "jobs": dict(states),
        "errors": errors,
        "samples": len(jobs) * cluster.samples,
        "faults": dict(sorted(chaos.faults.items())),
        "attempts": attempts,
        "rescued": attempts.get("lost", 0),
        "fenced": attempts.get("fenced", 0),
        "lost": sum(count.lost + count.strange for count in counts),
        "duplicates": sum(count.duplicates for count in counts),
        "failed": sum(count.failed for count in counts),
        "digest_equal": all(count.digest == expected for count in counts),
        # Of all time; a device twenty times slower has much of it, and little work is lost with it.
        "wasted_time": round(times.get(False, 0.0) / max(1e-9, sum(times.values())), 4),
        "wasted_work": round(_recomputed(cluster) / (len(jobs) * cluster.samples), 4),
        "recovery_worker_s": _spread(worker_s),
        "recovery_host_s": _spread(host_s),
        "alarms": sum(cluster.log(host).count("refused a row that must not exist") for host in cluster.slots),
        "client_errors": chaos.client_errors,
        "clients_turned_away": chaos.turned_away,
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {"median": statistics.median(values), "max": max(values)}
    return {"n": len(values), **{key: round(value, 2) for key, value in found.items()}}


def _recomputed(cluster: Cluster) -> float:
    """Samples that attempts in vain had computed, by the time they ran and their device's usual pace."""
    ((found,),) = cluster.sql(
        "WITH ran AS (SELECT a.device, a.state = 'won' AS won, sum(a.ended - a.started) AS seconds,"
        " sum(s.stop - s.start) AS samples FROM attempt a JOIN shard s ON s.id = a.shard_id"
        " WHERE a.started IS NOT NULL GROUP BY 1, 2)"
        " SELECT sum(v.seconds * w.samples / w.seconds) FROM ran v JOIN ran w ON w.device = v.device"
        " WHERE w.won AND NOT v.won"
    )
    return float(found or 0)


def _worker_recoveries(chaos: Chaos) -> list[float]:
    """From a worker's SIGKILL to its device's next incarnation."""
    found = []
    for device, at in chaos.killed:
        ((registered,),) = chaos.cluster.sql(
            "SELECT min(at) FROM event WHERE kind = 'device_up' AND text LIKE 'incarnation%' "
            "AND device = :device AND at > :at",
            device=device,
            at=at,
        )
        if registered is not None:
            found.append(registered - at)
    return found


def _host_recoveries(chaos: Chaos) -> list[float]:
    """From a host's silence to the moment when all it held was taken back."""
    found = []
    for host, at in chaos.vanished:
        ((taken,),) = chaos.cluster.sql(
            "SELECT max(e.at) FROM event e JOIN attempt a ON a.id = e.attempt_id WHERE e.kind = 'attempt_lost' "
            "AND a.device LIKE :devices AND a.assigned <= :at AND e.at BETWEEN :at AND :at + 20",
            devices=f"{host}:%",
            at=at,
        )
        if taken is not None:
            found.append(taken - at)
    return found


def leftovers(cluster: Cluster) -> list[str]:
    """Device processes without a worker and messages nobody will fetch, once all jobs are done."""
    workers = set(cluster.pids("tasks.worker"))
    orphans = [f"device process {pid}" for pid in cluster.device_pids() if psutil.Process(pid).ppid() not in workers]
    strange = [key for key in cluster.broker_keys() if not key.startswith(EXPECTED_KEYS)]
    unacked = [f"{count} unacked messages"] if (count := cluster.unacked()) else []
    return orphans + strange + unacked


def rss_mb(cluster: Cluster) -> dict[str, float]:
    """Of the coordinator, and of the largest worker."""
    coordinator = cluster.coordinator.pid
    return {
        "coordinator": round(psutil.Process(coordinator).memory_info().rss / 1e6, 1) if coordinator else 0.0,
        "worker": round(max(psutil.Process(p).memory_info().rss for p in cluster.pids("tasks.worker")) / 1e6, 1),
    }


#: One host's clock is an hour off; on another a device is slow, on the third one crashes now and then.
HOSTS = {
    "a": {**simulate({"kind": "crash", "device": "a:1", "batch": 500})},
    "b": {**simulate({"kind": "slow", "device": "b:1", "factor": 20})},
    "c": {"FARM_CLOCK_OFFSET_S": "3600"},
}


def make_cluster(root: Path, slots: dict[str, int], samples: int, mutation: str = "") -> Cluster:
    env = mutate(root, MUTATIONS[mutation]) if mutation else {}
    return Cluster(root, slots=slots, samples=samples, env=env, host_env=dict(HOSTS))


#: What is taken away in every worker: the check that an attempt is live when it commits.
FENCE = ("db.shards", "    if won.rowcount != 1 or done.rowcount != 1:\n        raise _Fenced\n", "")
MUTATIONS = {"fence": [FENCE], "fence+key": [FENCE]}
DROP_KEY = "ALTER TABLE result DROP CONSTRAINT pk_result"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16_000)
    parser.add_argument("--mutate", choices=MUTATIONS, default="")
    parser.add_argument("--short", action="store_true", help="half a minute, small jobs: shows that it runs")
    arguments = parser.parse_args()
    minutes, samples = (0.5, 2000) if arguments.short else (arguments.minutes, arguments.samples)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "cluster"
        with make_cluster(root, {"a": 3, "b": 3, "c": 2}, samples, arguments.mutate) as cluster:
            cluster.up()
            if arguments.mutate == "fence+key":
                cluster.execute(DROP_KEY)
            chaos = Chaos(cluster, random.Random(arguments.seed))
            before = rss_mb(cluster)
            chaos.run(60 * minutes)
            jobs = chaos.finish()
            found = figures(chaos, jobs)
            found["rss_mb"] = {"begin": before, "end": rss_mb(cluster)}
            with suppress(AssertionError):
                wait_for(lambda: not leftovers(cluster), 10)
            found["leftovers"] = leftovers(cluster)
            lease_s = float(cluster.environment(HEAD)["FARM_LEASE_S"])
    print(json.dumps({"benchmark": "chaos", "seed": arguments.seed, **found, "targets": _targets(found, lease_s)}))
    if arguments.mutate and not (found["duplicates"] or found["alarms"]):
        sys.exit(f"nobody noticed that the farm lacked its {arguments.mutate}")


def _targets(found: dict[str, Any], lease_s: float) -> dict[str, Any]:
    def at_most(value: float, wanted: float) -> dict[str, Any]:
        return {"value": value, "target": wanted, "met": value <= wanted}

    targets = {
        "lost": at_most(found["lost"], 0),
        "duplicates": at_most(found["duplicates"], 0),
        "digest_equal": {"value": found["digest_equal"], "target": True, "met": found["digest_equal"]},
        "leftovers": at_most(len(found["leftovers"]), 0),
        "wasted_work": at_most(found["wasted_work"], 0.05),
        "wasted_time": at_most(found["wasted_time"], 0.05),
    }
    for name, wanted in (("recovery_worker_s", 3.0), ("recovery_host_s", lease_s + TICK_S)):
        if found[name]:
            targets[name] = at_most(found[name]["median"], wanted)
    return targets


if __name__ == "__main__":
    main()
