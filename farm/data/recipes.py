"""From an image file to the array a network takes, bit for bit as its authors' own code does it.

Knows no dataset and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from farm.errors import DataError

#: Raise it with any change that alters bytes but no field of a recipe.
VERSION = 1

#: What a picture may grow to before its crop: a sliver of 65500 x 1 would become 16 million pixels wide.
#: Twice Pillow's own warning limit, which is where it refuses to decode.
MOST_PIXELS = 178_956_970

#: Those Pillow reads by itself, without an external program.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class UnusableImage(DataError):
    """An image that does not become an array; `problem` is the sentence without the path."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.problem = problem

    def __str__(self) -> str:
        path, problem = self.args
        return f"{path}: {problem}"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shorter side to `short_side` (bicubic), centre crop, normalise, channels first: RGB [3, crop, crop]."""

    name: str  #: part of a directory's name; does not decide the bytes
    short_side: int
    crop: int
    mean: tuple[float, float, float]  #: of RGB in 0..1
    std: tuple[float, float, float]
    arithmetic: Literal["float32", "float64"]  #: what the normalisation is computed in
    dtype: Literal["float32"] = "float32"  #: of the result

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.crop, self.crop)

    @property
    def nbytes(self) -> int:
        """Size of a bin."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @cached_property
    def digest(self) -> str:
        """sha256 of all that decides a bin's bytes."""
        fields = asdict(self) | {"version": VERSION, "shape": self.shape, "layout": "RGB CHW", "resize": "PIL bicubic"}
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


RECIPES = {
    "lvvit": Recipe(
        name="lvvit", short_side=248, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, arithmetic="float64"
    ),
}


def prepare(source: Path | BinaryIO, recipe: Recipe) -> NDArray[np.float32]:
    """The image as float32 [3, crop, crop], C order. `DataError` names what cannot be used, and why.

    EXIF orientation is not applied: the networks were measured without.
    """
    pixels = np.asarray(_crop(_resize(_decode(source), recipe, source), recipe.crop))
    table = normalisation(recipe)
    result = np.empty(recipe.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=result[channel], mode="clip")
    return result


@lru_cache
def normalisation(recipe: Recipe) -> NDArray[np.float32]:
    """What each of the 256 values of a channel becomes: float32 [3, 256]."""
    values = np.tile(np.arange(256, dtype=recipe.arithmetic), (3, 1))
    mean = np.array(recipe.mean, np.float64).reshape(3, 1)
    std = np.array(recipe.std, np.float64).reshape(3, 1)
    if recipe.arithmetic == "float64":
        values -= mean * 255
        values /= std * 255
    else:
        values /= 255
        values -= mean.astype(np.float32)
        values /= std.astype(np.float32)
    table = values.astype(np.float32)
    table.flags.writeable = False  # every caller gets this one
    return table


def _decode(source: Path | BinaryIO) -> Image.Image:
    # A decoder fed with noise may raise anything, and whatever it is, the image is what cannot be used.
    try:
        with Image.open(source, formats=_FORMATS) as image:
            return image.convert("RGB")
    except Exception as exc:
        raise _unusable(source, _why(source, exc)) from exc


def _unusable(source: Path | BinaryIO, problem: str) -> UnusableImage:
    name = source if isinstance(source, Path) else getattr(source, "name", "image")
    # One printable line, whatever a decoder says: it goes into the manifest.
    printable = "".join(character if character.isprintable() else " " for character in problem)
    return UnusableImage(str(name), " ".join(printable.split()))


def _why(source: Path | BinaryIO, exc: Exception) -> str:
    """In words that depend neither on where the file lies nor, if it can be helped, on Pillow's version."""
    if isinstance(exc, UnidentifiedImageError):
        size = source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)
        if size == 0:
            return "is empty (0 bytes), expected an image"
        return f"is not an image ({size} bytes), expected {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
    if isinstance(exc, Image.DecompressionBombError):
        return f"has too many pixels, expected at most {MOST_PIXELS}"
    if isinstance(exc, OSError) and exc.strerror:
        return f"cannot be read: {exc.strerror}"
    return f"does not decode: {exc or type(exc).__name__}"


def _resize(image: Image.Image, recipe: Recipe, source: Path | BinaryIO) -> Image.Image:
    short, long = sorted(image.size)
    # Multiplied first, then divided, then truncated: any other order moves some images by a pixel.
    grown = int(recipe.short_side * long / short)
    if grown * recipe.short_side > MOST_PIXELS:
        raise _unusable(
            source,
            f"is {image.width} x {image.height}: with the shorter side resized to {recipe.short_side} "
            f"it would have more than {MOST_PIXELS} pixels",
        )
    size = (recipe.short_side, grown) if image.width == short else (grown, recipe.short_side)
    return image.resize(size, Image.Resampling.BICUBIC)


def _crop(image: Image.Image, side: int) -> Image.Image:
    # Python rounds halves to even, as the reference does.
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
