"""
The demo's input: photographs, weights and labels whose right answer is known before the farm has seen any of them.

All in a farm home of its own, so that nothing seeded ever mixes with what a user measures. Runs no job: a user's
commands do, and `farm.cli.demo` types them.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

import farm
from farm import zoo
from farm.data import disk
from farm.errors import UsageError
from farm.settings import Settings, make_home

SEED = 310
VERSION = 2

#: Their digits are in the truth: with others it is made again.
PACKAGES = ("numpy", "pillow", "scikit-image", "torch")

#: Told how many of all images the reference has scored.
Progress = Callable[[int, int], None]


class Key(BaseModel):
    """What the input depends on; made again when any of it changes."""

    model_config = ConfigDict(frozen=True)

    version: int = VERSION
    farm: str = farm.__version__
    model: str
    seed: int = SEED
    count: int
    packages: Mapping[str, str]


class Truth(BaseModel):
    """What anyone who evaluates the input must find."""

    model_config = ConfigDict(frozen=True)

    key: Key
    top1_correct: int
    top5_correct: int
    favourite_share: float  #: of the samples have the commonest top-1 as theirs

    @property
    def outcome(self) -> Outcome:
        return Outcome(top1_correct=self.top1_correct, top5_correct=self.top5_correct, scored=self.key.count, failed=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures of an evaluation as counts, which are equal or not."""

    top1_correct: int
    top5_correct: int
    scored: int
    failed: int

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

    def as_json(self) -> dict[str, float]:
        return {"top1": self.top1, "top5": self.top5, "scored": self.scored, "failed": self.failed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The input where it lies, and its truth."""

    truth: Truth
    reused: bool  #: an earlier demo made it


@dataclass(frozen=True, slots=True)
class Home:
    """The demo's directory, itself a FARM_HOME. Paths of the input are relative to it, as its commands name them."""

    root: Path
    model: str

    images = Path("ILSVRC2012/images")
    labels = Path("ILSVRC2012/val_label.txt")
    expected = Path("expected.json")

    @property
    def weights(self) -> Path:
        return Path(f"{self.model}-seeded.pth")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the home against another demo; `UsageError` when one has it."""
        make_home(Settings(home=self.root))
        with (self.root / "demo.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                raise UsageError(f"another farm demo is at work in {self.root}: wait for it to end") from exc
            yield

    def input(self, count: int, progress: Progress) -> Input:
        """
        Have `count` images, weights and labels: those an earlier demo left complete, or new ones.

        `UsageError` names the package that is missing, `StorageError` the disk that refuses.
        """
        key = Key(model=self.model, count=count, packages=_packages())
        truth = self._complete(key)
        if truth is not None:
            return Input(truth=truth, reused=True)
        return Input(truth=self._make(key, progress), reused=False)

    def _complete(self, key: Key) -> Truth | None:
        """The truth of an input that is there as a whole; nobody asks whether it was altered since: the job tells."""
        try:
            truth = Truth.model_validate_json((self.root / self.expected).read_bytes())
        except (OSError, ValidationError):
            return None
        files = list((self.root / self.images).glob("*.JPEG"))
        others = all((self.root / path).is_file() for path in (self.labels, self.weights))
        return truth if truth.key == key and len(files) == key.count and others else None

    def _clear(self) -> None:
        """Leave nothing of another input, nor what was made from it: two artifacts of a batch size are one too many."""
        for path in (self.expected, self.labels, self.weights):
            with disk.writing(self.root / path):
                (self.root / path).unlink(missing_ok=True)
        for path in (self.images, Path("data/bins"), Path("data/artifacts")):
            with disk.writing(self.root / path):
                if (self.root / path).exists():
                    shutil.rmtree(self.root / path)

    def _make(self, key: Key, progress: Progress) -> Truth:
        from farm.data import synthetic
        from farm.export import require_torch

        require_torch()
        from farm.export import planted

        self._clear()
        images = synthetic.write_imagenet(self.root / self.images, key.count, key.seed)
        spec = zoo.get(key.model)
        weights = planted.seeded_weights(spec, key.seed)
        centred = planted.centre_head(weights, planted.reference_scores(images, spec, weights, progress=progress))
        truth = planted.plant_labels(centred.scores, key.seed)
        with disk.writing(self.root / self.weights):
            planted.save_weights(centred.state, self.root / self.weights)
        lines = (f"{image.name} {label}\n" for image, label in zip(images, truth.labels, strict=True))
        self._write(self.labels, "".join(lines))
        expected = Truth(
            key=key,
            top1_correct=truth.top1_correct,
            top5_correct=truth.top5_correct,
            favourite_share=_favourite_share(centred.scores.argmax(axis=1)),
        )
        # Last: what it vouches for is there.
        self._write(self.expected, expected.model_dump_json(indent=2) + "\n")
        return expected

    def _write(self, path: Path, text: str) -> None:
        whole = self.root / path
        disk.replace(whole, text.encode(), partial=whole.with_suffix(".tmp"), durable=True)


def _favourite_share(answers: npt.NDArray[np.int64]) -> float:
    """The share of the commonest of these classes, [n]."""
    return float(np.bincount(answers).max()) / len(answers)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Whoever needs it says how to get it.
            found[name] = "missing"
    return found
