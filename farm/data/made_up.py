"""
Prepared data that is of nothing: seeded noise, as large as the real thing, for farms that simulate and for speed.

Few files are written, the others are links to them; a farm reads and checks each all the same.
"""

from __future__ import annotations

import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.data import bins, disk, manifest, slide
from farm.data.manifest import Header, Sample, Windows
from farm.data.prepare import Prepared
from farm.data.recipes import Recipe, Segmentation
from farm.data.slide import Size
from farm.errors import DataError, UsageError

#: Samples that have bytes of their own. Not a multiple of any usual batch size.
DISTINCT = 61
_NAME = "made_up_"
#: Resized sizes, of one, two and three windows, as often as ADE20K's validation set has them: 347, 1,620, 33 of 2,000.
ONE, TWO, THREE = Size(512, 512), Size(512, 683), Size(512, 1000)


def make(recipe: Recipe, data_dir: Path, count: int) -> Prepared:
    """
    Write `count` samples of a recipe and their manifest. The same samples every time, and in a longer set, too.

    `UsageError` where real data lies, `StorageError` when the disk refuses.
    """
    began = time.monotonic()
    directory = manifest.bins_dir(data_dir, recipe.name, recipe.dtype)
    _spare_real_data(directory)
    with disk.writing(directory):
        (directory / "annotations" if isinstance(recipe, Segmentation) else directory).mkdir(
            parents=True, exist_ok=True
        )
        (directory / manifest.FILE_NAME).unlink(missing_ok=True)
        own = [_sample(directory, recipe, index) for index in range(min(count, DISTINCT))]
        samples = own + [_copy(directory, own[index % DISTINCT], index) for index in range(DISTINCT, count)]
    segmented = isinstance(recipe, Segmentation)
    header = Header(
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        dtype=recipe.dtype,
        shape=recipe.shape,
        classes=150 if segmented else 1000,
        source=manifest.MADE_UP,
    )
    written = manifest.write(directory, header, samples)
    seconds = time.monotonic() - began
    return Prepared(directory=directory, manifest=written, done=count, reused=0, failures=(), seconds=seconds)


def _spare_real_data(directory: Path) -> None:
    try:
        found = manifest.read(directory)
    except DataError:
        if any(not path.name.startswith(_NAME) for path in directory.glob("*.bin")):
            raise UsageError(
                f"{directory} has bins without a manifest: finish farm prepare, or set FARM_DATA to another place"
            ) from None
        return
    if found.header.source != manifest.MADE_UP:
        raise UsageError(
            f"{directory} holds {len(found.samples)} samples from {found.header.source or 'elsewhere'}: made-up ones "
            "would replace them. Set FARM_DATA to another place"
        )


def _sample(directory: Path, recipe: Recipe, index: int) -> Sample:
    name = f"{_NAME}{index + 1:08}"
    if not isinstance(recipe, Segmentation):
        data = _noise(recipe, index)
        disk.replace(manifest.bin_path(directory, name), data.data.cast("B"), partial=directory / f"{name}.tmp")
        return Sample(name, _label(index), bins.xxh3(data.data.cast("B")))
    size = (TWO, TWO, ONE, TWO, TWO, TWO)[index % 6] if index != DISTINCT - 1 else THREE
    hashes = []
    for number, window in enumerate(slide.windows(size)):
        data = _noise(recipe, 3 * index + number)
        path = directory / slide.bin_name(name, window, size, size)
        disk.replace(path, data.data.cast("B"), partial=directory / f"{name}.tmp")
        hashes.append(bins.xxh3(data.data.cast("B")))
    annotation = _annotation(size, index)
    path = manifest.annotation_path(directory, name)
    disk.replace(path, annotation, partial=path.with_suffix(".tmp"))
    windows = Windows(original=size, resized=size, annotation=bins.xxh3(annotation), xxh3=tuple(hashes))
    return Sample(name, 0, str(windows))


def _copy(directory: Path, like: Sample, index: int) -> Sample:
    name = f"{_NAME}{index + 1:08}"
    for source, path in zip(
        manifest.paths(directory, like.name, like.xxh3), manifest.paths(directory, name, like.xxh3), strict=True
    ):
        path.unlink(missing_ok=True)
        try:
            os.link(source, path)
        except OSError:  # a file system without links, or with as many as a file may have
            shutil.copyfile(source, path)
    return Sample(name, like.label if "/" in like.xxh3 else _label(index), like.xxh3)


def _label(index: int) -> int:
    return index * 7919 % 1000


def _noise(recipe: Recipe, seed: int) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Pixels, or values about as large as normalised pixels are."""
    count = int(np.prod(recipe.shape))
    pixels = np.random.PCG64(seed).random_raw((count + 7) // 8).astype("<u8").view(np.uint8)[:count]
    pixels = pixels.reshape(recipe.shape)
    return pixels if recipe.dtype == "uint8" else (pixels.astype(np.float32) - 127.5) / np.float32(64)


def _annotation(size: Size, seed: int) -> bytes:
    """Patches of classes, as ADE20K stores them: 0 is none."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 151, (size.height // 32 + 1, size.width // 32 + 1), dtype=np.uint8)
    labels = patches.repeat(32, axis=0).repeat(32, axis=1)[: size.height, : size.width]
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()
