"""
A device that is none: it waits as long as a 310P3 would, and its outputs are a function of each sample's bytes.

So sharding, order, padding and restarts cannot change a digit. A chip that is named (`farm up --simulate 8x310P3`) has
the latencies of its reference table; otherwise a batch takes 1 ms. What differs comes from ``FARM_SIMULATED`` (JSON),
e.g. ``{"compute_ms": 50, "faults": [{"kind": "hang", "batch": 3, "once": "/tmp/mark"}]}``. A fault strikes when all it
names fits: `sample` (xxh3 of the bin, 16 hex digits), `batch` (counted from 1 since the model was loaded), `after`
(every batch after that one), `bs` (the batch size), `device` (host:index); with `once`, only for the one process that
manages to create that file. Kinds: hang, crash, slow (`factor`), nan, error, wrong (other scores), acl (ACL's `code`,
blamed as the real backend would), oom (no memory: when the model is loaded, or at the `batch` it names). Outputs are
white noise; with ``"smooth": true`` those that are maps vary slowly, as a network's do.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from farm import zoo
from farm.errors import DataError, DeviceError, JobError
from workers.backends import acl_codes
from workers.backends.acl_codes import Blame
from workers.backends.base import Array, Backend, Load, Times

#: Bytes a ms to the card and off it: the guides' one line with copies has 3,145,728 bytes in 0.793 ms, and
#: 157,286,400 in 98.025.
H2D, D2H = 3_145_728 / 0.793, 157_286_400 / 98.025
#: Deviation of a batch's time, over the time: between what the guides' two lines show, 0.02 % and 0.3 %.
JITTER = 0.001
_PR_SET_TIMERSLACK = 29
#: Scores that are made anew; more of them repeat these.
PERIOD = 1 << 16
#: Values of an output that may be remembered.
SHORT = 1 << 12
#: A smooth map is drawn between so many points a side, and one more.
POINTS = 4

_STRICT = ConfigDict(extra="forbid")


@checked(frozen=True, kw_only=True, config=_STRICT)
class Fault:
    """What goes wrong, and when."""

    kind: Literal["hang", "crash", "slow", "nan", "error", "wrong", "acl", "oom"]
    sample: str = ""
    batch: int = 0
    after: int = 0
    bs: int = 0
    device: str = ""
    once: str = ""
    factor: float = 20.0  #: of a slow device
    code: int = 507015  #: of acl

    def strikes(self, load: Load, batch: int, samples: Sequence[str] = ()) -> bool:
        """Whether it does at the `batch` of these `samples`; 0 is the load itself."""
        fits = (
            (not self.device or self.device == load.device)
            and (not self.bs or self.bs == load.input.shape[0])
            and (not self.batch or self.batch == batch)
            and (batch > self.after or not batch)
            and (not self.sample or self.sample in samples)
        )
        return fits and (not self.once or _first(self.once))


@checked(frozen=True, kw_only=True, config=_STRICT)
class Behaviour:
    """What a simulated device is like. Times in ms a batch."""

    h2d_ms: float | None = None  #: None: as the chip's, or nothing
    compute_ms: float | None = None  #: None: as the chip's, or 1 ms
    d2h_ms: float | None = None
    smooth: bool = False  #: outputs that are maps vary slowly, as real ones do; otherwise they are white noise
    faults: tuple[Fault, ...] = ()


def behaviour(text: str) -> Behaviour:
    """`JobError` for JSON that describes none."""
    try:
        return TypeAdapter(Behaviour).validate_json(text)
    except ValidationError as exc:
        raise JobError(f"FARM_SIMULATED describes no simulated device: {exc}") from exc


def scores(xxh3: int, count: int) -> NDArray[np.float32]:
    """The output of a sample whose bytes have this hash: float32 [count], about normal with deviation 3."""
    return np.resize(_drawn(xxh3, count), count)


def _drawn(xxh3: int, count: int) -> NDArray[np.float32]:
    made = np.random.Generator(np.random.SFC64(xxh3)).standard_normal(min(count, PERIOD), dtype=np.float32)
    return made * np.float32(3)


#: Made-up bins are few, and their scores are the same each time: what a card would compute costs the host nothing.
_remembered = lru_cache(maxsize=256)(_drawn)


def _write_scores(xxh3: int, out: Array) -> None:
    """`scores`, without a copy of them all: a large output is made in a third of the time."""
    flat = out.reshape(-1)
    if out.size <= SHORT:
        flat[:] = _remembered(xxh3, out.size)
        return
    drawn = _drawn(xxh3, out.size)
    whole = out.size // len(drawn) * len(drawn)
    flat[:whole].reshape(-1, len(drawn))[:] = drawn
    flat[whole:] = drawn[: out.size - whole]


def _write_map(xxh3: int, out: Array) -> None:
    """
    A map of every class, [classes, height, width], that is linear between seeded points.

    Values and weights have so few digits that float32 holds every sum: the same bits in whatever order they are added.
    """
    classes, height, width = out.shape
    seeded = np.random.Generator(np.random.SFC64(xxh3))
    points = seeded.integers(-512, 512, (classes, POINTS + 1, POINTS + 1)).astype(np.float32) / 64
    rows = np.matmul(_between(height), points).reshape(classes * height, POINTS + 1)
    np.matmul(rows, _between(width).T, out=out.reshape(classes * height, width))


@cache
def _between(length: int) -> NDArray[np.float32]:
    """The weights of the points at each of `length` places, [length, POINTS + 1]."""
    near, share = np.divmod(np.arange(length) * POINTS, length)
    weights = np.zeros((length, POINTS + 1), np.float32)
    weights[np.arange(length), near] = 1 - share / length
    weights[np.arange(length), near + 1] = share / length
    return weights


def latencies(load: Load, behaviour: Behaviour) -> Times:
    """
    Mean times of a batch: those asked for, else those of the chip that `load.options` names.

    Compute is the reference table's 1000 * bs / fps, in between and beyond in proportion. `JobError` where the
    reference says that a batch size does not fit into the chip's memory.
    """
    chip, bs = load.options.get("chip"), load.input.shape[0]
    usual = Times(0.0, 1.0, 0.0)
    if chip:
        spec = zoo.get(str(load.options["model"]))
        if reason := spec.impossible.get(bs):
            raise JobError(f"{reason}: {spec.name} at batch size {bs} on a simulated {chip}, as the reference has it")
        known = sorted(spec.reference_fps)
        ms = np.interp(bs, known, [1000 / spec.reference_fps[size] for size in known]) * bs if known else 1.0
        usual = Times(load.input.nbytes / H2D, float(ms), load.output.nbytes / D2H)
    asked = (behaviour.h2d_ms, behaviour.compute_ms, behaviour.d2h_ms)
    return Times(*(ms if own is None else own for own, ms in zip(asked, usual, strict=True)))


@dataclass
class SimulatedBackend(Backend):
    """Answers when the time is over. It tells the times it was made to have: a card's do not depend on its host."""

    load: Load
    behaviour: Behaviour
    batches: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for fault in self.behaviour.faults:
            if fault.kind == "oom" and not fault.batch and fault.strikes(self.load, 0):
                raise _no_memory(self.load)
        self._usual = latencies(self.load, self.behaviour)
        self._spread = JITTER if self.behaviour.compute_ms is None else 0.0
        self._jitter = random.Random(self.load.device)  # noqa: S311  # the same times again, not secrets

    def infer(self, batch: Array, out: Array) -> Times:
        began = time.perf_counter()
        self.batches += 1
        hashes = [xxhash.xxh3_64_intdigest(sample) for sample in batch]
        struck = self._struck(hashes) if self.behaviour.faults else []
        for fault in struck:
            _strike(fault, self.load)
        write = _write_map if self.behaviour.smooth and out.ndim == 4 else _write_scores
        for value, row in zip(hashes, out, strict=True):
            write(value, row)
            if struck:
                _spoil(struck, value, row)
        h2d, compute, d2h = self._usual
        compute *= 1 + self._spread * max(-3.0, min(3.0, self._jitter.gauss(0, 1)))
        compute *= max([1.0, *(fault.factor for fault in struck if fault.kind == "slow")])
        left = began + (h2d + compute + d2h) / 1000 - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return Times(h2d, compute, d2h)

    def _struck(self, hashes: Sequence[int]) -> list[Fault]:
        names = [f"{value:016x}" for value in hashes]
        return [fault for fault in self.behaviour.faults if fault.strikes(self.load, self.batches, names)]


