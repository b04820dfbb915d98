"""
Against the published arithmetic in float64, along each axis as a matrix: PyTorch's own resize of the identity.

What differs must be a near-tie: float32 cannot tell more.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from numba.core import caching
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from farm.data.slide import CROP, Size, resized, windows
from farm.metrics import slide_merge
from farm.metrics.slide_merge import CLASSES, ImageMerge, Labels, Logits, merge
from tests.golden import fill

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "slide.json").read_text())
VALUES = np.load(GOLDEN / "slide.npz")

#: Between the two logits of a near-tie, for logits up to about 8.
NEAR = 1e-5

relaxed = settings(deadline=None, max_examples=15, derandomize=True)

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """An image, and how its logits are made."""

    original: Size
    cells: int
    noise: float  #: of each cell; the rest is smooth
    quantum: float  #: logits are multiples of it, or of nothing if 0
    seed: int

    @property
    def resized(self) -> Size:
        return resized(self.original)

    def logits(self) -> list[Logits]:
        return [each.copy() for each in made(self)]

    def merged(self, **options: Any) -> Labels:
        image = ImageMerge(self.original, self.resized, self.cells, **options)
        for each in made(self):
            image.add(each)
        assert image.is_complete
        assert image.is_finite
        return image.label_map


@lru_cache(maxsize=1)
def made(case: Case) -> list[Logits]:
    rng = np.random.default_rng(case.seed)
    coarse = rng.random((CLASSES, 6, 6), np.float32) * 8 - 4
    spread = resize_matrix(6, case.cells).astype(np.float32)
    found = []
    for _ in windows(case.resized):
        some = np.matmul(np.matmul(spread, coarse), spread.T)
        if case.noise:
            some += (rng.random(some.shape, np.float32) * 4 - 2) * np.float32(case.noise)
        if case.quantum:
            some = np.round(some / np.float32(case.quantum)) * np.float32(case.quantum)
        found.append(some)
    return found


def case(height: int, width: int, cells: int = 32, noise: float = 0.3, quantum: float = 0, seed: int = 1) -> Case:
    return Case(Size(height, width), cells, noise, quantum, seed)


#: What sizes come to; the smaller the original, the more windows lie under a tile of its pixels.
SIZES = {
    "one window": (200, 220),
    "two side by side": (90, 130),
    "two, one above the other": (130, 90),
    "three in a row that overlap": (60, 117),
    "three in a column that overlap": (117, 60),
    "five": (40, 160),
    "five in a column": (160, 40),
    "lower than a window": (36, 200),
    "narrower than a window": (200, 36),
    "hardly more than a line": (3, 61),
    "three pixels under five windows": (1, 3),
    "no resize": (512, 512),
    "no resize of two": (512, 640),
    "shrunk before, so enlarged after": (600, 660),
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    short = draw(st.integers(8, 120), label="shorter side")
    long = draw(
        st.integers(short, min(int(short * draw(st.sampled_from([1.2, 2, 4, 8])) + 1), 300)), label="longer side"
    )
    sides = draw(st.permutations([short, long]))
    return Case(
        original=Size(*sides),
        cells=draw(st.sampled_from([16, 32, 64])),
        noise=draw(st.sampled_from([0.0, 0.3, 2.0])),
        quantum=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 99)),
    )


@lru_cache(maxsize=64)
def resize_matrix(given: int, wanted: int) -> Matrix:
    """[wanted, given]"""
    columns = torch.eye(given, dtype=torch.float64)[None]
    return interpolate(columns, size=wanted, mode="linear", align_corners=False)[0].T.contiguous().numpy()


def axis_matrices(original: int, intervals: Sequence[tuple[int, int]], cells: int) -> Iterator[Matrix]:
    """[original, cells] for each window: resized to pixels, cut, put on the canvas, divided, resized."""
    length = intervals[-1][1]
    covering = np.zeros(length)
    for start, stop in intervals:
        covering[start:stop] += 1
    back = resize_matrix(length, original)
    for start, stop in intervals:
        yield (back[:, start:stop] / covering[start:stop]) @ resize_matrix(cells, CROP)[: stop - start]


def factors(case: Case) -> list[tuple[Matrix, Matrix]]:
    """For each window, what its cells are multiplied with on both sides."""
    places = windows(case.resized)
    down = list(dict.fromkeys((place.y1, place.y2) for place in places))
    across = list(dict.fromkeys((place.x1, place.x2) for place in places))
    return [
        (y, x)
        for y in axis_matrices(case.original.height, down, case.cells)
        for x in axis_matrices(case.original.width, across, case.cells)
    ]


def shortfall(found: Labels, case: Case) -> tuple[Matrix, Labels]:
    """By how much each pixel's logit of the class found is lower than the best, and the lowest of the best classes."""
    sides, logits = factors(case), made(case)
    best, here = np.full(case.original, -np.inf), np.full(case.original, -np.inf)
    label_map = np.zeros(case.original, np.uint8)
    for label in range(CLASSES):
        values = sum(y @ each[label].astype(np.float64) @ x.T for (y, x), each in zip(sides, logits, strict=True))
        label_map[values > best] = label
        best = np.maximum(best, values)
        here = np.where(found == label, values, here)
    return best - here, label_map


