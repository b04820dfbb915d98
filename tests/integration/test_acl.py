"""The acl backend over a stand-in for the vendor's module: loads, times, faults, and what becomes of the process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from time import sleep
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from farm.data.manifest import Sample
from farm.errors import DataError, DeviceCrashed, DeviceError, DeviceHung, FarmError, HostError, JobError
from tests import fake_acl
from tests.fake_acl import Described
from tests.integration.test_pipeline import (
    BS,
    CLASSES,
    ROOT,
    SHAPE,
    Data,
    answers,
    descriptors,
    eventually,
    plan_of,
    reasons,
    scored,
    write_data,
)
from workers.backends import acl_codes, check_host, open_backend
from workers.backends.acl import Clock, interval, module_file
from workers.backends.acl_codes import Blame
from workers.backends.base import Backend, Load, TensorSpec, Times
from workers.backends.simulated import SimulatedBackend, behaviour
from workers.pipeline import Pipeline
from workers.reader import read_bin
from workers.ring import Ring

Floats = NDArray[np.float32]
Machine = Callable[..., None]


@pytest.fixture(autouse=True)
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is found by this process and by device processes."""
    monkeypatch.syspath_prepend(str(fake_acl.FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(fake_acl.FOLDER))
    monkeypatch.delenv("FAKE_ACL", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # it would have C not buffer what the module prints


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Call it to have another machine, e.g. ``machine(devices=2)``."""
    return lambda **said: monkeypatch.setenv("FAKE_ACL", json.dumps(said))


@pytest.fixture
def acl() -> Any:
    return import_module("aclruntime")


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return write_data(tmp_path)


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        yield pipeline


@pytest.fixture
def impatient() -> Iterator[Pipeline]:
    """It waits half a second for a batch, and four times that for the first one."""
    with closing(Pipeline(deadline_s=0.5)) as pipeline:
        yield pipeline


def om(directory: Path, *faults: dict[str, object], bs: int = BS, name: str = "model.om", **behaviour: object) -> Load:
    """A model of the tests' tensors and how to load it, e.g. ``om(tmp_path, {"kind": "hang"}, compute_ms=5)``."""
    given: Described = ("image", "float32", (bs, *SHAPE))
    wanted: Described = ("Gemm_9:0:features", "float32", (bs, CLASSES))
    path = fake_acl.write_om(directory / name, [given], [wanted], faults=faults, **behaviour)
    return load_of(path, bs)


def dynamic_om(directory: Path, *, bs: int, **behaviour: object) -> Load:
    """A model for batches of 1, 2 and 4."""
    given: Described = ("image", "float32", (-1, *SHAPE))
    wanted: Described = ("features", "float32", (-1, CLASSES))
    path = fake_acl.write_om(directory / "dynamic.om", [given], [wanted], gears=[1, 2, 4], **behaviour)
    return load_of(path, bs)


def load_of(path: Path, bs: int = BS) -> Load:
    return Load(
        backend="acl",
        path=str(path),
        input=TensorSpec(name="image", dtype="float32", shape=(bs, *SHAPE)),
        output=TensorSpec(name="features", dtype="float32", shape=(bs, CLASSES)),
        device="h:0",
    )


def images(count: int = BS) -> Floats:
    return np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32)


def infer(backend: Backend, batch: Floats) -> Floats:
    out = np.full((len(batch), CLASSES), np.nan, dtype=np.float32)
    backend.infer(batch, out)
    return out


def expected(batch: Floats) -> Floats:
    """The simulated device's scores, which the stand-in's are by definition."""
    return infer(SimulatedBackend(load_of(Path(), len(batch)), behaviour("{}")), batch)


def code(number: int, data: Data | None = None, sample: int = 0, **more: object) -> dict[str, object]:
    """A failed run with this ACL code, always or for a sample."""
    named = {"sample": data.samples[sample].xxh3} if data is not None else {}
    return {"kind": "code", "code": number, **named, **more}


def refusal(load: Load, error: type[FarmError]) -> str:
    with pytest.raises(error) as caught, closing(open_backend(load)):
        pass
    assert type(caught.value) is error
    return str(caught.value)


def failure(load: Load, error: type[FarmError], *, after: int = 0) -> str:
    """What a run says that fails, after others that do not."""
    with closing(open_backend(load)) as backend:
        for _ in range(after):
            infer(backend, images(load.input.shape[0]))
        with pytest.raises(error) as caught:
            infer(backend, images(load.input.shape[0]))
    assert type(caught.value) is error
    return str(caught.value)


def events(trace: Path) -> list[tuple[str, int]]:
    """What the stand-in noted, with the process."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [(event, int(pid)) for event, pid in (line.split() for line in lines)]


# -- batches -----------------------------------------------------------------------------------------------------


def test_rows_of_a_shard_are_what_a_direct_computation_gives(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    assert pipeline.run(plan_of(data, om(tmp_path))).samples == answers(data.samples)


@pytest.mark.parametrize("bs", [1, 2, 4])
def test_a_model_with_a_dynamic_batch_runs_at_each_of_its_sizes(
    pipeline: Pipeline, data: Data, tmp_path: Path, bs: int
) -> None:
    assert pipeline.run(plan_of(data, dynamic_om(tmp_path, bs=bs))).samples == answers(data.samples)


@pytest.mark.parametrize("bs", [3, 8])
def test_a_dynamic_batch_that_the_model_does_not_have_is_a_job_error(tmp_path: Path, bs: int) -> None:
    assert f"has no batch size {bs}" in refusal(dynamic_om(tmp_path, bs=bs), JobError)


def test_an_answer_as_long_as_the_largest_batch_is_cut(tmp_path: Path) -> None:
    with closing(open_backend(dynamic_om(tmp_path, bs=2, rows=4))) as backend:
        assert infer(backend, images(2)).tobytes() == expected(images(2)).tobytes()


@pytest.mark.parametrize("rows", [3, 5])
def test_an_answer_of_another_size_is_a_job_error_with_both_sizes(tmp_path: Path, rows: int) -> None:
    text = failure(om(tmp_path, rows=rows), JobError)

    assert f"answers with {rows * CLASSES * 4} bytes" in text
    assert "features float32[4, 10], which is 160" in text


def test_a_batch_is_fed_from_where_it_lies(tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    load = om(tmp_path)
    ring = Ring(load.input, load.output)
    fed: list[tuple[int, int]] = []

    class Watched(acl.BaseTensor):  # type: ignore[misc]
        def __init__(self, *given: int) -> None:
            fed.append((given[0], given[1]))
            super().__init__(*given)

    monkeypatch.setattr(acl, "BaseTensor", Watched)

    with closing(open_backend(load)) as backend:
        for buffer in ring.inputs:
            backend.infer(buffer.array, ring.outputs[0].array)

    assert fed == [(buffer.array.ctypes.data, load.input.nbytes) for buffer in ring.inputs]
    ring.close()


def test_a_batch_with_strides_is_read_in_its_order(tmp_path: Path) -> None:
    batch = images()[::-1]

    with closing(open_backend(om(tmp_path))) as backend:
        assert infer(backend, batch).tobytes() == expected(batch.copy()).tobytes()


def test_a_batch_of_another_size_does_not_reach_the_device(tmp_path: Path) -> None:
    with (
        closing(open_backend(om(tmp_path))) as backend,
        pytest.raises(JobError, match="takes 768 bytes, the batch has 576"),
    ):
        infer(backend, images(3))


def test_outputs_are_not_kept_on_the_device(tmp_path: Path, acl: Any) -> None:
    with closing(open_backend(om(tmp_path))) as backend:
        before = acl._chips[0].used
        infer(backend, images())

        assert acl._chips[0].used == before


def test_an_output_that_stays_on_the_device_is_not_looked_at(
    tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acl.Tensor, "to_host", lambda _: None)

    assert "left an output" in failure(om(tmp_path), DeviceError)


# -- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["T23", "M24", "T25", "F26"])
def test_every_version_of_the_module_gives_rows_and_times(
    pipeline: Pipeline, data: Data, tmp_path: Path, machine: Machine, api: str
) -> None:
    machine(api=api, trace=str(tmp_path / "trace"))

    result = pipeline.run(plan_of(data, om(tmp_path, h2d_ms=2, compute_ms=6, d2h_ms=4)))
    pipeline.close()

    assert result.samples == answers(data.samples)
    assert all(h2d >= 1.9 and compute >= 5.9 and d2h >= 3.9 for h2d, compute, d2h in result.batch_ms)
    assert [event for event, _ in events(tmp_path / "trace")] == ["load", "free", "finalize"]


def test_a_host_without_the_module_is_a_device_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aclruntime", None)

    assert "Install the vendor's wheel" in refusal(om(tmp_path), HostError)


def test_another_module_of_that_name_is_a_device_error_that_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = ModuleType("aclruntime")
    stranger.BaseTensor = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aclruntime", stranger)

    assert "has no InferenceSession, session_options" in refusal(om(tmp_path), HostError)


# -- times -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "ms"),
    [
        ((1000.0, 1013.0), 13.0),
        ([1000.0, 1013.0], 13.0),
        (13.0, 13.0),  # a duration, as old versions have it
        ((8.64e7, 8.64e7 + 16), None),  # after a day the clock's step is 8 ms
        ((1.7e7, 1.7e7 + 13), None),  # after five hours 1 ms
        ((1013.0, 1000.0), None),  # the clock was set back
        ((1000.0, 1000.0), None),
        ((1000.0, 1021.0), None),  # longer than the call took
        (-1.0, None),
        (21.0, None),
    ],
)
def test_an_interval_of_the_modules_clock_counts_where_it_can_be_right(entry: object, ms: float | None) -> None:
    assert interval(entry, 20.0) == ms


def clock(copied: Sequence[float], *intervals: object) -> Clock:
    """A clock over a module with these times, one interval a reading."""
    left = list(intervals)
    session = SimpleNamespace(
        sumary=lambda: SimpleNamespace(exec_time_list=[left.pop(0)]), reset_sumaryinfo=lambda: None
    )
    return Clock(SimpleNamespace(MemorySummary=lambda: SimpleNamespace(H2D_time_list=copied)), session)


def test_times_are_the_modules_where_they_are_fit() -> None:
    assert clock([2.0], (100.0, 113.0)).split(17.0) == (2.0, 13.0)


def test_an_old_clock_does_not_make_the_device_seem_slower() -> None:
    aged = clock([2.0], (100.0, 113.0), (8.64e7, 8.64e7 + 16))
    aged.split(17.0)  # 2 ms of it are neither

    assert aged.split(17.0) == (2.0, 13.0)


def test_without_a_fit_interval_computing_is_what_copying_leaves() -> None:
    assert clock([2.0], (8.64e7, 8.64e7)).split(17.0) == (2.0, 15.0)


@pytest.mark.parametrize("copied", [[], [-1.0], [18.0], [float("nan")]])
def test_without_a_fit_time_of_copying_it_is_what_computing_leaves(copied: list[float]) -> None:
    assert clock(copied, (100.0, 113.0)).split(17.0) == (4.0, 13.0)


def test_a_module_without_times_has_all_of_it_as_computing() -> None:
    assert Clock(SimpleNamespace(), SimpleNamespace()).split(17.0) == (0.0, 17.0)


def test_times_are_right_however_old_the_session_is(
    pipeline: Pipeline, data: Data, tmp_path: Path, machine: Machine
) -> None:
    """Its own clock has steps of 8 ms by then: an interval of 5 ms is 0 or 8."""
    machine(age_s=86_400)

    result = pipeline.run(plan_of(data, om(tmp_path, bs=1, h2d_ms=1, compute_ms=5, d2h_ms=2)))

    assert len(result.batch_ms) == 10
    assert all(h2d >= 0.9 and compute >= 4.9 and d2h >= 1.9 for h2d, compute, d2h in result.batch_ms)


def test_the_modules_lists_of_times_do_not_grow(tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: list[Any] = []
    real = acl.InferenceSession

    def watched(*given: Any) -> Any:
        sessions.append(real(*given))
        return sessions[-1]

    monkeypatch.setattr(acl, "InferenceSession", watched)

    with closing(open_backend(om(tmp_path))) as backend:
        for _ in range(5):
            infer(backend, images())

    assert len(sessions[0].sumary().exec_time_list) == 1
    assert len(acl.MemorySummary().H2D_time_list) == len(acl.MemorySummary().D2H_time_list) == 1


# -- the GIL -----------------------------------------------------------------------------------------------------


class Ticker:
    """A thread that wants a turn every millisecond, as a heartbeat does."""

    def __init__(self) -> None:
        self.turns = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._tick)

    def __enter__(self) -> Ticker:
        self._thread.start()
        assert eventually(lambda: self.turns)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()

    def _tick(self) -> None:
        while not self._stopping:
            self.turns += 1
            sleep(0.001)


def test_a_run_starves_the_threads_of_its_process(tmp_path: Path) -> None:
    with closing(open_backend(om(tmp_path, compute_ms=500))) as backend, Ticker() as heart:
        before = heart.turns
        infer(backend, images())

        assert heart.turns - before < 50


def test_a_run_delays_neither_the_workers_heartbeat_nor_its_reader(
    pipeline: Pipeline, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, mark = tmp_path / "gate", tmp_path / "mark"
    os.mkfifo(gate)
    read: list[str] = []

    def watched(directory: Path, sample: Sample, out: Floats, part: int) -> None:
        read_bin(directory, sample, out, part)
        read.append(sample.name)

    monkeypatch.setattr("workers.pipeline.read_bin", watched)
    load = om(tmp_path, {"kind": "gate", "path": str(gate), "once": str(mark)}, bs=1)
    first, second = plan_of(data, load, stop=1), plan_of(data, load, attempt_id=2, start=1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipeline.run, first)
        assert eventually(mark.exists)

        with Ticker() as heart:  # from here on the device process holds its GIL, until somebody opens the gate
            pipeline.read_ahead(second)
            assert eventually(lambda: heart.turns >= 100)
            assert eventually(lambda: len(read) == len(data.samples))
        assert not running.done()

        os.close(os.open(gate, os.O_WRONLY))
        assert running.result(30).samples == answers(data.samples[:1])
    assert pipeline.run(second).samples == answers(data.samples[1:])


# -- processes that break ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["run", "to_host"])
def test_a_call_that_hangs_is_cut_off_and_the_next_shard_is_as_ever(
    impatient: Pipeline, data: Data, tmp_path: Path, at: str
) -> None:
    load = om(tmp_path, {"kind": "hang", "at": at, "once": str(tmp_path / "mark")})
    with pytest.raises(DeviceHung, match="batch of s0, s1, s2, s3"):
        impatient.run(plan_of(data, load))

    assert impatient.run(plan_of(data, load, attempt_id=2)).samples == answers(data.samples)


def test_a_load_that_hangs_is_cut_off(
    pipeline: Pipeline, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.device.LOAD_S", 0.5)

    with pytest.raises(DeviceHung):
        pipeline.run(plan_of(data, om(tmp_path, {"kind": "hang", "at": "load"})))


@pytest.mark.parametrize(("kind", "name"), [("abort", "SIGABRT"), ("segfault", "SIGSEGV")])
@pytest.mark.parametrize("at", ["load", "run", "to_host"])
def test_a_call_that_ends_the_process_is_a_crash_and_the_next_shard_is_as_ever(
    pipeline: Pipeline, data: Data, tmp_path: Path, kind: str, name: str, at: str
) -> None:
    load = om(tmp_path, {"kind": kind, "at": at, "once": str(tmp_path / "mark")})
    with pytest.raises(DeviceCrashed, match=rf"ended by itself \({name}\)"):
        pipeline.run(plan_of(data, load))

    assert pipeline.run(plan_of(data, load, attempt_id=2)).samples == answers(data.samples)
    assert pipeline.device.starts == 2


def test_isolating_names_the_one_sample_that_aborts(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    load = om(tmp_path, {"kind": "abort", "sample": data.samples[6].xxh3})

    rows = pipeline.run(plan_of(data, load, isolating=True)).samples

    assert list(reasons(rows)) == ["s6"]
    assert scored(rows) == answers([*data.samples[:6], *data.samples[7:]])


# -- runs that fail ----------------------------------------------------------------------------------------------


def test_a_failed_run_leaks_its_inputs_on_the_device(tmp_path: Path, acl: Any) -> None:
    with closing(open_backend(om(tmp_path, code(507015)))) as backend:
        before = acl._chips[0].used
        for _ in range(3):
            with pytest.raises(DataError):
                infer(backend, images())

        assert acl._chips[0].used == before + 3 * 768


def test_a_failed_run_costs_its_process_and_so_leaks_nothing(
    pipeline: Pipeline, data: Data, tmp_path: Path, machine: Machine
) -> None:
    machine(memory=2 * 768 + 300)  # of a batch and its answer, and of one batch leaked
    load = om(tmp_path, code(507015, data, 0))
    for attempt_id in range(1, 4):
        with pytest.raises(DataError):
            pipeline.run(plan_of(data, load, attempt_id=attempt_id, stop=4))

    assert pipeline.run(plan_of(data, load, attempt_id=4, start=4)).samples == answers(data.samples[4:])
    assert pipeline.device.starts == 4


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (507011, DataError),
        (507014, DataError),
        (507015, DataError),
        (507018, DataError),
        (507034, DataError),
        (507035, DataError),
        (507010, DeviceError),
        (507033, DeviceError),
        (507899, DeviceError),
        (507901, DeviceError),
        (507001, DeviceError),
        (500003, DeviceError),
        (207005, DeviceError),
        (107002, JobError),
        (145011, JobError),
        (207001, JobError),
        (207018, JobError),
    ],
)
def test_a_failed_run_is_the_fault_of_whom_its_code_says(tmp_path: Path, number: int, error: type[FarmError]) -> None:
    text = failure(om(tmp_path, code(number)), error)

    assert "device h:0 failed to run" in text
    assert f"({number})" in text
    assert "CANN: [ACL ERROR] EZ9999: Inner Error!" in text


def test_a_failed_run_of_no_known_reason_is_the_devices_fault(tmp_path: Path) -> None:
    text = failure(om(tmp_path, {"kind": "code", "text": "EZ9999: something else"}), DeviceError)

    assert "[-1][ACL: general failure]; CANN: [ACL ERROR] EZ9999: something else" in text


def test_memory_that_was_enough_before_is_the_devices_fault(tmp_path: Path) -> None:
    assert "(207018)" in failure(om(tmp_path, code(207018, batch=3)), DeviceError, after=2)


def test_no_memory_for_the_first_batch_is_the_jobs_fault(tmp_path: Path, acl: Any, machine: Machine) -> None:
    load = om(tmp_path)
    with closing(open_backend(load)):
        used = acl._chips[0].used
    machine(memory=used + 700)

    assert "malloc device memory data failed" in failure(load, JobError)


def test_no_memory_for_the_first_answer_is_the_jobs_fault(tmp_path: Path, acl: Any, machine: Machine) -> None:
    load = om(tmp_path)
    with closing(open_backend(load)):
        used = acl._chips[0].used
    machine(memory=used + 800)

    assert "[2][ACL: memory allocation fail]" in failure(load, JobError)


def test_a_failed_copy_to_the_host_is_classed_as_a_failed_run(tmp_path: Path) -> None:
    assert "lost its heartbeat (507010)" in failure(om(tmp_path, code(507010, at="to_host")), DeviceError)


def test_no_memory_on_the_host_is_not_the_jobs_fault(tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise RuntimeError("[2][ACL: memory allocation fail] ")

    monkeypatch.setattr(acl.Tensor, "to_host", full)

    assert "[2][ACL: memory allocation fail]" in failure(om(tmp_path), DeviceError)


def test_the_batch_that_fails_is_named(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"AI core exception \(507015\).*\(batch of s4, s5, s6, s7\)"):
        pipeline.run(plan_of(data, om(tmp_path, code(507015, data, 5))))


def test_isolating_names_the_one_sample_that_fails(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    rows = pipeline.run(plan_of(data, om(tmp_path, code(507015, data, 5)), isolating=True)).samples

    assert list(reasons(rows)) == ["s5"]
    assert "AI core exception (507015)" in reasons(rows)["s5"]
    assert scored(rows) == answers([*data.samples[:5], *data.samples[6:]])


def test_isolating_does_not_blame_a_sample_for_a_card_that_fails(
    pipeline: Pipeline, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match="507010"):
        pipeline.run(plan_of(data, om(tmp_path, code(507010, data, 5)), isolating=True))


# -- codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("synchronize stream failed, runtime result = 507035[FUNC:ReportCallError]", 507035),
        ("error code:507015.", 507015),
        ("runtime result = 500003 ... 107000 ... 507015", 507015),
        ("runtime result = 507015, device status 507010", 507010),
        ("[PID: 507010] runtime result = 507014", 507014),
        ("execute model failed, modelId is 107001", None),
        ("streamId=507015, taskId: 507010", None),
        ("at 507015.25 s, 0x507015, 1507015, 507015a, LINE:645", None),
        ("waited for 100000 ms", None),
        ("EL0001: Device[1] lost heartbeat", 507010),
        ("EL0004: Failed to allocate memory.", 207001),
        ("rtMalloc: out of memory", 207001),
        ("Kernel task happen error, retCode=0x26, [aicore exception].", 507015),
        ("there is an aivec error exception, core id is 0", 507035),
        ("reason=[vector core timeout]", 507034),
        ("aicore timeout", 507014),
        ("AI CPU exception", 507018),
        ("", None),
        ("all is well", None),
    ],
)
def test_a_code_is_found_in_what_cann_says(said: str, number: int | None) -> None:
    assert acl_codes.find(said) == number


@pytest.mark.parametrize(
    ("numbers", "whom"),
    [
        ([507010, 507033, 507899, 507901], Blame.CARD),
        ([*range(507011, 507019), 507034, 507035], Blame.BATCH),
        ([107000, 107020, 145000, 145018], Blame.OURS),
        ([207001, 207018], Blame.MEMORY),
        ([207004, 207012, 500000, 500004, 507000, 507052, 507900, 545000], Blame.DEVICE),
    ],
)
def test_codes_concern_whom_the_retry_rule_says(numbers: list[int], whom: Blame) -> None:
    assert {acl_codes.blame(number) for number in numbers} == {whom}


def test_an_unknown_code_has_a_phrase_too() -> None:
    assert acl_codes.meaning(507052) == "ACL error 507052"


# -- loads that fail ---------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_a_device_error_by_name(tmp_path: Path) -> None:
    assert "device h:7 is not there ([107001]" in refusal(replace(om(tmp_path), device="h:7"), DeviceError)


def test_a_number_that_no_device_can_have_is_a_device_error(tmp_path: Path) -> None:
    assert "device id is out of range" in refusal(replace(om(tmp_path), device="h:256"), DeviceError)


def test_a_device_that_does_not_open_is_a_device_error_with_its_code(tmp_path: Path, machine: Machine) -> None:
    machine(broken=[0])

    assert "the device cannot be set up (507033)" in refusal(om(tmp_path), DeviceError)


def test_a_model_too_large_for_the_device_is_a_job_error_with_the_batch_size(tmp_path: Path, machine: Machine) -> None:
    machine(memory=1 << 20)

    assert "no memory for it at batch size 4" in refusal(om(tmp_path, workspace=2 << 20), JobError)


def test_a_model_for_another_chip_is_a_job_error_that_says_so(tmp_path: Path) -> None:
    assert "compiled for another chip" in refusal(om(tmp_path, soc="Ascend910B3"), JobError)


def test_a_model_of_another_cann_is_a_host_error_that_says_so(tmp_path: Path) -> None:
    load = om(tmp_path, {"kind": "code", "at": "load", "text": "E19999: Invalid opp version"})

    assert "another version of CANN" in refusal(load, HostError)


@pytest.mark.parametrize("number", [507010, 507015, 500004])
def test_a_load_that_fails_for_the_device_is_a_device_error(tmp_path: Path, number: int) -> None:
    assert f"({number})" in refusal(om(tmp_path, code(number, at="load")), DeviceError)


def test_a_load_that_fails_for_no_known_reason_is_a_job_error_with_all_that_was_said(tmp_path: Path) -> None:
    load = om(tmp_path, {"kind": "code", "at": "load", "text": "E19999: something else"})

    text = refusal(load, JobError)

    assert f"cannot load {load.path}: it is no model, or one for another chip or CANN" in text
    assert "E19999: something else" in text


def test_after_a_refused_load_the_next_is_as_ever(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    with pytest.raises(JobError):
        pipeline.run(plan_of(data, om(tmp_path, soc="Ascend910B3", name="other.om")))

    assert pipeline.run(plan_of(data, om(tmp_path), attempt_id=2)).samples == answers(data.samples)


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        ([("image", "float32", (4, 3, 4, 4))] * 2, None, "has input image float32[4, 3, 4, 4], image float32[4,"),
        (None, [("features", "float32", (4, 10))] * 2, "has output features float32[4, 10], features float32[4, 10],"),
        ([], None, "has input , the job needs image float32[4, 3, 4, 4]"),
        ([("image", "float32", (8, 3, 4, 4))], None, "has input image float32[8, 3, 4, 4]"),
        ([("image", "uint8", (4, 3, 4, 4))], None, "has input image uint8[4, 3, 4, 4]"),
        ([("image", "float32", (4, -1, 4, 4))], None, "has input image float32[4, -1, 4, 4]"),
        (None, [("Gemm_9:0:logits", "float32", (4, 10))], "has output logits float32[4, 10]"),
        (None, [("features", "float64", (4, 10))], "has output features float64[4, 10]"),
        (None, [("features", "float32", (4, 10, 1))], "has output features float32[4, 10, 1]"),
        (None, [("features", "float32", (-1, 10))], "has output features float32[-1, 10]"),
    ],
)  # fmt: skip
def test_a_model_with_other_tensors_is_a_job_error_that_lists_them(
    tmp_path: Path, given: list[Described] | None, wanted: list[Described] | None, said: str
) -> None:
    path = fake_acl.write_om(
        tmp_path / "other.om",
        given if given is not None else [("image", "float32", (4, *SHAPE))],
        wanted if wanted is not None else [("features", "float32", (4, CLASSES))],
    )

    assert said in refusal(load_of(path), JobError)


@pytest.mark.parametrize("shape", [(-1, 3, 8, 8), (-1, 3, -1, -1)])
def test_a_dynamic_model_with_other_axes_is_a_job_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = fake_acl.write_om(
        tmp_path / "other.om", [("image", "float32", shape)], [("features", "float32", (-1, CLASSES))], gears=[1, 4]
    )

    assert "the job needs image float32[4, 3, 4, 4]" in refusal(load_of(path), JobError)


@pytest.mark.parametrize("name", ["features", "Gemm_9:0:features", "Gemm_9:0", "scope/Gemm_9:12:features"])
def test_an_output_named_as_the_compiler_does_is_the_jobs(tmp_path: Path, name: str) -> None:
    path = fake_acl.write_om(
        tmp_path / "named.om", [("image", "float32", (4, *SHAPE))], [(name, "float32", (4, CLASSES))]
    )

    with closing(open_backend(load_of(path))) as backend:
        assert infer(backend, images()).tobytes() == expected(images()).tobytes()


def test_a_model_that_wants_other_bytes_than_its_shape_is_a_job_error(
    tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one compiled with preprocessing of its own."""
    real = acl._desc

    def smaller(*given: Any) -> Any:
        desc = real(*given)
        desc.realsize //= 4
        return desc

    monkeypatch.setattr(acl, "_desc", smaller)

    assert "takes 192 bytes a batch, the job's have 768" in refusal(om(tmp_path), JobError)


# -- files -------------------------------------------------------------------------------------------------------


def link(path: Path) -> Path:
    path.with_name("link.om").symlink_to(path)
    return path.with_name("link.om")


def folder(path: Path) -> Path:
    path.with_name("folder.om").mkdir()
    return path.with_name("folder.om")


def writable(path: Path) -> Path:
    path.chmod(0o660)
    return path


def huge(path: Path) -> Path:
    os.truncate(path, (64 << 30) + 1)
    return path


def deep(path: Path, levels: int = 33) -> Path:
    missing = levels - len(path.parts)  # of its parts one is the root, and one more is the name
    directory = path.parent.joinpath(*"d" * (missing + 1))
    directory.mkdir(parents=True)
    return path.rename(directory / path.name)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (link, "it is a symbolic link"),
        (folder, "it is no regular file"),
        (writable, "chmod go-w"),
        (huge, "has 68719476737 bytes, aclruntime takes 64 GiB"),
        (deep, "33 levels deep, aclruntime takes 32"),
        (lambda path: path.rename(path.with_suffix(".bin")), "does not end in .om"),
        (lambda path: path.rename(path.with_name("my model.om")), "takes only letters, digits"),
        (lambda path: path.rename(path.with_name("m+1.om")), "takes only letters, digits"),
    ],
)
def test_a_file_that_the_module_would_refuse_is_a_host_error_that_says_why(
    tmp_path: Path, acl: Any, spoil: Callable[[Path], Path], said: str
) -> None:
    load = load_of(spoil(Path(om(tmp_path).path)))

    text = refusal(load, HostError)

    assert f"cannot load {load.path}: " in text
    assert said in text
    with pytest.raises(HostError, match=re.escape(said)):
        check_host(load)
    with pytest.raises(RuntimeError, match="please check model path"):
        acl.InferenceSession(load.path, 0, acl.session_options())


