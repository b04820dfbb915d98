"""
The manifest: which samples there are, in which order, with which label and which bytes.

One text file beside the bins. First line: a JSON header. Then one line a sample, in byte order of the name:
``name<TAB>label<TAB>xxh3`` where xxh3 is the 64-bit XXH3 of the bin in 16 hex digits; for an image that could
not be prepared it is ``!`` and a fourth field says why, so that the sample is counted as failed, not forgotten.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from farm.errors import DataError

FILE_NAME = "manifest"
VERSION = 1
UNPREPARED = "!"


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
        """sha256 over recipe digest and sample lines: equal digests, equal inputs and labels."""
        digest = hashlib.sha256(self.header.recipe_digest.encode() + b"\n")
        for sample in self.samples:
            digest.update(sample.line().encode())
        return digest.hexdigest()


def bins_dir(data_dir: Path, recipe: str, dtype: str = "float32") -> Path:
    return data_dir / "bins" / f"{recipe}-{dtype}"


def bin_path(directory: Path, name: str) -> Path:
    return directory / f"{name}.bin"


def write(directory: Path, header: Header, samples: Iterable[Sample]) -> Manifest:
    """Replace the manifest, whole or not at all."""
    manifest = Manifest(header, sorted(samples, key=lambda s: s.name.encode()))
    partial = directory / (FILE_NAME + ".tmp")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(header.model_dump_json() + "\n")
        file.writelines(sample.line() for sample in manifest.samples)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, directory / FILE_NAME)
    return manifest


def read(directory: Path) -> Manifest:
    """`DataError` names the line for anything that is not as `write` leaves it."""
    path = directory / FILE_NAME
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            first = file.readline()
            lines = file.read().split("\n")
    except FileNotFoundError as exc:
        raise DataError(f"no prepared data in {directory}: run farm prepare first") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"cannot read {path}: {exc}. Run farm prepare again; finished bins are kept.") from exc
    try:
        header = Header.model_validate_json(first)
    except ValidationError as exc:
        raise DataError(f"{path}: line 1 is no manifest header. Run farm prepare again; finished bins are kept.") from exc
    if header.version > VERSION:
        raise DataError(f"{path} has version {header.version}, this farm knows up to {VERSION}: upgrade the farm")
    if lines.pop() != "":
        raise DataError(f"{path} ends in the middle of a line. Run farm prepare again; finished bins are kept.")
    samples = []
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        try:
            sample = Sample(fields[0], int(fields[1]), *fields[2:])
            if not sample.xxh3:
                raise ValueError
        except (IndexError, TypeError, ValueError) as exc:
            raise DataError(
                f"{path}: line {number} is {line[:80]!r}, expected name, label and xxh3 parted by tabs. "
                "Run farm prepare again; finished bins are kept."
            ) from exc
        samples.append(sample)
    return Manifest(header, samples)
