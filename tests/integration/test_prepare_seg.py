"""Segmentation from pictures to windows, as `test_prepare` has it for classification: real files and signals."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
import xxhash
from PIL import Image

from farm.cli import data as cli
from farm.data import ade20k, journal, manifest, recipes
from farm.data.manifest import UNPREPARED, Windows
from farm.data.prepare import Prepared, prepare_segmentation
from farm.data.recipes import SEG, Segmentation
from farm.data.recipes import prepare as prepare_image
from farm.data.slide import CROP, Size
from farm.errors import DataError, UsageError

COMMAND = [sys.executable, "-c", "import typer; from farm.cli.data import prepare; typer.run(prepare)", "swin"]

SIZES = {"a": (64, 48), "b-0,0": (50, 50), "c": (40, 180)}  #: height, width; the last one is a panorama


class Dataset:
    """Three pictures of noise and their annotations; they become 2, 1 and 5 windows."""

    def __init__(self, root: Path) -> None:
        self.images = root / "images"
        self.annotations = root / "annotations"
        self.data = root / "data"
        self.bins = manifest.bins_dir(self.data, "seg")
        self.images.mkdir(parents=True)
        self.annotations.mkdir()
        for name, size in SIZES.items():
            self.add(name, *size)

    def add(self, name: str, height: int, width: int, seed: int = 0) -> Path:
        rng = np.random.default_rng([*name.encode(), seed])
        path = self.images / f"{name}.jpg"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        self.annotate(name, rng.integers(0, 151, (height, width), np.uint8))
        return path

    def annotate(self, name: str, values: np.ndarray) -> Path:
        path = self.annotations / f"{name}.png"
        Image.fromarray(values).save(path)
        return path

    def prepare(self, recipe: Segmentation = SEG, **options: object) -> Prepared:
        settings: dict[str, object] = {"processes": 1} | options
        return prepare_segmentation(self.images, self.annotations, recipe, self.data, **settings)  # type: ignore[arg-type]

    def written(self) -> dict[str, tuple[int, int]]:
        """What tells one writing of a bin or an annotation from another."""
        files = [*self.bins.glob("*.bin"), *self.bins.glob("annotations/*")]
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}

    def windows(self, name: str) -> Windows:
        (sample,) = [sample for sample in manifest.read(self.bins).samples if sample.name == name]
        assert sample.windows is not None
        return sample.windows


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path)


class Stop(Exception):
    pass


# What is made


def test_every_window_is_a_bin_of_its_published_name(dataset: Dataset) -> None:
    dataset.prepare()

    assert sorted(path.name for path in dataset.bins.glob("*.bin")) == [
        "a-0,0,512,512-64,48,3-1,683,512.bin",
        "a-0,171,512,683-64,48,3-1,683,512.bin",
        "b-0,0-0,0,512,512-50,50,3-1,512,512.bin",
        "c-0,0,512,455-40,180,3-1,455,2048.bin",
        "c-1152,0,1664,455-40,180,3-1,455,2048.bin",
        "c-1536,0,2048,455-40,180,3-1,455,2048.bin",
        "c-384,0,896,455-40,180,3-1,455,2048.bin",
        "c-768,0,1280,455-40,180,3-1,455,2048.bin",
    ]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("name", SIZES)
def test_a_bin_holds_its_window_of_the_picture(name: str, dtype: str, dataset: Dataset) -> None:
    recipe = recipes.get("seg", dtype)
    assert isinstance(recipe, Segmentation)
    directory = dataset.prepare(recipe).directory

    whole = prepare_image(dataset.images / f"{name}.jpg", recipe)
    _, height, width = whole.shape
    for path in directory.glob(f"{name}-*,3-1,*.bin"):
        x1, y1, x2, y2 = map(int, path.name.removeprefix(f"{name}-").split("-")[0].split(","))
        expected = np.empty((3, CROP, CROP), dtype)
        expected[...] = np.array(recipe.padding).reshape(3, 1, 1)
        expected[:, : min(height, CROP), : min(width, CROP)] = whole[:, y1:y2, x1:x2]
        assert path.read_bytes() == expected.tobytes()


def test_the_manifest_holds_sizes_and_the_hash_of_every_file(dataset: Dataset) -> None:
    prepared = dataset.prepare()

    def xxh3(name: str) -> str:
        return xxhash.xxh3_64_hexdigest((dataset.bins / name).read_bytes())

    assert [(sample.name, sample.label) for sample in prepared.manifest.samples] == [("a", 0), ("b-0,0", 0), ("c", 0)]
    assert dataset.windows("a") == Windows(
        original=Size(64, 48),
        resized=Size(683, 512),
        annotation=xxh3("annotations/a.png"),
        xxh3=(xxh3("a-0,0,512,512-64,48,3-1,683,512.bin"), xxh3("a-0,171,512,683-64,48,3-1,683,512.bin")),
    )
    assert len(dataset.windows("c").xxh3) == 5


def test_the_header_says_what_a_bin_is(dataset: Dataset) -> None:
    header = dataset.prepare().manifest.header

    assert (header.recipe, header.recipe_digest, header.shape) == ("seg", SEG.digest, (3, 512, 512))
    assert (header.dtype, header.classes, header.source) == ("float32", 150, str(dataset.images))


def test_the_annotation_is_copied_byte_by_byte(dataset: Dataset) -> None:
    dataset.prepare()

    for name in SIZES:
        copied = manifest.annotation_path(dataset.bins, name)
        assert copied.read_bytes() == (dataset.annotations / f"{name}.png").read_bytes()


def test_one_process_and_two_give_the_same_manifest(dataset: Dataset, tmp_path: Path) -> None:
    one = dataset.prepare(processes=1).manifest

    dataset.data = tmp_path / "other"
    assert dataset.prepare(processes=2).manifest == one


def test_the_size_of_a_turned_picture_is_the_annotations(dataset: Dataset) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(dataset.images / "a.jpg", exif=exif)

    assert dataset.prepare().failures == ()
    assert dataset.windows("a").original == Size(64, 48)


# What is kept and what is made again


def test_a_second_run_makes_nothing(dataset: Dataset) -> None:
    first = dataset.prepare()
    before = dataset.written()

    second = dataset.prepare()

    assert (second.done, second.reused, dataset.written()) == (0, 3, before)
    assert second.manifest == first.manifest


def redone(dataset: Dataset, before: dict[str, tuple[int, int]]) -> set[str]:
    return {name.split("-")[0] for name, identity in dataset.written().items() if identity != before.get(name)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: next(d.bins.glob("c-1152*.bin")).unlink(),
        lambda d: os.truncate(next(d.bins.glob("c-384*.bin")), 100),
        lambda d: next(d.bins.glob("c-384*.bin")).write_bytes(bytes(SEG.nbytes)),
        lambda d: manifest.annotation_path(d.bins, "c").unlink(),
        lambda d: os.utime(d.annotations / "c.png", ns=(0, 0)),
        lambda d: d.add("c", 40, 180, seed=1),
    ],
    ids=["no window", "half a window", "another window", "no annotation", "annotation touched", "other image"],
)
def test_what_is_damaged_or_outdated_is_made_again(damage: Callable[[Dataset], object], dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    damage(dataset)

    prepared = dataset.prepare()

    assert {name.removesuffix(".png") for name in redone(dataset, before)} == {"c"}
    assert (prepared.done, prepared.reused) == (1, 2)


def test_a_journal_of_noise_is_no_journal(dataset: Dataset) -> None:
    dataset.prepare()
    path = dataset.bins / journal.FILE_NAME
    path.write_text(path.read_text().replace("64,48/", "/").replace("50,50/", "/,/").replace("/455,2048", "/9999999,9"))

    assert dataset.prepare().done == 3


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_after_sigkill_no_finished_image_is_made_again(dataset: Dataset) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1800, 3), np.uint8)).save(file, "JPEG")
    for number in range(24):
        (dataset.images / f"slow{number}.jpg").write_bytes(file.getvalue())
        dataset.annotate(f"slow{number}", np.zeros((1400, 1800), np.uint8))
    noted = dataset.bins / journal.FILE_NAME
    command: list[str | Path] = [*COMMAND, "--images", dataset.images, "--annotations", dataset.annotations]
    with subprocess.Popen(
        [*command, "--processes", "2"],
        env=os.environ | {"FARM_DATA": str(dataset.data)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        wait_for(lambda: process.poll() is not None or (noted.exists() and noted.read_text().count("\n") >= 6))
        children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), 5)
    finished, before = noted.read_text().count("\n"), dataset.written()

    prepared = dataset.prepare(processes=2)

    assert 6 <= prepared.reused == finished < 27
    names = {line.split("\t")[0] for line in noted.read_text().splitlines()[:finished]}
    kept = {name: when for name, when in before.items() if name.split("-")[0] in names}
    assert len(kept) >= finished
    assert kept.items() <= dataset.written().items()
    assert not list(dataset.bins.glob(".*.partial"))


def test_interrupted_it_leaves_no_manifest_that_vouches_for_other_windows(dataset: Dataset) -> None:
    dataset.prepare()
    dataset.add("a", 64, 48, seed=1)

    def stop(settled: int, total: int) -> None:
        if settled == total:
            raise Stop

    with pytest.raises(Stop):
        dataset.prepare(progress=stop)

    with pytest.raises(DataError, match="run farm prepare first"):
        manifest.read(dataset.bins)


# What cannot be used


def truncate(dataset: Dataset) -> None:
    path = dataset.images / "a.jpg"
    os.truncate(path, path.stat().st_size * 2 // 3)


BAD = {
    "truncated image": (truncate, "does not decode: image file is truncated"),
    "no image": (lambda d: (d.images / "a.jpg").write_bytes(b"noise"), "is not an image (5 bytes), expected JPEG"),
    "empty image": (lambda d: (d.images / "a.jpg").write_bytes(b""), "is empty (0 bytes), expected an image"),
    "missing annotation": (lambda d: (d.annotations / "a.png").unlink(), "has no annotation of its name"),
    "empty annotation": (lambda d: (d.annotations / "a.png").write_bytes(b""), "its annotation does not decode"),
    "other size": (
        lambda d: d.annotate("a", np.zeros((48, 64), np.uint8)),
        "its annotation is 64 x 48, expected 48 x 64 like the image",
    ),
    "three channels": (
        lambda d: d.annotate("a", np.zeros((64, 48, 3), np.uint8)),
        "its annotation has 8 bits, mode RGB, expected a PNG of one 8-bit channel",
    ),
    "16 bits": (lambda d: d.annotate("a", np.zeros((64, 48), np.uint16)), "its annotation has 16 bits"),
    "value 200": (
        lambda d: d.annotate("a", np.full((64, 48), 200, np.uint8)),
        "its annotation has the value 200, expected 0 to 150 or 255",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_used_is_listed_with_the_reason_and_the_rest_made(bad: str, dataset: Dataset) -> None:
    spoil, problem = BAD[bad]
    spoil(dataset)

    prepared = dataset.prepare()

    assert (prepared.done, [failure.name for failure in prepared.failures]) == (2, ["a"])
    assert prepared.failures[0].problem.startswith(problem)
    sample = manifest.read(dataset.bins).samples[0]
    assert (sample.name, sample.xxh3, sample.problem) == ("a", UNPREPARED, prepared.failures[0].problem)
    assert not list(dataset.bins.glob("a-*"))


def test_what_was_repaired_is_taken_in(dataset: Dataset) -> None:
    (dataset.annotations / "a.png").write_bytes(b"")
    dataset.prepare()
    dataset.add("a", 64, 48)

    prepared = dataset.prepare()

    assert (prepared.done, prepared.reused, prepared.failed) == (1, 2, 0)


# The command


@pytest.fixture
def command(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`farm prepare` in this process."""
    monkeypatch.setenv("FARM_DATA", str(dataset.data))

    def run(name: str = "swin", **options: object) -> None:
        given: dict[str, object] = {"images": dataset.images, "annotations": dataset.annotations, "processes": 1}
        cli.prepare(name, **(given | options))  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("name", ["swin", "seg"])