def check(found: Labels, case: Case) -> int:
    """How many pixels differ, all of them near-ties."""
    lacking, expected = shortfall(found, case)
    assert lacking.max() < NEAR
    return int((found != expected).sum())


# The fixture, a full head.


def fixture_windows(name: str) -> list[Logits]:
    """`fill.field` and the class bias as the recipe in slide.json has them, class by class."""
    bias = 1.5 * fill.unit(f"slide/{name}/classbias", CLASSES)
    place = np.arange(CROP, dtype=np.float64) * 6 / (CROP - 1)
    near = np.minimum(place.astype(np.int64), 5)
    share = place - near
    found = []
    for number in range(len(FACTS[name]["windows"])):
        logits = np.empty((CLASSES, CROP, CROP), np.float32)
        for label, grid in enumerate(fill.unit(f"slide/{name}/window{number}/field", CLASSES * 49).reshape(-1, 7, 7)):
            rows = [grid[near + step][:, near] + (grid[near + step][:, near + 1] - grid[near + step][:, near]) * share
                    for step in (0, 1)]  # fmt: skip
            logits[label] = 4.0 * (rows[0] + (rows[1] - rows[0]) * share[:, None]) + bias[label]
        found.append(logits)
    return found


@pytest.mark.parametrize("name", ["same", "rescaled", "panorama"])
def test_the_fixtures_label_maps_are_reproduced_to_the_pixel(name: str) -> None:
    logits = fixture_windows(name)
    assert hashlib.sha256(logits[0].data).hexdigest() == FACTS[name]["window0_sha256"]

    label_map = merge(logits, Size(*FACTS[name]["original_hw"]), Size(*FACTS[name]["resized_hw"]))

    assert (label_map == VALUES[f"{name}/label_map"]).all()
    assert hashlib.sha256(label_map.data).hexdigest() == FACTS[name]["label_map_sha256"]


# Against float64.


@pytest.mark.parametrize("size", [(90, 130), (36, 200), (61, 117), (117, 60)])
def test_the_reference_is_the_published_arithmetic(size: tuple[int, int]) -> None:
    some = case(*size, cells=16)
    logits = [torch.from_numpy(each[:3]).double() for each in some.logits()]
    canvas, count = torch.zeros(3, *some.resized, dtype=torch.float64), torch.zeros(some.resized)
    for each, place in zip(logits, windows(some.resized), strict=True):
        pixels = interpolate(each[None], size=(CROP, CROP), mode="bilinear", align_corners=False)[0]
        canvas[:, place.y1 : place.y2, place.x1 : place.x2] += pixels[:, : place.y2 - place.y1, : place.x2 - place.x1]
        count[place.y1 : place.y2, place.x1 : place.x2] += 1
    expected = interpolate((canvas / count)[None], size=some.original, mode="bilinear", align_corners=False)[0]

    values = sum(y @ each.numpy() @ x.T for (y, x), each in zip(factors(some), logits, strict=True))

    assert np.abs(values - expected.numpy()).max() < 1e-12


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_every_arrangement_of_windows_is_merged(size: tuple[int, int]) -> None:
    some = case(*size)

    assert check(some.merged(), some) <= 2


@pytest.mark.parametrize("cells", [16, 64, 128])
def test_every_size_of_head_is_merged(cells: int) -> None:
    some = case(45, 60, cells=cells)

    assert check(some.merged(), some) <= 2


