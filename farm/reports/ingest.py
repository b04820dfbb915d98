"""
A folder of results that ais_bench or a script of its kind wrote, scored with the farm's metrics.

Results and samples are matched by name. Each sample must have its results exactly once: what lacks, is doubled, or
belongs to nobody is named. Nothing is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from farm import zoo
from farm.data import ade20k, imagenet, manifest, slide
from farm.data.slide import Size
from farm.digest import answers_digest
from farm.errors import DataError, UsageError
from farm.metrics import miou, slide_merge, topk
from farm.reports.outputs import summary_of
from farm.reports.report import SCHEMA, Report, classified, segmented
from farm.settings import Settings
from farm.zoo.spec import ModelSpec

SUFFIXES = {"TXT": ".txt", "BIN": ".bin", "NPY": ".npy"}
_RESULT = re.compile(r"(.+)_0\.[a-z]+", re.IGNORECASE | re.DOTALL)

_UNKNOWN = Size(0, 0)

Scores = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A sample whose results should be there."""

    name: str
    stems: tuple[str, ...]  #: of its bins
    label: int = 0
    annotation: Path | None = None  #: of segmentation
    original: Size = _UNKNOWN
    resized: Size = _UNKNOWN
    problem: str = ""  #: why it has no bin


@dataclass(kw_only=True)
class _Found:
    """What the samples came to."""

    answers: dict[str, str] = field(default_factory=dict)  #: for the digest
    ranks: list[int] = field(default_factory=list)
    areas: list[NDArray[np.int64]] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)  #: samples, and why


def ingest(
    settings: Settings, model: str, folder: Path, *, outfmt: str | None = None, truth: Path | None = None
) -> Report:
    """
    Metrics of the samples whose results are there, and what is wrong with the others.

    The samples are those prepared for the model, or those that `truth` has, a file of labels or a folder of
    annotations. `DataError` when nothing in the folder is a sample's.
    """
    spec = zoo.get(model)
    wanted = list(_wanted(spec, settings.data_dir, truth))
    form, files, strangers = _files(folder, outfmt)
    owners = {stem: sample.name for sample in wanted for stem in sample.stems}
    # Names up to the first dot are those of Python's tools, whole ones those of C++'s.
    short: dict[str, list[str]] = {}
    for stem in owners:
        short.setdefault(stem.partition(".")[0], []).append(stem)
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        named = _stem(path)
        stems = [named] if named in owners else short.get(named.partition(".")[0], [])
        if len(stems) > 1:
            raise DataError(f"{path} may be of {' or '.join(stems[:2])}, for published names end at the first dot")
        if not stems:
            strangers.append(path)
        for stem in stems:
            by_stem.setdefault(stem, []).append(path)
    if not by_stem:
        raise DataError(
            f"none of the {SUFFIXES[form]} files in {folder} has the name of a sample's results, "
            f"expected {next(iter(owners), 'NAME').partition('.')[0]}_0{SUFFIXES[form]} and {len(owners) - 1} others"
        )
    shapes = [output.shape for output in spec.heads.values()] or [spec.output.shape]
    score = _classify if spec.dataset == "imagenet" else _segment
    found = _Found()
    for sample in wanted:
        try:
            if not sample.stems:
                raise DataError(f"was not prepared: {sample.problem}")
            score(shapes, sample, found, [_only(by_stem.get(stem, []), stem, sample) for stem in sample.stems])
        except DataError as exc:
            found.lacking[sample.name] = str(exc)
    nothing = np.zeros((3, miou.CLASSES), np.int64)
    metrics = classified(found.ranks) if spec.dataset == "imagenet" else segmented(sum(found.areas, nothing))
    return {
        "schema": SCHEMA,
        "model": spec.name,
        "folder": str(folder),
        "format": form,
        "simulated": _is_simulated(folder),
        "labels": str(truth or "prepared"),
        "partial": bool(found.lacking),
        "samples": {"total": len(wanted), "scored": len(found.answers), "lacking": len(found.lacking)},
        "lacking": [{"name": name, "reason": reason} for name, reason in found.lacking.items()],
        "strangers": sorted(str(path.relative_to(folder)) for path in strangers),
        "ties": found.ties,
        **metrics,
        "digest": answers_digest((sample.name, found.answers.get(sample.name)) for sample in wanted),
    }


