"""From an image file to the array a network takes, bit for bit as its authors' own code does it.

Knows no dataset and writes nothing. The pixels of `Segmentation` are made in `farm.data.seg`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from math import gcd
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.data import slide
from farm.data.decoding import FORMATS, MOST_PIXELS, Source, decoding, unusable
from farm.errors import UsageError

#: Raise it with any change that alters bytes but no field of a recipe.
VERSION = 1

#: Pixels uint8 [height, width, 3].
Pixels = NDArray[np.uint8]
#: float32 or uint8, as the recipe says.
Array = NDArray[Any]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """What makes an image into arrays of `shape`, channels first, RGB.

    In "float32" they are normalised; in "uint8" they are the pixels before that, which the device normalises.
    """

    name: str  #: part of a directory's name; does not decide the bytes
    mean: tuple[float, float, float]  #: of RGB
    std: tuple[float, float, float]
    dtype: Literal["float32", "uint8"] = "float32"  #: of the result

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Of one bin."""

    @property
    @abstractmethod
    def _unnamed(self) -> dict[str, Any]:
        """What decides the bytes and is no field."""

    @abstractmethod
    def _normalised(self, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The arithmetic of the networks' authors: uint8 [3, n] to float32 [3, n]."""

    @property
    def nbytes(self) -> int:
        """Size of a bin."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @cached_property
    def digest(self) -> str:
        """sha256 of all that decides what a bin's bytes are and mean."""
        fields = asdict(self) | {"version": VERSION, "shape": self.shape, "layout": "RGB CHW"} | self._unnamed
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Classification(Recipe):
    """Shorter side to `short_side`, centre crop: one array [3, crop, crop] an image."""

    short_side: int
    crop: int
    arithmetic: Literal["float32", "float64"]  #: what the normalisation is computed in; `mean` is of values in 0..1

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.crop, self.crop)

    @property
    def _unnamed(self) -> dict[str, Any]:
        return {"resize": "PIL bicubic"}

    def _normalised(self, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        mean, std = _column(self.mean), _column(self.std)
        if self.arithmetic == "float64":
            exact = values.astype(np.float64)
            exact -= mean * 255
            exact /= std * 255
            return exact.astype(np.float32)
        rounded = values.astype(np.float32)
        rounded /= 255
        rounded -= mean.astype(np.float32)
        rounded /= std.astype(np.float32)
        return rounded


@dataclass(frozen=True, kw_only=True)
class Segmentation(Recipe):
    """The picture resized as `farm.data.slide` says and cut into its windows: as many arrays [3, 512, 512].

    `mean` is of values in 0..255. Beyond a picture lower or narrower than a window there is `padding`.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, slide.CROP, slide.CROP)

    @property
    def padding(self) -> tuple[int, int, int]:
        """What fills up a channel: 0 after normalisation, or the value that comes nearest to it before."""
        red, green, blue = (0.0, 0.0, 0.0) if self.dtype == "float32" else self.mean
        return round(red), round(green), round(blue)

    @property
    def _unnamed(self) -> dict[str, Any]:
        sizes = {"crop": slide.CROP, "stride": slide.STRIDE, "short_side": slide.SHORT, "long_side": slide.LONG}
        return {"resize": "OpenCV bilinear"} | sizes

    def _normalised(self, values: NDArray[np.uint8]) -> NDArray[np.float32]:
        # OpenCV's way: the difference in float32, the product with the float64 reciprocal rounded to it.
        difference = values.astype(np.float32) - _column(self.mean).astype(np.float32)
        return (difference * (1 / _column(self.std).astype(np.float32).astype(np.float64))).astype(np.float32)


LVVIT = Classification(
    name="lvvit", short_side=248, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, arithmetic="float64"
)
IN256 = Classification(
    name="in256", short_side=256, crop=224, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, arithmetic="float32"
)
SEG = Segmentation(name="seg", mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))

RECIPES: dict[str, Recipe] = {"lvvit": LVVIT, "in256": IN256, "seg": SEG}


def get(name: str, dtype: str = "float32") -> Recipe:
    """A recipe whose results have this type; `UsageError` for one that is not known."""
    if name not in RECIPES:
        raise UsageError(f"unknown recipe {name!r}: the farm knows {', '.join(RECIPES)}")
    if dtype == "float32":
        return RECIPES[name]
    if dtype == "uint8":
        return replace(RECIPES[name], dtype="uint8")
    raise UsageError(f"input {dtype!r}: expected float32 or uint8")


def prepare(source: Source, recipe: Recipe) -> Array:
    """The image as [3, height, width], C order; of a segmentation recipe the whole picture, before it is cut.

    `DataError` names what cannot be used, and why. EXIF orientation is not applied for classification, as the
    networks were measured without; for segmentation it is.
    """
    if isinstance(recipe, Classification):
        pixels = _pixels(source, recipe)
    else:
        from farm.data import seg  # it brings OpenCV, which classification does without

        pixels = seg.resize(seg.decode(source), source)
    result = np.empty((3, *pixels.shape[:2]), recipe.dtype)
    normalise(pixels, recipe, result)
    return result


def normalise(pixels: Pixels, recipe: Recipe, out: Array) -> None:
    """Pixels RGB [height, width, 3] to the type of the recipe, channels first: `out` [3, height, width]."""
    if recipe.dtype == "uint8":
        out[...] = pixels.transpose(2, 0, 1)
        return
    table = normalisation(recipe)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=out[channel], mode="clip")


@lru_cache
def normalisation(recipe: Recipe) -> NDArray[np.float32]:
    """What each of the 256 values of a channel becomes: float32 [3, 256]."""
    table = recipe._normalised(np.tile(np.arange(256, dtype=np.uint8), (3, 1)))
    table.flags.writeable = False  # every caller gets this one
    return table


def _column(numbers: tuple[float, float, float]) -> NDArray[np.float64]:
    return np.array(numbers, np.float64).reshape(3, 1)


def _pixels(source: Source, recipe: Classification) -> Pixels:
    with decoding(source), Image.open(source, formats=FORMATS) as file:
        file.load()
        image = file if file.mode == "RGB" else file.convert("RGB")  # which would copy
    return np.asarray(crop_of_resized(image, _resized(image, recipe, source), recipe.crop))


def _resized(image: Image.Image, recipe: Classification, source: Source) -> tuple[int, int]:
    """Width and height that the image is resized to."""
    short, long = sorted(image.size)
    # Multiplied first, then divided, then truncated: any other order moves some images by a pixel.
    grown = int(recipe.short_side * long / short)
    if grown * recipe.short_side > MOST_PIXELS:
        raise unusable(
            source,
            f"is {image.width} x {image.height}: with the shorter side resized to {recipe.short_side} "
            f"it would have more than {MOST_PIXELS} pixels",
        )
    return (recipe.short_side, grown) if image.width == short else (grown, recipe.short_side)


def crop_of_resized(image: Image.Image, size: tuple[int, int], side: int) -> Image.Image:
    """The centre of ``image.resize(size, BICUBIC)``, bit for bit, without computing all that is cut off.

    Pillow resizes in two passes, first each row, then each column, rounding to 8 bits after each. Here they are called
    one by one: the first for the rows that the second looks at, the second for the columns that are kept. That also
    holds the order: since Pillow 13 an image more than twice as high as wide is shrunk columns first, which moves some
    pixels by 1 from what the networks were measured with.
    """
    width, height = size
    # Python rounds halves to even, as the reference does.
    left, top = round((width - side) / 2), round((height - side) / 2)
    if size == image.size:
        return image.crop((left, top, left + side, top + side))
    across = exact_part(image.width, width, left, left + side)
    down = exact_part(image.height, height, top, top + side)
    first, last = _rows_looked_at(image.height, height, top, top + side)
    strip = image.crop((0, first, image.width, last))
    strip = strip.resize(
        (across.stop - across.start, strip.height),
        Image.Resampling.BICUBIC,
        (across.begin, 0, across.end, strip.height),
    )
    # Back to the rows where they were, for the second pass to weigh them as it would; it looks at no others for `side`.
    left, top = left - across.start, top - down.start
    strip = strip.crop((left, -first, left + side, image.height - first))
    strip = strip.resize((side, down.stop - down.start), Image.Resampling.BICUBIC, (0, down.begin, side, down.end))
    return strip.crop((0, top, side, top + side))


class Part(NamedTuple):
    """Of a side: pixels `start` to `stop` of a resized side, which come from `begin` to `end` of the original one."""

    start: int
    stop: int
    begin: float
    end: float


def exact_part(length: int, resized: int, start: int, stop: int) -> Part:
    """The least part of a resized side around `start` to `stop` that Pillow can resize by itself, bit for bit.

    Its `box` is in float32: only where both ends are such numbers, as those with ten bits after the point, is it the
    same part. And unless positions are such numbers too, the part must begin where the side does: they are computed
    from there, and would be rounded differently (one of 68,508 parts tried had another weight in its last bit).
    """
    unit = resized // gcd(length << 10, resized)
    if unit > 1:
        start, stop = 0, min(-(-stop // unit) * unit, resized)
    return Part(start, stop, start * length / resized, stop * length / resized)


def _rows_looked_at(height: int, resized: int, start: int, stop: int) -> tuple[int, int]:
    """Rows that bicubic resizing of `height` rows to `resized` needs for its rows `start` to `stop`, and one more."""
    scale = height / resized
    reach = 2 * max(scale, 1.0) + 1
    return max(0, int((start + 0.5) * scale - reach)), min(height, int((stop - 0.5) * scale + reach) + 1)
