"""The demo of segmentation: photographs in ADE20K's layout, an annotation each."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from farm import zoo
from farm.data import disk
from farm.demo import home, pictures
from farm.demo.home import Counts, Figure, Home, Key, Progress

if TYPE_CHECKING:
    from farm.export.planted_seg import Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(home.Outcome):
    """As means over classes and pixels, in percent."""

    miou: float
    aacc: float
    macc: float

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Outcome:
        """What a job's report says."""
        samples = report["samples"]
        # Percent of nothing is None.
        percent = {name: report["metrics"][name] or 0.0 for name in ("miou", "aacc", "macc")}
        return cls(**percent, scored=samples["scored"], failed=samples["failed"])

    def metrics(self) -> list[Figure]:
        named = {"aAcc": self.aacc, "mIoU": self.miou, "mAcc": self.macc}
        # So many digits that a pixel shows.
        return [Figure(name, value, f"{value:.6f} %") for name, value in named.items()]

    def percent(self) -> dict[str, float]:
        return {"miou": self.miou, "aacc": self.aacc, "macc": self.macc}


class Truth(home.Truth):
    """The metrics of the reference's label maps against the planted annotations, in percent."""

    miou: float
    aacc: float
    macc: float

    @property
    def outcome(self) -> Outcome:
        return Outcome(miou=self.miou, aacc=self.aacc, macc=self.macc, scored=self.key.count, failed=0)


class SegmentationHome(Home):
    """A folder of annotations beside that of the images."""

    images = Path("ADEChallengeData2016/images/validation")
    image_names = "ADE_val_{:08}.jpg"
    labels = Path("ADEChallengeData2016/annotations/validation")
    labels_option = "--annotations"
    options = ("--head", "small")  # 16 times less to carry from device to merge
    truth = Truth
    packages = ("numpy", "opencv-python-headless", "pillow", "scikit-image", "torch")
    counts = Counts(1, 6, 60)  # the reference keeps 20 MB of scores for each
    bs = 1
    layout = "ADE20K's"
    planted = "annotations"
    favourite = "no class has more of the pixels than"

    def measured(self, report: Mapping[str, object]) -> Outcome:
        return Outcome.of(report)

    def plant(self, key: Key, progress: Progress) -> Truth:
        from farm.export import planted, planted_seg

        images = self.image_paths(key.count)
        pictures.write(images, key.seed)
        spec = zoo.get(key.model)
        weights = planted.seeded_weights(spec, key.seed)
        scored = planted_seg.reference_scores(images, spec, weights, progress=progress)
        centred = planted_seg.centre_head(weights, scored)
        self.save_weights(centred.state)
        truths = list(planted_seg.plant(centred.pictures, key.seed))
        with disk.writing(self.root / self.labels):
            (self.root / self.labels).mkdir(parents=True)
        for image, truth in zip(images, truths, strict=True):
            self.write(self.labels / f"{image.stem}.png", _png(truth.annotation))
        expected = planted_seg.expected(truths, spec.output.shape[0])
        return Truth(
            key=key,
            miou=expected.miou,
            aacc=expected.aacc,
            macc=expected.macc,
            favourite_share=expected.favourite_share,
        )


HOME = SegmentationHome


def _png(annotation: Labels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(annotation).save(file, "PNG")
    return file.getvalue()