# -- what should be there --------------------------------------------------------------------------------------------


def _wanted(spec: ModelSpec, data_dir: Path, truth: Path | None) -> Iterator[Wanted]:
    if spec.dataset == "imagenet" and truth is not None:
        for name, label in sorted(imagenet.read_labels(truth).items(), key=lambda item: item[0].encode()):
            yield Wanted(name=name, stems=(name,), label=label)
    elif truth is not None:
        for name, path in ade20k.find_annotations(truth).items():
            height, width = ade20k.read_annotation(path).shape
            yield _image(name, path, Size(height, width), slide.resized(Size(height, width)))
    else:
        yield from _prepared(spec, data_dir)


def _prepared(spec: ModelSpec, data_dir: Path) -> Iterator[Wanted]:
    """The manifest's samples; whichever input the model takes, they are the same."""
    directories = [manifest.bins_dir(data_dir, spec.recipe, dtype) for dtype in ("float32", "uint8")]
    directory = next((each for each in directories if (each / manifest.FILE_NAME).exists()), directories[0])
    try:
        data = manifest.read(directory)
    except DataError as exc:
        option = "--labels val_label.txt" if spec.dataset == "imagenet" else "--annotations DIR"
        raise UsageError(f"{exc}, or say {option}") from exc
    for sample in data.samples:
        windows = sample.windows
        if windows is not None:
            path = manifest.annotation_path(directory, sample.name)
            yield _image(sample.name, path, windows.original, windows.resized)
        else:
            stems = (sample.name,) if spec.dataset == "imagenet" else ()
            yield Wanted(name=sample.name, stems=stems, label=sample.label, problem=sample.problem)


def _image(name: str, annotation: Path, original: Size, resized: Size) -> Wanted:
    stems = tuple(
        slide.bin_name(name, window, original, resized).removesuffix(".bin") for window in slide.windows(resized)
    )
    return Wanted(name=name, stems=stems, annotation=annotation, original=original, resized=resized)


# -- what is there ---------------------------------------------------------------------------------------------------


def _files(folder: Path, outfmt: str | None) -> tuple[str, list[Path], list[Path]]:
    """The format, the files that are called as results are, and the others of that format."""
    if outfmt is not None and outfmt not in SUFFIXES:
        raise UsageError(f"--outfmt {outfmt}: expected {', '.join(SUFFIXES)}")
    try:
        # With several devices the tool makes a folder for each.
        folders = [folder, *sorted(path for path in folder.glob("device*_*") if path.is_dir())]
        entries = [path for each in folders for path in sorted(each.iterdir()) if path.is_file()]
    except OSError as exc:
        raise UsageError(f"cannot read the results in {folder}: {exc.strerror}") from exc
    there = {
        form: [path for path in entries if path.suffix.lower() == suffix and not path.name.startswith(".")]
        for form, suffix in SUFFIXES.items()
    }
    forms = [outfmt] if outfmt else [form for form, paths in there.items() if paths]
    if len(forms) > 1:
        raise UsageError(f"{folder} holds results as {' and '.join(forms)}: choose with --outfmt")
    if not forms or not there[forms[0]]:
        wanted = SUFFIXES[outfmt] if outfmt else ", ".join(SUFFIXES.values())
        raise UsageError(f"no results in {folder}, expected files *_0 with the suffix {wanted}")
    paths = there[forms[0]]
    return (
        forms[0],
        [path for path in paths if _RESULT.fullmatch(path.name)],
        [path for path in paths if not _RESULT.fullmatch(path.name)],
    )


