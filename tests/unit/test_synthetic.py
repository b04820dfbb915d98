import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farm.data import imagenet, synthetic
from farm.data.recipes import RECIPES, prepare
from farm.errors import StorageError, UsageError

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return synthetic.write_imagenet(tmp_path_factory.mktemp("demo"), 256, seed=0)


def contents(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_files_are_named_as_in_ilsvrc2012(dataset: list[Path]) -> None:
    assert (dataset[0].name, dataset[-1].name) == ("ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000256.JPEG")


def test_the_farm_finds_every_file(dataset: list[Path]) -> None:
    assert list(imagenet.find_images(dataset[0].parent).values()) == dataset


def test_every_file_is_a_jpeg(dataset: list[Path]) -> None:
    formats = set()
    for path in dataset:
        with Image.open(path) as image:
            formats.add(image.format)

    assert formats == {"JPEG"}


def test_there_are_pictures_in_colour_in_gray_and_in_cmyk(dataset: list[Path]) -> None:
    modes: Counter[str] = Counter()
    for path in dataset:
        with Image.open(path) as image:
            modes[image.mode] += 1

    assert modes == {"RGB": 208, "L": 32, "CMYK": 16}


def test_some_pictures_carry_an_exif_orientation(dataset: list[Path]) -> None:
    orientations: Counter[int | None] = Counter()
    for path in dataset:
        with Image.open(path) as image:
            orientations[image.getexif().get(ORIENTATION)] += 1

    assert orientations == {None: 240, 6: 16}


def test_sizes_are_odd_tall_wide_and_one_kind_very_wide(dataset: list[Path]) -> None:
    sizes = []
    for path in dataset:
        with Image.open(path) as image:
            sizes.append(image.size)

    assert len(set(sizes)) > 200
    assert sum(width < height for width, height in sizes) > 50
    assert sum(width > 3.5 * height for width, height in sizes) == 16
    assert min(map(min, sizes)) >= 60
    assert max(map(max, sizes)) <= 900


def test_no_two_pictures_look_alike_to_a_network(dataset: list[Path]) -> None:
    # 14 x 14 means of what a network gets: the same photograph in the same piece would all but agree here.
    arrays = np.stack([prepare(path, RECIPES["lvvit"]) for path in dataset])
    means = arrays.reshape(256, 3, 14, 16, 14, 16).mean(axis=(3, 5)).reshape(256, -1)

    nearest = min(np.abs(means[i] - means[i + 1 :]).mean(axis=1).min() for i in range(255))

    assert nearest > 0.05


def test_the_same_seed_gives_the_same_files(dataset: list[Path], tmp_path: Path) -> None:
    assert contents(synthetic.write_imagenet(tmp_path, 32, seed=0)) == contents(dataset[:32])


def test_another_seed_gives_other_files(dataset: list[Path], tmp_path: Path) -> None:
    other = contents(synthetic.write_imagenet(tmp_path, 32, seed=1))

    assert not set(other) & set(contents(dataset))


def test_writing_again_leaves_the_times_of_the_files(tmp_path: Path) -> None:
    first = [path.stat().st_mtime_ns for path in synthetic.write_imagenet(tmp_path, 4, seed=0)]

    second = [path.stat().st_mtime_ns for path in synthetic.write_imagenet(tmp_path, 4, seed=0)]

    assert first == second


def test_a_damaged_file_is_written_again(tmp_path: Path) -> None:
    paths = synthetic.write_imagenet(tmp_path, 2, seed=0)
    before = contents(paths)
    paths[1].write_bytes(b"")

    synthetic.write_imagenet(tmp_path, 2, seed=0)

    assert contents(paths) == before


def test_without_scikit_image_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(synthetic, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"pip install 'scikit-image>=0.24'"):
        synthetic.write_imagenet(tmp_path, 1, seed=0)


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StorageError, match=r"cannot write .*file/demo: Not a directory"):
        synthetic.write_imagenet(tmp_path / "file" / "demo", 1, seed=0)
