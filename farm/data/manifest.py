"""
The manifest: which samples there are, in which order, with which label and which bytes.

One text file beside the bins. First line: a JSON header. Then one line a sample, in byte order of the name:
``name<TAB>label<TAB>xxh3`` where xxh3 is the 64-bit XXH3 of the bin in 16 hex digits; for an image that could
not be prepared it is ``!`` and a fourth field says why, so that the sample is counted as failed, not forgotten.

A sample of segmentation is an image, not a window. It has label 0, for its labels are in its annotation, and for xxh3
``H,W/h,w/ANNOTATION/XXH3,XXH3``: the image's size, the resized one's, the annotation's hash, and a hash for each of the
windows that `farm.data.slide` cuts out of h x w, row by row.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from farm.data import disk, slide
from farm.data.slide import Size
from farm.errors import DataError

FILE_NAME = "manifest"
VERSION = 1
UNPREPARED = "!"
#: `Header.source` of samples that are of nothing: see `farm.data.made_up`.
MADE_UP = "made up"

#: A name becomes a file name and a field of a line, hence no slash and no control characters.
_NAME = r"[^/\x00-\x1f\x7f]+"
_LABEL = r"0|[1-9][0-9]{0,8}"
_HASH = "[0-9a-f]{16}"
_SIDE = "[1-9][0-9]{0,8}"
_SMALL_SIDE = "[1-9][0-9]{0,3}"  #: its windows can be counted
_WINDOWS = rf"{_SIDE},{_SIDE}/{_SMALL_SIDE},{_SMALL_SIDE}/{_HASH}/{_HASH}(?:,{_HASH})*"
_PREPARED = re.compile(f"{_HASH}|{_WINDOWS}")
_LINE = re.compile(rf"({_NAME})\t({_LABEL})\t(?:({_PREPARED.pattern})|{UNPREPARED}\t([^\x00-\x1f\x7f]+))")

_AGAIN = "Run farm prepare again; finished bins are kept."


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A segmentation sample's sizes and hashes; as a string, what stands in its line."""

    original: Size  #: of the image, and of its annotation
    resized: Size  #: of what was cut into windows
    annotation: str  #: xxh3
    xxh3: tuple[str, ...]  #: of each window's bin, row by row

    @classmethod
    def parse(cls, text: str) -> Windows:
        original, resized, annotation, hashes = text.split("/")
        return cls(
            original=_parse_size(original),
            resized=_parse_size(resized),
            annotation=annotation,
            xxh3=tuple(hashes.split(",")),
        )

    def __str__(self) -> str:
        return "/".join((_size(self.original), _size(self.resized), self.annotation, ",".join(self.xxh3)))


class Sample(NamedTuple):
    """One thing to evaluate, known by its name alone. A tuple: every worker makes a whole set of them for a job."""

    name: str  #: the image's file name up to its first dot
    label: int  #: 0 where labels are in an annotation
    xxh3: str  #: of the bin, 16 hex digits; or `Windows` as a string; or `UNPREPARED`
    problem: str = ""  #: why it could not be prepared

    @property
    def windows(self) -> Windows | None:
        """Of a prepared image of segmentation."""
        return Windows.parse(self.xxh3) if "/" in self.xxh3 else None

    @property
    def parts(self) -> int:
        """How many bins it has; of a sample that could not be prepared 1, which is missing."""
        windows = self.windows
        return len(windows.xxh3) if windows else 1

    def line(self) -> str:
        fields = [self.name, str(self.label), self.xxh3]
        return "\t".join([*fields, self.problem] if self.problem else fields) + "\n"


class Header(BaseModel):
    """What all samples of a manifest share."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    recipe: str
    recipe_digest: str
    dtype: str
    shape: tuple[int, ...]  #: of one sample
    classes: int
    source: str = ""  #: where the images were


@dataclass(frozen=True)
class Manifest:
    """The samples of one prepared dataset, in byte order of their names."""

    header: Header
    samples: Sequence[Sample]

    @cached_property
    def digest(self) -> str:
        """sha256 over the recipe digest and each sample's name, label and hash: equal digests, equal inputs and labels.

        Why a sample could not be prepared is left out: hosts may word it differently and have the same inputs.
        """
        digest = hashlib.sha256(self.header.recipe_digest.encode() + b"\n")
        for sample in self.samples:
            digest.update(f"{sample.name}\t{sample.label}\t{sample.xxh3}\n".encode())
        return digest.hexdigest()


def bins_dir(data_dir: Path, recipe: str, dtype: str = "float32") -> Path:
    return data_dir / "bins" / f"{recipe}-{dtype}"


def bin_file(name: str) -> str:
    return f"{name}.bin"


def bin_path(directory: Path, name: str) -> Path:
    return directory / bin_file(name)


def annotation_path(directory: Path, name: str) -> Path:
    return directory / "annotations" / f"{name}.png"


def window_paths(directory: Path, name: str, windows: Windows) -> tuple[Path, ...]:
    """The bins of an image's windows, row by row, in the order of their hashes."""
    original, resized = windows.original, windows.resized
    return tuple(
        directory / slide.bin_name(name, window, original, resized) for window in slide.windows(windows.resized)
    )


def paths(directory: Path, name: str, xxh3: str) -> tuple[Path, ...]:
    """All files of a prepared sample: its bin; or its windows' bins, and its annotation last."""
    if windows := Sample(name, 0, xxh3).windows:
        return (*window_paths(directory, name, windows), annotation_path(directory, name))
    return (bin_path(directory, name),)


def is_name(text: str) -> bool:
    """Whether a sample can be called so."""
    return re.fullmatch(_NAME, text) is not None and _is_utf8(text)


