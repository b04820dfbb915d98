"""The records of a job's life. They change in the database only; what a process holds is a frozen copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from farm.artifacts import Artifact


class JobState(str, Enum):
    """Where a job stands."""

    PENDING = "pending"  #: written, nothing assigned yet
    RUNNING = "running"
    DONE = "done"  #: every sample scored
    DONE_WITH_ERRORS = "done_with_errors"  #: every sample has a row, some say failed
    FAILED = "failed"  #: cannot be finished; `Job.error` says why
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (JobState.PENDING, JobState.RUNNING)


class ShardState(str, Enum):
    """Where a shard stands."""

    PENDING = "pending"
    ASSIGNED = "assigned"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  #: out of attempts
    CANCELLED = "cancelled"


class AttemptState(str, Enum):
    """What became of one device's go at a shard."""

    ASSIGNED = "assigned"  #: waits in its device's window
    RUNNING = "running"
    WON = "won"  #: its rows are the shard's rows
    LOST = "lost"  #: taken away: device gone, drained, job cancelled
    FENCED = "fenced"  #: came back too late and wrote nothing
    FAILED = "failed"  #: ran and broke; `reason` says how


#: An attempt that may still win.
LIVE = (AttemptState.ASSIGNED, AttemptState.RUNNING)


class Failure(str, Enum):
    """Why an attempt failed, as far as the next attempt must know."""

    CRASH = "crash"  #: the device process ended by itself
    HANG = "hang"  #: the device process was killed at its deadline
    DATA = "data"  #: the backend blames the batch
    NON_FINITE = "non_finite"  #: scores that are no numbers
    DEVICE = "device"  #: the device refused: load, driver, health, or a canary that came out wrong
    HOST = "host"  #: bins of this host cannot be used; another host's may
    JOB = "job"  #: no device can do it


class DeviceState(str, Enum):
    """Whether a device takes work."""

    UP = "up"
    QUARANTINED = "quarantined"  #: three strikes, or a canary that came out wrong; a canary that does not ends it
    GONE = "gone"  #: its worker left


class ResultState(str, Enum):
    """What a sample's row says."""

    SCORED = "scored"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What a job is, frozen when it is submitted."""

    model: str
    bs: int
    artifact: Artifact
    dataset: str
    recipe: str
    dtype: str
    manifest_digest: str
    samples: int  #: the first so many of the manifest
    windows: int = 0  #: of all these images, for segmentation
    devices: tuple[str, ...] = ()  #: only these; empty: all that match
    priority: int = 0  #: higher goes first
    allow_failed: int = 0
    loop: int = 0  #: batches of noise to be timed on its one device: a job of speed, which has no samples
    together: tuple[str, ...] = ()  #: of a job of speed: the devices that are timed at the same time
    keep_logits: bool = False  #: raw outputs are kept, on the hosts they were made on
    provenance: Mapping[str, object]

    @property
    def extent(self) -> str:
        """How much it is, in words."""
        if self.loop:
            return f"speed of {self.loop} batches on {', '.join(self.devices)}"
        return f"{self.samples} images of {self.windows} windows" if self.windows else f"{self.samples} samples"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the database holds it."""

    id: int
    state: JobState
    spec: JobSpec
    created: float
    finished: float | None
    error: str

    @property
    def simulated(self) -> bool:
        return self.spec.artifact.backend == "simulated"

    def __str__(self) -> str:
        mark = " (simulated)" if self.simulated else ""
        return f"job {self.id}: {self.spec.model} bs {self.spec.bs}, {self.spec.extent}{mark}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One shard pinned to one device: all a worker needs to evaluate it."""

    attempt_id: int
    shard_id: int
    job: Job
    shard: int  #: position in the job
    attempt: int  #: 1 for the shard's first
    start: int  #: index of the first sample, in manifest order
    stop: int  #: one past the last
    isolating: bool  #: find the sample that breaks the device process
    non_finite_before: bool  #: another attempt saw scores that are no numbers: final now

    @property
    def task_id(self) -> str:
        return f"j{self.job.id}.s{self.shard}.a{self.attempt}"

    def __str__(self) -> str:
        spec = self.job.spec
        return f"{spec.model} bs={spec.bs} samples={self.start}..{self.stop - 1} try={self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """What segmentation makes of an image. A class is 0 to 149 everywhere."""

    height: int
    width: int
    label_map: bytes  #: PNG of uint8 [height, width]
    sha256: str  #: of those uint8 values, row by row
    areas: bytes  #: uint32 little-endian [3, 150]: pixels intersecting, predicted, labelled, by class
    merge_ms: float  #: from the first window's logits to the label map and the areas


class SampleResult(NamedTuple):
    """
    One sample's row: scored with its five best classes or its segments, or failed with the reason. A tuple: workers
    make thousands a second.
    """

    name: str
    state: ResultState
    label: int
    reason: str = ""
    rank: int | None = None  #: of the label, 1 is best
    classes: tuple[int, ...] = ()  #: the five best, score descending, lowest class on ties
    scores: tuple[float, ...] = ()
    segments: Segments | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where the time of an attempt went, in ms summed over its batches."""

    read_ms: float = 0.0
    wait_ms: float = 0.0  #: batches ready, device busy with others
    device_ms: float = 0.0  #: h2d + compute + d2h
    post_ms: float = 0.0
    load_ms: float = 0.0  #: loading the model, when this attempt had to


class Verdict(str, Enum):
    """What a device's answer to a canary says of it."""

    AGREES = "agrees"  #: with others of its kind, bit by bit
    DISAGREES = "disagrees"  #: with most of them, or with onnxruntime
    UNVERIFIED = "unverified"  #: nobody to compare it with
    DISPUTED = "disputed"  #: as many say this as that


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A device's answer to an input that is the same everywhere."""

    artifact_sha256: str
    number: int  #: which input
    digest: str  #: sha256 of the outputs' bytes
    max_abs_diff: float | None  #: to onnxruntime, over the largest magnitude; None without a reference
    tolerance: float  #: of that
    ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """All that an attempt brings home, written in one transaction."""

    samples: Sequence[SampleResult]
    batch_ms: Sequence[tuple[float, float, float]]  #: (h2d, compute, d2h) of each batch
    budget: Budget
    canary: Canary | None = None  #: what the device said to one on the way
    unread: str = ""  #: why a sample's bin could not be used on this host, if one could not
