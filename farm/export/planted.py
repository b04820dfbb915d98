"""
A truth to test the farm against: seeded weights, and labels whose top-1 and top-5 are known before anything runs.

`seeded_weights` -> `reference_scores` -> `centre_head` -> `plant_labels`. The reference is PyTorch in eager mode on
images that are prepared here, by lines of its own: whatever the farm's preparation, export, devices or metrics do
wrong, it does not share.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from farm import nets
from farm.errors import FarmError
from farm.zoo.spec import ModelSpec

Scores = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

BATCH = 4  #: the stem's activations of more images do not fit a processor's caches
MOST = 0.1  #: share of the samples that may have the same class as their top-1
LEAD = 1e-3  #: least distance of a label's score to where it would count differently; devices differ by 5e-5

CROP = 224
SHORT_SIDE = {"lvvit": 248, "in256": 256}  #: by recipe
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Centred:
    """Weights whose answers are spread over the classes, and what they answer."""

    state: Mapping[str, Tensor]  #: a state dict; it differs from the one given in the class head's bias only
    scores: Scores  #: [n, classes]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Planted:
    """Labels, and what anyone who scores the same samples against them must find."""

    labels: npt.NDArray[np.int64]  #: [n], in the order of the scores
    top1_correct: int
    top5_correct: int

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.top1_correct / len(self.labels)

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.top5_correct / len(self.labels)


def seeded_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """
    A state dict with the names, shapes and types of the official checkpoint.

    Wide enough everywhere that the signal neither dies nor blows up on its way and that scores differ by image.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _seeded(name, tensor, generator) for name, tensor in nets.build(spec).state_dict().items()}


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """The state dict as a checkpoint, bare, as the official one is believed to be."""
    data = io.BytesIO()  # torch's own writing turns a full disk into an assertion
    torch.save(dict(state), data)
    path.write_bytes(data.getbuffer())


