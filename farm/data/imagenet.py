"""
ILSVRC2012 validation data as its users have it.

Pictures lie in one folder and their labels in a text file; or each picture lies in the folder of its class, and the
1000 folders in the order of their names are the classes 0 to 999.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
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


def load(images: Path, labels: Path | None, *, subset: bool = False) -> list[Picture]:
    """All pictures with their labels, in byte order of the names. Without `labels` their folders are the classes.

    `DataError` if one of them lacks the other; with `subset` there may be more labels than images.
    """
    folders = class_folders(images)
    if labels is None:
        return _by_folder(images, folders)
    return pair(_inside(folders) if folders else find_images(images), images, labels, subset=subset)


def pair(paths: Mapping[str, Path], images: Path, labels: Path, *, subset: bool) -> list[Picture]:
    """Files by name, all from `images`, with their labels. `DataError` as `load` says."""
    known = read_labels(labels)
    unlabelled = sorted(paths.keys() - known.keys())
    missing = [] if subset else sorted(known.keys() - paths.keys())
    problems = []
    if unlabelled:
        problems.append(f"{len(unlabelled)} of {len(paths)} images in {images} have no label ({some(unlabelled)})")
    if missing:
        problems.append(
            f"{len(missing)} of {len(known)} labels have no image in {images} ({some(missing)}; --subset allows this)"
        )
    if problems:
        raise DataError(f"{labels} does not fit the images: {'; '.join(problems)}. Nothing was written")
    return [Picture(name=name, path=path, label=known[name]) for name, path in paths.items()]


def find_images(directory: Path) -> dict[str, Path]:
    """Image files of a folder by sample name, in byte order of the names.

    `UsageError` for a folder without images, `DataError` for two files of one name or a name that fits no manifest.
    """
    found = files(directory, EXTENSIONS, "images")
    if not found:
        raise UsageError(_no_images(directory))
    return by_name(found)


def class_folders(directory: Path) -> list[Path]:
    """The folders in a folder that holds no image itself, in the order of their names."""
    if files(directory, EXTENSIONS, "images"):
        return []
    return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def files(directory: Path, extensions: tuple[str, ...], what: str) -> list[Path]:
    """Files with one of these extensions, in the order of their names; `UsageError` for a folder that is none."""
    try:
        with os.scandir(directory) as entries:
            return sorted(Path(entry) for entry in entries if _is_one(entry, extensions))
    except OSError as exc:
        raise UsageError(f"cannot read the {what} in {directory}: {exc.strerror}") from exc


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Files by sample name, in byte order; `DataError` for two of one name, or a name that fits no manifest."""
    named: dict[str, Path] = {}
    for path in paths:
        name = sample_name(path.name)
        if not manifest.is_name(name):
            raise DataError(f"{path.parent} holds {path.name!r}, whose name cannot be written down: rename it")
        if name in named:
            raise DataError(f"{named[name]} and {path} are both called {name}, expected one file of a name")
        named[name] = path
    return dict(sorted(named.items(), key=lambda item: item[0].encode()))


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


def sample_name(path: str) -> str:
    """The last part of a path, up to its first dot."""
    return path.rpartition("/")[2].partition(".")[0]


def some(names: Collection[str]) -> str:
    """The first few, for a sentence."""
    first = ", ".join(list(names)[:3])
    return f"{first}, ..." if len(names) > 3 else first


def _by_folder(directory: Path, folders: Sequence[Path]) -> list[Picture]:
    if not folders:
        find_images(directory)
        raise UsageError(
            f"the images in {directory} lie in no class folders: give their labels with --labels val_label.txt"
        )
    if len(folders) != CLASSES:
        raise DataError(
            f"{directory} holds {len(folders)} folders ({some([folder.name for folder in folders])}), expected one for "
            f"each of {CLASSES} classes: with others a folder's rank is not its class. Give the labels with "
            "--labels val_label.txt"
        )
    classes = {folder: label for label, folder in enumerate(folders)}
    return [Picture(name=name, path=path, label=classes[path.parent]) for name, path in _inside(folders).items()]


def _inside(folders: Iterable[Path]) -> dict[str, Path]:
    """The images in class folders by name."""
    found = [path for folder in folders for path in files(folder, EXTENSIONS, "images")]
    if not found:
        raise UsageError(_no_images(next(iter(folders)).parent))
    return by_name(found)


def _is_one(entry: os.DirEntry[str], extensions: tuple[str, ...]) -> bool:
    # Hidden files are none: macOS leaves a `._x.JPEG` beside every x.JPEG it copies.
    return entry.name.lower().endswith(extensions) and not entry.name.startswith(".") and entry.is_file()


def _no_images(directory: Path) -> str:
    folders = sorted(path.name for path in directory.iterdir() if path.is_dir())
    inside = f"; it holds {len(folders)} folders ({some(folders)})" if folders else ""
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