@relaxed
@given(some=cases())
def test_the_class_is_the_best_of_the_published_arithmetic(some: Case) -> None:
    differing = check(some.merged(), some)

    event(f"differing: {differing}, quantised: {some.quantum > 0}")
    # Exact ties of two sums of the same terms in another order do occur where logits are multiples of a half.
    assert differing <= (0.01 * some.original.height * some.original.width + 2 if some.quantum else 2)


def test_of_classes_that_tie_in_every_cell_the_lowest_wins() -> None:
    some = case(90, 130, noise=1.0)
    logits = some.logits()
    for each in logits:
        each[80:] = each[70:0:-1]  # 80 is as 70 was, 149 as 1

    label_map = merge(logits, some.original, some.resized)

    assert label_map.max() < 80
    assert len(np.unique(label_map)) > 10


def test_a_class_that_is_best_nowhere_in_the_cells_can_be_best_between_them() -> None:
    """Second everywhere, where the best one alternates: the bounds must not drop it."""
    logits = np.zeros((CLASSES, 32, 32), np.float32)
    logits[3, :, ::2] = logits[4, :, 1::2] = 1
    logits[90] = 0.75

    label_map = merge([logits], Size(512, 512), Size(512, 512))

    assert set(np.unique(label_map)) == {3, 4, 90}


@pytest.mark.parametrize("label", [0, 149])
def test_an_image_of_one_class_is_filled_with_it(label: int) -> None:
    logits = np.zeros((CLASSES, 32, 32), np.float32)
    logits[label] = 1

    label_map = merge([logits] * 2, Size(90, 130), resized(Size(90, 130)))

    assert label_map.shape == (90, 130)
    assert (label_map == label).all()


def test_extreme_logits_are_compared_like_any() -> None:
    logits = np.full((CLASSES, 16, 16), -3e38, np.float32)
    logits[7] = 3e38

    assert (merge([logits], Size(100, 100), Size(512, 512)) == 7).all()


# Streaming.


@relaxed
@given(some=cases())
@example(some=case(40, 160))
@example(some=case(160, 40))
@example(some=case(60, 117))
@example(some=case(3, 61))
def test_a_window_no_longer_held_may_be_overwritten(some: Case) -> None:
    image = ImageMerge(some.original, some.resized, some.cells)
    given_ = some.logits()
    for number, logits in enumerate(given_):
        image.add(logits)
        assert image.is_complete == (number == len(given_) - 1)
        for earlier in given_[: number + 1]:
            if not any(np.shares_memory(earlier, held) for held in image.held):
                earlier[:] = np.nan

    assert image.held == []
    assert (image.label_map == some.merged()).all()
    assert image.is_finite


def test_of_five_windows_two_are_held_at_most_and_those_before_are_released() -> None:
    some = case(40, 160)
    image = ImageMerge(some.original, some.resized, some.cells)
    held = []
    for logits in some.logits():
        image.add(logits)
        held.append(len(image.held))

    assert held == [1, 1, 1, 1, 0]


@settings(relaxed, max_examples=6)
@given(some=cases())
@example(some=case(160, 40))
@example(some=case(512, 640))
def test_threads_change_nothing(some: Case) -> None:
    with ThreadPoolExecutor(3) as threads:
        assert (some.merged(threads=threads) == some.merged()).all()


# What is given.


@relaxed
@given(
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    place=st.tuples(st.integers(0, 149), st.integers(0, 31), st.integers(0, 31)),
    which=st.integers(0, 2),
)
@example(value=np.nan, place=(0, 0, 0), which=0)
@example(value=-np.inf, place=(149, 31, 31), which=2)
def test_a_logit_that_is_not_finite_is_told(value: float, place: tuple[int, int, int], which: int) -> None:
    some = case(60, 117)
    image = ImageMerge(some.original, some.resized, some.cells)
    for number, logits in enumerate(some.logits()):
        if number == which:
            logits[place] = value
        image.add(logits)
        assert image.is_finite == (number < which)

    assert image.is_complete
    assert image.label_map.max() < CLASSES


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nothing_but_such_logits_is_told_too(value: float) -> None:
    image = ImageMerge(Size(90, 60), Size(768, 512), 16)
    for _ in range(2):
        image.add(np.full((CLASSES, 16, 16), value, np.float32))

    assert not image.is_finite
    assert image.label_map.max() < CLASSES


