"""Bins in the published scripts' layout, taken over by the farm."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from farm.cli import data as cli
from farm.data import bins, importing, manifest, slide
from farm.data.bins import Bin, Task
from farm.data.importing import import_bins
from farm.data.manifest import Manifest, bin_path
from farm.data.prepare import Prepared, prepare_dataset, prepare_segmentation
from farm.data.recipes import IN256, LVVIT, SEG, Recipe
from farm.data.slide import Size, Window
from farm.errors import DataError, UsageError

#: height, width; they become 2, 1 and 5 windows, the last ones lower than the network takes.
SIZES = {"a": (64, 48), "b-b": (50, 50), "c": (40, 180)}
SIZES_OF_A = Size(64, 48), Size(683, 512)


class Published:
    """Bins as published scripts leave them: made by the farm elsewhere, then stripped of all that is the farm's."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.root = root
        self.bins = root / "published"
        self.data = root / "data"
        self.directory = manifest.bins_dir(self.data, recipe.name, recipe.dtype)
        self.images = root / "images"
        self.labels = root / "val_label.txt"
        self.annotations = root / "annotations"

    def make(self) -> Published:
        self.images.mkdir()
        self.annotations.mkdir()
        for name, size in SIZES.items():
            pixels = np.random.default_rng([*name.encode()]).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(self.images / f"{name}.jpg")
            Image.fromarray(pixels[:, :, 0] % 151).save(self.annotations / f"{name}.png")
        self.labels.write_text("a.JPEG 1\nb-b.JPEG 2\nc.JPEG 3\n")
        self._prepare(self.root / "made")
        self.bins.mkdir()
        for path in (self.root / "made" / "bins").glob("*/*.bin"):
            path.rename(self.bins / path.name)
        return self

    def copy(self, root: Path) -> Published:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Published(root, self.recipe)

    def _prepare(self, data_dir: Path) -> Prepared:
        if self.recipe.name == "seg":
            return prepare_segmentation(self.images, self.annotations, SEG, data_dir, processes=1)
        return prepare_dataset(self.images, self.labels, self.recipe, data_dir, processes=1)

    @property
    def made(self) -> Manifest:
        """What preparing gave."""
        return manifest.read(manifest.bins_dir(self.root / "made", self.recipe.name, self.recipe.dtype))

    @property
    def truth(self) -> Path:
        return self.annotations if self.recipe.name == "seg" else self.labels

    def take(self, **options: object) -> Prepared:
        settings: dict[str, object] = {"processes": 1} | options
        return import_bins(self.bins, self.truth, self.recipe, self.data, **settings)  # type: ignore[arg-type]

    def bin(self, name: str) -> Path:
        (path, *_) = sorted(self.bins.glob(f"{name}.bin" if self.recipe.name != "seg" else f"{name}-*.bin"))
        return path


Make = Callable[[Recipe], Published]


@pytest.fixture(scope="module")
def originals() -> dict[str, Published]:
    return {}


@pytest.fixture
def publish(originals: dict[str, Published], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Make:
    """Published bins of a recipe for one test alone; each recipe's are made once."""

    def make(recipe: Recipe) -> Published:
        if recipe.digest not in originals:
            originals[recipe.digest] = Published(tmp_path_factory.mktemp("original"), recipe).make()
        return originals[recipe.digest].copy(tmp_path)

    return make


@pytest.fixture
def published(publish: Make) -> Published:
    return publish(IN256)


@pytest.fixture
def windows(publish: Make) -> Published:
    return publish(SEG)


def samples(found: Manifest) -> list[tuple[str, int, str]]:
    return [(sample.name, sample.label, sample.xxh3) for sample in found.samples]


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.glob("*.bin")}


class Killed(BaseException):
    pass


# What is taken over


@pytest.mark.parametrize(
    "recipe", [LVVIT, IN256, SEG, replace(IN256, dtype="uint8")], ids=["lvvit", "in256", "seg", "uint8"]
)
def test_the_manifest_is_the_one_that_preparing_writes(recipe: Recipe, publish: Make) -> None:
    published = publish(recipe)

    taken = published.take()

    assert taken.manifest.digest == published.made.digest
    assert samples(manifest.read(published.directory)) == samples(published.made)
    assert taken.manifest.header.source == str(published.bins)
    assert (taken.done, taken.failed) == (3, 0)


@pytest.mark.parametrize("recipe", [IN256, SEG], ids=["in256", "seg"])
def test_bins_are_the_same_files_where_the_file_system_can(recipe: Recipe, publish: Make) -> None:
    published = publish(recipe)

    published.take()

    for path in published.bins.iterdir():
        assert (published.directory / path.name).samefile(path)


