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

from workers.backends.base import Array, TensorSpec

_PAGE = mmap.PAGESIZE
#: Buffers: enough that reading stays ahead of the device, few enough that 157 MB outputs fit.
INPUTS, OUTPUTS = 4, 3


@dataclass(frozen=True, slots=True)
class Buffer:
    """One batch's place in the ring."""

    offset: int
    array: Array


class Ring:
    """`INPUTS` input and `OUTPUTS` output buffers, page-aligned."""

    def __init__(self, given: TensorSpec, wanted: TensorSpec) -> None:
        sizes = [given] * INPUTS + [wanted] * OUTPUTS
        self.nbytes = nbytes(given.nbytes, wanted.nbytes)
        self.fd = os.memfd_create("farm-ring", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.nbytes)
        memory = mmap.mmap(self.fd, self.nbytes)
        buffers, offset = [], 0
        for tensor in sizes:
            buffers.append(Buffer(offset, view(memory, offset, tensor)))
            offset += _aligned(tensor.nbytes)
        self.inputs, self.outputs = buffers[:INPUTS], buffers[INPUTS:]

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last array that views it."""
        os.close(self.fd)


def nbytes(given: int, wanted: int) -> int:
    """What a ring takes for batches of so many bytes: the most a device holds of them, whatever the samples are."""
    return INPUTS * _aligned(given) + OUTPUTS * _aligned(wanted)


def view(memory: mmap.mmap, offset: int, tensor: TensorSpec) -> Array:
    """A tensor at a place in the ring, writable, without a copy."""
    flat = np.frombuffer(memory, dtype=tensor.dtype, count=int(np.prod(tensor.shape)), offset=offset)
    return flat.reshape(tensor.shape)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
