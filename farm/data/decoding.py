"""What keeps an image file from becoming pixels, in one sentence whichever decoder says so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from farm.errors import DataError

#: What a picture may grow to: a sliver of 65500 x 1 would become 16 million pixels wide before its crop.
#: Twice Pillow's own warning limit, which is where it refuses to decode.
MOST_PIXELS = 178_956_970

#: Those Pillow reads by itself, without an external program.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM")

Source = Path | BinaryIO


class UnusableImage(DataError):
    """An image that does not become an array; `problem` is the sentence without the path."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.problem = problem

    def __str__(self) -> str:
        path, problem = self.args
        return f"{path}: {problem}"


def unusable(source: Source, problem: str) -> UnusableImage:
    name = source if isinstance(source, Path) else getattr(source, "name", "image")
    # One printable line, whatever a decoder says: it goes into the manifest.
    printable = "".join(character if character.isprintable() else " " for character in problem)
    return UnusableImage(str(name), " ".join(printable.split()))


@contextmanager
def decoding(source: Source) -> Iterator[None]:
    """Raise whatever comes from inside as an `UnusableImage`.

    A decoder fed with noise may raise anything, and whatever it is, the image is what cannot be used.
    """
    try:
        yield
    except UnusableImage:
        raise
    except Exception as exc:
        raise unusable(source, _why(source, exc)) from exc


def _why(source: Source, exc: Exception) -> str:
    """In words that depend neither on where the file lies nor, if it can be helped, on Pillow's version."""
    if isinstance(exc, UnidentifiedImageError):
        size = source.stat().st_size if isinstance(source, Path) else source.seek(0, os.SEEK_END)
        if size == 0:
            return "is empty (0 bytes), expected an image"
        return f"is not an image ({size} bytes), expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    if isinstance(exc, Image.DecompressionBombError):
        return f"has too many pixels, expected at most {MOST_PIXELS}"
    if isinstance(exc, OSError) and exc.strerror:
        return f"cannot be read: {exc.strerror}"
    return f"does not decode: {exc or type(exc).__name__}"