def is_prepared(xxh3: str) -> bool:
    """Whether a sample's `xxh3` says what its files hold."""
    return _PREPARED.fullmatch(xxh3) is not None


def write(directory: Path, header: Header, samples: Iterable[Sample]) -> Manifest:
    """Replace the manifest, whole or not at all.

    `DataError` for a sample that `read` would not take back, `StorageError` when the disk refuses.
    """
    manifest = Manifest(header, tuple(sorted(samples, key=lambda s: s.name.encode(errors="surrogatepass"))))
    for number, sample in enumerate(manifest.samples, start=2):
        if not _LINE.fullmatch(sample.line()[:-1]) or not _is_utf8(sample.line()):
            raise DataError(f"line {number}: {sample} does not fit into a manifest")
    _check(manifest)
    text = header.model_dump_json() + "\n" + "".join(sample.line() for sample in manifest.samples)
    path = directory / FILE_NAME
    disk.replace(path, text.encode(), partial=path.with_suffix(".tmp"), durable=True)
    return manifest


def read(directory: Path) -> Manifest:
    """`DataError` names the line for anything that is not as `write` leaves it."""
    path = directory / FILE_NAME
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError as exc:
        raise DataError(f"no prepared data in {directory}: run farm prepare first") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"cannot read {path}: {exc}. {_AGAIN}") from exc
    first, *lines = text.split("\n")
    header = _read_header(path, first)
    if not lines or lines.pop() != "":
        raise DataError(f"{path} ends in the middle of a line. {_AGAIN}")
    manifest = Manifest(header, tuple(_read_sample(path, number, line) for number, line in enumerate(lines, start=2)))
    try:
        _check(manifest)
    except DataError as exc:
        raise DataError(f"{path}: {exc}. {_AGAIN}") from exc
    return manifest


class Frozen:
    """The samples of a manifest that was found good before, by its bytes: each is made when it is asked for."""

    def __init__(self, text: bytes) -> None:
        """`text` is all after the header's line."""
        self._text = text
        self._ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))

    def samples(self, start: int, stop: int) -> list[Sample]:
        """Those from one index to before another, in the manifest's order."""
        first = int(self._ends[start - 1]) + 1 if start else 0
        lines = (
            self._text[first : int(self._ends[stop - 1])].decode(errors="replace").split("\n") if stop > start else []
        )
        return [_sample_of(line) for line in lines]


def frozen(directory: Path, digest: str) -> Frozen | None:
    """
    The samples of the manifest with this digest; None if it is another one.

    So much quicker than `read`, and so much smaller, that every worker can do it when a job begins: what has the digest
    of a manifest that was read needs no second look. `DataError` where there is none.
    """
    path = directory / FILE_NAME
    try:
        first, _, text = path.read_bytes().partition(b"\n")
        header = first.decode()
    except FileNotFoundError as exc:
        raise DataError(f"no prepared data in {directory}: run farm prepare first") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"cannot read {path}: {exc}. {_AGAIN}") from exc
    mark = f"\t{UNPREPARED}\t".encode()
    told = text
    if mark in text:
        lines = text.split(b"\n")
        told = b"\n".join(line.rpartition(mark)[0] + mark[:-1] if mark in line else line for line in lines)
    found = hashlib.sha256(_read_header(path, header).recipe_digest.encode() + b"\n")
    found.update(told)
    return Frozen(text) if found.hexdigest() == digest else None


def _sample_of(line: str) -> Sample:
    name, label, xxh3, *problem = line.split("\t")
    return Sample(name, int(label), xxh3, *problem)


def _read_header(path: Path, line: str) -> Header:
    try:
        fields = json.loads(line)
        # Before the other fields: a newer version may have renamed them.
        if isinstance(fields, dict) and isinstance(fields.get("version"), int) and fields["version"] > VERSION:
            raise DataError(
                f"{path} has version {fields['version']}, this farm knows up to {VERSION}: upgrade the farm"
            )
        return Header.model_validate(fields)
    except (ValueError, RecursionError, ValidationError) as exc:
        raise DataError(f"{path}: line 1 is no manifest header. {_AGAIN}") from exc


def _read_sample(path: Path, number: int, line: str) -> Sample:
    match = _LINE.fullmatch(line)
    if match is None:
        raise DataError(
            f"{path}: line {number} is {line[:80]!r}, expected name, label and xxh3 parted by tabs. {_AGAIN}"
        )
    name, label, xxh3, problem = match.groups()
    return Sample(name, int(label), xxh3 or UNPREPARED, problem or "")


def _check(manifest: Manifest) -> None:
    """`DataError` for a sample that does not fit among the others."""
    before = ""
    for number, sample in enumerate(manifest.samples, start=2):
        if sample.label >= manifest.header.classes:
            raise DataError(
                f"line {number}: sample {sample.name} has label {sample.label}, expected 0 to "
                f"{manifest.header.classes - 1}"
            )
        if (windows := sample.windows) and len(windows.xxh3) != len(slide.windows(windows.resized)):
            raise DataError(
                f"line {number}: sample {sample.name} has {len(windows.xxh3)} windows, expected "
                f"{len(slide.windows(windows.resized))} of {windows.resized.height} x {windows.resized.width} pixels"
            )
        if number > 2 and sample.name <= before:  # as their bytes in UTF-8, which are in the order of code points
            raise DataError(
                f"line {number}: sample {sample.name} comes after {before}, expected ascending names, each once"
            )
        before = sample.name


def _size(size: Size) -> str:
    return f"{size.height},{size.width}"


def _parse_size(text: str) -> Size:
    height, width = map(int, text.split(","))
    return Size(height, width)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
