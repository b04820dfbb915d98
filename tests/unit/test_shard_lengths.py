"""How long shards are: long enough that their own cost is little, short enough that little is lost with one."""

import pytest

from farm.settings import Settings
from tasks.submission import LAST, LONGEST, OF_A_LEASE, SHARDS_EACH, _shards

FPS, SHARD_S, LEASE_S = 76.0, 2.0, 30.0


def seconds(share_s: float, devices: int, lease_s: float = LEASE_S) -> list[float]:
    """How long the shards are of a job that gives each device so much work; the last may be short."""
    samples = int(share_s * FPS) * devices
    cut = _shards([1] * samples, 4, FPS, devices, Settings(shard_s=SHARD_S, lease_s=lease_s))
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == samples
    return [(stop - start) / FPS for start, stop in cut]


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_shards_of_a_long_job_are_longer_up_to_a_limit(devices: int) -> None:
    found = [max(seconds(share_s, devices)) for share_s in (5, 12, 24, 48, 1000)]

    a_batch = 4 / FPS
    wanted = [5 / 4, SHARD_S, 24 / SHARDS_EACH, LONGEST * SHARD_S, LONGEST * SHARD_S]
    assert found == [pytest.approx(each, abs=a_batch) for each in wanted]


@pytest.mark.parametrize(("lease_s", "wanted"), [(6, SHARD_S), (24, OF_A_LEASE * 24), (600, LONGEST * SHARD_S)])
def test_a_lease_bounds_them(lease_s: float, wanted: float) -> None:
    assert max(seconds(1000, 8, lease_s)) == pytest.approx(wanted, abs=4 / FPS)


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_the_last_shards_of_a_long_job_are_not(devices: int) -> None:
    *found, _ = seconds(1000, devices)

    assert min(found) == pytest.approx(LAST * SHARD_S, abs=4 / FPS)
