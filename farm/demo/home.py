"""What the demos of all models share: a home whose input is complete or made again, and a truth to compare with."""

from __future__ import annotations

import fcntl
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

import farm
from farm.data import disk
from farm.errors import UsageError
from farm.settings import Settings, make_home

if TYPE_CHECKING:
    from torch import Tensor

SEED = 310
VERSION = 2

#: Two ways to sum the same counts may differ by a last digit.
EQUAL = 1e-9

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


class Figure(NamedTuple):
    """One number of an outcome."""

    name: str
    value: float
    shown: str

    def agrees(self, other: Figure) -> bool:
        return abs(self.value - other.value) <= EQUAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(ABC):
    """The figures of an evaluation, planted or measured."""

    scored: int
    failed: int

    @abstractmethod
    def metrics(self) -> list[Figure]: ...

    @abstractmethod
    def percent(self) -> dict[str, float]:
        """The metrics by the names that a job's report has for them."""

    def figures(self) -> list[Figure]:
        counts = {"scored": self.scored, "failed": self.failed}
        return [*self.metrics(), *(Figure(name, count, str(count)) for name, count in counts.items())]

    def agrees(self, other: Outcome) -> bool:
        return all(mine.agrees(theirs) for mine, theirs in zip(self.figures(), other.figures(), strict=True))

    def as_json(self) -> dict[str, float]:
        return {**self.percent(), "scored": self.scored, "failed": self.failed}


class Truth(BaseModel, ABC):
    """What anyone who evaluates the input must find."""

    model_config = ConfigDict(frozen=True)

    key: Key
    favourite_share: float  #: of all answers are the commonest one

    @property
    @abstractmethod
    def outcome(self) -> Outcome: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The input where it lies, and its truth."""

    truth: Truth
    reused: bool  #: an earlier demo made it


class Counts(NamedTuple):
    """How many photographs a demo may have."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Home(ABC):
    """The demo's directory, itself a FARM_HOME. Paths of the input are relative to it, as its commands name them."""

    root: Path
    model: str

    expected: ClassVar = Path("expected.json")

    images: ClassVar[Path]
    image_names: ClassVar[str]  #: that number 1, 2 .. is put into
    labels: ClassVar[Path]  #: a file, or a folder with one for each image
    labels_option: ClassVar[str]  #: of `farm prepare`
    options: ClassVar[tuple[str, ...]] = ()  #: of `farm export` and `farm submit`

    truth: ClassVar[type[Truth]]
    #: Their digits are in the truth: with others it is made again.
    packages: ClassVar[tuple[str, ...]]

    counts: ClassVar[Counts]
    bs: ClassVar[int]  #: unless the user wants another

    layout: ClassVar[str]  #: whose
    planted: ClassVar[str]
    favourite: ClassVar[str]  #: of what a class has no more than its share

    @property
    def weights(self) -> Path:
        return Path(f"{self.model}-seeded.pth")

    @abstractmethod
    def measured(self, report: Mapping[str, object]) -> Outcome:
        """What a job's report says."""

    @abstractmethod
    def plant(self, key: Key, progress: Progress) -> Truth:
        """Write images, weights and labels, from PyTorch alone."""

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
        key = Key(model=self.model, count=count, packages=_versions(self.packages))
        truth = self._complete(key)
        if truth is not None:
            return Input(truth=truth, reused=True)
        return Input(truth=self._make(key, progress), reused=False)

    def image_paths(self, count: int) -> list[Path]:
        return [self.root / self.images / self.image_names.format(number) for number in range(1, count + 1)]

    def write(self, path: Path, data: bytes) -> None:
        """A file of the input, as a whole or not at all."""
        whole = self.root / path
        disk.replace(whole, data, partial=whole.with_suffix(".tmp"), durable=True)

    def save_weights(self, state: Mapping[str, Tensor]) -> None:
        from farm.export import planted

        with disk.writing(self.root / self.weights):
            planted.save_weights(state, self.root / self.weights)

    def _complete(self, key: Key) -> Truth | None:
        """The truth of an input that is there as a whole; nobody asks whether it was altered since: the job tells."""
        try:
            truth = self.truth.model_validate_json((self.root / self.expected).read_bytes())
        except (OSError, ValidationError):
            return None
        images = list((self.root / self.images).glob(f"*{Path(self.image_names).suffix}"))
        others = (self.root / self.weights).is_file() and self._labelled(key.count)
        return truth if truth.key == key and len(images) == key.count and others else None

    def _labelled(self, count: int) -> bool:
        labels = self.root / self.labels
        return len(list(labels.iterdir())) == count if labels.is_dir() else labels.is_file()

    def _clear(self) -> None:
        """Leave nothing of another input, nor what was made from it: two artifacts of a batch size are one too many."""
        made_from_it = Path("data/bins"), Path("data/artifacts")
        for path in (self.expected, self.labels, self.weights, self.images, *made_from_it):
            with disk.writing(self.root / path):
                if (self.root / path).is_dir():
                    shutil.rmtree(self.root / path)
                else:
                    (self.root / path).unlink(missing_ok=True)

    def _make(self, key: Key, progress: Progress) -> Truth:
        from farm.export import require_torch

        require_torch()
        self._clear()
        truth = self.plant(key, progress)
        # Last: what it vouches for is there.
        self.write(self.expected, (truth.model_dump_json(indent=2) + "\n").encode())
        return truth


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Whoever needs it says how to get it.
            found[name] = "missing"
    return found
