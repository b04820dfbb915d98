"""
The manifest: which samples there are, in which order, with which label and which bytes.

One text file beside the bins. First line: a JSON header. Then one line a sample, in byte order of the name:
``name<TAB>label<TAB>xxh3`` where xxh3 is the 64-bit XXH3 of the bin in 16 hex digits; for an image that could
not be prepared it is ``!`` and a fourth field says why, so that the sample is counted as failed, not forgotten.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from farm.data import disk
from farm.errors import DataError

FILE_NAME = "manifest"
VERSION = 1
UNPREPARED = "!"

#: A name becomes a file name and a field of a line, hence no slash and no control characters.
_NAME = r"[^/\x00-\x1f\x7f]+"
_LABEL = r"0|[1-9][0-9]{0,8}"
_LINE = re.compile(rf"({_NAME})\t({_LABEL})\t(?:([0-9a-f]{{16}})|{UNPREPARED}\t([^\x00-\x1f\x7f]+))")

_AGAIN = "Run farm prepare again; finished bins are kept."


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing to evaluate, known by its name alone."""

    name: str  #: the image's file name up to its first dot
    label: int
    xxh3: str  #: of the bin, 16 hex digits, or `UNPREPARED`
    problem: str = ""  #: why it could not be prepared

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


def bin_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def is_name(text: str) -> bool:
    """Whether a sample can be called so."""
    return re.fullmatch(_NAME, text) is not None and _is_utf8(text)


def write(directory: Path, header: Header, samples: Iterable[Sample]) -> Manifest:
    """Replace the manifest, whole or not at all.

    `DataError` for a sample that `read` would not take back, `StorageError` when the disk refuses.
    """
    manifest = Manifest(header, tuple(sorted(samples, key=lambda s: s.name.encode(errors="surrogatepass"))))
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
    """`DataError` for a sample that does not fit into a line or among the others."""
    before = ""
    for number, sample in enumerate(manifest.samples, start=2):
        if not _LINE.fullmatch(sample.line()[:-1]) or not _is_utf8(sample.line()):
            raise DataError(f"line {number}: {sample} does not fit into a manifest")
        if sample.label >= manifest.header.classes:
            raise DataError(
                f"line {number}: sample {sample.name} has label {sample.label}, expected 0 to "
                f"{manifest.header.classes - 1}"
            )
        if number > 2 and sample.name.encode() <= before.encode():
            raise DataError(
                f"line {number}: sample {sample.name} comes after {before}, expected ascending names, each once"
            )
        before = sample.name


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