def open_backend(load: Load) -> Backend:
    # The kernel lets a sleeper sleep 50 us longer than asked, to wake it with others; a card's interrupt does not wait.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    return SimulatedBackend(load, behaviour(str(load.options.get("simulated", "{}"))))


def _strike(fault: Fault, load: Load) -> None:
    if fault.kind == "hang":
        time.sleep(3600)
    elif fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault.kind == "error":
        raise DeviceError("the simulated device failed, as it was told to")
    elif fault.kind == "oom" and fault.batch:
        raise _no_memory(load)
    elif fault.kind == "acl":
        whom = {Blame.BATCH: DataError, Blame.MEMORY: JobError, Blame.OURS: JobError}
        error = whom.get(acl_codes.blame(fault.code), DeviceError)
        raise error(f"the simulated device failed, as it was told to: {acl_codes.meaning(fault.code)}")


def _spoil(faults: Sequence[Fault], xxh3: int, out: Array) -> None:
    """Another output of the sample with this hash, if one of the faults is of that kind."""
    if any(fault.kind == "nan" and fault.sample in ("", f"{xxh3:016x}") for fault in faults):
        out[:] = np.nan
    if any(fault.kind == "wrong" for fault in faults):
        out[:] = out[::-1]  # plausible, and another answer


def _no_memory(load: Load) -> JobError:
    bs = load.input.shape[0]
    return JobError(f"out of memory at batch size {bs}, as the simulated device was told to be")


def _first(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
