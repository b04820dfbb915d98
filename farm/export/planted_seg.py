"""
`planted`, for segmentation: annotations whose mIoU, aAcc and mAcc are known before anything runs.

`planted.seeded_weights` -> `reference_scores` -> `centre_head` -> `plant` -> `expected`. Preparation, windows, merge
and metrics are lines of this module's own, written after the published scripts and not after the farm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from farm import nets
from farm.export.planted import LEAD, evening_shift
from farm.zoo.spec import ModelSpec

Labels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]

WINDOW, STRIDE = 512, 384  #: pixels
SHORT_SIDE, LONG_SIDE = 512, 2048
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

BIAS = "decode_head.conv_seg.bias"
MOST = 0.2  #: share of the probed pixels that one class may have; of all pixels it is a little more or less
PROBE = 16  #: pixels from one probed pixel to the next, either way

CELLS = 6  #: rows and columns of rectangles that an annotation is divided into
WRONG, UNLABELLED, IGNORED = 6, 2, 2  #: of the CELLS * CELLS rectangles of an annotation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What the network answers to the windows of a picture."""

    original: tuple[int, int]  #: height, width
    resized: tuple[int, int]
    windows: Tensor  #: the small head's scores, float32 [n, classes, 128, 128]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Centred:
    """Weights whose answers are spread over the classes, and what they answer."""

    state: Mapping[str, Tensor]  #: a state dict; it differs from the one given in the last bias only
    pictures: Sequence[Scored]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Planted:
    """A picture's right answer, and the annotation that it is measured against."""

    label_map: Labels  #: [H, W], classes from 0
    annotation: Labels  #: [H, W], as ADE20K has them: classes from 1, 0 and 255 count nowhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What anyone who evaluates the same pictures must find, in percent."""

    miou: float
    aacc: float
    macc: float
    favourite_share: float  #: of all pixels have the commonest answer; 0 to 1


def reference_scores(
    images: Sequence[Path], spec: ModelSpec, state: Mapping[str, Tensor], *, progress: Progress | None = None
) -> list[Scored]:
    """
    What the network answers to pictures of at most four times their shorter side, window by window, on all cores.

    `progress` is told how many images of how many are done.
    """
    net = nets.build(spec, "small")
    net.load_state_dict(dict(state))
    pictures = []
    with torch.inference_mode():
        for done, path in enumerate(images, start=1):
            picture, original = prepare(path)
            answers = [net(window[None])[0] for window in cut(picture)]
            height, width = picture.shape[1:]
            pictures.append(Scored(original=original, resized=(height, width), windows=torch.stack(answers)))
            if progress:
                progress(done, len(images))
    return pictures


def prepare(path: Path) -> tuple[Tensor, tuple[int, int]]:
    """A picture by the recipe of the deployment, float32 [3, h, w], and its original height and width."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert bgr is not None, f"{path} is no picture"
    height, width = bgr.shape[:2]
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    rgb = cv2.cvtColor(cv2.resize(bgr, size, interpolation=cv2.INTER_LINEAR), cv2.COLOR_BGR2RGB)
    centred = rgb.astype(np.float32) - np.array(MEAN, np.float32)
    # The published scripts multiply by a reciprocal in float64, of constants in float32.
    scaled = centred.astype(np.float64) * (1 / np.array(STD, np.float32).astype(np.float64))
    return torch.from_numpy(scaled.astype(np.float32).transpose(2, 0, 1).copy()), (height, width)


def cut(picture: Tensor) -> Iterator[Tensor]:
    """The windows of a picture [3, h, w], row by row, each [3, 512, 512]."""
    for top, left in corners((picture.shape[1], picture.shape[2])):
        yield picture[:, top : top + WINDOW, left : left + WINDOW]


def corners(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Top and left of each window of a picture of this height and width."""
    height, width = size
    return list(product(_starts(height), _starts(width)))


def centre_head(state: Mapping[str, Tensor], pictures: Sequence[Scored]) -> Centred:
    """
    Shift the bias of the last layer until no class is the answer to more than `MOST` of the pixels, probed coarsely.

    All that comes after that layer takes means, with weights that sum to 1: the bias goes through it as it is.
    """
    probed = [merge(picture)[:, ::PROBE, ::PROBE].flatten(1).T for picture in pictures]
    shift = torch.from_numpy(evening_shift(torch.cat(probed).numpy(), MOST))
    bias = state[BIAS]
    shifted = (bias.to(torch.float64) - shift).to(bias.dtype)
    moved = (shifted.to(torch.float64) - bias.to(torch.float64)).to(torch.float32)[:, None, None]
    centred = [Scored(original=p.original, resized=p.resized, windows=p.windows + moved) for p in pictures]
    return Centred(state={**state, BIAS: shifted}, pictures=centred)


