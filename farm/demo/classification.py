"""The demo of a classifier: photographs in ILSVRC2012's layout, a label each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farm import zoo
from farm.demo import home
from farm.demo.home import Counts, Figure, Home, Key, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(home.Outcome):
    """As counts, which are equal or not."""

    top1_correct: int
    top5_correct: int

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Outcome:
        """What a job's report says."""
        samples, metrics = report["samples"], report["metrics"]
        # Percent of nothing is None.
        correct = {name: round((metrics[name] or 0) * samples["scored"] / 100) for name in ("top1", "top5")}
        return cls(
            top1_correct=correct["top1"],
            top5_correct=correct["top5"],
            scored=samples["scored"],
            failed=samples["failed"],
        )

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.top1_correct / self.scored if self.scored else 0.0

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.top5_correct / self.scored if self.scored else 0.0

    def metrics(self) -> list[Figure]:
        return [
            Figure("top-1", self.top1_correct, f"{self.top1:.3f} % ({self.top1_correct})"),
            Figure("top-5", self.top5_correct, f"{self.top5:.3f} % ({self.top5_correct})"),
        ]

    def percent(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5}


class Truth(home.Truth):
    """Top-1 and top-5 of the planted labels."""

    top1_correct: int
    top5_correct: int

    @property
    def outcome(self) -> Outcome:
        return Outcome(top1_correct=self.top1_correct, top5_correct=self.top5_correct, scored=self.key.count, failed=0)


class ClassificationHome(Home):
    """A label for each image, in one file."""

    images = Path("ILSVRC2012/images")
    image_names = "ILSVRC2012_val_{:08}.JPEG"
    labels = Path("ILSVRC2012/val_label.txt")
    labels_option = "--labels"
    truth = Truth
    packages = ("numpy", "pillow", "scikit-image", "torch")
    counts = Counts(10, 256, 50_000)
    bs = 4
    layout = "ILSVRC2012's"
    planted = "labels"
    favourite = "no class is the top-1 of more than"

    def measured(self, report: Mapping[str, object]) -> Outcome:
        return Outcome.of(report)

    def plant(self, key: Key, progress: Progress) -> Truth:
        from farm.data import synthetic
        from farm.export import planted

        images = synthetic.write_imagenet(self.root / self.images, key.count, key.seed)
        spec = zoo.get(key.model)
        weights = planted.seeded_weights(spec, key.seed)
        centred = planted.centre_head(weights, planted.reference_scores(images, spec, weights, progress=progress))
        truth = planted.plant_labels(centred.scores, key.seed)
        self.save_weights(centred.state)
        lines = (f"{image.name} {label}\n" for image, label in zip(images, truth.labels, strict=True))
        self.write(self.labels, "".join(lines).encode())
        return Truth(
            key=key,
            top1_correct=truth.top1_correct,
            top5_correct=truth.top5_correct,
            favourite_share=_favourite_share(centred.scores.argmax(axis=1)),
        )


HOME = ClassificationHome


def _favourite_share(answers: npt.NDArray[np.int64]) -> float:
    """The share of the commonest of these classes, [n]."""
    return float(np.bincount(answers).max()) / len(answers)
