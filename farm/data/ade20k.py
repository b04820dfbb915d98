"""ADE20K as its users have it: a folder of pictures, and a folder of annotations of the same names."""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.data import imagenet
from farm.data.slide import Size
from farm.errors import DataError, UsageError

CLASSES = 150
IGNORED = 255  #: beside 0, which is unlabelled
EXTENSION = ".png"  #: of annotations


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image file and its annotation."""

    name: str  #: file name up to its first dot
    path: Path
    annotation: Path | None  #: None: there is none of this name


def load(images: Path, annotations: Path, *, subset: bool = False) -> list[Picture]:
    """All pictures, in byte order of the names; those without an annotation too, to be counted as failed.

    `DataError` if annotations lack their image (with `subset` they may), or if no image has one.
    """
    paths = imagenet.find_images(images)
    known = pair(paths, images, annotations, subset=subset)
    return [Picture(name=name, path=path, annotation=known.get(name)) for name, path in paths.items()]


def pair(names: Collection[str], images: Path, annotations: Path, *, subset: bool) -> dict[str, Path]:
    """The annotations by name, of the images with these names. `DataError` as `load` says."""
    known = find_annotations(annotations)
    if known.keys().isdisjoint(names):
        raise DataError(
            f"no image in {images} has an annotation of its name in {annotations} (images: "
            f"{imagenet.some(names)}; annotations: {imagenet.some(known)}). Nothing was written"
        )
    if missing := [] if subset else [name for name in known if name not in names]:
        raise DataError(
            f"{len(missing)} of {len(known)} annotations have no image in {images} ({imagenet.some(missing)}; --subset "
            "allows this). Nothing was written"
        )
    return known


def find_annotations(directory: Path) -> dict[str, Path]:
    """Annotations of a folder by sample name; `UsageError` for a folder without any."""
    found = imagenet.files(directory, (EXTENSION,), "annotations")
    if not found:
        raise UsageError(f"no annotations in {directory}, expected files *{EXTENSION} directly in it")
    return imagenet.by_name(found)


def read_annotation(path: Path) -> NDArray[np.uint8]:
    """[height, width] as stored: 0 unlabelled, 1 to 150 the classes, 255 ignored. `DataError` says what is wrong."""
    try:
        return check_annotation(path.read_bytes(), None)
    except OSError as exc:
        raise DataError(f"annotation {path} cannot be read: {exc.strerror}") from exc
    except DataError as exc:
        raise DataError(f"{path}: {exc}") from exc


def check_annotation(data: bytes, size: Size | None) -> NDArray[np.uint8]:
    """The values in the bytes of an annotation, [height, width], if it is one and, unless None, of this size.

    `DataError` says what is wrong with it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            # Image type and bit depth as the file has them: Pillow would scale the values of fewer bits.
            kind = data[24], data[25]
            values: NDArray[np.uint8] = np.asarray(image)
            found = image.mode
    except Exception as exc:  # a decoder fed with noise may raise anything
        raise DataError("its annotation does not decode, expected a PNG of one 8-bit channel") from exc
    if kind not in ((8, 0), (8, 3)):
        raise DataError(f"its annotation has {kind[0]} bits, mode {found}, expected a PNG of one 8-bit channel")
    if size is not None and values.shape != size:
        height, width = values.shape
        raise DataError(f"its annotation is {width} x {height}, expected {size.width} x {size.height} like the image")
    strange = np.flatnonzero(np.bincount(values.ravel(), minlength=256)[CLASSES + 1 : IGNORED])
    if len(strange):
        raise DataError(
            f"its annotation has the value {strange[0] + CLASSES + 1}, expected 0 to {CLASSES} or {IGNORED}"
        )
    return values