def test_a_file_that_may_not_be_read_is_a_host_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = om(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)

    assert f"may not read it: chmod u+r {load.path}" in refusal(load, HostError)


def test_a_file_at_the_deepest_allowed_level_loads(tmp_path: Path) -> None:
    load = load_of(deep(Path(om(tmp_path).path), 32))

    open_backend(load).close()


def test_a_path_that_the_module_refuses_all_the_same_is_a_host_error(
    tmp_path: Path, acl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acl, "_is_fine", lambda _: False)

    assert "refuses the path" in refusal(om(tmp_path), HostError)


def test_a_host_error_comes_through_the_pipeline_as_one(pipeline: Pipeline, data: Data, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"does not end in \.om"):
        pipeline.run(plan_of(data, load_of(Path(om(tmp_path).path).rename(tmp_path / "model.bin"))))


def test_a_host_that_lacks_nothing_passes_the_look_from_outside(tmp_path: Path) -> None:
    check_host(om(tmp_path))

    assert module_file() == str(fake_acl.FOLDER / "aclruntime.py")


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import os; os.abort()", r"importing aclruntime ended the process \(-6\)"),
        ("raise ImportError('GLIBCXX_3.4.29 not found')", "cannot import aclruntime: GLIBCXX_3.4.29 not found"),
        ("print('hello')", "has no InferenceSession, session_options, BaseTensor: it is not the vendor's"),
        ("import time; time.sleep(60)", "does not end within 1 s"),
    ],
)
def test_a_module_that_cannot_be_used_is_told_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, said: str
) -> None:
    (tmp_path / "aclruntime.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("workers.backends.acl._IMPORT_S", 1.0 if "sleep" in module else 60.0)

    with pytest.raises(HostError, match=said):
        check_host(om(tmp_path))


# -- what is printed ---------------------------------------------------------------------------------------------


def test_what_the_module_prints_is_handed_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failure(om(tmp_path, code(507015)), DataError)

    printed = capfd.readouterr().out
    assert "[INFO] load model" in printed
    assert printed.count("[ACL ERROR]") == 1


#: A process of its own, for how C buffers is settled when a process starts.
PRINTING = """
import ctypes, sys
from pathlib import Path
from tests.integration.test_acl import images, infer, load_of
from workers.backends import open_backend
backend = open_backend(load_of(Path(sys.argv[1])))
ctypes.CDLL(None).puts(b"printed before: runtime result = 507010")
try:
    infer(backend, images())
except Exception as exc:
    print(type(exc).__name__, exc, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"text": "EZ9999: something"}, "DeviceError device h:0 failed to run"),
        ({"code": 507015}, "DataError device h:0 failed to run"),
    ],
)
def test_a_complaint_is_all_of_what_c_buffered_during_the_run_and_nothing_before(
    tmp_path: Path, fault: dict[str, object], said: str
) -> None:
    path = om(tmp_path, {"kind": "code", **fault}).path

    done = subprocess.run([sys.executable, "-c", PRINTING, path], cwd=ROOT, capture_output=True, text=True, timeout=60)

    assert done.stderr.startswith(said)
    assert "CANN: [ACL ERROR] EZ9999" in done.stderr
    assert "507010" not in done.stderr
    assert "printed before" in done.stdout


def test_a_complaint_is_not_taken_for_that_of_the_next_run(tmp_path: Path) -> None:
    faults = [code(507015, batch=1), {"kind": "code", "text": "EZ9999: something", "batch": 2}]
    with closing(open_backend(om(tmp_path, *faults))) as backend:
        with pytest.raises(DataError, match="507015"):
            infer(backend, images())
        with pytest.raises(DeviceError) as caught:
            infer(backend, images())

    assert "507015" not in str(caught.value)


def test_a_module_that_prints_a_megabyte_does_not_hang(tmp_path: Path) -> None:
    with closing(open_backend(om(tmp_path, {"kind": "say", "bytes": 1 << 20}))) as backend:
        assert infer(backend, images()).tobytes() == expected(images()).tobytes()


# -- leaving -----------------------------------------------------------------------------------------------------


def test_models_are_freed_when_switched_and_the_module_is_taken_down_last(
    pipeline: Pipeline, data: Data, tmp_path: Path, machine: Machine
) -> None:
    trace = tmp_path / "trace"
    machine(trace=str(trace))
    pipeline.run(plan_of(data, om(tmp_path)))
    pipeline.run(plan_of(data, om(tmp_path, bs=2, name="other.om"), attempt_id=2))

    pipeline.close()

    assert [event for event, _ in events(trace)] == ["load", "free", "load", "free", "finalize"]
    assert len({pid for _, pid in events(trace)}) == 1


def test_a_closed_backend_refuses_to_run(tmp_path: Path) -> None:
    backend = open_backend(om(tmp_path))
    backend.close()

    with pytest.raises(DeviceError, match="is not open"):
        infer(backend, images())


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B3"])
@pytest.mark.parametrize("rows", [4, 8])
def test_neither_a_load_nor_its_refusal_leaves_a_descriptor_or_memory(
    tmp_path: Path, acl: Any, soc: str, rows: int
) -> None:
    open_backend(om(tmp_path, name="first.om")).close()
    before = descriptors(), acl._chips[0].used
    given, wanted = ("image", "float32", (rows, *SHAPE)), ("features", "float32", (rows, CLASSES))
    path = fake_acl.write_om(tmp_path / "second.om", [given], [wanted], workspace=100, soc=soc)

    if (soc, rows) == ("Ascend310P3", BS):
        open_backend(load_of(path)).close()
    else:
        refusal(load_of(path), JobError)

    assert (descriptors(), acl._chips[0].used) == before


#: Opens a model, runs it, forks; the child says what a run says, and leaves by itself.
FORKING = """
import os, sys
import numpy as np
from pathlib import Path
from tests.integration.test_acl import images, infer, load_of
from workers.backends import open_backend
backend = open_backend(load_of(Path(sys.argv[1])))
infer(backend, images())
child = os.fork()
if child == 0:
    try:
        infer(backend, images())
    except Exception as exc:
        print(type(exc).__name__, "no fork" in str(exc), flush=True)
    backend.close()
    sys.exit()
os.waitpid(child, 0)
infer(backend, images())
backend.close()
"""


def test_a_forked_child_neither_uses_nor_frees_the_session(tmp_path: Path, machine: Machine) -> None:
    trace = tmp_path / "trace"
    machine(trace=str(trace))

    done = subprocess.run(
        [sys.executable, "-c", FORKING, om(tmp_path).path], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60
    )

    assert (done.returncode, "DeviceError True\n" in done.stdout) == (0, True)
    assert [event for event, _ in events(trace)] == ["load", "free", "finalize"]


# -- the stand-in ------------------------------------------------------------------------------------------------


def script(text: str) -> int:
    """The exit status of a script over the stand-in."""
    header = "import aclruntime, sys, numpy as np\nx = np.zeros((4, 3, 4, 4), np.float32)\n"
    return subprocess.run([sys.executable, "-c", header + text], cwd=ROOT, timeout=60).returncode


def test_reading_an_output_on_the_device_aborts(tmp_path: Path) -> None:
    path = om(tmp_path).path
    feed = "[aclruntime.BaseTensor(x.ctypes.data, x.nbytes)]"
    opened = f"session = aclruntime.InferenceSession({path!r}, 0, aclruntime.session_options())\n"

    status = script(f"{opened}(out,) = session.run(['Gemm_9:0:features'], {feed})\nnp.array(out)")

    assert status == -signal.SIGABRT


def test_a_model_without_options_ends_the_process(tmp_path: Path) -> None:
    assert script(f"aclruntime.model({om(tmp_path).path!r}, 0)") == -signal.SIGSEGV


def test_arguments_are_positional_only(tmp_path: Path, acl: Any) -> None:
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        acl.InferenceSession(om(tmp_path).path, 0, options=acl.session_options())
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        acl.BaseTensor(address=1, bytes=2)


def test_a_run_with_wrong_sizes_names_or_counts_fails_as_the_vendors_does(tmp_path: Path, acl: Any) -> None:
    session = acl.InferenceSession(om(tmp_path).path, 0, acl.session_options())
    batch = images()
    feed = acl.BaseTensor(batch.ctypes.data, batch.nbytes)
    short = acl.BaseTensor(batch.ctypes.data, batch.nbytes - 4)

    for names, feeds, text in (
        (["Gemm_9:0:features"], [short], r"\[-1\]\[ACL: general failure\] "),
        (["features"], [feed], r"\[-1\]\[ACL: general failure\] "),
        (["Gemm_9:0:features"], [feed, feed], r"\[3\]\[ACL: runtime failure\] "),
    ):
        with pytest.raises(RuntimeError, match=text):
            session.run(names, feeds)
    session.free_resource()
    with pytest.raises(RuntimeError, match=r"\[1\]\[ACL: invalid parameter\] "):
        session.run(["Gemm_9:0:features"], [feed])


def test_times_of_a_run_are_taken_as_three(tmp_path: Path) -> None:
    with closing(open_backend(om(tmp_path, h2d_ms=2, compute_ms=6, d2h_ms=4))) as backend:
        times = backend.infer(images(), np.empty((BS, CLASSES), np.float32))

    assert isinstance(times, Times)
    assert times.h2d_ms >= 1.9
    assert times.compute_ms >= 5.9
    assert times.d2h_ms >= 3.9