def reference_scores(
    images: Sequence[Path], spec: ModelSpec, state: Mapping[str, Tensor], *, progress: Progress | None = None
) -> Scores:
    """
    What the network answers to JPEGs or the like, float32 [n, classes], computed on all cores.

    Probabilities come as their logarithms, so that they differ as raw scores do. `progress` is told how many images of
    how many are done. The images must all be readable.
    """
    net = nets.build(spec)
    net.load_state_dict(dict(state))
    scores = np.empty((len(images), *spec.output.shape), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            answers = net(torch.stack([prepare(path, spec.recipe) for path in batch]))
            scores[start : start + len(batch)] = (answers.log() if spec.probabilities else answers).numpy()
            if progress:
                progress(start + len(batch), len(images))
    return scores


def prepare(path: Path, recipe: str) -> Tensor:
    """One image by the recipe of a model's deployment, float32 [3, 224, 224]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale, short_side = min(image.size), SHORT_SIDE[recipe]
    if scale != short_side:
        # `int` truncates the long side; the short one comes out as exactly what is asked for.
        width, height = (int(short_side * side / scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (round((side - CROP) / 2) for side in image.size)
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + CROP, top + CROP)))).permute(2, 0, 1)
    if recipe == "lvvit":
        mean, std = (torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) * 255 for values in (MEAN, STD))
        return ((pixels.to(torch.float64) - mean) / std).to(torch.float32)
    mean, std = (torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return (pixels.to(torch.float32) / 255 - mean) / std


def centre_head(state: Mapping[str, Tensor], scores: Scores) -> Centred:
    """
    Shift the bias of the class head until no class is the answer to more than `MOST` of the samples.

    Seeded networks have favourite classes, and a truth that is the same class over and over would not notice samples
    that change places. The bias enters the scores as a plain sum, so they need no second pass through the network.
    `FarmError` if no shift does it: too many of the images are the same.
    """
    # The head's own, or the first of two that are summed.
    name = next(name for name in state if name.startswith("head.") and name.endswith("bias"))
    bias = state[name]
    shifted = (bias.to(torch.float64) - torch.from_numpy(evening_shift(scores, MOST))).to(bias.dtype)
    moved = shifted.to(torch.float64) - bias.to(torch.float64)  # what rounding the bias left of the shift
    centred = (scores.astype(np.float64) + moved.numpy()).astype(np.float32)
    return Centred(state={**state, name: shifted}, scores=centred)


def evening_shift(scores: Scores, share: float) -> npt.NDArray[np.float64]:
    """
    What to take off each class's scores, [classes], so that none wins more than this share of the samples.

    Its mean, and more where the class still wins too often. `FarmError` if no shift does it.
    """
    shift: npt.NDArray[np.float64] = scores.mean(axis=0, dtype=np.float64)
    centred = scores - shift
    samples, classes = scores.shape
    most = max(1, int(share * samples))
    for _ in range(10 * classes):
        winners = centred.argmax(axis=1)
        wins = np.bincount(winners, minlength=classes)
        favourite = int(wins.argmax())
        if wins[favourite] <= most:
            return shift
        won = centred[winners == favourite]
        leads = np.sort(won[:, favourite] - np.delete(won, favourite, axis=1).max(axis=1))[::-1]
        # The samples with the smallest leads go to their runners-up, by enough that these are clear answers.
        less = leads[most] + 2 * LEAD
        shift[favourite] += less
        centred[:, favourite] -= less
    raise FarmError(
        f"no class bias spreads the answers to {samples} samples so that none is given to more than {most}: "
        "too many of the images are the same"
    )


def plant_labels(scores: Scores, seed: int, *, wrong: float = 0.2) -> Planted:
    """
    One label a sample: the top-1 of its scores, but for a fraction `wrong` of the samples another class.

    Of the wrong ones half come out of ranks 2 to 5, half from beyond. A label whose score is closer than `LEAD` to
    where it would count differently is not planted: the sample gets one of the next worse kind.
    """
    generator = np.random.default_rng(seed)
    worsened = round(wrong * len(scores))
    kinds = np.zeros(len(scores), dtype=np.int64)
    kinds[:worsened] = 2
    kinds[: worsened // 2] = 1
    generator.shuffle(kinds)
    planted = [_plant(row, int(kind), generator) for row, kind in zip(scores, kinds, strict=True)]
    return Planted(
        labels=np.array([label for label, _ in planted], dtype=np.int64),
        top1_correct=sum(rank < 1 for _, rank in planted),
        top5_correct=sum(rank < 5 for _, rank in planted),
    )


def _seeded(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point() or "coords" in name:
        return like  # a counter, or a table that the network made itself
    noise = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    if name.endswith("running_var"):
        return 1 + 0.1 * noise.abs()
    if name.endswith(("bias", "running_mean")):
        return 0.1 * noise
    if name.endswith(("cls_token", "pos_embed")):
        return 0.2 * noise
    if like.dim() == 1:
        # The last norm of a residual branch is smaller, or a long chain of branches without norms after their sums
        # would answer in thousands.
        return (0.3 if "_block.bn3." in name else 1.0) * (1 + 0.1 * noise)
    # Half of what a convolution of the stem puts out dies in its ReLU; scores shall stand well apart from rounding.
    gain = 9.0 if name.endswith(("head.weight", "conv_seg.weight")) else 2.0 if like.dim() == 4 else 1.0
    if name.endswith("conv_cls_head.weight"):
        gain = 0.25  # its input is large, and a probability must not vanish
    return noise * math.sqrt(gain / like[0].numel())


def _plant(row: Scores, kind: int, generator: np.random.Generator) -> tuple[int, int]:
    """A label for a sample with these scores, and its rank from 0. Kinds: 0 right, 1 in the top five, 2 beyond."""
    order = np.argsort(-row, kind="stable")
    ranked = row[order].astype(np.float64)
    clear = np.concatenate(
        (
            ranked[:1] - ranked[1] > LEAD,
            (ranked[0] - ranked[1:5] > LEAD) & (ranked[1:5] - ranked[5] > LEAD),
            ranked[4] - ranked[5:] > LEAD,
        )
    )
    for first, last in ((0, 1), (1, 5), (5, len(row)))[kind:]:
        if len(candidates := np.flatnonzero(clear[first:last])):
            rank = first + int(generator.choice(candidates))
            return int(order[rank]), rank
    raise FarmError("a sample's scores are all alike: there is no label to plant")
