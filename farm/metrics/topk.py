"""Top-k classification: the best classes of a score row, the label's rank, accuracy and its interval."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.typing import NDArray

K = 5

Scores = NDArray[np.float32]


def best(scores: Scores, k: int = K) -> tuple[NDArray[np.int64], Scores]:
    """
    The `k` best classes of each row and their scores, both [n, k]; `scores` is float32 [n, classes], finite.

    Score descending; the lowest class comes first on ties, also on a tie with what is left out.
    """
    n, classes = scores.shape
    threshold = np.partition(scores, classes - k, axis=1)[:, classes - k]
    _, candidates = np.nonzero(scores >= threshold[:, None])  # k in each row, more where the last place is shared
    if len(candidates) == n * k:
        kept = candidates.reshape(n, k)
    else:
        kept = np.array([_lowest(row, least, k) for row, least in zip(scores, threshold, strict=True)])
    order = np.argsort(-np.take_along_axis(scores, kept, axis=1), axis=1, kind="stable")
    kept = np.take_along_axis(kept, order, axis=1)
    return kept, np.take_along_axis(scores, kept, axis=1)


def _lowest(row: NDArray[np.float32], least: np.float32, k: int) -> NDArray[np.int64]:
    """The `k` best classes of a row, ascending; `least` is the score of the last of them."""
    above, equal = np.flatnonzero(row > least), np.flatnonzero(row == least)
    return np.sort(np.concatenate([above, equal[: k - len(above)]]))


def ranks(scores: Scores, labels: Sequence[int]) -> NDArray[np.int64]:
    """The rank of each row's label, [n], 1 is best; ties go to the lower class as in `best`."""
    rows = np.arange(len(scores))
    wanted = np.asarray(labels)
    own = scores[rows, wanted][:, None]
    before = np.arange(scores.shape[1])[None, :] < wanted[:, None]
    rank: NDArray[np.int64] = 1 + np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    return rank


def percent(correct: int, scored: int) -> float | None:
    """Accuracy in percent; None when nothing was scored."""
    return 100.0 * correct / scored if scored else None


def interval(correct: int, scored: int) -> tuple[float, float] | None:
    """Wilson's 95 % interval of `percent`, in percent (E. B. Wilson, JASA 22, 1927)."""
    if not scored:
        return None
    z = 1.959963984540054
    p = correct / scored
    centre = p + z * z / (2 * scored)
    spread = z * sqrt(p * (1 - p) / scored + z * z / (4 * scored * scored))
    scale = 1 + z * z / scored
    return 100 * max(0.0, (centre - spread) / scale), 100 * min(1.0, (centre + spread) / scale)
