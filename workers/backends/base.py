"""What every kind of device can do: load one model, run one full batch, say how long it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of the graph as the job expects it, batch axis included."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Which model to load where."""

    backend: str
    path: str  #: of the artifact; empty for the simulated backend
    input: TensorSpec
    output: TensorSpec
    device: str  #: host:index
    options: Mapping[str, Any] = field(default_factory=dict)  #: the backend's own


class Times(NamedTuple):
    """Durations of one batch in ms."""

    h2d_ms: float
    compute_ms: float
    d2h_ms: float


class Backend(ABC):
    """
    One model loaded on one device. Used from a single thread, inside the device process.

    Arrays are views of the shared ring: they are not kept after a call returns.
    """

    @abstractmethod
    def infer(self, batch: Array, out: Array) -> Times:
        """
        Run one full batch of the job's input shape into `out`, of its output shape.

        Raises `DataError` for what the batch itself caused, `DeviceError` for this device, `JobError` for any.
        """

    def close(self) -> None:
        """Release the device. Safe to call twice."""
