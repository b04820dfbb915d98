"""Against a reference that sorts every row in plain Python; scores are drawn from few values, so that ties abound."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from farm.metrics import topk
from farm.metrics.topk import Scores

tied = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0]) | st.floats(width=32, allow_nan=False, allow_infinity=False)
#: n rows of at least `K` classes.
score_rows = arrays.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(topk.K, 12)), elements=tied)

relaxed = settings(deadline=None)


def order_of(row: Any) -> list[int]:
    """All classes, score descending, lowest class first on ties."""
    return sorted(range(len(row)), key=lambda c: (-float(row[c]), c))


def row_of(*scores: float) -> Scores:
    return np.array([scores], dtype=np.float32)


@relaxed
@given(scores=score_rows)
def test_the_best_classes_are_those_of_a_full_sort(scores: Scores) -> None:
    classes, _ = topk.best(scores)

    assert classes.tolist() == [order_of(row)[: topk.K] for row in scores]


@relaxed
@given(scores=score_rows, k=st.integers(1, topk.K))
def test_fewer_than_five_can_be_asked_for(scores: Scores, k: int) -> None:
    classes, _ = topk.best(scores, k)

    assert classes.tolist() == [order_of(row)[:k] for row in scores]


@relaxed
@given(scores=score_rows)
def test_the_best_scores_stand_beside_their_classes(scores: Scores) -> None:
    classes, best = topk.best(scores)

    assert best.tolist() == [[row[c] for c in found] for row, found in zip(scores.tolist(), classes, strict=True)]


@relaxed
@given(scores=score_rows, data=st.data())
def test_the_rank_is_the_labels_place_in_a_full_sort(scores: Scores, data: st.DataObject) -> None:
    labels = data.draw(
        st.lists(st.integers(0, scores.shape[1] - 1), min_size=len(scores), max_size=len(scores)), label="labels"
    )

    expected = [order_of(row).index(label) + 1 for row, label in zip(scores, labels, strict=True)]

    assert topk.ranks(scores, labels).tolist() == expected


@relaxed
@given(scores=score_rows)
def test_the_best_class_has_rank_1_and_the_fifth_rank_5(scores: Scores) -> None:
    classes, _ = topk.best(scores)

    ranks = [topk.ranks(scores, classes[:, place].tolist()).tolist() for place in range(topk.K)]

    assert ranks == [[place + 1] * len(scores) for place in range(topk.K)]


def test_of_equal_scores_the_lowest_classes_are_kept() -> None:
    classes, _ = topk.best(row_of(1, 3, 1, 1, 1, 1, 1))

    assert classes.tolist() == [[1, 0, 2, 3, 4]]


def test_minus_zero_is_zero() -> None:
    classes, _ = topk.best(row_of(-0.0, 0.0, -0.0, 0.0, -0.0))

    assert classes.tolist() == [[0, 1, 2, 3, 4]]


def test_as_many_classes_as_are_wanted_are_all_returned() -> None:
    classes, _ = topk.best(row_of(1, 5, 3, 4, 2))

    assert classes.tolist() == [[1, 3, 2, 4, 0]]


def test_accuracy_is_in_percent() -> None:
    assert topk.percent(3, 8) == 37.5


def test_nothing_scored_has_no_accuracy() -> None:
    assert topk.percent(0, 0) is None


@pytest.mark.parametrize(
    ("correct", "scored", "expected"),
    [
        (81, 263, (25.53, 36.62)),
        (15, 148, (6.24, 16.05)),
        (0, 20, (0.00, 16.11)),
        (1, 29, (0.61, 17.18)),
    ],
)
def test_the_interval_is_wilsons(correct: int, scored: int, expected: tuple[float, float]) -> None:
    """Values: R. G. Newcombe, Statistics in Medicine 17 (1998), table I, score method without correction."""
    assert topk.interval(correct, scored) == pytest.approx(expected, abs=0.005)


@relaxed
@given(scored=st.integers(1, 50_000), data=st.data())
def test_the_interval_holds_the_accuracy_and_stays_within_0_and_100(scored: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, scored), label="correct")

    interval, percent = topk.interval(correct, scored), topk.percent(correct, scored)

    assert interval is not None
    assert percent is not None
    assert 0 <= interval[0] <= percent + 1e-9
    assert percent - 1e-9 <= interval[1] <= 100


@relaxed
@given(scored=st.integers(1, 50_000), data=st.data())
def test_the_interval_of_the_wrong_mirrors_that_of_the_right(scored: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, scored), label="correct")

    right, wrong = topk.interval(correct, scored), topk.interval(scored - correct, scored)

    assert right is not None
    assert wrong is not None
    assert right == pytest.approx((100 - wrong[1], 100 - wrong[0]), abs=1e-6)


def test_nothing_scored_has_no_interval() -> None:
    assert topk.interval(0, 0) is None
