"""Any job, cut in any way: hypothesis looks for one that comes apart."""

from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from farm import sharding

#: The docstring's "last fifth", written out: a test that read `sharding.TAIL` would follow any change of it.
BODY = 0.8


def cut_samples(samples: int, bs: int, per_shard: int, devices: int) -> list[tuple[int, int]]:
    """Samples of one part each, in shards of about so many samples."""
    size = per_shard // bs
    return sharding.cut(sharding.edges([1] * samples, bs), per_shard=size, per_last=size, devices=devices)


class Cut(NamedTuple):
    """What `cut` is asked for."""

    samples: int
    bs: int
    per_shard: int
    devices: int

    @property
    def shards(self) -> list[tuple[int, int]]:
        return cut_samples(self.samples, self.bs, self.per_shard, self.devices)

    @property
    def sizes(self) -> list[int]:
        """In batches, the last one perhaps not full."""
        return [-(-(stop - start) // self.bs) for start, stop in self.shards]

    @property
    def fair_share(self) -> float:
        """What a shard may hold at most, in samples."""
        return self.samples / (4 * self.devices)


cuts = st.builds(Cut, st.integers(1, 3000), st.integers(1, 64), st.integers(1, 500), st.integers(1, 64))

relaxed = settings(deadline=None)


@relaxed
@given(cut=cuts)
def test_shards_cover_all_samples_in_order_without_gap_or_overlap(cut: Cut) -> None:
    covered = [sample for start, stop in cut.shards for sample in range(start, stop)]

    assert covered == list(range(cut.samples))


@relaxed
@given(cut=cuts)
def test_no_shard_is_empty(cut: Cut) -> None:
    assert all(start < stop for start, stop in cut.shards)


@relaxed
@given(cut=cuts)
def test_shards_begin_at_multiples_of_the_batch_size(cut: Cut) -> None:
    assert [start % cut.bs for start, _ in cut.shards] == [0] * len(cut.shards)


@relaxed
@given(cut=cuts)
def test_no_shard_holds_more_than_a_quarter_of_a_devices_share_if_that_is_a_batch(cut: Cut) -> None:
    assume(cut.fair_share >= cut.bs)

    assert all(stop - start <= cut.fair_share for start, stop in cut.shards)


@relaxed
@given(cut=cuts)
def test_shards_are_single_batches_if_a_quarter_of_a_devices_share_is_less(cut: Cut) -> None:
    assume(cut.fair_share < cut.bs)

    assert set(cut.sizes) == {1}


@relaxed
@given(cut=cuts)
def test_no_shard_holds_more_than_asked_for_if_that_is_a_batch(cut: Cut) -> None:
    assume(cut.per_shard >= cut.bs)

    assert all(stop - start <= cut.per_shard for start, stop in cut.shards)


@relaxed
@given(cut=cuts)
def test_shards_are_alike_until_the_last_fifth(cut: Cut) -> None:
    end = BODY * cut.samples - cut.bs * (1 + max(cut.sizes))
    body = [size for (start, _), size in zip(cut.shards, cut.sizes, strict=True) if start < end]

    assert len(set(body)) <= 1


@relaxed
@given(cut=cuts)
def test_shards_never_grow(cut: Cut) -> None:
    assert cut.sizes == sorted(cut.sizes, reverse=True)


@relaxed
@given(cut=cuts)
@example(Cut(samples=16, bs=1, per_shard=100, devices=1))
@example(Cut(50_000, 4, 600, 8))
def test_the_last_shard_is_a_tenth_of_the_first_or_a_batch(cut: Cut) -> None:
    assert cut.sizes[-1] <= max(1, cut.sizes[0] // 10)


@relaxed
@given(cut=cuts)
@example(Cut(50_000, 4, 600, 8))
def test_a_shard_of_the_last_fifth_is_at_most_half_a_devices_share_of_what_is_left(cut: Cut) -> None:
    tail = [(start, stop) for start, stop in cut.shards if start > BODY * cut.samples and stop - start > cut.bs]

    least = cut.bs * (cut.sizes[0] // 10)
    half = [(cut.samples - start + cut.bs) / (2 * cut.devices) for start, _ in tail]
    assert all(stop - start <= max(least, most) for (start, stop), most in zip(tail, half, strict=True))


def test_no_shard_but_the_last_is_less_than_a_tenth_of_the_first() -> None:
    *sizes, _ = Cut(50_000, 4, 600, 8).sizes

    assert (sizes[0], min(sizes)) == (150, 15)


def test_the_last_ones_are_no_longer_than_is_said() -> None:
    edges = sharding.edges([1] * 50_000, 4)

    def sizes(per_last: int) -> list[int]:
        cut = sharding.cut(edges, per_shard=150, per_last=per_last, devices=8)
        return [(stop - start) // 4 for start, stop in cut]

    assert (sizes(7)[0], min(sizes(7)[:-1])) == (150, 7)
    assert min(sizes(0)) == 1
    assert min(sizes(99)[:-1]) == 15


def test_a_job_of_twenty_samples_is_cut_as_by_hand() -> None:
    shards = cut_samples(20, 1, 4, 1)

    assert shards == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 18), (18, 19), (19, 20)]


def test_the_last_batch_may_be_short() -> None:
    assert cut_samples(10, 4, 4, 1) == [(0, 4), (4, 8), (8, 10)]


def test_no_samples_make_no_shards() -> None:
    assert cut_samples(0, 4, 100, 2) == []


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut 2 edges for 0 devices"):
        sharding.cut([0, 1], per_shard=1, per_last=1, devices=0)
    with pytest.raises(ValueError, match="a batch size is 1 or more, not 0"):
        sharding.edges([1], 0)


parts = st.lists(st.integers(0, 5), min_size=1, max_size=200)


@relaxed
@given(parts=parts, bs=st.integers(1, 16))
def test_batches_are_the_same_from_any_edge_on(parts: list[int], bs: int) -> None:
    found = sharding.edges(parts, bs)

    for number, edge in enumerate(found):
        rest = sharding.edges(parts[edge:], bs) if parts[edge:] else [0]
        assert [edge + further for further in rest] == found[number:]


@relaxed
@given(parts=parts, bs=st.integers(1, 16))
def test_between_edges_little_is_left_empty(parts: list[int], bs: int) -> None:
    found = sharding.edges(parts, bs)

    for start, stop in pairwise(found[:-1]):
        filled = sum(parts[start:stop])
        assert filled % bs == 0 or filled >= sharding.MOST_BATCHES * bs


def test_images_of_two_windows_and_one_of_three_are_batched_as_by_hand() -> None:
    assert sharding.edges([2, 2, 2, 2, 3, 2, 3, 2], 4) == [0, 2, 4, 7, 8]