def _stem(path: Path) -> str:
    match = _RESULT.fullmatch(path.name)
    assert match is not None
    return match[1]


def _only(paths: list[Path], stem: str, sample: Wanted) -> Path:
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise DataError(f"is there {len(paths)} times: {paths[0]} and {paths[1]}")
    window = "" if stem == sample.name else f" of its window {stem.removeprefix(f'{sample.name}-')}"
    raise DataError(f"has no results{window}" + (f"; it was not prepared: {sample.problem}" if sample.problem else ""))


def _is_simulated(folder: Path) -> bool:
    """Whether the summary beside the folder, if it is the farm's, says so."""
    try:
        return bool(json.loads(summary_of(folder).read_bytes()).get("simulated"))
    except (OSError, ValueError, AttributeError):
        return False


def read(path: Path, shapes: Iterable[tuple[int, ...]]) -> Scores:
    """One file's values in whichever of the shapes they fill. `DataError` says why they cannot be used."""
    suffix = path.suffix.lower()
    try:
        if suffix == SUFFIXES["TXT"]:
            with path.open() as file:
                values = np.concatenate(
                    [np.array(line.split(), np.float32) for line in file] or [np.zeros(0, np.float32)]
                )
        elif suffix == SUFFIXES["BIN"]:
            values = np.frombuffer(path.read_bytes(), "<f4")
        else:
            values = np.load(path, allow_pickle=False).ravel()
    except OSError as exc:
        raise DataError(f"{exc.strerror}: {path}") from exc
    except (ValueError, EOFError) as exc:  # UnicodeDecodeError is one
        raise DataError(f"{path} does not hold numbers as {suffix.removeprefix('.').upper()}: {exc}") from exc
    shape = next((shape for shape in shapes if prod(shape) == values.size), None)
    if shape is None or values.dtype.kind not in "fiu":
        expected = " or ".join(str(prod(shape)) for shape in shapes)
        raise DataError(f"{path} has {values.size} values, expected {expected}")
    found: Scores = values.astype(np.float32, copy=False).reshape(shape)
    return found


# -- what it is worth ------------------------------------------------------------------------------------------------


def _classify(shapes: Iterable[tuple[int, ...]], sample: Wanted, found: _Found, paths: list[Path]) -> None:
    scores = _finite(read(paths[0], shapes))[np.newaxis]
    classes, _ = topk.best(scores)
    # A sixth that equals the fifth could as well be among the five.
    leading = np.sort(scores[0])[-topk.K - 1 :]
    if (leading[1:] == leading[:-1]).any():
        found.ties.append(sample.name)
    found.ranks.append(int(topk.ranks(scores, [sample.label])[0]))
    found.answers[sample.name] = ",".join(map(str, classes[0]))


def _segment(shapes: Iterable[tuple[int, ...]], sample: Wanted, found: _Found, paths: list[Path]) -> None:
    assert sample.annotation is not None
    label_map = _merged(shapes, sample, paths)
    annotation = ade20k.read_annotation(sample.annotation)
    if annotation.shape != label_map.shape:
        raise DataError(f"{sample.annotation} is of {annotation.shape}, expected {label_map.shape} like the image")
    found.areas.append(miou.areas(label_map, annotation))
    found.answers[sample.name] = hashlib.sha256(label_map.data).hexdigest()


def _merged(shapes: Iterable[tuple[int, ...]], sample: Wanted, paths: list[Path]) -> NDArray[np.uint8]:
    """The image's label map; a window's logits are read when it is its turn."""
    image: slide_merge.ImageMerge | None = None
    for path in paths:
        logits = _finite(read(path, shapes))
        if image is None:
            image, shapes = slide_merge.ImageMerge(sample.original, sample.resized, logits.shape[-1]), [logits.shape]
        image.add(logits)
    assert image is not None
    return image.label_map


def _finite(scores: Scores) -> Scores:
    if not np.isfinite(scores).all():
        raise DataError("its scores are not finite numbers")
    return scores