def merge(picture: Scored) -> Tensor:
    """The scores of a picture's pixels, float32 [classes, H, W]: summed on a canvas, divided, resized."""
    classes = picture.windows.shape[1]
    total, times = torch.zeros(classes, *picture.resized), torch.zeros(picture.resized)
    for (top, left), scores in zip(corners(picture.resized), picture.windows, strict=True):
        rows, columns = slice(top, top + WINDOW), slice(left, left + WINDOW)
        total[:, rows, columns] += _resize(scores, (WINDOW, WINDOW))
        times[rows, columns] += 1
    return _resize(total / times, picture.original)


def plant(pictures: Iterable[Scored], seed: int) -> Iterator[Planted]:
    """
    Annotations: each picture's answer, but for some rectangles of wrong classes and some that count nowhere.

    Nor do pixels whose two best scores are closer than `LEAD`: devices round differently.
    """
    generator = np.random.default_rng(seed)
    for picture in pictures:
        scores = merge(picture)
        best = scores.topk(2, dim=0).values
        label_map = scores.argmax(dim=0).numpy().astype(np.uint8)
        annotation = annotate(label_map, len(scores), generator)
        annotation[(best[0] - best[1] < LEAD).numpy()] = 0
        yield Planted(label_map=label_map, annotation=annotation)


def annotate(label_map: Labels, classes: int, generator: np.random.Generator) -> Labels:
    """A label map [H, W] as an annotation in which `WRONG` of 36 rectangles have other classes, and some have none."""
    annotation = label_map + np.uint8(1)
    order = generator.permutation(CELLS * CELLS)
    for place in order[:WRONG]:
        cell = _cell(label_map.shape, int(place))
        other = (label_map[cell].astype(np.int64) + generator.integers(1, classes)) % classes
        annotation[cell] = other + 1
    for place in order[WRONG : WRONG + UNLABELLED]:
        annotation[_cell(label_map.shape, int(place))] = 0
    for place in order[WRONG + UNLABELLED : WRONG + UNLABELLED + IGNORED]:
        annotation[_cell(label_map.shape, int(place))] = 255
    return annotation


def expected(planted: Iterable[Planted], classes: int) -> Expected:
    """Counted class by class, over the pixels of all pictures."""
    pairs = [(each.label_map.ravel(), each.annotation.ravel()) for each in planted]
    answers, annotations = (np.concatenate(parts).astype(np.int64) for parts in zip(*pairs, strict=True))
    favourite_share = float(np.bincount(answers).max()) / len(answers)
    known = (annotations != 0) & (annotations != 255)
    answer, truth = answers[known], annotations[known] - 1
    iou, acc = [], []
    for each in range(classes):
        answered, true = answer == each, truth == each
        both, either = int((answered & true).sum()), int((answered | true).sum())
        # A class that no pixel speaks of has no part in a mean.
        iou += [both / either] if either else []
        acc += [both / int(true.sum())] if true.any() else []
    return Expected(
        miou=100 * float(np.mean(iou)),
        aacc=100 * float((answer == truth).mean()),
        macc=100 * float(np.mean(acc)),
        favourite_share=favourite_share,
    )


def _starts(length: int) -> list[int]:
    """Where windows start on an axis: a stride apart, until one reaches the end, moved back to end there."""
    starts = [0]
    while starts[-1] + WINDOW < length:
        starts.append(min(starts[-1] + STRIDE, length - WINDOW))
    return starts


def _resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """[classes, h, w] to [classes, *size]."""
    return interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]


def _cell(shape: tuple[int, ...], place: int) -> tuple[slice, slice]:
    """One of the rectangles of a map of this shape, counted row by row."""
    row, column = divmod(place, CELLS)
    height, width = shape
    return (
        slice(row * height // CELLS, (row + 1) * height // CELLS),
        slice(column * width // CELLS, (column + 1) * width // CELLS),
    )
