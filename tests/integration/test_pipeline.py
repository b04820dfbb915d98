"""Shards through real device processes, some of which hang, crash or are killed."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash
from numpy.typing import NDArray

from farm import artifacts, canary
from farm.data.manifest import UNPREPARED, Sample, bin_path, bins_dir
from farm.errors import DeviceCrashed, DeviceError, DeviceHung, FarmError, JobError
from farm.jobs import ResultState, SampleResult
from tests.datasets import LVVIT, load_bin, write_bins, write_tiny_onnx
from workers.backends.base import Array, Load, TensorSpec
from workers.backends.simulated import scores
from workers.device import DeviceProcess
from workers.pipeline import GROUP_MS, Aborted, NonFinite, Pipeline, Plan
from workers.postprocess import Reducer, Slot, classify
from workers.ring import SMALL, Ring

SHAPE, CLASSES, BS = (3, 4, 4), 10, 4
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Data:
    """Ten small bins and their samples, s0 to s9."""

    directory: Path
    samples: tuple[Sample, ...]

    def path(self, number: int) -> Path:
        return bin_path(self.directory, self.samples[number].name)


def write_data(directory: Path) -> Data:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(10):
        data = rng.standard_normal(SHAPE, dtype=np.float32).tobytes()
        bin_path(directory, f"s{number}").write_bytes(data)
        samples.append(Sample(f"s{number}", number, xxhash.xxh3_64_hexdigest(data)))
    return Data(directory, tuple(samples))


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return write_data(tmp_path)


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    """A pipeline that nobody loses patience with."""
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        yield pipeline


@pytest.fixture
def impatient() -> Iterator[Pipeline]:
    """A pipeline that waits half a second for a batch, and four times that for the first one."""
    with closing(Pipeline(deadline_s=0.5)) as pipeline:
        yield pipeline


def simulated(*faults: dict[str, object], bs: int = BS, **behaviour: object) -> Load:
    """A simulated device with these faults, e.g. ``simulated(crash(data, 3))``."""
    text = json.dumps({"compute_ms": 0, "faults": faults} | behaviour)
    return Load(
        backend="simulated",
        path="",
        input=TensorSpec(name="image", dtype="float32", shape=(bs, *SHAPE)),
        output=TensorSpec(name="features", dtype="float32", shape=(bs, CLASSES)),
        device="h:0",
        options={"simulated": text},
    )


def fault(kind: str, data: Data, number: int) -> dict[str, object]:
    """What happens whenever this sample is on the device."""
    return {"kind": kind, "sample": data.samples[number].xxh3}


def plan_of(
    data: Data,
    load: Load | None = None,
    *,
    attempt_id: int = 1,
    start: int = 0,
    stop: int = 10,
    isolating: bool = False,
    non_finite_before: bool = False,
) -> Plan:
    return Plan(
        attempt_id=attempt_id,
        load=load or simulated(),
        dataset="imagenet",
        directory=data.directory,
        samples=data.samples[start:stop],
        isolating=isolating,
        non_finite_before=non_finite_before,
    )


def answer(sample: Sample, row: NDArray[np.float32]) -> SampleResult:
    """The row of a sample's scores, by sorting them all."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    return SampleResult(
        name=sample.name,
        state=ResultState.SCORED,
        label=sample.label,
        rank=order.index(sample.label) + 1,
        classes=tuple(order[:5]),
        scores=tuple(float(row[c]) for c in order[:5]),
    )


def answers(samples: Sequence[Sample]) -> list[SampleResult]:
    """What the simulated device answers, computed here."""
    return [answer(sample, scores(int(sample.xxh3, 16), CLASSES)) for sample in samples]


def reasons(rows: Sequence[SampleResult]) -> dict[str, str]:
    """The failed samples and why."""
    return {row.name: row.reason for row in rows if row.state is ResultState.FAILED}


def scored(rows: Sequence[SampleResult]) -> list[SampleResult]:
    return [row for row in rows if row.state is ResultState.SCORED]


def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> bool:
    deadline = monotonic() + timeout_s
    while not condition() and monotonic() < deadline:
        sleep(0.01)
    return bool(condition())


