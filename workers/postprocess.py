"""Reducing a batch's scores to rows before anything is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from farm.data.manifest import Sample
from farm.jobs import ResultState, SampleResult
from farm.metrics import topk
from workers.backends.base import Array


def classify(scores: Array, samples: Sequence[Sample]) -> tuple[list[SampleResult], list[Sample]]:
    """
    Top-5 rows from `scores`, float32 [n, classes], one row a sample; and the samples whose scores are not finite.
    """
    finite = np.asarray(np.isfinite(scores).all(axis=1))
    bad = [sample for sample, ok in zip(samples, finite, strict=True) if not ok]
    if bad:
        samples = [sample for sample, ok in zip(samples, finite, strict=True) if ok]
        scores = scores[finite]
    if not samples:
        return [], bad
    labels = [sample.label for sample in samples]
    classes, best = topk.best(scores)
    ranks = topk.ranks(scores, labels)
    rows = [
        SampleResult(
            name=sample.name,
            state=ResultState.SCORED,
            label=sample.label,
            rank=int(rank),
            classes=tuple(row_classes),
            scores=tuple(row_scores),
        )
        for sample, rank, row_classes, row_scores in zip(samples, ranks, classes.tolist(), best.tolist(), strict=True)
    ]
    return rows, bad
