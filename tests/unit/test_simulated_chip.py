"""What a simulated chip takes for a batch, and how it fails on request."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from farm import artifacts, zoo
from farm.errors import DataError, DeviceError, FarmError, JobError, UsageError
from farm.settings import load_settings
from workers.backends.base import Load, TensorSpec
from workers.backends.simulated import SimulatedBackend, behaviour, latencies, open_backend
from workers.devices import discover


def load_of(model: str, bs: int, *, head: str = "", chip: str = "310P3", **said: Any) -> Load:
    artifact = artifacts.simulated(zoo.get(model), bs, head)
    return Load(
        backend="simulated",
        path="",
        input=TensorSpec(**artifact.input.model_dump()),
        output=TensorSpec(**artifact.output.model_dump()),
        device="h:0",
        options={"simulated": json.dumps(said), "model": model, "chip": chip},
    )


CELLS = [(name, bs) for name in zoo.MODELS for bs in zoo.get(name).reference_fps]


@pytest.mark.parametrize(("model", "bs"), CELLS)
def test_device_fps_is_the_references(model: str, bs: int) -> None:
    times = latencies(load_of(model, bs, head="full" if model == "swin" else ""), behaviour("{}"))

    assert 1000 * bs / times.compute_ms == pytest.approx(zoo.get(model).reference_fps[bs], rel=1e-9)


def test_copies_take_what_the_guide_measured() -> None:
    times = latencies(load_of("swin", 1, head="full"), behaviour("{}"))

    assert (times.h2d_ms, times.d2h_ms) == pytest.approx((0.793, 98.025))


def test_the_small_head_copies_sixteen_times_less() -> None:
    full, small = (latencies(load_of("swin", 1, head=head), behaviour("{}")) for head in ("full", "small"))

    assert full.d2h_ms / small.d2h_ms == pytest.approx(16)


@pytest.mark.parametrize(("bs", "between"), [(2, (1000 / 59.2, 4000 / 76.0)), (128, (64000 / 5.1, 400000.0))])
def test_batch_sizes_without_a_reference_lie_between_or_beyond(bs: int, between: tuple[float, float]) -> None:
    assert between[0] < latencies(load_of("lvvit", bs), behaviour("{}")).compute_ms < between[1]


@pytest.mark.parametrize("bs", [16, 32, 64])
def test_what_was_out_of_memory_for_the_reference_is_here(bs: int) -> None:
    with pytest.raises(JobError, match=f"out of memory: swin at batch size {bs} on a simulated 310P3"):
        open_backend(load_of("swin", bs, head="full"))


def test_what_is_asked_for_goes_before_the_chip() -> None:
    asked = latencies(load_of("lvvit", 4), behaviour('{"compute_ms": 3}'))

    assert asked.compute_ms == 3
    assert asked.h2d_ms > 0


def test_times_vary_a_little_and_are_the_same_again() -> None:
    def times() -> list[float]:
        backend = SimulatedBackend(load_of("conformer", 1), behaviour("{}"))
        batch, out = np.zeros((1, 3, 224, 224), np.float32), np.zeros((1, 1000), np.float32)
        return [backend.infer(batch, out).compute_ms for _ in range(8)]

    first = times()
    assert len(set(first)) == 8
    assert max(first) / min(first) < 1.01
    assert first == times()


@pytest.mark.parametrize(
    ("code", "error"),
    [(507015, DataError), (507010, DeviceError), (207001, JobError), (107002, JobError), (507899, DeviceError)],
)
def test_an_acl_code_is_blamed_as_the_real_backend_would(code: int, error: type[FarmError]) -> None:
    load = load_of("lvvit", 1, compute_ms=0, faults=[{"kind": "acl", "code": code, "batch": 2}])
    backend = open_backend(load)
    batch, out = np.zeros((1, 3, 224, 224), np.float32), np.zeros((1, 1000), np.float32)
    backend.infer(batch, out)

    with pytest.raises(error, match=str(code)):
        backend.infer(batch, out)


def test_memory_ends_at_the_load_or_at_a_batch() -> None:
    with pytest.raises(JobError, match="out of memory at batch size 4"):
        open_backend(load_of("lvvit", 4, faults=[{"kind": "oom", "bs": 4}]))
    open_backend(load_of("lvvit", 1, faults=[{"kind": "oom", "bs": 4}]))
    later = open_backend(load_of("lvvit", 1, compute_ms=0, faults=[{"kind": "oom", "batch": 1}]))
    with pytest.raises(JobError, match="out of memory"):
        later.infer(np.zeros((1, 3, 224, 224), np.float32), np.zeros((1, 1000), np.float32))


def test_so_many_devices_as_asked_for_say_that_they_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SIMULATE", "12x310P3")
    monkeypatch.setenv("FARM_HOST", "h")
    found = discover(load_settings())

    assert [d.name for d in found] == [f"h:{index}" for index in range(12)]
    assert {(d.soc, d.backends) for d in found} == {("simulated 310P3", ("simulated",))}


@pytest.mark.parametrize("text", ["8", "8x910B", "0x310P3", "x310P3", "8 x 310P3"])
def test_what_cannot_be_simulated_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_SIMULATE", text)
    with pytest.raises(UsageError, match=r"FARM_SIMULATE: .*8x310P3"):
        load_settings()
