"""Reducing what comes off a device to rows before anything is stored: one reducer a kind of dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from farm.data.manifest import Sample
from farm.jobs import ResultState, SampleResult
from farm.metrics import topk
from workers.backends.base import Array


@dataclass(frozen=True, slots=True)
class Slot:
    """What a place of a batch is filled with."""

    sample: Sample
    part: int = 0  #: which of its windows


#: Samples that are classified at once.
MANY = 64


class Reducer(ABC):
    """Makes rows of one run's outputs, which come in the order of its slots. Used by one thread at a time."""

    @abstractmethod
    def take(
        self, outputs: Array, places: Sequence[int], slots: Sequence[Slot], failed: Collection[str]
    ) -> tuple[list[SampleResult], list[Sample]]:
        """
        Rows of some samples that are complete, and the samples whose scores are not finite.

        `outputs` is a batch, float32 [bs, ...]; slot i lies at places[i]. Samples in `failed` are not awaited any more.
        """

    def rest(self) -> tuple[list[SampleResult], list[Sample]]:
        """The same of what was taken and not told yet; after the last batch."""
        return [], []

    def held(self) -> list[Array]:
        """Parts of outputs taken before that must stay as they are until more have come."""
        return []


#: Modules with a function `reducer(directory, threads)`, by dataset.
REDUCERS = {"imagenet": "workers.postprocess", "ade20k": "workers.segment"}


def reducer_of(dataset: str, directory: Path, threads: int) -> Reducer:
    """The reducer of a run on bins in `directory`, which may use so many threads."""
    made: Reducer = import_module(REDUCERS[dataset]).reducer(directory, threads)
    return made


class Classifier(Reducer):
    """Top-5 rows of class scores, of many samples at once: what it costs is the calls, not the sorting."""

    def __init__(self) -> None:
        self._scores: list[Array] = []
        self._samples: list[Sample] = []

    def take(
        self, outputs: Array, places: Sequence[int], slots: Sequence[Slot], _failed: Collection[str]
    ) -> tuple[list[SampleResult], list[Sample]]:
        self._scores.append(outputs[list(places)])  # a copy: the buffer is wanted for the next batch
        self._samples += [slot.sample for slot in slots]
        return self.rest() if len(self._samples) >= MANY else ([], [])

    def rest(self) -> tuple[list[SampleResult], list[Sample]]:
        if not self._samples:
            return [], []
        scores, samples, self._scores, self._samples = self._scores, self._samples, [], []
        return classify(np.concatenate(scores), samples)


def reducer(_directory: Path, _threads: int) -> Reducer:
    return Classifier()


def classify(scores: Array, samples: Sequence[Sample]) -> tuple[list[SampleResult], list[Sample]]:
    """
    Top-5 rows from `scores`, float32 [n, classes], one row a sample; and the samples whose scores are not finite.
    """
    finite = np.asarray(np.isfinite(scores).all(axis=1))
    bad = [sample for sample, ok in zip(samples, finite, strict=True) if not ok]
    if bad:
        samples = [sample for sample, ok in zip(samples, finite, strict=True) if ok]
        scores = scores[finite]
    if not samples:
        return [], bad
    labels = [sample.label for sample in samples]
    classes, best = topk.best(scores)
    ranks = topk.ranks(scores, labels)
    rows = [
        SampleResult(
            name=sample.name,
            state=ResultState.SCORED,
            label=sample.label,
            rank=int(rank),
            classes=tuple(row_classes),
            scores=tuple(row_scores),
        )
        for sample, rank, row_classes, row_scores in zip(samples, ranks, classes.tolist(), best.tolist(), strict=True)
    ]
    return rows, bad
