"""Real files, processes, signals and full disks. The recipe is a small one where the bytes do not matter."""

import fcntl
import io
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import typer
import xxhash
from PIL import Image

from farm.cli import data as cli
from farm.data import journal, manifest
from farm.data.manifest import UNPREPARED, Sample, bin_path
from farm.data.prepare import LOCK_NAME, Prepared, prepare_dataset
from farm.data.recipes import IN256, LVVIT
from farm.data.recipes import prepare as prepare_image
from farm.errors import DataError, StorageError, UsageError

SMALL = replace(LVVIT, short_side=40, crop=32)

#: What `farm prepare` is in a process of its own; the recipe is the real one.
COMMAND = [sys.executable, "-c", "import typer; from farm.cli.data import prepare; typer.run(prepare)", "lvvit"]


class Dataset:
    """A folder of noise and its labels."""

    def __init__(self, root: Path, count: int = 0) -> None:
        self.root = root
        self.images = root / "images"
        self.labels = root / "val_label.txt"
        self.data = root / "data"
        self.bins = manifest.bins_dir(self.data, "lvvit")
        self.images.mkdir(parents=True)
        for number in range(count):
            self.add(f"image{number:03}")
        self.label(lambda number: number % 1000)

    def add(self, name: str, seed: int = 0) -> Path:
        """Write an image, or write over it."""
        pixels = np.random.default_rng([*name.encode(), seed]).integers(0, 256, (50, 60, 3), np.uint8)
        path = self.images / f"{name}.JPEG"
        Image.fromarray(pixels).save(path)
        return path

    def label(self, label: Callable[[int], int]) -> None:
        names = sorted(path.name for path in self.images.iterdir())
        self.labels.write_text("".join(f"{name} {label(number)}\n" for number, name in enumerate(names)))

    def prepare(self, **options: object) -> Prepared:
        settings: dict[str, object] = {"recipe": SMALL, "processes": 1} | options
        recipe = settings.pop("recipe")
        return prepare_dataset(self.images, self.labels, recipe, self.data, **settings)  # type: ignore[arg-type]

    def arguments(self, *more: str) -> list[str]:
        return [*COMMAND, "--images", str(self.images), "--labels", str(self.labels), *more]

    def bin(self, name: str) -> Path:
        return bin_path(self.bins, name)

    def written(self) -> dict[str, tuple[int, int]]:
        """What tells one writing of a bin from another: its inode and time."""
        bins = (path.stat() for path in sorted(self.bins.glob("*.bin")))
        return dict(
            zip(sorted(p.stem for p in self.bins.glob("*.bin")), ((s.st_ino, s.st_mtime_ns) for s in bins), strict=True)
        )

    def journalled(self) -> list[str]:
        path = self.bins / journal.FILE_NAME
        return [line.split("\t")[0] for line in path.read_text().split("\n")[:-1]] if path.exists() else []


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path, 6)