def runs(pid: int) -> bool:
    """Whether a process lives; one that nobody has reaped does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def rings() -> int:
    """How many descriptors of rings this process has."""
    gc.collect()
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum("farm-ring" in os.readlink(link) for link in links if os.path.lexists(link))


# -- a shard -----------------------------------------------------------------------------------------------------


def test_every_sample_has_one_row_in_order(pipeline: Pipeline, data: Data) -> None:
    result = pipeline.run(plan_of(data))

    assert [row.name for row in result.samples] == [f"s{number}" for number in range(10)]


def test_rows_are_what_a_direct_computation_gives(pipeline: Pipeline, data: Data) -> None:
    result = pipeline.run(plan_of(data))

    assert result.samples == answers(data.samples)


@pytest.mark.parametrize("bs", [1, 3, 16])
def test_rows_do_not_depend_on_the_batch_size(pipeline: Pipeline, data: Data, bs: int) -> None:
    result = pipeline.run(plan_of(data, simulated(bs=bs)))

    assert result.samples == answers(data.samples)


def test_rows_of_a_real_model_are_those_of_its_graph_in_numpy(pipeline: Pipeline, tmp_path: Path) -> None:
    """16 x 16 means and a linear layer of seeded weights (`tests.datasets.write_tiny_onnx`)."""
    manifest, artifact = write_bins(tmp_path, 6), write_tiny_onnx(tmp_path, BS)
    load = Load(
        backend="ort",
        path=str(artifacts.directory(tmp_path, LVVIT.name) / artifact.file),
        input=TensorSpec(**artifact.input.model_dump()),
        output=TensorSpec(**artifact.output.model_dump()),
        device="h:0",
    )
    plan = Plan(
        attempt_id=1,
        load=load,
        dataset="imagenet",
        directory=bins_dir(tmp_path, LVVIT.recipe),
        samples=manifest.samples,
    )

    result = pipeline.run(plan)

    weights = np.random.default_rng(0).standard_normal((588, 1000), dtype=np.float32)
    for row, sample in zip(result.samples, manifest.samples, strict=True):
        means = load_bin(tmp_path, sample.name).reshape(3, 14, 16, 14, 16).mean(axis=(2, 4), dtype=np.float64)
        expected = answer(sample, (means.reshape(588) @ weights).astype(np.float32))
        assert (row.name, row.rank, row.classes) == (expected.name, expected.rank, expected.classes)
        assert row.scores == pytest.approx(expected.scores, abs=1e-4)


def test_each_batch_has_its_times(pipeline: Pipeline, data: Data) -> None:
    result = pipeline.run(plan_of(data, simulated(h2d_ms=1, compute_ms=2, d2h_ms=3)))

    assert len(result.batch_ms) == 3
    assert all(h2d >= 1 and compute >= 2 and d2h >= 3 for h2d, compute, d2h in result.batch_ms)


def test_the_budget_holds_the_classification_of_a_shards_last_samples(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(scores: Array, samples: Sequence[Sample]) -> tuple[list[SampleResult], list[Sample]]:
        sleep(0.1)
        return classify(scores, samples)

    monkeypatch.setattr("workers.postprocess.classify", slow)

    assert pipeline.run(plan_of(data)).budget.post_ms >= 100


def test_the_budgets_device_time_is_that_of_its_batches(pipeline: Pipeline, data: Data) -> None:
    result = pipeline.run(plan_of(data, simulated(compute_ms=2)))

    assert result.budget.device_ms == pytest.approx(sum(map(sum, result.batch_ms)))


def test_what_a_batch_takes_is_no_part_of_what_it_waited(pipeline: Pipeline, data: Data) -> None:
    load = simulated(compute_ms=600)
    pipeline.run(plan_of(data, load, stop=1))

    budget = pipeline.run(plan_of(data, load, attempt_id=2, stop=1)).budget

    assert budget.wait_ms < budget.device_ms == 600


def test_batches_of_a_group_wait_for_one_another(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    load = simulated(bs=1, compute_ms=30)
    pipeline.run(plan_of(data, load))
    groups.clear()

    budget = pipeline.run(plan_of(data, load, attempt_id=2)).budget

    behind = sum(size * (size - 1) // 2 for size in groups)
    assert max(groups) > 2
    assert budget.wait_ms >= 30 * behind


def test_the_model_is_kept_between_shards(pipeline: Pipeline, data: Data) -> None:
    first = pipeline.run(plan_of(data, stop=4))

    second = pipeline.run(plan_of(data, attempt_id=2, start=4))

    assert first.budget.load_ms > 0
    assert second.budget.load_ms == 0
    assert pipeline.device.starts == 1


def test_another_model_takes_its_place(pipeline: Pipeline, data: Data) -> None:
    models = [simulated(bs=4), simulated(bs=2), simulated(bs=4)]

    results = [pipeline.run(plan_of(data, load, attempt_id=number)) for number, load in enumerate(models)]

    assert [result.samples for result in results] == [answers(data.samples)] * 3
    assert all(result.budget.load_ms > 0 for result in results)


def test_another_model_can_be_read_ahead_of(pipeline: Pipeline, data: Data) -> None:
    first, second = plan_of(data, simulated(bs=4)), plan_of(data, simulated(bs=2), attempt_id=2)
    pipeline.read_ahead(first)
    pipeline.read_ahead(second)

    assert pipeline.run(first).samples == answers(data.samples)
    assert pipeline.run(second).samples == answers(data.samples)


def test_a_shard_that_was_read_ahead_is_run_once(pipeline: Pipeline, data: Data) -> None:
    """It has three batches; a fourth would crash."""
    plan = plan_of(data, simulated({"kind": "crash", "batch": 4}))
    pipeline.read_ahead(plan)
    pipeline.read_ahead(plan)

    assert pipeline.run(plan).samples == answers(data.samples)
    assert pipeline.device.starts == 1


def test_a_shard_that_was_read_ahead_is_under_way(pipeline: Pipeline, data: Data) -> None:
    pipeline.read_ahead(plan_of(data, attempt_id=7))

    assert pipeline.attempts() == {7}


def test_a_shard_that_was_run_is_not_under_way(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data))

    assert pipeline.attempts() == frozenset()


def test_a_model_that_does_not_load_is_a_job_error(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(JobError, match="FARM_SIMULATED describes no simulated device"):
        pipeline.run(plan_of(data, simulated(speed=3)))


def test_after_a_model_that_does_not_load_another_one_does(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(JobError):
        pipeline.run(plan_of(data, simulated(speed=3)))

    assert pipeline.run(plan_of(data, attempt_id=2)).samples == answers(data.samples)


def test_after_a_model_that_does_not_load_the_one_before_is_loaded_again(impatient: Pipeline, data: Data) -> None:
    impatient.run(plan_of(data))
    with pytest.raises(JobError):
        impatient.run(plan_of(data, simulated(speed=3), attempt_id=2))

    assert impatient.run(plan_of(data, attempt_id=3)).samples == answers(data.samples)


def test_models_that_take_each_others_place_leave_no_memory_behind(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data))
    before = rings()

    for bs in (1, 2, 3):
        pipeline.run(plan_of(data, simulated(bs=bs), attempt_id=1 + bs))

    assert rings() == before


# -- samples that cannot be used ---------------------------------------------------------------------------------


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def become_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    (alter, "was altered after it was prepared"),
    (truncate, "has 191 bytes, expected 192"),
    (lengthen, "has 193 bytes, expected 192"),
    (empty, "has 0 bytes, expected 192"),
    (remove, "No such file or directory"),
    (become_a_directory, "s5.bin. Run farm prepare again."),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_bin_fails_its_sample_by_name_and_no_other(
    pipeline: Pipeline, data: Data, damage: Callable[[Path], None], reason: str
) -> None:
    damage(data.path(5))

    rows = pipeline.run(plan_of(data)).samples

    assert list(reasons(rows)) == ["s5"]
    assert str(data.path(5)) in reasons(rows)["s5"]
    assert reason in reasons(rows)["s5"]
    assert scored(rows) == answers(data.samples[:5] + data.samples[6:])


def test_a_sample_that_was_not_prepared_fails_with_its_problem(pipeline: Pipeline, data: Data) -> None:
    unprepared = Sample("s0", 0, UNPREPARED, "is no image")

    rows = pipeline.run(replace(plan_of(data), samples=(unprepared, *data.samples[1:]))).samples

    assert reasons(rows) == {"s0": "was not prepared: is no image"}
    assert scored(rows) == answers(data.samples[1:])


def test_a_batch_without_a_usable_sample_does_not_reach_the_device(pipeline: Pipeline, data: Data) -> None:
    for number in range(4, 8):
        data.path(number).unlink()

    result = pipeline.run(plan_of(data))

    assert list(reasons(result.samples)) == ["s4", "s5", "s6", "s7"]
    assert len(result.batch_ms) == 2


def test_a_shard_without_a_usable_sample_has_a_row_for_each(pipeline: Pipeline, data: Data) -> None:
    for number in range(10):
        data.path(number).unlink()

    result = pipeline.run(plan_of(data))

    assert len(reasons(result.samples)) == 10
    assert result.batch_ms == []


def test_scores_that_are_no_numbers_are_first_a_device_error_by_name(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(NonFinite, match="scores of s6 are not finite numbers"):
        pipeline.run(plan_of(data, simulated(fault("nan", data, 6))))


def test_scores_that_are_no_numbers_again_fail_their_sample_and_no_other(pipeline: Pipeline, data: Data) -> None:
    plan = plan_of(data, simulated(fault("nan", data, 6)), non_finite_before=True)

    rows = pipeline.run(plan).samples

    assert reasons(rows) == {"s6": "its scores are not finite numbers, on two attempts"}
    assert scored(rows) == answers(data.samples[:6] + data.samples[7:])


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_one_score_that_is_no_number_is_enough(data: Data, score: float) -> None:
    table = np.zeros((2, CLASSES), dtype=np.float32)
    table[1, 3] = score

    rows, bad = classify(table, data.samples[:2])

    assert ([row.name for row in rows], bad) == (["s0"], [data.samples[1]])


def test_scores_that_are_no_numbers_leave_the_device_process_alone(pipeline: Pipeline, data: Data) -> None:
    load = simulated(fault("nan", data, 6))
    with pytest.raises(NonFinite):
        pipeline.run(plan_of(data, load))

    assert pipeline.run(plan_of(data, load, attempt_id=2, stop=4)).samples == answers(data.samples[:4])
    assert pipeline.device.starts == 1


# -- device processes that break ---------------------------------------------------------------------------------


def test_a_batch_that_hangs_is_cut_off_and_named(impatient: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceHung, match=r"no answer within .* killed \(batch of s4, s5, s6, s7\)"):
        impatient.run(plan_of(data, simulated(fault("hang", data, 5))))


def test_a_batch_that_crashes_the_device_process_is_named(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceCrashed, match=r"ended by itself \(SIGSEGV\) \(batch of s4, s5, s6, s7\)"):
        pipeline.run(plan_of(data, simulated(fault("crash", data, 5))))


def test_a_batch_that_the_device_refuses_is_named(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceError, match=r"failed, as it was told to \(batch of s4, s5, s6, s7\)"):
        pipeline.run(plan_of(data, simulated(fault("error", data, 5))))


def test_after_a_hang_the_next_shard_is_as_ever(impatient: Pipeline, data: Data) -> None:
    load = simulated(fault("hang", data, 5))
    with pytest.raises(DeviceHung):
        impatient.run(plan_of(data, load))

    assert impatient.run(plan_of(data, load, attempt_id=2, stop=4)).samples == answers(data.samples[:4])


@pytest.mark.parametrize("kind", ["crash", "error"])
def test_after_a_broken_batch_the_next_shard_is_as_ever(pipeline: Pipeline, data: Data, kind: str) -> None:
    load = simulated(fault(kind, data, 5))
    with pytest.raises(DeviceError):
        pipeline.run(plan_of(data, load))

    assert pipeline.run(plan_of(data, load, attempt_id=2, stop=4)).samples == answers(data.samples[:4])


@pytest.mark.parametrize("kind", ["crash", "error"])
def test_a_broken_batch_costs_one_device_process(pipeline: Pipeline, data: Data, kind: str) -> None:
    load = simulated(fault(kind, data, 5))
    with pytest.raises(DeviceError):
        pipeline.run(plan_of(data, load))
    pipeline.run(plan_of(data, load, attempt_id=2, stop=4))

    assert pipeline.device.starts == 2


@pytest.mark.parametrize("kind", ["crash", "error", "nan"])
def test_a_shard_read_ahead_survives_the_end_of_the_one_before(pipeline: Pipeline, data: Data, kind: str) -> None:
    load = simulated(fault(kind, data, 3))
    first, second = plan_of(data, load, stop=4), plan_of(data, load, attempt_id=2, start=4)
    pipeline.read_ahead(first)
    pipeline.read_ahead(second)

    with pytest.raises(DeviceError):
        pipeline.run(first)

    assert pipeline.run(second).samples == answers(data.samples[4:])


def test_a_shard_read_ahead_survives_a_hang_of_the_one_before(impatient: Pipeline, data: Data) -> None:
    load = simulated(fault("hang", data, 3))
    first, second = plan_of(data, load, stop=4), plan_of(data, load, attempt_id=2, start=4)
    impatient.read_ahead(first)
    impatient.read_ahead(second)

    with pytest.raises(DeviceHung):
        impatient.run(first)

    assert impatient.run(second).samples == answers(data.samples[4:])


def test_a_shard_read_ahead_that_breaks_does_not_break_the_one_before(pipeline: Pipeline, data: Data) -> None:
    load = simulated(fault("crash", data, 4))
    first, second = plan_of(data, load, stop=4), plan_of(data, load, attempt_id=2, start=4)
    pipeline.read_ahead(first)
    pipeline.read_ahead(second)

    assert pipeline.run(first).samples == answers(data.samples[:4])
    with pytest.raises(DeviceCrashed):
        pipeline.run(second)


def test_a_device_process_that_was_killed_is_replaced(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data))
    assert pipeline.device.pid is not None
    os.kill(pipeline.device.pid, signal.SIGKILL)

    with pytest.raises(DeviceCrashed, match="SIGKILL"):
        pipeline.run(plan_of(data, attempt_id=2))

    assert pipeline.run(plan_of(data, attempt_id=3)).samples == answers(data.samples)


@pytest.mark.parametrize("culprit", [0, 5, 9])
def test_isolating_names_the_one_sample_that_crashes_and_scores_all_others(
    pipeline: Pipeline, data: Data, culprit: int
) -> None:
    plan = plan_of(data, simulated(fault("crash", data, culprit)), isolating=True)

    rows = pipeline.run(plan).samples

    assert list(reasons(rows)) == [f"s{culprit}"]
    assert "breaks the device process" in reasons(rows)[f"s{culprit}"]
    assert scored(rows) == answers([sample for sample in data.samples if sample.label != culprit])


def test_isolating_names_every_sample_that_crashes(pipeline: Pipeline, data: Data) -> None:
    plan = plan_of(data, simulated(fault("crash", data, 4), fault("crash", data, 8)), isolating=True)

    rows = pipeline.run(plan).samples

    assert list(reasons(rows)) == ["s4", "s8"]


def test_isolating_names_the_one_sample_that_hangs(impatient: Pipeline, data: Data) -> None:
    plan = plan_of(data, simulated(fault("hang", data, 2), bs=2), stop=6, isolating=True)

    rows = impatient.run(plan).samples

    assert list(reasons(rows)) == ["s2"]
    assert scored(rows) == answers([*data.samples[:2], *data.samples[3:6]])


def test_isolating_finds_nothing_in_a_shard_that_breaks_nothing(pipeline: Pipeline, data: Data) -> None:
    assert pipeline.run(plan_of(data, isolating=True)).samples == answers(data.samples)


def test_isolating_does_not_blame_a_sample_for_a_device_that_refuses(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceError, match="as it was told to"):
        pipeline.run(plan_of(data, simulated(fault("error", data, 5)), isolating=True))


# -- a device that never waits ------------------------------------------------------------------------------------


class Pairs(Reducer):
    """As of images of two windows: needs the first outputs until it has worked on the second."""

    def __init__(self) -> None:
        self._first: list[Array] = []

    def take(
        self, outputs: Array, _places: Sequence[int], slots: Sequence[Slot], _failed: Collection[str]
    ) -> tuple[list[SampleResult], list[Sample]]:
        if self._first:
            sleep(0.05)
        self._first = [] if self._first else [outputs]
        return [answer(slot.sample, np.arange(CLASSES, dtype=np.float32)) for slot in slots], []

    def held(self) -> list[Array]:
        return self._first


def test_a_device_whose_outputs_are_needed_in_pairs_always_has_a_batch_waiting(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three outputs are free again while the device works, and it is the device that was waited for."""
    monkeypatch.setattr("workers.pipeline.reducer_of", lambda *_: Pairs())
    send, finished = pipeline.device.send, pipeline.device.finished
    there: list[int] = []  # before and after each batch sent and done

    def count_sent(*arguments: Any) -> None:
        there.append(there[-1] + 1 if there else 1)
        send(*arguments)

    def count_done(*arguments: Any) -> Any:
        found = finished(*arguments)
        there.append(there[-1] - 1)
        return found

    monkeypatch.setattr(pipeline.device, "send", count_sent)
    monkeypatch.setattr(pipeline.device, "finished", count_done)
    load = simulated(bs=1, compute_ms=200)
    large = replace(load, output=replace(load.output, shape=(1, 1 << 19)))

    pipeline.run(plan_of(data, large))

    assert min(there[:-1]) == 1


