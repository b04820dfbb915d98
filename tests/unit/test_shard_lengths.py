"""How long shards are: long enough that their own cost is little, short enough that little is lost with one."""

import pytest

from tasks.submission import LONGEST, SHARDS_EACH, _shards

FPS, SHARD_S = 76.0, 2.0


def longest_s(samples: int, devices: int) -> float:
    cut = _shards([1] * samples, 4, FPS, devices, SHARD_S)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == samples
    return max(stop - start for start, stop in cut) / FPS


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_shards_of_a_long_job_are_longer_up_to_a_limit(devices: int) -> None:
    share_s = [5, 20, 40, 50, 1000]
    found = [longest_s(int(seconds * FPS) * devices, devices) for seconds in share_s]

    a_batch = 4 / FPS
    wanted = [5 / 4, SHARD_S, 40 / SHARDS_EACH, LONGEST * SHARD_S, LONGEST * SHARD_S]
    assert found == [pytest.approx(seconds, abs=a_batch) for seconds in wanted]
