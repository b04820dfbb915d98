"""Any job, cut in any way: hypothesis looks for one that comes apart."""

from typing import NamedTuple

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from farm import sharding

#: The docstring's "last fifth", written out: a test that read `sharding.TAIL` would follow any change of it.
BODY = 0.8


class Cut(NamedTuple):
    """What `cut` is asked for."""

    samples: int
    bs: int
    per_shard: int
    devices: int

    @property
    def shards(self) -> list[tuple[int, int]]:
        return sharding.cut(self.samples, self.bs, per_shard=self.per_shard, devices=self.devices)

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
def test_the_last_shard_is_a_single_batch(cut: Cut) -> None:
    assert cut.sizes[-1] == 1


@relaxed
@given(cut=cuts)
@example(Cut(50_000, 4, 600, 8))
def test_a_shard_of_the_last_fifth_is_at_most_half_a_devices_share_of_what_is_left(cut: Cut) -> None:
    tail = [(start, stop) for start, stop in cut.shards if start > BODY * cut.samples and stop - start > cut.bs]

    assert all(stop - start <= (cut.samples - start + cut.bs) / (2 * cut.devices) for start, stop in tail)


def test_a_job_of_twenty_samples_is_cut_as_by_hand() -> None:
    shards = sharding.cut(20, 1, per_shard=4, devices=1)

    assert shards == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 18), (18, 19), (19, 20)]


def test_the_last_batch_may_be_short() -> None:
    assert sharding.cut(10, 4, per_shard=4, devices=1) == [(0, 4), (4, 8), (8, 10)]


def test_no_samples_make_no_shards() -> None:
    assert sharding.cut(0, 4, per_shard=100, devices=2) == []


@pytest.mark.parametrize(("samples", "bs", "devices"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_what_cannot_be_cut_is_refused(samples: int, bs: int, devices: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {samples} samples, bs {bs}, {devices} devices"):
        sharding.cut(samples, bs, per_shard=1, devices=devices)
