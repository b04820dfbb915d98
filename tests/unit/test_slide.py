import csv
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.data import slide
from farm.data.slide import CROP, Size, Window
from farm.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"

sides = st.integers(1, 9_999)
sizes = st.builds(Size, sides, sides)
#: What pictures are resized to.
resized_sizes = st.builds(Size, st.integers(1, 2048), st.integers(1, 2048))
windows = st.builds(Window, *[st.integers(0, 9_999)] * 4)


@pytest.mark.parametrize(
    ("original", "resized"),
    [
        ((500, 375), (683, 512)),
        ((397, 613), (512, 791)),
        ((90, 60), (768, 512)),
        ((256, 300), (512, 600)),
        ((431, 288), (766, 512)),
        ((301, 1400), (440, 2048)),
    ],
)
def test_a_picture_is_resized_as_the_reference_does(original: tuple[int, int], resized: tuple[int, int]) -> None:
    assert slide.resized(Size(*original)) == resized


@pytest.mark.parametrize(
    ("resized", "corners"),
    [
        ((512, 700), [(0, 0), (188, 0)]),
        ((641, 512), [(0, 0), (0, 129)]),
        ((512, 999), [(0, 0), (384, 0), (487, 0)]),
        ((512, 512), [(0, 0)]),
        ((512, 896), [(0, 0), (384, 0)]),
        ((512, 897), [(0, 0), (384, 0), (385, 0)]),
        ((700, 600), [(0, 0), (88, 0), (0, 188), (88, 188)]),
    ],
)
def test_windows_lie_where_the_reference_has_them(resized: tuple[int, int], corners: list[tuple[int, int]]) -> None:
    assert list(slide.windows(Size(*resized))) == [(x, y, x + CROP, y + CROP) for x, y in corners]


def test_a_panorama_gives_windows_as_low_as_itself() -> None:
    assert [(w.y1, w.y2, w.x2 - w.x1) for w in slide.windows(Size(440, 2048))] == [(0, 440, CROP)] * 5


def test_ade20ks_2000_pictures_give_the_3686_windows_of_the_deployment() -> None:
    with (GOLDEN / "ade20k_val_sizes.csv").open() as file:
        originals = [Size(int(row["height"]), int(row["width"])) for row in csv.DictReader(file)]

    counts = Counter(len(slide.windows(slide.resized(original))) for original in originals)

    assert counts == {1: 347, 2: 1620, 3: 33}
    assert sum(count * times for count, times in counts.items()) == 3686


@given(size=resized_sizes)
def test_windows_cover_every_pixel_and_nothing_else(size: Size) -> None:
    placed = slide.windows(size)

    columns = {(w.x1, w.x2) for w in placed}
    rows = {(w.y1, w.y2) for w in placed}
    assert len(placed) == len(rows) * len(columns) == len(set(placed))
    assert set().union(*(range(*column) for column in columns)) == set(range(size.width))
    assert set().union(*(range(*row) for row in rows)) == set(range(size.height))


@given(size=resized_sizes)
def test_no_window_is_larger_than_the_network_takes_or_smaller_than_it_must_be(size: Size) -> None:
    for window in slide.windows(size):
        assert window.x2 - window.x1 == min(CROP, size.width)
        assert window.y2 - window.y1 == min(CROP, size.height)


def test_a_bin_has_its_published_name() -> None:
    name = slide.bin_name("ADE_val_00000001", Window(171, 0, 683, 512), Size(512, 683), Size(512, 683))

    assert name == "ADE_val_00000001-171,0,683,512-512,683,3-1,512,683.bin"


@given(stem=st.text(min_size=1), window=windows, original=sizes, resized=sizes)
def test_a_name_says_what_it_was_made_from(stem: str, window: Window, original: Size, resized: Size) -> None:
    parsed = slide.parse_name(slide.bin_name(stem, window, original, resized))

    assert (parsed.stem, parsed.window, parsed.original, parsed.resized) == (stem, window, original, resized)


@pytest.mark.parametrize("stem", ["a-b", "-", "a-0,0,512,512-5,6,3-1,7,8", "a.b", "a\nb"])
def test_a_stem_may_look_like_the_rest_of_a_name(stem: str) -> None:
    assert slide.parse_name(f"{stem}-0,0,512,512-500,375,3-1,683,512.bin").stem == stem


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a.bin",
        "-0,0,512,512-500,375,3-1,683,512.bin",
        "a-0,0,512,512-500,375,3-1,683,512",
        "a-0,0,512,512-500,375,3-1,683,512_0.bin",
        "a-0,0,512-500,375,3-1,683,512.bin",
        "a-0,0,512,512-500,375,1-1,683,512.bin",
        "a-0,0,512,512-500,375,3-4,683,512.bin",
        "a-0,0,512,0512-500,375,3-1,683,512.bin",
        "a-0,-1,512,512-500,375,3-1,683,512.bin",
        "a-0,0,512,٣-500,375,3-1,683,512.bin",
    ],
)
def test_another_name_is_a_data_error_that_shows_one(name: str) -> None:
    with pytest.raises(
        DataError, match=r"is no window's name, expected one like a-0,0,512,512-512,683,3-1,512,683.bin"
    ):
        slide.parse_name(name)
