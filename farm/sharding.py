"""How a job is cut into shards, once, when it is submitted. Which samples share a batch never depends on the cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

#: Share of the samples, at the end, that is cut smaller and smaller so that no device is left with a long one.
TAIL = 0.2
#: The last ones are so much of a whole one, or a single step: a device must not wait for its next one.
LEAST = 0.1


#: Batches after which samples of several parts begin a new one, full or not.
MOST_BATCHES = 16


def edges(parts: Sequence[int], bs: int) -> list[int]:
    """
    Where a new batch begins whatever the cut, as indices of samples of so many parts each; 0 and the end among them.

    Wherever batches come out full, and after `MOST_BATCHES` at the latest. Counted from any edge on, the next ones are
    the same.
    """
    if bs < 1:
        raise ValueError(f"a batch size is 1 or more, not {bs}")
    found, filled = [0], 0
    for index, count in enumerate(parts, start=1):
        filled += count
        if filled % bs == 0 or filled >= MOST_BATCHES * bs:
            found.append(index)
            filled = 0
    if found[-1] != len(parts):
        found.append(len(parts))
    return found


def cut(edges: Sequence[int], *, per_shard: int, per_last: int, devices: int) -> list[tuple[int, int]]:
    """
    Half-open (start, stop) runs of samples that cover all from the first edge to the last, in order.

    Every boundary is one of `edges`, so a batch holds the same samples however the job is cut. A shard has about
    `per_shard` of the steps between edges and never more than ``samples / (4 * devices)`` samples; in the last fifth
    sizes fall to a tenth of that, to `per_last` steps where that is less, or to one step.
    """
    if not edges or devices < 1:
        raise ValueError(f"cannot cut {len(edges)} edges for {devices} devices")
    steps = len(edges) - 1
    widest = max((stop - start for start, stop in pairwise(edges)), default=1)
    whole = max(1, min(per_shard, (edges[-1] - edges[0]) // (4 * devices * widest)))
    least = max(1, min(int(LEAST * whole), per_last))
    tail = steps * TAIL
    shards = []
    step = 0
    while step < steps:
        left = steps - step
        # Where a whole one would bite into the tail, a device takes at most half of its fair share of what is left.
        size = whole if left - whole >= tail else min(left, max(least, min(whole, left // (2 * devices))))
        shards.append((edges[step], edges[step + size]))
        step += size
    return shards
