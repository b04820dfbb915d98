"""Rows of class scores, whatever the batches they come in."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.data.manifest import Sample
from farm.jobs import SampleResult
from workers import postprocess
from workers.postprocess import Classifier, Slot

SAMPLES = [Sample(f"s{number:03}", number % 10, "0" * 16) for number in range(3 * postprocess.MANY)]


def scores_of(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, 10), dtype=np.float32)


def reduce(scores: Any, sizes: list[int]) -> tuple[list[SampleResult], list[Sample]]:
    """Rows and samples of no numbers, of batches of these sizes that all lie in one buffer."""
    reducer, buffer = Classifier(), np.empty((max(sizes), scores.shape[1]), np.float32)
    rows: list[SampleResult] = []
    bad: list[Sample] = []
    first = 0
    for size in sizes:
        buffer[:] = np.nan  # what lies in places that are not given
        places = list(range(buffer.shape[0]))[-size:]
        buffer[places] = scores[first : first + size]
        told = reducer.take(buffer, places, [Slot(sample) for sample in SAMPLES[first : first + size]], ())
        rows, bad, first = rows + told[0], bad + told[1], first + size
    told = reducer.rest()
    return rows + told[0], bad + told[1]


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_rows_do_not_depend_on_the_batches(sizes: list[int], seed: int) -> None:
    scores = scores_of(sum(sizes), seed)

    rows, bad = reduce(scores, sizes)

    whole, _ = postprocess.classify(scores, SAMPLES[: len(scores)])
    assert rows == whole
    assert bad == []


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), data=st.data())
def test_scores_that_are_no_numbers_are_named_and_the_others_keep_their_rows(
    sizes: list[int], data: st.DataObject
) -> None:
    scores = scores_of(sum(sizes))
    broken = data.draw(st.sets(st.integers(0, len(scores) - 1)), label="broken")
    scores[sorted(broken), 3] = np.inf

    rows, bad = reduce(scores, sizes)

    names = [sample.name for sample in SAMPLES[: len(scores)]]
    assert {sample.name for sample in bad} == {names[number] for number in broken}
    assert [row.name for row in rows] == [name for number, name in enumerate(names) if number not in broken]


def test_rows_are_told_as_soon_as_there_are_many() -> None:
    reducer = Classifier()
    slots = [Slot(sample) for sample in SAMPLES[: postprocess.MANY]]
    scores = scores_of(len(slots))

    early = reducer.take(scores[:-1], range(len(slots) - 1), slots[:-1], ())
    enough = reducer.take(scores[-1:], [0], slots[-1:], ())

    assert early == ([], [])
    assert len(enough[0]) == postprocess.MANY
    assert reducer.rest() == ([], [])
