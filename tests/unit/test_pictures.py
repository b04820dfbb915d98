"""The photographs of segmentation's demo: every ordinary way to be cut into windows, and the same files every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from farm.data import seg, slide, synthetic
from farm.data.slide import Size
from farm.demo import pictures
from farm.errors import UsageError

COUNT = 18
ORIENTATION = 0x0112


def written(directory: Path, count: int, seed: int = 0) -> list[Path]:
    paths = [directory / "images" / f"{number}.jpg" for number in range(count)]
    pictures.write(paths, seed)
    return paths


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return written(tmp_path_factory.mktemp("pictures"), COUNT)


@pytest.fixture(scope="module")
def sizes(dataset: list[Path]) -> list[Size]:
    """As OpenCV decodes them."""
    return [seg.size_of(seg.decode(path)) for path in dataset]


def windows(size: Size) -> int:
    return len(slide.windows(slide.resized(size)))


def contents(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_some_are_of_one_window_and_most_of_two(sizes: list[Size]) -> None:
    counts = [windows(size) for size in sizes]

    assert counts.count(1) == COUNT // 6
    assert counts.count(2) >= COUNT // 2
    assert set(counts) <= {1, 2, 3}


def test_some_need_no_resize_and_still_two_windows(sizes: list[Size]) -> None:
    as_they_are = [size for size in sizes if slide.resized(size) == size]

    assert len(as_they_are) == COUNT // 6
    assert all(windows(size) > 1 for size in as_they_are)


def test_most_sides_are_odd_and_some_pictures_tall(sizes: list[Size]) -> None:
    assert sum(min(size) % 2 for size in sizes) == COUNT * 5 // 6
    assert sum(size.height > size.width for size in sizes) >= COUNT // 6


def test_some_lie_on_their_side_and_some_are_gray(dataset: list[Path]) -> None:
    orientations, modes = [], []
    for path in dataset:
        with Image.open(path) as image:
            orientations.append(image.getexif().get(ORIENTATION))
            modes.append(image.mode)

    assert orientations.count(6) == COUNT // 6
    assert modes.count("L") == COUNT // 6


def test_no_two_are_of_the_same_photograph_within_one_round(dataset: list[Path]) -> None:
    small = []
    for path in dataset[: len(synthetic.PHOTOGRAPHS)]:
        with Image.open(path) as image:
            small.append(image.convert("L").resize((8, 8)).tobytes())

    assert len(set(small)) == len(small)


def test_a_longer_dataset_begins_with_the_shorter_ones_files(dataset: list[Path], tmp_path: Path) -> None:
    assert contents(written(tmp_path, 3)) == contents(dataset[:3])


def test_another_seed_gives_other_files(dataset: list[Path], tmp_path: Path) -> None:
    assert not set(contents(written(tmp_path, 3, seed=1))) & set(contents(dataset))


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(synthetic, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"pip install 'scikit-image>=0.24'"):
        written(tmp_path, 1)
