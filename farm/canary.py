"""
Canaries: seeded inputs that are the same on every device, and what onnxruntime said to them.

Four inputs, turned by one place from one canary to the next, fill a batch of any size. The reference lies beside the
artifact, as a part of each output: 1,000 values, spread evenly.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Different inputs, and so different canaries.
COUNT = 4
#: Distance to onnxruntime, over the reference's largest magnitude. ATC compiles to float16, and float16 in PyTorch
#: (seeded weights, all five models) comes 0.001 to 0.008 away from float32. That a card's own way with float16 comes no
#: further than six times that is an assumption.
TOLERANCE = {"ort": 1e-3, "acl": 5e-2}
#: Values of a sample's output that a reference keeps, about.
KEPT = 1000


def fill(array: Array, number: int) -> None:
    """Write canary `number` into a batch: float32 or uint8 [bs, ...]."""
    for place in range(len(array)):
        pixels = _pixels((number + place) % COUNT, array.shape[1:])
        # As they are, or about as large as normalised ones.
        array[place] = pixels if array.dtype == np.uint8 else (pixels.astype(np.float32) - 127.5) / 64


@lru_cache(maxsize=COUNT)
def _pixels(index: int, shape: tuple[int, ...]) -> Array:
    """One of the inputs, in as little memory as it can be kept. Only a bit generator's own stream never changes."""
    count = int(np.prod(shape))
    return np.random.PCG64(index).random_raw((count + 7) // 8).astype("<u8").view(np.uint8)[:count].reshape(shape)


def write_reference(artifact: Path, outputs: Array) -> None:
    """Keep what onnxruntime made of inputs 0 to 3, [4, ...], beside the artifact."""
    with _reference_path(artifact).open("wb") as file:
        np.save(file, _kept(outputs).astype(np.float32))


def copy_reference(source: Path | None, artifact: Path) -> None:
    """Have an artifact compared with what onnxruntime made of its `source`; with nothing where there is none."""
    reference = None
    with suppress(FileNotFoundError):
        reference = _reference_path(source).read_bytes() if source else None
    if reference:
        _reference_path(artifact).write_bytes(reference)
    else:
        _reference_path(artifact).unlink(missing_ok=True)  # of another file that had this name


def has_reference(artifact: Path) -> bool:
    return _reference_path(artifact).is_file()


def distance(artifact: Path, outputs: Array, number: int) -> float | None:
    """
    How far a batch's outputs [bs, ...] for canary `number` are from the reference, over its largest magnitude.

    NaN for outputs that are none; None where no reference lies beside the artifact, or one of another shape.
    """
    try:
        reference = np.load(_reference_path(artifact), allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    found = _kept(outputs).astype(np.float64)
    if reference.shape != (COUNT, found.shape[1]):
        return None
    turned = reference[[(number + place) % COUNT for place in range(len(found))]]
    return float(np.abs(found - turned).max() / max(1e-9, np.abs(reference).max()))


def _reference_path(artifact: Path) -> Path:
    return artifact.with_suffix(".canary.npy")


def _kept(outputs: Array) -> Array:
    flat: Array = outputs.reshape(len(outputs), -1)
    return flat[:, :: max(1, flat.shape[1] // KEPT)]
