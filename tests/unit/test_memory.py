"""Devices whose buffers together would leave their host no memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from farm import artifacts, zoo
from farm.errors import HostError
from farm.jobs import JobSpec
from tasks.worker import MOST_MEMORY, DeviceWorker
from workers.devices import LocalDevice
from workers.ring import nbytes

ARTIFACT = artifacts.simulated(zoo.get("swin"), 8, "full")
RING = nbytes(ARTIFACT.input.nbytes, ARTIFACT.output.nbytes)


def worker(devices: int, memory: float, monkeypatch: pytest.MonkeyPatch) -> DeviceWorker:
    """One of so many devices on a host of so much memory, which is all that is asked of it."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=memory))
    made = object.__new__(DeviceWorker)
    made._peers = devices
    made.device = LocalDevice(host="h", index=0, soc="cpu", backends=("simulated",))
    return made


def spec_of(**said: Any) -> JobSpec:
    return JobSpec(
        model="swin", bs=8, artifact=ARTIFACT, dataset="ade20k", recipe="seg", dtype="float32", manifest_digest="",
        samples=4, provenance={}, **said,
    )  # fmt: skip


def test_more_buffers_than_memory_are_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match=r"4 devices of h need 15.5 GB of buffers for swin at batch size 8"):
        worker(4, 3.9 * RING / MOST_MEMORY, monkeypatch)._check_memory(spec_of())


@pytest.mark.parametrize("chosen", [{"devices": ("h:0", "other:1")}, {"devices": ("h:0",), "together": ("h:0", "h:1")}])
def test_only_devices_that_work_count(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    worker(4, 2.1 * RING / MOST_MEMORY, monkeypatch)._check_memory(spec_of(**chosen))


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(4, 4.1 * RING / MOST_MEMORY, monkeypatch)._check_memory(spec_of())
