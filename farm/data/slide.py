"""
How an image becomes windows: sizes, places and the published names of their bins. Knows no pixels.

Sizes are (height, width). Windows are `CROP` high and wide, `STRIDE` apart, the last of a row or column pushed back
inside. A picture longer than four times its shorter side is lower (or narrower) than a window after resizing: its
windows end with the picture, and their bins are filled up at the bottom and on the right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from farm.errors import DataError

CROP = 512
STRIDE = 384

#: What an image is resized to: the shorter side to `SHORT`, unless the longer one would then exceed `LONG`.
SHORT, LONG = 512, 2048

_NUMBER = "(0|[1-9][0-9]{0,8})"
_NAME = re.compile(rf"(.+)-{','.join([_NUMBER] * 4)}-{_NUMBER},{_NUMBER},3-1,{_NUMBER},{_NUMBER}\.bin", re.DOTALL)


class Size(NamedTuple):
    """Of a picture, in pixels."""

    height: int
    width: int


class Window(NamedTuple):
    """A part of the resized picture: columns x1 to x2, rows y1 to y2, the ends left out."""

    x1: int
    y1: int
    x2: int
    y2: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowName:
    """What the name of a window's bin says."""

    stem: str  #: of the image
    window: Window
    original: Size
    resized: Size


def resized(original: Size) -> Size:
    """What an image of this size is resized to; a side may come to 0, of an image that is hardly more than a line."""
    scale = min(LONG / max(original), SHORT / min(original))
    return Size(int(original.height * scale + 0.5), int(original.width * scale + 0.5))


def windows(resized: Size) -> tuple[Window, ...]:
    """The windows of a resized picture, row by row."""
    return tuple(
        Window(x1, y1, x2, y2) for y1, y2 in _intervals(resized.height) for x1, x2 in _intervals(resized.width)
    )


def bin_name(stem: str, window: Window, original: Size, resized: Size) -> str:
    """The published file name: ``stem-x1,y1,x2,y2-H,W,3-1,h,w.bin``."""
    return (
        f"{stem}-{','.join(map(str, window))}-{original.height},{original.width},3-1,{resized.height},{resized.width}"
        ".bin"
    )


def parse_name(name: str) -> WindowName:
    """What `bin_name` was told; `DataError` for any other name. The stem may hold anything, "-" too."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name!r} is no window's name, expected one like a-0,0,512,512-512,683,3-1,512,683.bin")
    stem, *numbers = match.groups()
    x1, y1, x2, y2, *sizes = map(int, numbers)
    return WindowName(stem=stem, window=Window(x1, y1, x2, y2), original=Size(*sizes[:2]), resized=Size(*sizes[2:]))


def _intervals(length: int) -> list[tuple[int, int]]:
    count = max(length - CROP + STRIDE - 1, 0) // STRIDE + 1
    ends = [min(STRIDE * index + CROP, length) for index in range(count)]
    return [(max(end - CROP, 0), end) for end in ends]