# -- groups of batches -------------------------------------------------------------------------------------------


@pytest.fixture
def groups(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches were sent together, each time."""
    sizes: list[int] = []
    send = pipeline.device.send

    def note(group: int, batches: Any) -> None:
        sizes.append(len(batches))
        send(group, batches)

    monkeypatch.setattr(pipeline.device, "send", note)
    return sizes


def test_batches_go_in_groups_once_their_time_is_known(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    pipeline.run(plan_of(data, simulated(bs=1)))
    told = len(groups)

    result = pipeline.run(plan_of(data, simulated(bs=1), attempt_id=2))

    assert groups[0] == 1  # for the device has nothing to do
    assert groups[told] == 1
    assert max(groups[told:]) == 8  # half of the ring
    assert sum(groups) == 20
    assert result.samples == answers(data.samples)


def test_a_group_lasts_no_longer_than_is_good(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    slow = simulated(bs=1, compute_ms=GROUP_MS / 3)

    for attempt_id in (1, 2):
        pipeline.run(plan_of(data, slow, attempt_id=attempt_id))

    assert max(groups) in (2, 3)  # the measured times, not what they were meant to be


def test_the_batches_of_two_shards_are_never_in_one_group(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    load = simulated(bs=1, compute_ms=1)
    pipeline.run(plan_of(data, load))
    groups.clear()
    plans = [plan_of(data, load, attempt_id=2, stop=3), plan_of(data, load, attempt_id=3, start=3)]
    for plan in plans:
        pipeline.read_ahead(plan)

    rows = [pipeline.run(plan).samples for plan in plans]

    assert [*rows[0], *rows[1]] == answers(data.samples)
    assert 3 in [sum(groups[:number]) for number in range(len(groups))]


def test_large_outputs_go_one_by_one(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    load = simulated(bs=1)
    large = replace(load, output=replace(load.output, shape=(1, 1 + SMALL // 4)))

    for attempt_id in (1, 2):
        pipeline.run(plan_of(data, large, attempt_id=attempt_id))

    assert set(groups) == {1}


def test_batches_go_one_by_one_while_a_sample_is_looked_for(pipeline: Pipeline, data: Data, groups: list[int]) -> None:
    pipeline.run(plan_of(data, simulated(bs=1)))
    groups.clear()

    pipeline.run(plan_of(data, simulated(bs=1), attempt_id=2, isolating=True))

    assert set(groups) == {1}


@pytest.mark.parametrize("kind", ["crash", "error", "acl"])
def test_the_batch_of_a_group_that_breaks_the_device_process_is_named(
    pipeline: Pipeline, data: Data, groups: list[int], kind: str
) -> None:
    load = simulated({**fault(kind, data, 6), "after": 10}, bs=1)  # not the first time
    pipeline.run(plan_of(data, load))
    groups.clear()

    with pytest.raises(FarmError, match=r"\(batch of s6\)"):
        pipeline.run(plan_of(data, load, attempt_id=2))

    assert max(groups) > 1


def test_a_hang_in_a_group_is_cut_off_and_named(impatient: Pipeline, data: Data) -> None:
    load = simulated({**fault("hang", data, 6), "after": 10}, bs=1, compute_ms=1)
    impatient.run(plan_of(data, load))
    began = monotonic()

    with pytest.raises(DeviceHung, match=r"no answer within 0.5 s; .*\(batch of s6\)"):
        impatient.run(plan_of(data, load, attempt_id=2))

    assert monotonic() - began < 5


def test_a_device_that_gets_on_with_a_group_is_not_taken_for_one_that_hangs(impatient: Pipeline, data: Data) -> None:
    """A batch takes 0.2 s of the 0.5 it may take, all at once, and a group of them longer than that."""
    load = simulated({"kind": "slow", "after": 10, "factor": 200}, bs=1, compute_ms=1)
    impatient.run(plan_of(data, load))

    result = impatient.run(plan_of(data, load, attempt_id=2))

    assert result.samples == answers(data.samples)
    assert impatient.device.starts == 1


def test_what_an_unusable_sample_leaves_of_a_group_is_scored(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data, simulated(bs=1)))
    data.path(4).write_bytes(b"damaged")

    result = pipeline.run(plan_of(data, simulated(bs=1), attempt_id=2))

    assert list(reasons(result.samples)) == ["s4"]
    assert scored(result.samples) == answers([*data.samples[:4], *data.samples[5:]])


def test_a_group_for_a_device_process_that_is_gone_is_done_by_the_next_one(pipeline: Pipeline, data: Data) -> None:
    load = simulated(bs=1)
    pipeline.run(plan_of(data, load))
    os.kill(pipeline.device.pid or 0, signal.SIGKILL)
    with pytest.raises(DeviceCrashed):
        pipeline.run(plan_of(data, load, attempt_id=2))

    assert pipeline.run(plan_of(data, load, attempt_id=3)).samples == answers(data.samples)


def test_a_send_that_fails_is_heard_of_at_once() -> None:
    ring = Ring(simulated().input, simulated().output)
    with closing(DeviceProcess()) as device:
        device._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.send(7, [(ring.inputs[0], ring.outputs[0])] * 100_000)  # more than the kernel takes

        with theirs, pytest.raises(DeviceCrashed):
            device.finished(60)
    ring.close()


def test_a_ring_that_cannot_be_made_fails_its_shard(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> Ring:
        raise OSError("cannot allocate memory")

    monkeypatch.setattr("workers.pipeline.Ring", no_memory)
    with pytest.raises(DeviceError, match="cannot allocate memory"):
        pipeline.run(plan_of(data))
    monkeypatch.undo()

    assert pipeline.run(plan_of(data)).samples == answers(data.samples)


def test_a_pipeline_does_not_take_the_core_of_its_device_process(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data))

    threads = [thread.native_id for thread in threading.enumerate() if thread.name in ("reader", "device", "post")]
    assert {os.sched_getscheduler(thread or 0) for thread in threads} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(pipeline.device.pid or 0) == os.SCHED_OTHER


# -- leaving -----------------------------------------------------------------------------------------------------


def test_a_dropped_shard_is_aborted(pipeline: Pipeline, data: Data) -> None:
    slow = plan_of(data, simulated(bs=1, compute_ms=500))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipeline.run, slow)
        assert eventually(pipeline.attempts)

        pipeline.drop({slow.attempt_id})

        with pytest.raises(Aborted):
            running.result(timeout=30)


def test_a_dropped_shard_is_not_under_way(pipeline: Pipeline, data: Data) -> None:
    pipeline.read_ahead(plan_of(data))

    pipeline.drop({1})

    assert pipeline.attempts() == frozenset()


def test_a_hang_at_a_shard_that_was_dropped_is_told_once(impatient: Pipeline, data: Data, tmp_path: Path) -> None:
    impatient.read_ahead(plan_of(data, simulated({"kind": "hang", "once": str(tmp_path / "hanging")})))
    assert eventually((tmp_path / "hanging").exists)
    impatient.drop([1])
    told: list[tuple[int, FarmError]] = []

    def hear() -> bool:
        told.extend(impatient.late())
        return bool(told)

    assert eventually(hear)
    assert [(attempt_id, type(error)) for attempt_id, error in told] == [(1, DeviceHung)]
    assert impatient.late() == []


def test_a_shard_that_fails_under_way_is_not_told_again(impatient: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceHung):
        impatient.run(plan_of(data, simulated(fault("hang", data, 5))))

    assert impatient.late() == []


def test_dropping_leaves_the_others_alone(pipeline: Pipeline, data: Data) -> None:
    first, second = plan_of(data), plan_of(data, attempt_id=2)
    pipeline.read_ahead(first)
    pipeline.read_ahead(second)

    pipeline.drop({first.attempt_id, 99})

    assert pipeline.attempts() == {second.attempt_id}
    assert pipeline.run(second).samples == answers(data.samples)


def test_a_shard_dropped_while_its_model_loads_does_not_mix_the_models(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(plan_of(data))
    loading, go_on, load = threading.Event(), threading.Event(), pipeline.device.load

    def slow_load(which: Load, ring: Ring) -> None:
        loading.set()
        assert go_on.wait(10)
        load(which, ring)

    monkeypatch.setattr(pipeline.device, "load", slow_load)
    pipeline.read_ahead(plan_of(data, simulated(bs=2), attempt_id=2))
    assert loading.wait(10)
    pipeline.read_ahead(plan_of(data, attempt_id=3))
    pipeline.drop([2])
    sleep(0.2)  # time for the reader to be tempted
    go_on.set()

    assert list(pipeline.run(plan_of(data, attempt_id=3)).samples) == answers(data.samples)


def test_a_reader_that_breaks_ends_its_shards_and_keeps_its_buffers(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.run(plan_of(data))

    def broken(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("workers.pipeline.read_bin", broken)
        for attempt_id in range(2, 9):
            with pytest.raises(DeviceError, match="MemoryError"):
                pipeline.run(plan_of(data, attempt_id=attempt_id))

    assert list(pipeline.run(plan_of(data, attempt_id=9)).samples) == answers(data.samples)


def test_closing_aborts_the_shard_under_way(data: Data) -> None:
    pipeline = Pipeline(deadline_s=60.0)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipeline.run, plan_of(data, simulated(compute_ms=200)))
        assert eventually(pipeline.attempts)

        pipeline.close()

        with pytest.raises(Aborted):
            running.result(timeout=30)


def test_closing_ends_the_device_process(data: Data) -> None:
    before = psutil.Process().children(recursive=True)
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        pipeline.run(plan_of(data))

    assert psutil.Process().children(recursive=True) == before


def test_closing_ends_the_pipelines_threads(data: Data) -> None:
    before = set(threading.enumerate())
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        pipeline.run(plan_of(data))

    assert set(threading.enumerate()) <= before


def test_closing_before_anything_was_done_is_harmless() -> None:
    Pipeline(deadline_s=60.0).close()


def test_the_terminals_interrupt_does_not_reach_the_device_process(pipeline: Pipeline, data: Data) -> None:
    pipeline.run(plan_of(data))
    assert pipeline.device.pid is not None
    os.kill(pipeline.device.pid, signal.SIGINT)

    assert pipeline.run(plan_of(data, attempt_id=2)).samples == answers(data.samples)
    assert pipeline.device.starts == 1


def test_a_device_process_outlives_the_thread_that_asked_for_it() -> None:
    load = simulated()
    ring = Ring(load.input, load.output)
    with closing(DeviceProcess()) as device:
        asking = threading.Thread(target=device.load, args=(load, ring))
        asking.start()
        asking.join()

        device.send(7, [(ring.inputs[0], ring.outputs[0])])

        answer = device.finished(60)
        assert answer is not None
        assert answer[0] == 7
    ring.close()


#: A worker whose device hangs; it says which process that is.
WORKER = """
import sys, threading, time
from pathlib import Path
from tests.integration.test_pipeline import plan_of, simulated, write_data
from workers.pipeline import Pipeline

directory = Path(sys.argv[1])
pipeline = Pipeline(deadline_s=60.0)
pipeline.read_ahead(plan_of(write_data(directory), simulated({"kind": "hang", "once": str(directory / "hanging")})))
while not (directory / "hanging").exists():
    time.sleep(0.01)
print(pipeline.device.pid, flush=True)
threading.Event().wait()
"""


def test_a_hanging_device_process_dies_with_its_killed_worker(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as worker:
        assert worker.stdout is not None
        device = int(worker.stdout.readline())
        assert runs(device)

        worker.kill()

    assert eventually(lambda: not runs(device), timeout_s=5.0)


def test_closing_leaves_no_descriptor_behind(data: Data) -> None:
    before = descriptors()
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        pipeline.run(plan_of(data))

    del pipeline
    assert descriptors() == before


def test_closing_during_a_hang_leaves_no_process_behind(data: Data, tmp_path: Path) -> None:
    before = psutil.Process().children(recursive=True)
    pipeline = Pipeline(deadline_s=60.0)
    pipeline.read_ahead(plan_of(data, simulated({"kind": "hang", "once": str(tmp_path / "hanging")})))
    assert eventually((tmp_path / "hanging").exists)

    pipeline.close()

    assert psutil.Process().children(recursive=True) == before


def test_a_shard_after_the_close_is_aborted(data: Data) -> None:
    pipeline = Pipeline(deadline_s=60.0)
    pipeline.close()

    with ThreadPoolExecutor(1) as pool, pytest.raises(Aborted):
        pool.submit(pipeline.run, plan_of(data)).result(5)


def test_isolating_does_not_blame_the_samples_for_a_device_that_always_crashes(pipeline: Pipeline, data: Data) -> None:
    with pytest.raises(DeviceCrashed, match="every sample"):
        pipeline.run(plan_of(data, simulated({"kind": "crash"}), stop=4, isolating=True))


@pytest.mark.parametrize("package", ["farm", "workers"])
def test_a_folder_of_the_users_of_that_name_is_not_imported(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)

    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        assert list(pipeline.run(plan_of(data)).samples) == answers(data.samples)


def descriptors() -> list[str]:
    gc.collect()
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(os.readlink(descriptor))
    return sorted(found)


def said(pipeline: Pipeline) -> tuple[int, str]:
    """The number of the last canary, and the digest of what the device made of it."""
    answer = pipeline.answer()
    assert answer is not None
    return answer[0], answer[1].digest


def test_a_device_answers_a_canary(pipeline: Pipeline) -> None:
    pipeline.ask(simulated(), 2)
    number, digest = said(pipeline)
    assert number == 2

    given = np.empty(simulated().input.shape, np.float32)
    canary.fill(given, number)
    expected = np.stack([scores(xxhash.xxh3_64_intdigest(sample), CLASSES) for sample in given])
    assert digest == hashlib.sha256(expected.tobytes()).hexdigest()


def test_a_canary_that_was_not_asked_has_no_answer(pipeline: Pipeline) -> None:
    assert pipeline.answer() is None


def test_canaries_take_turns(pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pipeline.EVERY", 1)
    load, numbers = simulated(), []
    for attempt_id in range(1, 6):
        number = pipeline.canary_due(load)
        assert number is not None
        numbers.append(number)
        pipeline.ask(load, number)
        said(pipeline)
        pipeline.run(plan_of(data, load=load, attempt_id=attempt_id))

    assert numbers[0] == 0
    assert set(numbers) == set(range(canary.COUNT))


def test_a_canary_is_no_attempt_and_none_of_a_shards_batches(pipeline: Pipeline, data: Data) -> None:
    plan = plan_of(data)
    pipeline.read_ahead(plan)
    pipeline.ask(plan.load, 0)

    assert pipeline.attempts() == {plan.attempt_id}
    assert len(pipeline.run(plan).batch_ms) == 3
    assert said(pipeline)


def test_a_canary_is_wanted_once_a_load(pipeline: Pipeline, data: Data) -> None:
    load = simulated()
    assert pipeline.canary_due(load) == 0
    pipeline.ask(load, 0)
    assert pipeline.canary_due(load) is None
    said(pipeline)
    pipeline.run(plan_of(data, load=load))
    assert pipeline.canary_due(load) is None
    assert pipeline.canary_due(simulated(compute_ms=3)) == 0


def test_a_canary_is_wanted_after_many_batches(pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pipeline.EVERY", 2)
    load = simulated()
    pipeline.ask(load, 0)
    said(pipeline)

    pipeline.run(plan_of(data, load=load))

    assert pipeline.canary_due(load) is not None


def test_every_batch_of_a_group_brings_the_next_canary_nearer(
    pipeline: Pipeline, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.pipeline.EVERY", 10)
    load = simulated(bs=1)
    pipeline.ask(load, 0)
    said(pipeline)

    pipeline.run(plan_of(data, load=load))

    assert pipeline.canary_due(load) is not None


def test_a_canary_is_wanted_of_a_device_process_that_was_replaced(pipeline: Pipeline, data: Data) -> None:
    load = simulated(fault("crash", data, 3))
    pipeline.ask(load, 0)
    said(pipeline)
    with pytest.raises(DeviceCrashed):
        pipeline.run(plan_of(data, load=load))

    assert eventually(lambda: pipeline.canary_due(load) == 0)


def test_a_device_that_fails_at_a_canary_says_so(pipeline: Pipeline) -> None:
    pipeline.ask(simulated({"kind": "crash", "batch": 1}), 0)

    with pytest.raises(DeviceCrashed, match="canary 0"):
        pipeline.answer()


def test_a_canary_of_a_model_that_does_not_load_is_forgotten(pipeline: Pipeline, data: Data) -> None:
    unknown = replace(simulated(), backend="unknown")
    plan = plan_of(data, load=unknown)
    pipeline.read_ahead(plan)
    pipeline.ask(unknown, 0)

    with pytest.raises(JobError):
        pipeline.run(plan)

    assert pipeline.answer() is None


def test_closing_twice_closes_nothing_that_is_another_ones_by_then() -> None:
    pipeline = Pipeline(deadline_s=60.0)
    pipeline.close()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(32)]

    pipeline.close()

    for descriptor in others:
        os.close(descriptor)  # OSError for one that is closed already
