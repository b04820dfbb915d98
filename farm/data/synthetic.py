"""A small dataset in ILSVRC2012's layout for those who have none: photographs from the scikit-image wheel, varied.

The same seed gives the same files. It says nothing of what the pictures show: there are no labels here.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageEnhance

from farm.data import disk
from farm.errors import UsageError

#: Real photographs among scikit-image's data, in every version of the wheel from 0.24 on.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)

#: Which files are out of the ordinary, by index; the period brings each kind into any 16 files in a row.
PERIOD = 16
CMYK, TURNED, PANORAMA = 3, 6, 9
GRAY = (5, 12)
_ORIENTATION_TAG, _TURNED_CLOCKWISE = 0x0112, 6


def write_imagenet(directory: Path, count: int, seed: int) -> list[Path]:
    """Write ``ILSVRC2012_val_00000001.JPEG`` to number `count`. A file that has its bytes already keeps its time.

    `UsageError` without scikit-image, `StorageError` when the disk refuses.
    """
    originals = photographs()
    with disk.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"ILSVRC2012_val_{number:08}.JPEG" for number in range(1, count + 1)]
    for index, path in enumerate(paths):
        # Seeded one by one: a longer dataset begins with the shorter one's files.
        data = _jpeg(originals, index, random.Random(f"{seed}/{index}"))  # noqa: S311
        if not path.is_file() or path.read_bytes() != data:
            disk.replace(path, data, partial=path.with_suffix(".tmp"))
    return paths


def photographs() -> list[Image.Image]:
    # Found, not imported: importing scikit-image pulls in scipy.
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if folder is None or not all((folder / name).is_file() for name in PHOTOGRAPHS):
        raise UsageError(
            "the demo's pictures come from scikit-image, which is not here: pip install 'scikit-image>=0.24'"
        )
    images = []
    for name in PHOTOGRAPHS:
        with Image.open(folder / name) as image:
            images.append(image.convert("RGB"))
    return images


def _jpeg(photographs: Sequence[Image.Image], index: int, rng: random.Random) -> bytes:
    """One file: a piece of a photograph, varied in all ways that change what a network sees."""
    kind = index % PERIOD
    image = piece(photographs[index % len(photographs)], *_size(kind, rng), rng)
    image = recolour(_turn(image, rng), rng)
    exif = Image.Exif()
    if kind == CMYK:
        image = image.convert("CMYK")
    elif kind in GRAY:
        image = image.convert("L")
    elif kind == TURNED:
        exif[_ORIENTATION_TAG] = _TURNED_CLOCKWISE
    file = io.BytesIO()
    image.save(file, "JPEG", quality=rng.choice((60, 75, 85, 92, 96)), subsampling=rng.choice((0, 1, 2)), exif=exif)
    return file.getvalue()


def _size(kind: int, rng: random.Random) -> tuple[int, int]:
    """Width and height, like ILSVRC2012's: mostly about 500 x 375, either way round, a few small or very long."""
    if kind == PANORAMA:
        return rng.randint(700, 900), rng.randint(140, 180)
    long = rng.randint(64, 500)
    short = max(60, round(long * rng.uniform(0.55, 1.0)))
    return (long, short) if rng.random() < 0.6 else (short, long)


def piece(photograph: Image.Image, width: int, height: int, rng: random.Random) -> Image.Image:
    """A random part of the photograph in the wanted shape, brought to the wanted size."""
    most = min(photograph.width / width, photograph.height / height)
    scale = most * rng.uniform(0.45, 1.0)
    left = rng.uniform(0, photograph.width - width * scale)
    top = rng.uniform(0, photograph.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _turn(image: Image.Image, rng: random.Random) -> Image.Image:
    for way in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM):
        if rng.random() < 0.5:
            image = image.transpose(way)
    return image


def recolour(image: Image.Image, rng: random.Random) -> Image.Image:
    """Channels with a gain each, at times in another order; then contrast and brightness."""
    channels = rng.sample(image.split(), 3) if rng.random() < 0.4 else image.split()
    gains = [rng.uniform(0.55, 1.25) for _ in channels]
    image = Image.merge("RGB", [_scaled(channel, gain) for channel, gain in zip(channels, gains, strict=True)])
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.6))
    return ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.35))


def _scaled(channel: Image.Image, gain: float) -> Image.Image:
    return channel.point([min(255, round(value * gain)) for value in range(256)])
