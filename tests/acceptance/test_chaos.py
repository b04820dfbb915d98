"""Random faults, one after another, on a farm of three hosts that works all the while."""

from __future__ import annotations

import random
from pathlib import Path

from tests.benchmarks.chaos import Chaos, figures, leftovers, make_cluster
from tests.cluster import wait_for

SEED, SECONDS = 310, 40.0
SLOTS, SAMPLES = {"a": 2, "b": 2, "c": 1}, 1600


def test_random_faults_lose_nothing_double_nothing_and_leave_nothing(tmp_path: Path) -> None:
    with make_cluster(tmp_path / "c", SLOTS, SAMPLES) as cluster:
        cluster.up()
        chaos = Chaos(cluster, random.Random(SEED))
        chaos.run(SECONDS)
        found = figures(chaos, chaos.finish())
        assert sum(found["faults"].values()) > 10, found
        assert set(found["jobs"]) == {"done"}, found
        assert (found["lost"], found["duplicates"], found["failed"]) == (0, 0, 0), found
        assert found["digest_equal"], found
        assert not found["client_errors"]
        cluster.up()
        wait_for(lambda: not leftovers(cluster), 30, lambda: f"nothing is left: {leftovers(cluster)}")
        cluster.stop_workers()
        assert cluster.coordinator.stop() == 0
        wait_for(lambda: not cluster.processes(), 5, lambda: f"all have ended: {cluster.processes()}")