def test_logits_may_lie_in_any_order_and_be_read_only() -> None:
    some = case(90, 130)
    image = ImageMerge(some.original, some.resized, some.cells)
    for logits in some.logits():
        strange = np.asfortranarray(logits)
        strange.flags.writeable = False
        image.add(strange)

    assert (image.label_map == some.merged()).all()


def test_compiled_once_for_all_that_is_given() -> None:
    case(60, 117).merged()
    case(117, 60, cells=16).merged()
    read_only = np.zeros((CLASSES, 16, 16), np.float32)
    read_only.flags.writeable = False
    merge([read_only], Size(1, 1), Size(512, 512))

    assert [len(each.signatures) for each in (slide_merge._bound, slide_merge._merge)] == [1, 1]


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def one_more(number: int) -> int:
        return number + 1

    assert slide_merge._jit(one_more)(1) == 2


@pytest.mark.parametrize("shape", [(150, 32, 16), (149, 32, 32), (1, 150, 32, 32), (150, 16, 16)])
def test_windows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    image = ImageMerge(Size(90, 130), resized(Size(90, 130)), 32)

    with pytest.raises(ValueError, match=r"window 1 of 2 has the shape .*, expected \(150, 32, 32\)"):
        image.add(np.zeros(shape, np.float32))


def test_more_windows_than_there_are_are_refused() -> None:
    logits = np.zeros((CLASSES, 16, 16), np.float32)

    with pytest.raises(ValueError, match="window 2 of 1"):
        merge([logits, logits], Size(512, 512), Size(512, 512))


@pytest.mark.parametrize("cells", [0, 8, 24, 48, 1024])
def test_cells_that_do_not_divide_a_window_are_refused(cells: int) -> None:
    with pytest.raises(ValueError, match="expected a multiple of 16 that divides 512"):
        ImageMerge(Size(512, 512), Size(512, 512), cells)


def test_windows_in_rows_and_columns_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="no row or column"):
        ImageMerge(Size(700, 600), Size(700, 600), 16)


# What stands behind it.


@pytest.mark.parametrize("cells", [16, 32, 64, 512])
def test_each_block_of_cells_is_bounded_class_by_class(cells: int) -> None:
    grid = min(slide_merge.GRID, cells)
    logits = np.random.default_rng(5).standard_normal((CLASSES, cells, cells), np.float32)
    low, high = (np.full((grid, grid, CLASSES), np.nan, np.float32) for _ in range(2))

    assert slide_merge._bound(logits.ctypes.data, cells, low, high, 0, grid)

    blocks = logits.reshape(CLASSES, grid, cells // grid, grid, cells // grid)
    assert (low == blocks.min(axis=(2, 4)).transpose(1, 2, 0)).all()
    assert (high == blocks.max(axis=(2, 4)).transpose(1, 2, 0)).all()


def intervals_of(length: int) -> tuple[tuple[int, int], ...]:
    return tuple((place.x1, place.x2) for place in windows(Size(1, length)))


def test_no_place_of_any_length_lies_in_more_than_three_windows() -> None:
    most = 0
    for length in range(1, 2049):
        covering = np.zeros(length, np.int64)
        for start, stop in intervals_of(length):
            covering[start:stop] += 1
        most = max(most, covering.max())

    assert most == slide_merge.SHARED


@pytest.mark.parametrize("original", [1, 2, 3, 5, 16, 17, 40, 333, 1000])
def test_no_tile_needs_more_than_three_windows_and_every_pixel_is_made_whole(original: int) -> None:
    lengths = {
        *range(1, 2049, 61),
        *(512 + 384 * count + few for count in range(5) for few in (-1, 0, 1, 127, 128, 129)),
    }
    for length in sorted(each for each in lengths if each <= 2048):
        segments = slide_merge.axis(original, intervals_of(length), 32)

        assert [segment.start for segment in segments] == [0, *(segment.stop for segment in segments[:-1])]
        assert segments[-1].stop == original
        for segment in segments:
            assert segment.spans[:, 0].max(initial=0) < slide_merge.SHARED
            if len(segment.shares):
                assert np.allclose(np.add.reduceat(segment.shares, segment.pixels[:-1]), 1, atol=1e-6)
