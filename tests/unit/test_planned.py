"""Plans of shards that were read ahead: made once, their artifact looked at twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farm.errors import HostError
from farm.jobs import Assignment, Job, JobSpec, JobState
from farm.settings import Settings
from tasks.worker import DeviceWorker
from tests.datasets import LVVIT, write_bins, write_tiny_onnx
from workers.devices import LocalDevice

BS, SAMPLES = 2, 4


@pytest.fixture
def worker(tmp_path: Path) -> DeviceWorker:
    """A device's worker that has read a shard ahead."""
    made = object.__new__(DeviceWorker)
    made._settings = Settings(home=tmp_path)
    made._peers, made._checked, made._data, made._ahead = 1, set(), {}, None
    made.device = LocalDevice(host="h", index=0, soc="cpu", backends=("ort",))
    made._begin = lambda *_: None  # type: ignore[method-assign]  # nothing is to run
    made._read_ahead(assignment(tmp_path))
    return made


def assignment(home: Path, attempt_id: int = 1) -> Assignment:
    data_dir = home / "data"
    digest = write_bins(data_dir, SAMPLES).digest
    spec = JobSpec(
        model="lvvit", bs=BS, artifact=write_tiny_onnx(data_dir, BS), dataset="imagenet", recipe=LVVIT.recipe,
        dtype="float32", manifest_digest=digest, samples=SAMPLES, provenance={},
    )  # fmt: skip
    job = Job(id=1, state=JobState.RUNNING, spec=spec, created=0, finished=None, error="")
    return Assignment(
        attempt_id=attempt_id, shard_id=1, job=job, shard=0, attempt=1, start=0, stop=SAMPLES, isolating=False,
        non_finite_before=False,
    )  # fmt: skip


def test_a_shard_that_was_read_ahead_is_planned_once(worker: DeviceWorker, tmp_path: Path) -> None:
    assert worker._planned(assignment(tmp_path)) is worker._ahead


def test_another_one_has_a_plan_of_its_own(worker: DeviceWorker, tmp_path: Path) -> None:
    assert worker._planned(assignment(tmp_path, attempt_id=2)).attempt_id == 2


def test_an_artifact_that_was_replaced_since_is_refused(worker: DeviceWorker, tmp_path: Path) -> None:
    given = assignment(tmp_path)
    (file,) = (tmp_path / "data").rglob("*.onnx")
    file.write_bytes(b"another")
    os.utime(file, (1, 1))

    with pytest.raises(HostError, match="is not the artifact the job froze"):
        worker._planned(given)
