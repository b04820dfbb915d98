"""A picture as segmentation takes it: OpenCV's pixels, turned as its EXIF says, resized, cut into windows."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from farm.data import slide
from farm.data.decoding import FORMATS, Source, decoding, unusable
from farm.data.recipes import Array, Pixels, Segmentation, normalise
from farm.data.slide import Size, Window


def decode(source: Source) -> Pixels:
    """RGB [height, width, 3]. `UnusableImage` for what is not a whole image."""
    with decoding(source):
        data = source.read_bytes() if isinstance(source, Path) else source.read()
        # With Pillow first: OpenCV fills up what is missing of a truncated file, and says nothing.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise unusable(source, "does not decode: OpenCV cannot read it, expected JPEG or PNG")
    return _turned(pixels)


def size_of(pixels: Pixels) -> Size:
    height, width, _ = pixels.shape
    return Size(height, width)


def resize(pixels: Pixels, source: Source) -> Pixels:
    """[h, w, 3] as `slide.resized` says; `UnusableImage` for a line, of which nothing would be left."""
    original = size_of(pixels)
    size = slide.resized(original)
    if min(size) < 1:
        raise unusable(
            source, f"is {original.width} x {original.height}: resized to {size.width} x {size.height} nothing is left"
        )
    return _turned(cv2.resize(_turned(pixels), (size.width, size.height), interpolation=cv2.INTER_LINEAR))


def cut(pixels: Pixels, recipe: Segmentation) -> Iterator[tuple[Window, Array]]:
    """The windows of a resized picture, row by row: each [3, 512, 512]. The array is used again for the next one."""
    array = np.empty(recipe.shape, recipe.dtype)
    array[...] = np.array(recipe.padding, recipe.dtype).reshape(3, 1, 1)
    for window in slide.windows(size_of(pixels)):
        part = pixels[window.y1 : window.y2, window.x1 : window.x2]
        normalise(part, recipe, array[:, : part.shape[0], : part.shape[1]])
        yield window, array


def _turned(pixels: Array) -> Pixels:
    """BGR to RGB or back, without a copy."""
    turned: Pixels = pixels[:, :, ::-1]
    return turned