def test_bins_are_copies_where_it_cannot(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", refuse)
    task = Task(name="a", sources=(published.bin("a"),), directory=published.directory)
    published.directory.mkdir(parents=True)

    taken = importing.take(task, IN256)

    copied = bin_path(published.directory, "a")
    assert isinstance(taken, Bin)
    assert copied.read_bytes() == published.bin("a").read_bytes()
    assert not copied.samefile(published.bin("a"))


def test_a_link_to_a_bin_is_followed(published: Published, tmp_path: Path) -> None:
    real = published.bin("a").rename(tmp_path / "real.bin")
    (published.bins / "a.bin").symlink_to(real)

    published.take()

    assert not bin_path(published.directory, "a").is_symlink()
    assert bin_path(published.directory, "a").samefile(real)


def test_the_annotation_lies_beside_the_windows(windows: Published) -> None:
    windows.take()

    for name in SIZES:
        copied = manifest.annotation_path(windows.directory, name)
        assert copied.read_bytes() == (windows.annotations / f"{name}.png").read_bytes()


@pytest.mark.parametrize("recipe", [IN256, SEG], ids=["in256", "seg"])
def test_a_second_import_has_nothing_to_do(recipe: Recipe, publish: Make) -> None:
    published = publish(recipe)
    published.take()

    again = published.take()

    assert (again.done, again.reused, again.manifest.digest) == (0, 3, published.made.digest)


def test_bins_that_lie_in_their_place_already_stay(published: Published) -> None:
    published.take()
    published.bins = published.directory
    (published.directory / "journal").unlink()

    again = published.take()

    assert (again.done, again.manifest.digest) == (3, published.made.digest)
    assert not list(published.directory.glob(".*.partial"))


def test_preparing_afterwards_does_not_write_into_the_published_files(published: Published, tmp_path: Path) -> None:
    published.take()
    before = contents(published.bins)

    prepare_dataset(tmp_path / "images", published.labels, replace(IN256, mean=(0, 0, 0)), published.data, processes=1)

    assert contents(published.bins) == before


def test_what_a_killed_import_left_is_not_written_into(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    published.directory.mkdir(parents=True)
    before = contents(published.bins)
    task = Task(name="a", sources=(published.bin("a"),), directory=published.directory)

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            importing.take(task, IN256)
    bins.write(bin_path(published.directory, "other"), b"what the next process of this number writes", task)
    importing.take(task, IN256)

    assert contents(published.bins) == before
    assert bin_path(published.directory, "a").samefile(published.bin("a"))


# What cannot be used


def change(path: Path, alter: Callable[[np.ndarray], None]) -> None:
    array = np.fromfile(path, np.float32)
    alter(array)
    array.tofile(path)


def put(position: int, value: float) -> Callable[[Path], None]:
    def alter(array: np.ndarray) -> None:
        array[position] = value

    return lambda path: change(path, alter)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: os.truncate(path, 1000), "its bin has 1000 bytes, expected 602112"),
        (lambda path: path.write_bytes(b""), "its bin has 0 bytes, expected 602112"),
        (put(5, np.nan), "its bin holds values that are no finite numbers"),
        (put(150_000, np.inf), "its bin holds values that are no finite numbers"),
        (put(70_000, 0.5), "its bin holds 0.5, which recipe in256 does not make of any pixel"),
        (put(70_000, 1e30), "its bin holds 1e+30, which recipe in256"),
    ],
    ids=["short", "empty", "nan", "inf", "no pixel", "huge"],
)
def test_a_bin_that_cannot_be_used_is_listed_and_the_rest_taken(
    spoil: Callable[[Path], None], problem: str, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "PROBED", 1)  # another one is looked at beforehand
    spoil(published.bin("c"))

    taken = published.take()

    assert [(f.name, f.problem.startswith(problem)) for f in taken.failures] == [("c", True)]
    assert taken.done == 2
    assert not bin_path(published.directory, "c").exists()


@pytest.mark.parametrize("claimed", [LVVIT, replace(IN256, mean=(0.5, 0.5, 0.5))], ids=["lvvit", "other mean"])
def test_bins_of_another_recipe_are_refused_as_a_whole(claimed: Recipe, published: Published) -> None:
    published.recipe = claimed

    with pytest.raises(DataError, match=r"does not make of any pixel. Is it of another recipe, .*Nothing was written"):
        published.take()

    assert not published.data.exists()


def test_the_other_way_round_too(publish: Make) -> None:
    published = publish(LVVIT)
    published.recipe = IN256

    with pytest.raises(DataError, match="which recipe in256 does not make of any pixel"):
        published.take()


def rename(published: Published, name: str, **changes: object) -> None:
    path = published.bin(name)
    said = slide.parse_name(path.name)
    said = replace(said, **changes)  # type: ignore[arg-type]
    path.rename(path.with_name(slide.bin_name(said.stem, said.window, said.original, said.resized)))


def padded_with_ones(published: Published) -> None:
    array = np.fromfile(published.bin("c"), np.float32).reshape(SEG.shape)
    array[:, 500:] = 1
    array.tofile(published.bin("c"))


