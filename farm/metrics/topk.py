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
    left, rows = scores.copy(), np.arange(len(scores))
    kept, values = np.empty((len(scores), k), np.int64), np.empty((len(scores), k), np.float32)
    for place in range(k):  # five passes of argmax, which takes the first of equals, cost less than one partition
        kept[:, place] = classes = left.argmax(axis=1)
        values[:, place] = left[rows, classes]
        left[rows, classes] = -np.inf
    return kept, values


def ranks(scores: Scores, labels: Sequence[int]) -> NDArray[np.int64]:
    """The rank of each row's label, [n], 1 is best; ties go to the lower class as in `best`."""
    rows = np.arange(len(scores))
    wanted = np.asarray(labels)
    own = scores[rows, wanted][:, None]
    above, same = scores > own, scores == own
    if np.count_nonzero(same) > len(scores):  # seldom, and dear
        above |= same & (np.arange(scores.shape[1]) < wanted[:, None])
    rank: NDArray[np.int64] = 1 + above.view(np.uint8).sum(axis=1, dtype=np.int64)
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