def test_the_command_takes_a_model_or_its_recipe(
    name: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    command(name, json=True)

    printed = json.loads(capsys.readouterr().out)
    assert (printed["recipe"], printed["input"], printed["serves"]) == ("seg", "float32", ["swin"])
    assert printed["samples"] == {"total": 3, "made": 3, "reused": 0, "failed": 0}


def test_uint8_has_a_directory_of_its_own(command: Callable[..., None], dataset: Dataset) -> None:
    command(input_type="uint8")

    directory = dataset.data / "bins" / "seg-uint8"
    assert manifest.read(directory).header.dtype == "uint8"
    assert {path.stat().st_size for path in directory.glob("*.bin")} == {3 * 512 * 512}


def test_the_command_exits_with_3_when_an_annotation_is_missing(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.annotations / "c.png").unlink()

    with pytest.raises(typer.Exit) as caught:
        command()

    assert caught.value.exit_code == 3
    assert "c has no annotation of its name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"annotations": None}, "swin also takes --annotations DIR"),
        ({"labels": Path("x")}, "--labels is not for swin, which takes --annotations DIR"),
        ({"name": "twins"}, "--annotations is not for twins, which takes --labels val_label.txt"),
        ({"images": None}, "no --images: type farm prepare swin --images DIR --annotations DIR"),
        ({"input_type": "float16"}, "input 'float16': expected float32 or uint8"),
        ({"name": "resnet"}, "unknown model 'resnet': the farm knows lvvit, twins, focal, conformer, swin, and the "),
    ],
)
def test_what_cannot_be_asked_says_what_can(
    options: dict[str, object], sentence: str, command: Callable[..., None], dataset: Dataset
) -> None:
    with pytest.raises(UsageError) as caught:
        command(**options)

    assert str(caught.value).startswith(sentence)
    assert not dataset.data.exists()


