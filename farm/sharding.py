"""How a job is cut into shards, once, when it is submitted. Which samples share a batch never depends on the cut."""

from __future__ import annotations

#: Share of the samples, at the end, that is cut smaller and smaller so that no device is left with a long one.
TAIL = 0.2


def cut(samples: int, bs: int, *, per_shard: int, devices: int) -> list[tuple[int, int]]:
    """
    Half-open (start, stop) runs that cover ``range(samples)`` in order.

    Every boundary is a multiple of `bs`, so batch k holds the same samples however the job is cut. A shard has about
    `per_shard` samples and never more than ``samples / (4 * devices)``; in the last fifth sizes fall to one batch.
    """
    if samples < 0 or bs < 1 or devices < 1:
        raise ValueError(f"cannot cut {samples} samples, bs {bs}, {devices} devices")
    batches = -(-samples // bs)
    whole = max(1, min(per_shard // bs, samples // (4 * devices * bs)))
    tail = batches * TAIL
    shards = []
    batch = 0
    while batch < batches:
        left = batches - batch
        # Where a whole one would bite into the tail, a device takes at most half of its fair share of what is left.
        size = whole if left - whole >= tail else max(1, min(whole, left // (2 * devices)))
        shards.append((batch * bs, min((batch + size) * bs, samples)))
        batch += size
    return shards
