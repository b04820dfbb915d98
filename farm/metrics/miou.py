"""Segmentation's metrics: pixels counted by class, image by image, then IoU and accuracy over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CLASSES = 150


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Metrics:
    """All in percent. NaN where there is nothing to divide by."""

    iou: NDArray[np.float64]  #: [150]
    acc: NDArray[np.float64]  #: [150]
    aacc: float
    miou: float
    macc: float


def areas(label_map: NDArray[np.uint8], annotation: NDArray[np.uint8]) -> NDArray[np.int64]:
    """
    Pixels intersecting, predicted and labelled by class, int64 [3, 150], of one image.

    `label_map` [H, W] holds classes 0 to 149, `annotation` values as stored: 0 and 255 count nowhere, c + 1 is class c.
    """
    # One histogram of both values at once.
    both = np.bincount((annotation.astype(np.uint16) << 8 | label_map).ravel(), minlength=1 << 16).reshape(256, 256)
    known = both[1 : CLASSES + 1, :CLASSES]
    return np.stack([known.diagonal(), known.sum(axis=0), known.sum(axis=1)])


def metrics(total: NDArray[np.int64]) -> Metrics:
    """From `areas` summed over images, as mmsegmentation 0.28 has them: means are over the classes that are not NaN."""
    intersecting, predicted, labelled = total.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        iou = intersecting / (predicted + labelled - intersecting)
        acc = intersecting / labelled
        aacc = intersecting.sum() / labelled.sum()
    return Metrics(iou=100 * iou, acc=100 * acc, aacc=100 * float(aacc), miou=100 * _mean(iou), macc=100 * _mean(acc))


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
