"""Samples that are of nothing: the same every time, as many windows as ADE20K has, and never over real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from farm.data import ade20k, made_up, manifest, recipes
from farm.errors import UsageError


def test_they_are_what_their_manifest_says(tmp_path: Path) -> None:
    made = made_up.make(recipes.get("in256", "uint8"), tmp_path, 130)

    for sample in made.manifest.samples:
        data = manifest.bin_path(made.directory, sample.name).read_bytes()
        assert (len(data), xxhash.xxh3_64_hexdigest(data)) == (3 * 224 * 224, sample.xxh3)
    assert len(made.manifest.samples) == 130
    assert len({sample.xxh3 for sample in made.manifest.samples}) == made_up.DISTINCT


def test_a_longer_set_begins_with_the_shorter_one(tmp_path: Path) -> None:
    few = made_up.make(recipes.get("in256", "uint8"), tmp_path / "few", 3)
    many = made_up.make(recipes.get("in256", "uint8"), tmp_path / "many", 70)

    assert many.manifest.samples[:3] == few.manifest.samples


def test_images_have_windows_as_often_as_the_real_ones(tmp_path: Path) -> None:
    made = made_up.make(recipes.get("seg", "uint8"), tmp_path, made_up.DISTINCT)

    parts = [sample.parts for sample in made.manifest.samples]
    assert sum(parts) / len(parts) == pytest.approx(3686 / 2000, abs=0.02)
    assert set(parts) == {1, 2, 3}
    for sample in made.manifest.samples:
        assert sample.windows is not None
        *bins, annotation = manifest.paths(made.directory, sample.name, sample.xxh3)
        assert tuple(xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in bins) == sample.windows.xxh3
        labels = annotation.read_bytes()
        ade20k.check_annotation(labels, sample.windows.original)
        assert xxhash.xxh3_64_hexdigest(labels) == sample.windows.annotation


def test_made_up_again_after_it_was_interrupted(tmp_path: Path) -> None:
    first = made_up.make(recipes.get("in256", "uint8"), tmp_path, 5)
    (first.directory / manifest.FILE_NAME).unlink()

    again = made_up.make(recipes.get("in256", "uint8"), tmp_path, 5)

    assert again.manifest.digest == first.manifest.digest


@pytest.mark.parametrize("finished", [True, False])
def test_real_samples_are_not_replaced(tmp_path: Path, finished: bool) -> None:
    recipe = recipes.get("in256", "uint8")
    made = made_up.make(recipe, tmp_path, 2)
    header = made.manifest.header.model_copy(update={"source": "/data/val"})
    manifest.write(made.directory, header, made.manifest.samples)
    if not finished:
        (made.directory / manifest.FILE_NAME).unlink()
        (made.directory / "ILSVRC2012_val_00000001.bin").write_bytes(b"real")

    with pytest.raises(UsageError, match="et FARM_DATA"):
        made_up.make(recipe, tmp_path, 2)
