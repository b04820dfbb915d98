"""
A device that is none: it waits as long as told, and its outputs are a function of each sample's bytes.

So sharding, order, padding and restarts cannot change a digit. Faults come on request, from ``FARM_SIMULATED``
(JSON), e.g. ``{"compute_ms": 50, "faults": [{"kind": "hang", "batch": 3, "once": "/tmp/mark"}]}``. A fault strikes
when all it names fits: `sample` (xxh3 of the bin, 16 hex digits), `batch` (counted from 1 since the model was
loaded), `after` (every batch after that one), `device` (host:index); with `once`, only for the one process that
manages to create that file.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from farm.errors import DeviceError, JobError
from workers.backends.base import Array, Backend, Load, Times

_STRICT = ConfigDict(extra="forbid")


@checked(frozen=True, kw_only=True, config=_STRICT)
class Fault:
    """What goes wrong, and when."""

    kind: Literal["hang", "crash", "slow", "nan", "error", "wrong"]
    sample: str = ""
    batch: int = 0
    after: int = 0
    device: str = ""
    once: str = ""
    factor: float = 20.0  #: of a slow device

    def strikes(self, device: str, batch: int, samples: Sequence[str]) -> bool:
        fits = (
            (not self.device or self.device == device)
            and (not self.batch or self.batch == batch)
            and batch > self.after
            and (not self.sample or self.sample in samples)
        )
        return fits and (not self.once or _first(self.once))


@checked(frozen=True, kw_only=True, config=_STRICT)
class Behaviour:
    """What a simulated device is like. Times in ms a batch."""

    h2d_ms: float = 0.0
    compute_ms: float = 1.0
    d2h_ms: float = 0.0
    faults: tuple[Fault, ...] = ()


def behaviour(text: str) -> Behaviour:
    """`JobError` for JSON that describes none."""
    try:
        return TypeAdapter(Behaviour).validate_json(text)
    except ValidationError as exc:
        raise JobError(f"FARM_SIMULATED describes no simulated device: {exc}") from exc


def scores(xxh3: int, count: int) -> NDArray[np.float32]:
    """The output of a sample whose bytes have this hash: float32 [count], about normal with deviation 3."""
    return np.random.Generator(np.random.SFC64(xxh3)).standard_normal(count, dtype=np.float32) * np.float32(3)


@dataclass
class SimulatedBackend(Backend):
    """Sleeps, then answers."""

    load: Load
    behaviour: Behaviour
    batches: int = field(default=0, init=False)

    def infer(self, batch: Array, out: Array) -> Times:
        self.batches += 1
        hashes = [xxhash.xxh3_64_intdigest(sample) for sample in batch]
        names = [f"{value:016x}" for value in hashes]
        struck = [f for f in self.behaviour.faults if f.strikes(self.load.device, self.batches, names)]
        slowness = max([1.0, *(f.factor for f in struck if f.kind == "slow")])
        for fault in struck:
            _strike(fault)
        for row, value in enumerate(hashes):
            out[row] = scores(value, out[row].size).reshape(out[row].shape)
            if any(f.kind == "nan" and f.sample in ("", names[row]) for f in struck):
                out[row] = np.nan
            if any(f.kind == "wrong" for f in struck):
                out[row] = out[row][::-1]  # plausible, and another answer
        b = self.behaviour
        return Times(*(_wait(ms * slowness) for ms in (b.h2d_ms, b.compute_ms, b.d2h_ms)))


def open_backend(load: Load) -> Backend:
    return SimulatedBackend(load, behaviour(str(load.options.get("simulated", "{}"))))


def _wait(ms: float) -> float:
    began = time.perf_counter()
    if ms > 0:
        time.sleep(ms / 1000)
    return 1000 * (time.perf_counter() - began)


def _strike(fault: Fault) -> None:
    if fault.kind == "hang":
        time.sleep(3600)
    elif fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault.kind == "error":
        raise DeviceError("the simulated device failed, as it was told to")


def _first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
