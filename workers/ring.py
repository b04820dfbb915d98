"""
The ring: a device's input and output buffers in memory that its worker and its device process share.

A memfd, because containers give /dev/shm 64 MB and because nothing can be left behind. The reader puts bins straight
into it, the device works on it in place, post-processing reads from it: no copy in between.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.backends.base import Array, TensorSpec

_PAGE = mmap.PAGESIZE
#: Buffers: enough that reading stays ahead of the device, few enough that 157 MB outputs fit.
INPUTS, OUTPUTS = 4, 3
#: Outputs of a batch, in bytes, that are read so quickly that batches can go in groups.
SMALL = 1 << 20
#: Of those there are more buffers: so many, if their inputs fit into so many bytes.
MOST, ROOM = 16, 32 << 20


@dataclass(frozen=True, slots=True)
class Buffer:
    """One batch's place in the ring."""

    offset: int
    array: Array


class Ring:
    """Input and output buffers, page-aligned, behind a page that says how far the device process has got."""

    def __init__(self, given: TensorSpec, wanted: TensorSpec) -> None:
        inputs, outputs = _counts(given.nbytes, wanted.nbytes)
        self.nbytes = nbytes(given.nbytes, wanted.nbytes)
        self.fd = os.memfd_create("farm-ring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        memory = mmap.mmap(self.fd, self.nbytes)
        self._progress = progress(memory)
        buffers, offset = [], _PAGE
        for tensor in [given] * inputs + [wanted] * outputs:
            buffers.append(Buffer(offset, view(memory, offset, tensor)))
            offset += _aligned(tensor.nbytes)
        self.inputs, self.outputs = buffers[:inputs], buffers[inputs:]

    @property
    def done(self) -> int:
        """Batches that the device process has done since `start`; a process that is gone has left it behind."""
        return int(self._progress[0])

    @property
    def done_at(self) -> float:
        """When it did the last of them, in `time.monotonic` seconds; 0 before the first."""
        return float(self._progress[1])

    def start(self) -> None:
        """A model is about to be loaded: nothing is done."""
        self._progress[:] = 0

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last array that views it."""
        os.close(self.fd)


def nbytes(given: int, wanted: int) -> int:
    """What a ring takes for batches of so many bytes: the most a device holds of them, whatever the samples are."""
    inputs, outputs = _counts(given, wanted)
    return _PAGE + inputs * _aligned(given) + outputs * _aligned(wanted)


def _counts(given: int, wanted: int) -> tuple[int, int]:
    """How many buffers there are for inputs and outputs of so many bytes."""
    if wanted > SMALL:
        return INPUTS, OUTPUTS
    many = max(INPUTS, min(MOST, ROOM // _aligned(given)))
    return many, many


def progress(memory: mmap.mmap) -> NDArray[np.float64]:
    """Batches that are done and the `time.monotonic` of the last: float64 [2]."""
    return np.frombuffer(memory, np.float64, 2)


def view(memory: mmap.mmap, offset: int, tensor: TensorSpec) -> Array:
    """A tensor at a place in the ring, writable, without a copy."""
    flat = np.frombuffer(memory, dtype=tensor.dtype, count=int(np.prod(tensor.shape)), offset=offset)
    return flat.reshape(tensor.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
