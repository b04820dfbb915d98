import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from farm.metrics import miou

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "slide.json").read_text())
VALUES = np.load(GOLDEN / "slide.npz")
IMAGES = ("same", "rescaled", "panorama")

relaxed = settings(deadline=None)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def maps(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A label map, and an annotation as stored; few classes, so that they meet."""
    shape = draw(shapes)
    classes = st.sampled_from([0, 1, 2, 70, 148, 149])
    annotated = st.sampled_from([0, 1, 2, 3, 71, 149, 150, 255])
    return (
        draw(arrays.arrays(np.uint8, shape, elements=classes)),
        draw(arrays.arrays(np.uint8, shape, elements=annotated)),
    )


def counted(label_map: Any, annotation: Any) -> list[list[int]]:
    """Pixel by pixel."""
    found = [[0] * 150 for _ in range(3)]
    for predicted, raw in zip(label_map.ravel().tolist(), annotation.ravel().tolist(), strict=True):
        if raw not in (0, 255):
            found[0][predicted] += predicted == raw - 1
            found[1][predicted] += 1
            found[2][raw - 1] += 1
    return found


def total_of(**areas: tuple[int, int, int]) -> NDArray[np.int64]:
    """Intersecting, predicted and labelled pixels of the classes c0, c1 and so on."""
    total = np.zeros((3, 150), np.int64)
    for name, values in areas.items():
        total[:, int(name[1:])] = values
    return total


@pytest.mark.parametrize("image", IMAGES)
def test_areas_are_those_of_the_fixture(image: str) -> None:
    intersecting, union, predicted, labelled = VALUES[f"{image}/areas"]

    areas = miou.areas(VALUES[f"{image}/label_map"], VALUES[f"{image}/annotation"])

    assert areas.dtype == np.int64
    assert (areas == [intersecting, predicted, labelled]).all()
    assert (areas[1] + areas[2] - areas[0] == union).all()


def test_metrics_over_the_three_images_are_those_of_the_fixture() -> None:
    total = sum(miou.areas(VALUES[f"{image}/label_map"], VALUES[f"{image}/annotation"]) for image in IMAGES)

    metrics = miou.metrics(np.asarray(total))

    assert np.array_equal(metrics.iou, 100 * VALUES["metrics/IoU"], equal_nan=True)
    assert np.array_equal(metrics.acc, 100 * VALUES["metrics/Acc"], equal_nan=True)
    assert metrics.aacc == 100 * VALUES["metrics/aAcc"]
    assert metrics.miou == pytest.approx(100 * VALUES["metrics/mIoU"], rel=1e-14)
    assert metrics.macc == pytest.approx(100 * VALUES["metrics/mAcc"], rel=1e-14)
    rounded = FACTS["metrics"]["rounded_percent"]
    assert [round(metrics.aacc, 2), round(metrics.miou, 2), round(metrics.macc, 2)] == list(rounded.values())
    assert int((~np.isnan(metrics.iou)).sum()) == FACTS["metrics"]["classes_with_iou"]
    assert int((~np.isnan(metrics.acc)).sum()) == FACTS["metrics"]["classes_with_acc"]


@relaxed
@given(both=maps())
def test_areas_are_those_counted_pixel_by_pixel(both: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    assert miou.areas(*both).tolist() == counted(*both)


@relaxed
@given(both=maps())
def test_parts_of_an_image_add_up_to_it(both: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    label_map, annotation = both

    parts = miou.areas(label_map[:1], annotation[:1]) + miou.areas(label_map[1:], annotation[1:])

    assert (parts == miou.areas(label_map, annotation)).all()


def test_maps_that_are_no_whole_array_are_read_where_they_lie() -> None:
    label_map, annotation = VALUES["same/label_map"], VALUES["same/annotation"]

    areas = miou.areas(label_map[::2, ::-3], annotation[::2, ::-3])

    assert (areas == miou.areas(label_map[::2, ::-3].copy(), annotation[::2, ::-3].copy())).all()


def test_what_is_predicted_on_ignored_pixels_counts_nowhere() -> None:
    label_map = np.array([[0, 1, 149]], np.uint8)

    assert not miou.areas(label_map, np.array([[0, 255, 0]], np.uint8)).any()


def test_a_class_predicted_but_never_labelled_counts_in_miou_and_not_in_macc() -> None:
    metrics = miou.metrics(total_of(c0=(6, 6, 8), c1=(0, 2, 0)))

    assert (metrics.iou[0], metrics.iou[1]) == (75, 0)
    assert metrics.miou == 37.5
    assert np.isnan(metrics.acc[1])
    assert metrics.macc == metrics.aacc == 75


def test_nothing_labelled_has_no_metrics() -> None:
    metrics = miou.metrics(total_of())

    assert np.isnan([metrics.aacc, metrics.miou, metrics.macc]).all()
    assert np.isnan(metrics.iou).all()
