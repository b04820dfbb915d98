"""
Photographs for segmentation, in sizes that are cut into windows in all ordinary ways. The same seed, the same files.

They are pieces of `farm.data.synthetic`'s; resized, their shorter side has 512 pixels, which is a window's.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from farm.data import disk, synthetic

#: What comes in turns.
PERIOD = 6
SQUARE, WIDE, EXACT, TALL, TURNED, GRAY = range(PERIOD)
_ORIENTATION_TAG, _TURNED_CLOCKWISE = 0x0112, 6


def write(paths: Sequence[Path], seed: int) -> None:
    """
    Write JPEGs to these paths, in one folder.

    `UsageError` without scikit-image, `StorageError` when the disk refuses.
    """
    originals = synthetic.photographs()
    for index, path in enumerate(paths):
        with disk.writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Seeded one by one: a longer dataset begins with the shorter one's files.
        data = _jpeg(originals[index % len(originals)], index % PERIOD, random.Random(f"{seed}/{index}"))  # noqa: S311
        disk.replace(path, data, partial=path.with_suffix(".tmp"))


def _jpeg(photograph: Image.Image, kind: int, rng: random.Random) -> bytes:
    image = synthetic.recolour(synthetic.piece(photograph, *_size(kind, rng), rng), rng)
    exif = Image.Exif()
    if kind == TURNED:
        exif[_ORIENTATION_TAG] = _TURNED_CLOCKWISE
    elif kind == GRAY:
        image = image.convert("L")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.choice((75, 85, 92, 96)), subsampling=rng.choice((0, 1, 2)), exif=exif)
    return file.getvalue()


def _size(kind: int, rng: random.Random) -> tuple[int, int]:
    """Width and height, of one window if they are equal, else of two (rarely three), like most of ADE20K's."""
    short = 512 if kind == EXACT else rng.randrange(257, 500, 2)
    long = short if kind == SQUARE else round(short * rng.uniform(1.2, 1.72))
    return (short, long) if kind == TALL else (long, short)