@pytest.mark.parametrize(
    ("spoil", "name", "problem"),
    [
        (lambda p: p.bin("a").unlink(), "a", "it has 1 windows, 1 of the 2 expected"),
        (lambda p: p.bin("c").unlink(), "c", "it has 4 windows, 4 of the 5 expected"),
        (lambda p: rename(p, "a", window=Window(0, 9, 512, 521)), "a", "it has 2 windows, 1 of the 2 expected"),
        (
            lambda p: shutil.copy(p.bin("a"), p.bins / slide.bin_name("a", Window(0, 9, 512, 521), *SIZES_OF_A)),
            "a",
            "it has 3 windows, 2 of the 2 expected",
        ),
        (lambda p: rename(p, "a", original=Size(65, 48)), "a", "its windows have names with 2 different sizes"),
        (lambda p: rename(p, "b-b", resized=Size(512, 513)), "b-b", "its windows are of 512 x 513, expected 512 x 512"),
        (lambda p: rename(p, "b-b", original=Size(0, 50)), "b-b", "its windows are of 512 x 512, expected"),
        (lambda p: os.truncate(p.bin("a"), 8), "a", "its bin has 8 bytes, expected 3145728"),
        (lambda p: (p.annotations / "a.png").unlink(), "a", "has no annotation of its name"),
        (lambda p: (p.annotations / "a.png").write_bytes(b""), "a", "its annotation does not decode"),
        (
            lambda p: Image.new("L", (64, 48)).save(p.annotations / "a.png"),
            "a",
            "its annotation is 64 x 48, expected 48 x 64 like the image",
        ),
        (padded_with_ones, "c", "its bin does not hold (0, 0, 0) beyond the 455 x 512 pixels of the window"),
    ],
    ids=[
        "no window",
        "no padded window",
        "elsewhere",
        "one too many",
        "two sizes",
        "other size",
        "no size",
        "short",
        "no annotation",
        "empty annotation",
        "turned annotation",
        "padding",
    ],
)
def test_an_image_whose_windows_cannot_be_used_is_listed_and_the_rest_taken(
    spoil: Callable[[Published], None], name: str, problem: str, windows: Published
) -> None:
    spoil(windows)

    taken = windows.take()

    assert [failure.name for failure in taken.failures] == [name]
    assert taken.failures[0].problem.startswith(problem)
    assert taken.done == 2
    assert not list(windows.directory.glob(f"{name}-*"))


def test_a_file_that_is_no_window_is_refused_with_the_form_of_a_name(windows: Published) -> None:
    (windows.bins / "x.bin").touch()

    with pytest.raises(DataError, match=r"'x.bin' is no window's name, expected one like"):
        windows.take()

    assert not windows.data.exists()


def test_bins_without_labels_are_refused(published: Published) -> None:
    published.labels.write_text("a 1\n")

    with pytest.raises(DataError, match=r"2 of 3 images in .* have no label \(b-b, c\)"):
        published.take()


def test_labels_without_bins_need_subset(published: Published) -> None:
    published.bin("a").unlink()
    with pytest.raises(DataError, match="--subset allows this"):
        published.take()

    assert published.take(subset=True).done == 2


def test_a_folder_without_bins_is_a_usage_error(published: Published) -> None:
    with pytest.raises(UsageError, match=r"no bins in .*, expected files \*.bin directly in it"):
        import_bins(published.annotations, published.labels, IN256, published.data)


# The command


@pytest.fixture
def command(published: Published, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`farm import` in this process."""
    monkeypatch.setenv("FARM_DATA", str(published.data))

    def run(recipe: str = "in256", **options: object) -> None:
        given: dict[str, object] = {"labels": published.labels, "processes": 1} | options
        cli.import_(published.bins, recipe, **given)  # type: ignore[arg-type]

    return run


def test_the_command_says_what_it_took(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command(json=True)

    printed = json.loads(capsys.readouterr().out)
    assert printed["samples"] == {"total": 3, "made": 3, "reused": 0, "failed": 0}
    assert (printed["recipe"], printed["serves"]) == ("in256", ["twins", "focal", "conformer"])


def test_what_was_imported_is_there_for_preparing(
    command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command()
    capsys.readouterr()

    cli.prepare("conformer")

    assert capsys.readouterr().out.startswith("in256-float32 was there: serves twins, focal, conformer\n")


def test_the_command_exits_with_3_and_names_the_bins_that_failed(
    command: Callable[..., None], published: Published, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(published.bin("b-b"), 10)

    with pytest.raises(typer.Exit) as caught:
        command()

    assert caught.value.exit_code == 3
    assert "b-b its bin has 10 bytes, expected 602112" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipe": "twins"}, "unknown recipe 'twins': the farm knows lvvit, in256, seg"),
        ({"labels": None}, "--recipe in256 also takes --labels val_label.txt"),
        ({"recipe": "seg"}, "--labels is not for seg, which takes --annotations DIR"),
        ({"recipe": "seg", "labels": None}, "--recipe seg also takes --annotations DIR"),
        ({"annotations": Path("x")}, "--annotations is not for in256, which takes --labels val_label.txt"),
    ],
)
def test_what_cannot_be_asked_says_what_can(
    options: dict[str, object], sentence: str, command: Callable[..., None]
) -> None:
    with pytest.raises(UsageError) as caught:
        command(**options)

    assert str(caught.value) == sentence
