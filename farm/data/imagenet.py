"""ILSVRC2012 validation data as its users have it: a flat folder of pictures, and a text file of labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from farm.data import manifest
from farm.errors import DataError, UsageError

CLASSES = 1000
EXTENSIONS = (".jpeg", ".jpg", ".png")  #: compared without regard to case
EXAMPLE = "ILSVRC2012_val_00000001.JPEG 65"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image file and the class it shows."""

    name: str  #: file name up to its first dot
    path: Path
    label: int  #: 0..999


def load(images: Path, labels: Path, *, subset: bool = False) -> list[Picture]:
    """All pictures with their labels, in byte order of the names.

    `DataError` if one of them lacks the other; with `subset` there may be more labels than images.
    """
    paths = find_images(images)
    known = read_labels(labels)
    unlabelled = sorted(paths.keys() - known.keys())
    missing = [] if subset else sorted(known.keys() - paths.keys())
    problems = []
    if unlabelled:
        problems.append(f"{len(unlabelled)} of {len(paths)} images in {images} have no label ({_some(unlabelled)})")
    if missing:
        problems.append(
            f"{len(missing)} of {len(known)} labels have no image in {images} ({_some(missing)}; --subset allows this)"
        )
    if problems:
        raise DataError(f"{labels} does not fit the images: {'; '.join(problems)}. Nothing was written")
    return [Picture(name=name, path=path, label=known[name]) for name, path in paths.items()]


def find_images(directory: Path) -> dict[str, Path]:
    """Image files of a folder by sample name, in byte order of the names.

    `UsageError` for a folder without images, `DataError` for two files of one name or a name that fits no manifest.
    """
    try:
        with os.scandir(directory) as entries:
            found = sorted(entry.name for entry in entries if _is_image(entry))
    except OSError as exc:
        raise UsageError(f"cannot read the images in {directory}: {exc.strerror}") from exc
    if not found:
        raise UsageError(_no_images(directory))
    paths: dict[str, Path] = {}
    for file_name in found:
        name = sample_name(file_name)
        if not manifest.is_name(name):
            raise DataError(f"{directory} holds {file_name!r}, whose name cannot be written down: rename it")
        if name in paths:
            raise DataError(
                f"{paths[name]} and {directory / file_name} are both called {name}, expected one image of a name"
            )
        paths[name] = directory / file_name
    return dict(sorted(paths.items(), key=lambda item: item[0].encode()))


def read_labels(path: Path) -> dict[str, int]:
    """Labels by sample name from lines ``file-name class``; `DataError` names the line that is not one."""
    labels: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2:
            raise _malformed(path, number, line, f"a file name and a class, like {EXAMPLE}")
        name, label = sample_name(fields[0]), _label(fields[1])
        if not name:
            raise _malformed(path, number, line, f"a file name and a class, like {EXAMPLE}")
        if label is None:
            hint = "; are these classes counted from 1?" if fields[1] == str(CLASSES) else ""
            raise _malformed(path, number, line, f"a class from 0 to {CLASSES - 1}{hint}")
        if labels.setdefault(name, label) != label:
            raise _malformed(path, number, line, f"class {labels[name]}, which an earlier line gives {name}")
    if not labels:
        raise DataError(f"{path} holds no labels, expected a line an image, like {EXAMPLE}")
    return labels


def sample_name(file_name: str) -> str:
    return file_name.partition(".")[0]


def _is_image(entry: os.DirEntry[str]) -> bool:
    # Hidden files are none: macOS leaves a `._x.JPEG` beside every x.JPEG it copies.
    return entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()


def _no_images(directory: Path) -> str:
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    inside = f"; it holds {len(folders)} folders ({_some(folders)})" if folders else ""
    return f"no images in {directory}{inside}, expected files {', '.join('*' + e for e in EXTENSIONS)} directly in it"


def _lines(path: Path) -> Iterable[str]:
    try:
        # utf-8-sig: an editor on Windows may have put a byte order mark in front.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as exc:
        raise UsageError(f"cannot read the labels in {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path} is not UTF-8 text (byte {exc.start}), expected lines like {EXAMPLE}") from exc


def _label(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        return None
    return int(text) if int(text) < CLASSES else None


def _malformed(path: Path, number: int, line: str, expected: str) -> DataError:
    return DataError(f"{path}: line {number} is {line[:80]!r}, expected {expected}")


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:3])
    return f"{first}, ..." if len(names) > 3 else first