def test_without_images_the_command_says_what_is_there(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = dataset.prepare().manifest.digest

    command(images=None, annotations=None)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "seg-float32 was there: serves swin"
    assert lines[1].startswith(f"swin: 3 samples in {dataset.bins}: 0 made, 3 were there, 0 failed")
    assert lines[2] == f"manifest {digest}"


def test_without_images_the_command_does_not_fail_for_what_failed_before(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    (dataset.annotations / "c.png").unlink()
    dataset.prepare()

    command(images=None, annotations=None, json=True)

    printed = json.loads(capsys.readouterr().out)
    assert printed["samples"] == {"total": 3, "made": 0, "reused": 2, "failed": 1}
    assert printed["failures"] == [{"name": "c", "problem": "has no annotation of its name"}]


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda d: (d.bins / "manifest").unlink(), r"no prepared data in .*: run farm prepare first"),
        (lambda d: next(d.bins.glob("a-0,0*")).unlink(), r"1 of 3 samples in .* lack bins \(a\): run farm prepare"),
        (lambda d: os.truncate(next(d.bins.glob("a-0,0*")), 9), r"1 of 3 samples in .* lack bins \(a\)"),
        (lambda d: manifest.annotation_path(d.bins, "a").unlink(), r"1 of 3 samples in .* lack bins \(a\)"),
        (
            lambda d: d.prepare(replace(SEG, mean=(1.0, 2.0, 3.0))),
            "are of another version of the recipe: run farm prepare again",
        ),
    ],
    ids=["no manifest", "no bin", "half a bin", "no annotation", "other recipe"],
)
def test_without_images_the_command_says_what_to_type_if_something_is_missing(
    spoil: Callable[[Dataset], object], sentence: str, command: Callable[..., None], dataset: Dataset
) -> None:
    dataset.prepare()
    spoil(dataset)

    with pytest.raises(UsageError, match=sentence) as caught:
        command(images=None, annotations=None)

    assert str(caught.value).endswith("(farm prepare swin --images DIR --annotations DIR)")


def test_what_workers_read_is_the_annotation_that_was_given(dataset: Dataset) -> None:
    dataset.prepare()

    values = ade20k.read_annotation(manifest.annotation_path(dataset.bins, "a"))

    assert (values == np.asarray(Image.open(dataset.annotations / "a.png"))).all()