class Stop(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(settled: int, total: int) -> None:
        if settled == count:
            raise Stop

    return progress


def slow_dataset(root: Path) -> Dataset:
    """Enough work on large images to be interrupted in the midst of it."""
    dataset = Dataset(root)
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    for number in range(60):
        (dataset.images / f"image{number:03}.JPEG").write_bytes(file.getvalue())
    dataset.label(lambda number: number)
    return dataset


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextmanager
def started(
    dataset: Dataset, is_ready: Callable[[subprocess.Popen[str]], bool] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A real farm prepare, as leader of a process group, at the point where `is_ready`: with some bins finished."""
    process = subprocess.Popen(
        dataset.arguments("--processes", "2"),
        env=os.environ | {"FARM_DATA": str(dataset.data)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            ready = is_ready or (lambda process: len(dataset.journalled()) >= 8)
            wait_for(lambda: process.poll() is not None or ready(process))
            assert process.poll() is None, "ended before it could be interrupted"
            yield process
        finally:
            process.kill()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# What is made


def test_a_bin_holds_what_the_recipe_gives(dataset: Dataset) -> None:
    dataset.prepare()

    expected = prepare_image(dataset.images / "image003.JPEG", SMALL)
    assert dataset.bin("image003").read_bytes() == expected.tobytes()


def test_the_manifest_holds_name_label_and_hash_of_every_bin(dataset: Dataset) -> None:
    dataset.prepare()

    assert list(manifest.read(dataset.bins).samples) == [
        Sample(f"image{n:03}", n, xxhash.xxh3_64_hexdigest(dataset.bin(f"image{n:03}").read_bytes())) for n in range(6)
    ]


def test_the_header_says_what_a_bin_is(dataset: Dataset) -> None:
    header = dataset.prepare().manifest.header

    assert header.model_dump() == {
        "version": 1,
        "recipe": "lvvit",
        "recipe_digest": SMALL.digest,
        "dtype": "float32",
        "shape": (3, 32, 32),
        "classes": 1000,
        "source": str(dataset.images),
    }


def test_one_process_and_three_give_the_same_manifest(dataset: Dataset, tmp_path: Path) -> None:
    one = dataset.prepare(processes=1).manifest

    dataset.data = tmp_path / "other"
    assert dataset.prepare(processes=3).manifest == one


def test_progress_counts_every_image_once(dataset: Dataset) -> None:
    told: list[tuple[int, int]] = []

    dataset.prepare(progress=lambda settled, total: told.append((settled, total)))

    assert told == [(count, 6) for count in range(7)]


def test_labels_that_do_not_fit_write_nothing(dataset: Dataset) -> None:
    dataset.labels.write_text("image000.JPEG 1\n")

    with pytest.raises(DataError, match="5 of 6 images"):
        dataset.prepare()

    assert not dataset.data.exists()


# What is kept


def test_a_second_run_makes_nothing(dataset: Dataset) -> None:
    first = dataset.prepare()
    before = dataset.written()

    second = dataset.prepare()

    assert (second.done, second.reused, dataset.written()) == (0, 6, before)
    assert second.manifest == first.manifest


def test_other_labels_rewrite_the_manifest_and_no_bin(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    dataset.label(lambda number: 999 - number)

    prepared = dataset.prepare()

    assert dataset.written() == before
    assert [sample.label for sample in manifest.read(dataset.bins).samples] == [999, 998, 997, 996, 995, 994]
    assert prepared.reused == 6


def test_more_images_leave_the_bins_that_are_there(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    dataset.add("image100")
    dataset.label(lambda number: number)

    prepared = dataset.prepare()

    assert (prepared.done, prepared.reused) == (1, 6)
    assert before.items() < dataset.written().items()


def test_a_smaller_set_leaves_the_bins_of_the_larger_for_later(dataset: Dataset) -> None:
    dataset.prepare()
    path = dataset.images / "image002.JPEG"
    path.rename(dataset.root / path.name)
    smaller = dataset.prepare(subset=True)
    (dataset.root / path.name).rename(path)

    larger = dataset.prepare()

    assert len(smaller.manifest.samples) == 5
    assert (larger.done, larger.reused) == (0, 6)


# What is made again


def redone(dataset: Dataset, before: dict[str, tuple[int, int]]) -> set[str]:
    return {name for name, identity in dataset.written().items() if identity != before.get(name)}


def test_an_altered_image_is_prepared_again(dataset: Dataset) -> None:
    first = dataset.prepare().manifest
    before = dataset.written()
    dataset.add("image002", seed=1)

    second = dataset.prepare().manifest

    assert redone(dataset, before) == {"image002"}
    assert second.samples[2].xxh3 != first.samples[2].xxh3


def test_an_altered_image_of_the_same_size_is_prepared_again(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    path = dataset.images / "image002.JPEG"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))

    dataset.prepare()

    assert redone(dataset, before) == {"image002"}


def truncate_unnoticed(path: Path) -> None:
    """As a power cut may: the length is lost, the time is not."""
    status = path.stat()
    os.truncate(path, 100)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        truncate_unnoticed,
        lambda path: path.write_bytes(bytes(SMALL.nbytes)),
    ],
    ids=["missing", "half written", "written over"],
)
def test_a_damaged_bin_is_made_again(damage: Callable[[Path], object], dataset: Dataset) -> None:
    first = dataset.prepare().manifest
    before = dataset.written()
    damage(dataset.bin("image004"))

    second = dataset.prepare()

    assert redone(dataset, before) == {"image004"}
    assert (second.done, second.reused, second.manifest) == (1, 5, first)


def test_a_bin_the_journal_does_not_know_is_made_again(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    path = dataset.bins / journal.FILE_NAME
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("image004")))

    dataset.prepare()

    assert redone(dataset, before) == {"image004"}


def test_a_torn_line_of_the_journal_costs_one_bin(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    path = dataset.bins / journal.FILE_NAME
    last = path.read_text().splitlines()[-1].split("\t")[0]
    os.truncate(path, path.stat().st_size - 30)

    dataset.prepare()

    assert redone(dataset, before) == {last}


def test_a_torn_line_of_the_journal_does_not_spoil_the_next_one(dataset: Dataset) -> None:
    dataset.prepare()
    path = dataset.bins / journal.FILE_NAME
    os.truncate(path, path.stat().st_size - 30)
    dataset.prepare()

    assert dataset.prepare().done == 0


def test_a_journal_of_noise_is_no_journal(dataset: Dataset) -> None:
    dataset.prepare()
    (dataset.bins / journal.FILE_NAME).write_bytes(b"\xff\n\t\t\t\n" + os.urandom(500) + b"\n")

    assert dataset.prepare().done == 6


def test_another_recipe_makes_everything_again(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    other = replace(SMALL, mean=(0.5, 0.5, 0.5))

    prepared = dataset.prepare(recipe=other)

    assert redone(dataset, before) == set(before)
    assert (prepared.done, prepared.manifest.header.recipe_digest) == (6, other.digest)


def test_bins_of_an_interrupted_change_of_recipe_are_not_taken_for_the_old_ones(dataset: Dataset) -> None:
    dataset.prepare()
    before = dataset.written()
    with pytest.raises(Stop):
        dataset.prepare(recipe=replace(SMALL, mean=(0.5, 0.5, 0.5)), progress=stop_after(2))

    dataset.prepare()

    assert redone(dataset, before) == set(before)


# Interrupted


def test_a_manifest_does_not_outlive_the_bins_it_vouches_for(dataset: Dataset) -> None:
    dataset.prepare()
    dataset.add("image000", seed=1)

    with pytest.raises(Stop):
        dataset.prepare(progress=stop_after(6))

    with pytest.raises(DataError, match="run farm prepare first"):
        manifest.read(dataset.bins)


def test_a_manifest_stays_valid_while_images_are_added(dataset: Dataset) -> None:
    before = dataset.prepare().manifest
    dataset.add("image100")
    dataset.label(lambda number: number)

    with pytest.raises(Stop):
        dataset.prepare(progress=stop_after(7))

    assert manifest.read(dataset.bins) == before


def test_a_manifest_stays_valid_while_an_image_that_failed_is_tried_again(dataset: Dataset) -> None:
    (dataset.images / "image001.JPEG").write_bytes(b"")
    before = dataset.prepare().manifest

    with pytest.raises(Stop):
        dataset.prepare(progress=stop_after(6))

    assert manifest.read(dataset.bins) == before


def test_an_exception_from_the_caller_ends_the_processes(dataset: Dataset) -> None:
    with pytest.raises(Stop):
        dataset.prepare(progress=stop_after(1))

    assert not multiprocessing.active_children()


def test_after_sigkill_no_finished_bin_is_made_again(tmp_path: Path) -> None:
    dataset = slow_dataset(tmp_path)
    with started(dataset) as process:
        children = descendants(process)
        process.kill()
        process.wait()
        wait_for(lambda: all(map(is_gone, children)), 5)
    noted, before = dataset.journalled(), dataset.written()

    prepared = dataset.prepare(recipe=LVVIT, processes=2)

    assert 8 <= prepared.reused == len(noted) < 60
    assert {name: dataset.written()[name] for name in noted} == {name: before[name] for name in noted}
    assert len(dataset.written()) == 60


def test_sigkill_leaves_no_process_behind(tmp_path: Path) -> None:
    with started(slow_dataset(tmp_path)) as process:
        children = descendants(process)

        process.kill()

        assert len(children) >= 2
        wait_for(lambda: all(map(is_gone, children)), 5)


def test_what_a_killed_process_was_writing_is_removed(dataset: Dataset) -> None:
    dataset.bins.mkdir(parents=True)
    (dataset.bins / ".4711.partial").write_bytes(b"half a bin")

    dataset.prepare()

    assert sorted(path.name for path in dataset.bins.iterdir() if path.suffix != ".bin") == [
        LOCK_NAME,
        journal.FILE_NAME,
        manifest.FILE_NAME,
    ]


def test_ctrl_c_stops_at_once_without_a_traceback_or_a_process(tmp_path: Path) -> None:
    dataset = slow_dataset(tmp_path)
    with started(dataset) as process:
        children = descendants(process)

        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them

        _, stderr = process.communicate(timeout=5)
        wait_for(lambda: all(map(is_gone, children)), 5)
        assert process.returncode != 0
        assert "stopped; the same command goes on from here" in stderr
        assert "Traceback" not in stderr


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2])
def test_ctrl_c_while_the_processes_start_gives_no_traceback(delay_s: float, tmp_path: Path) -> None:
    with started(slow_dataset(tmp_path), lambda process: len(descendants(process)) >= 2) as process:
        time.sleep(delay_s)

        os.killpg(process.pid, signal.SIGINT)

        _, stderr = process.communicate(timeout=5)
        assert "stopped; the same command goes on from here" in stderr
        assert "Traceback" not in stderr


def test_ctrl_c_keeps_what_was_finished(tmp_path: Path) -> None:
    dataset = slow_dataset(tmp_path)
    with started(dataset) as process:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=5)
    noted = dataset.journalled()

    prepared = dataset.prepare(recipe=LVVIT, processes=2)

    assert 8 <= prepared.reused == len(noted) < 60


def test_a_second_preparation_is_told_who_is_at_work(tmp_path: Path) -> None:
    dataset = slow_dataset(tmp_path)

    with started(dataset) as process, pytest.raises(UsageError) as caught:
        dataset.prepare()

    assert str(caught.value) == (
        f"another farm prepare (process {process.pid}) is at work in {dataset.bins}: wait for it to end"
    )


def test_the_lock_of_a_killed_preparation_holds_nobody_up(dataset: Dataset) -> None:
    dataset.prepare()
    with (dataset.bins / LOCK_NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UsageError, match="is at work"):
            dataset.prepare()

    assert dataset.prepare().reused == 6


# Images that cannot be used


@pytest.fixture
def with_bad_images(dataset: Dataset) -> Dataset:
    (dataset.images / "image001.JPEG").write_bytes(b"")
    path = dataset.images / "image004.JPEG"
    os.truncate(path, path.stat().st_size // 2)
    return dataset


def test_an_image_that_does_not_decode_is_listed_and_the_rest_made(with_bad_images: Dataset) -> None:
    prepared = with_bad_images.prepare()

    assert [failure.name for failure in prepared.failures] == ["image001", "image004"]
    assert (prepared.done, prepared.failed) == (4, 2)


def test_an_image_that_does_not_decode_is_in_the_manifest_with_the_reason(with_bad_images: Dataset) -> None:
    with_bad_images.prepare()

    assert manifest.read(with_bad_images.bins).samples[1] == Sample(
        "image001", 1, UNPREPARED, "is empty (0 bytes), expected an image"
    )


def test_a_repaired_image_is_taken_in(with_bad_images: Dataset) -> None:
    with_bad_images.prepare()
    with_bad_images.add("image001")

    prepared = with_bad_images.prepare()

    assert (prepared.done, prepared.reused, [f.name for f in prepared.failures]) == (1, 4, ["image004"])


def test_an_image_that_vanishes_while_others_are_prepared_is_listed(dataset: Dataset) -> None:
    def progress(settled: int, total: int) -> None:
        (dataset.images / "image005.JPEG").unlink(missing_ok=True)

    prepared = dataset.prepare(progress=progress)

    assert [(f.name, f.problem) for f in prepared.failures] == [
        ("image005", "cannot be read: No such file or directory")
    ]


# A disk that refuses


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """`tmp_path/data` as a file system of its own, of a size to be set."""
    target = tmp_path / "data"
    target.mkdir()

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=1m"):
        pytest.skip("needs the right to mount a file system")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(target)], check=True)

    yield resize
    subprocess.run(["umount", str(target)], check=True)


def test_a_full_disk_is_a_sentence_and_keeps_what_was_finished(
    tiny_disk: Callable[[str], None], dataset: Dataset
) -> None:
    tiny_disk("2m")
    with pytest.raises(StorageError, match=rf"cannot write {dataset.bins}/.*: No space left on device"):
        dataset.prepare(recipe=LVVIT)
    noted = dataset.journalled()
    tiny_disk("10m")

    prepared = dataset.prepare(recipe=LVVIT)

    assert 2 <= prepared.reused == len(noted) < 6
    assert prepared.done == 6 - len(noted)


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 4 KB: what a quota or a full disk does, without a disk.

    Not a fixture: the limit is the whole process's, and pytest's own output may be a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_bin_that_cannot_be_written_is_a_storage_error_with_its_path(dataset: Dataset) -> None:
    expected = rf"cannot write {dataset.bins}/image00\d.bin: File too large"
    with pytest.raises(StorageError, match=expected), small_files():
        dataset.prepare()


def test_a_bin_that_cannot_be_written_leaves_nothing_of_itself(dataset: Dataset) -> None:
    with pytest.raises(StorageError), small_files():
        dataset.prepare()

    assert sorted(path.name for path in dataset.bins.iterdir()) == [LOCK_NAME, journal.FILE_NAME]


def test_a_place_without_permission_to_write_is_a_storage_error() -> None:
    # Not tmp_path: where root runs the tests, nobody else may walk through it.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        dataset = Dataset(Path(name), 1)
        dataset.data.mkdir(mode=0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=f"cannot write {dataset.bins}: Permission denied"):
                dataset.prepare()
        finally:
            if is_root:
                os.seteuid(0)


def test_a_file_in_place_of_the_data_directory_is_a_storage_error(dataset: Dataset) -> None:
    dataset.data.touch()

    with pytest.raises(StorageError, match=f"cannot write {dataset.bins}: Not a directory"):
        dataset.prepare()


# The command


@pytest.fixture
def command(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`farm prepare lvvit` in this process."""
    monkeypatch.setenv("FARM_DATA", str(dataset.data))

    def run(
        model: str = "lvvit", *, labels: Path | None = None, json: bool = False, input_type: str = "float32"
    ) -> None:
        cli.prepare(model, dataset.images, labels or dataset.labels, processes=1, json=json, input_type=input_type)

    return run


def test_the_command_says_what_it_did(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    command()

    assert "6 made, 0 were there, 0 failed" in capsys.readouterr().out


def test_bins_of_one_model_serve_the_others_of_its_recipe(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    command("twins")
    capsys.readouterr()

    command("focal")

    printed = capsys.readouterr().out.splitlines()
    directory = dataset.data / "bins" / "in256-float32"
    assert printed[0] == "in256-float32 was there: serves twins, focal, conformer"
    assert printed[1].startswith(f"focal: 6 samples in {directory}: 0 made, 6 were there, 0 failed")
    assert manifest.read(directory).header.recipe_digest == IN256.digest


def test_what_was_made_now_was_not_there(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    command()
    dataset.add("image100")
    dataset.label(lambda number: number)
    command()

    assert "was there: serves" not in capsys.readouterr().out


def test_pixels_for_the_device_lie_beside_normalised_arrays(
    command: Callable[..., None], dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    command(json=True)
    command(json=True, input_type="uint8")

    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [Path(printed["directory"]).name for printed in (first, second)] == ["lvvit-float32", "lvvit-uint8"]
    assert second["input"] == "uint8"
    assert bin_path(Path(second["directory"]), "image003").stat().st_size == 3 * 224 * 224


def test_without_images_the_command_says_what_to_type(command: Callable[..., None], dataset: Dataset) -> None:
    command()

    with pytest.raises(UsageError) as caught:
        cli.prepare("conformer", input_type="uint8")

    assert str(caught.value) == (
        f"no prepared data in {dataset.data}/bins/in256-uint8: run farm prepare first "
        "(farm prepare conformer --images DIR --labels val_label.txt --input uint8)"
    )


def test_images_in_class_folders_are_prepared_without_labels(dataset: Dataset, tmp_path: Path) -> None:
    folders = tmp_path / "val"
    for number in range(1000):
        (folders / f"n{number:08}").mkdir(parents=True)
    for number, path in enumerate(sorted(dataset.images.iterdir())):
        path.rename(folders / f"n{number * 111:08}" / path.name)

    prepared = prepare_dataset(folders, None, SMALL, dataset.data, processes=1)

    assert [sample.label for sample in prepared.manifest.samples] == [0, 111, 222, 333, 444, 555]
    assert prepared.done == 6


def test_the_command_exits_with_3_and_names_the_images_that_failed(
    with_bad_images: Dataset, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as caught:
        command()

    assert caught.value.exit_code == 3
    assert "image001 is empty (0 bytes), expected an image\nimage004 does not decode" in capsys.readouterr().err


def test_the_command_prints_one_json_object(
    with_bad_images: Dataset, command: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit):
        command(json=True)

    printed = json.loads(capsys.readouterr().out)
    assert printed["samples"] == {"total": 6, "made": 4, "reused": 0, "failed": 2}
    assert [failure["name"] for failure in printed["failures"]] == ["image001", "image004"]
    assert printed["manifest"] == manifest.read(with_bad_images.bins).digest


def test_labels_that_are_malformed_exit_with_1(command: Callable[..., None], dataset: Dataset) -> None:
    dataset.labels.write_text("image000.JPEG\n")

    with pytest.raises(DataError) as caught:
        command()

    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "options", [{"model": "resnet"}, {"labels": Path("none.txt")}], ids=["unknown model", "no labels"]
)
def test_what_cannot_be_asked_exits_with_2(options: dict[str, object], command: Callable[..., None]) -> None:
    with pytest.raises(UsageError) as caught:
        command(**options)

    assert caught.value.exit_code == 2


def test_a_pipe_gets_sparse_lines_instead_of_a_bar(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path, 2)

    process = subprocess.run(
        dataset.arguments("--processes", "1"),
        env=os.environ | {"FARM_DATA": str(dataset.data)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert process.stderr == "preparing 2 images, 0 of them were there\n"


def test_preparing_imports_no_torch_celery_or_database() -> None:
    code = "import sys, farm.data.prepare as p; print(*{'torch', 'celery', 'sqlalchemy', 'typer'} & set(sys.modules))"

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == "\n"
