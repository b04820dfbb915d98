"""Folders of results against what should be in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from farm.data import manifest
from farm.data.ade20k import read_annotation
from farm.data.manifest import UNPREPARED, Manifest, Sample
from farm.data.prepare import prepare_segmentation
from farm.data.recipes import SEG
from farm.digest import answers_digest
from farm.errors import DataError, UsageError
from farm.metrics import miou, slide_merge, topk
from farm.reports.ingest import ingest, read
from farm.reports.outputs import encoded
from farm.settings import Settings
from tests.datasets import name_of, write_ade, write_bins
from workers.backends.simulated import scores

COUNT = 12


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Manifest]:
    settings = Settings(home=tmp_path_factory.mktemp("ingest"))
    return settings, write_bins(settings.data_dir, COUNT)


@pytest.fixture
def folder(prepared: tuple[Settings, Manifest], tmp_path: Path) -> Path:
    """Every sample's scores, as TXT."""
    folder = tmp_path / "result"
    folder.mkdir()
    for sample in prepared[1].samples:
        write(folder, f"{sample.name}_0.txt", scores(int(sample.xxh3, 16), 1000))
    return folder


def write(folder: Path, name: str, output: NDArray[Any]) -> None:
    form = Path(name).suffix.removeprefix(".").upper()
    (folder / name).write_bytes(b"".join(encoded(output, form)))


def digest_of(samples: Manifest, *, without: str = "") -> str:
    def answer(sample: Sample) -> str | None:
        order = np.argsort(-scores(int(sample.xxh3, 16), 1000), kind="stable")[:5]
        return None if sample.name == without else ",".join(map(str, order))

    return answers_digest((sample.name, answer(sample)) for sample in samples.samples)


@pytest.mark.parametrize("form", ["TXT", "BIN", "NPY"])
def test_every_format_gives_the_jobs_digest_and_accuracy(
    form: str, prepared: tuple[Settings, Manifest], tmp_path: Path
) -> None:
    for sample in prepared[1].samples:
        write(tmp_path, f"{sample.name}_0.{form.lower()}", scores(int(sample.xxh3, 16), 1000))

    found = ingest(prepared[0], "lvvit", tmp_path)

    ranks = [topk.ranks(scores(int(s.xxh3, 16), 1000)[None], [s.label])[0] for s in prepared[1].samples]
    assert found["digest"] == digest_of(prepared[1])
    assert found["metrics"] == {"top1": topk.percent(ranks.count(1), COUNT), "top5": 100 * np.mean(np.less(ranks, 6))}
    assert found["format"] == form
    assert found["samples"] == {"total": COUNT, "scored": COUNT, "lacking": 0}
    assert (found["partial"], found["strangers"], found["simulated"]) == (False, [], False)


def _missing(path: Path) -> None:
    path.unlink()


def _short(path: Path) -> None:
    path.write_text(" ".join(path.read_text().split()[:999]) + " \n")


def _nan(path: Path) -> None:
    path.write_text("nan " + path.read_text().split(" ", 1)[1])


def _words(path: Path) -> None:
    path.write_text("no numbers \n")


def _empty(path: Path) -> None:
    path.write_text("")


def _twice(path: Path) -> None:
    other = path.parent / "device1_1"
    other.mkdir()
    (other / path.name).write_text(path.read_text())


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_missing, "has no results"),
        (_short, "has 999 values, expected 1000"),
        (_nan, "not finite numbers"),
        (_words, "does not hold numbers as TXT"),
        (_empty, "has 0 values, expected 1000"),
        (_twice, "is there 2 times"),
    ],
)
def test_a_sample_without_sound_results_is_named_and_the_others_are_scored(
    spoil: Callable[[Path], None], reason: str, prepared: tuple[Settings, Manifest], folder: Path
) -> None:
    spoil(folder / f"{name_of(5)}_0.txt")

    found = ingest(prepared[0], "lvvit", folder)

    ((lacking,),) = (found["lacking"],)
    assert lacking["name"] == name_of(5)
    assert reason in lacking["reason"]
    assert found["partial"] is True
    assert found["samples"] == {"total": COUNT, "scored": COUNT - 1, "lacking": 1}
    assert found["digest"] == digest_of(prepared[1], without=name_of(5))


def test_results_that_are_nobodys_are_named(prepared: tuple[Settings, Manifest], folder: Path) -> None:
    for name in ("unknown_0.txt", f"{name_of(3)}_1.txt", "notes.txt"):
        (folder / name).write_text("1.0 \n")
    (folder / "sumary.json").write_text("{}")

    found = ingest(prepared[0], "lvvit", folder)

    assert found["strangers"] == sorted(["unknown_0.txt", f"{name_of(3)}_1.txt", "notes.txt"])
    assert found["digest"] == digest_of(prepared[1])


def test_results_of_several_devices_are_one_set(prepared: tuple[Settings, Manifest], folder: Path) -> None:
    for device in (0, 1):
        other = folder / f"device{device}_{device}"
        other.mkdir()
        for sample in prepared[1].samples[device::2]:
            (folder / f"{sample.name}_0.txt").rename(other / f"{sample.name}_0.txt")

    assert ingest(prepared[0], "lvvit", folder)["digest"] == digest_of(prepared[1])


def test_labels_can_be_given_instead_of_prepared_data(
    prepared: tuple[Settings, Manifest], folder: Path, tmp_path: Path
) -> None:
    labels = tmp_path / "val_label.txt"
    best = {s.name: int(scores(int(s.xxh3, 16), 1000).argmax()) for s in prepared[1].samples}
    labels.write_text("".join(f"{name}.JPEG {label}\n" for name, label in reversed(best.items())))

    found = ingest(Settings(home=tmp_path / "nothing"), "lvvit", folder, truth=labels)

    assert found["metrics"] == {"top1": 100.0, "top5": 100.0}
    assert found["digest"] == digest_of(prepared[1])


def test_a_tie_in_six_decimals_is_told_and_the_lowest_class_goes_first(
    prepared: tuple[Settings, Manifest], folder: Path
) -> None:
    row = np.linspace(0, 1, 1000, dtype=np.float32)
    row[[3, 900]] = 2.0, 2.0000002
    write(folder, f"{name_of(1)}_0.txt", row)
    row[[3, 4, 5, 6, 7, 8]] = 9, 8, 7, 6, 5, 5.0000005  # the sixth is as good as the fifth
    write(folder, f"{name_of(2)}_0.txt", row)
    row[[10, 11]] = 0.25  # nobody sees these
    row[8] = 4.9
    write(folder, f"{name_of(3)}_0.txt", row)

    found = ingest(prepared[0], "lvvit", folder)

    assert found["ties"] == [name_of(1), name_of(2)]


def test_what_is_no_folder_of_results_is_refused(
    prepared: tuple[Settings, Manifest], folder: Path, tmp_path: Path
) -> None:
    settings = prepared[0]
    with pytest.raises(UsageError, match="cannot read the results"):
        ingest(settings, "lvvit", tmp_path / "none")
    with pytest.raises(UsageError, match="expected TXT, BIN, NPY"):
        ingest(settings, "lvvit", folder, outfmt="txt")
    with pytest.raises(UsageError, match=r"no results in .*suffix \.bin"):
        ingest(settings, "lvvit", folder, outfmt="BIN")
    with pytest.raises(UsageError, match="or say --labels"):
        ingest(Settings(home=tmp_path / "nothing"), "lvvit", folder)
    (folder / f"{name_of(1)}_0.bin").write_bytes(bytes(4000))
    with pytest.raises(UsageError, match="TXT and BIN: choose with --outfmt"):
        ingest(settings, "lvvit", folder)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "dog_0.txt").write_text("1 \n")
    with pytest.raises(DataError, match=f"none of the .txt files .* expected {name_of(1)}_0.txt and 11 others"):
        ingest(settings, "lvvit", strange)


def test_a_simulated_folder_says_so(prepared: tuple[Settings, Manifest], folder: Path) -> None:
    folder.with_name("result_summary.json").write_text(json.dumps({"simulated": True}))

    assert ingest(prepared[0], "lvvit", folder)["simulated"] is True


def test_a_name_is_matched_up_to_its_first_dot(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a.x.JPEG 1\nb.c.JPEG 2\nd.JPEG 3\n")
    results = tmp_path / "results"
    results.mkdir()
    write(results, "a_0.bin", np.zeros(1000, np.float32))
    write(results, "b.c_0.bin", np.zeros(1000, np.float32))
    for name in ("d_0.bin", "d.e_0.bin"):
        write(results, name, np.zeros(1000, np.float32))

    found = ingest(Settings(home=tmp_path), "lvvit", results, truth=labels)

    assert [each["name"] for each in found["lacking"]] == ["d"]
    assert found["samples"]["scored"] == 2
    assert found["strangers"] == []


def test_values_are_read_as_they_were_written(tmp_path: Path) -> None:
    values = scores(1, 8)
    write(tmp_path, "x_0.npy", values)
    np.testing.assert_array_equal(read(tmp_path / "x_0.npy", [(2, 4)]), values.reshape(2, 4))
    np.save(tmp_path / "half_0.npy", values.astype(np.float16))
    assert read(tmp_path / "half_0.npy", [(8,)]).dtype == np.float32
    np.save(tmp_path / "pickle_0.npy", np.array([{}] * 8), allow_pickle=True)
    with pytest.raises(DataError, match="does not hold numbers"):
        read(tmp_path / "pickle_0.npy", [(8,)])
    (tmp_path / "odd_0.bin").write_bytes(bytes(9))
    with pytest.raises(DataError, match="does not hold numbers as BIN"):
        read(tmp_path / "odd_0.bin", [(8,)])


# -- segmentation ----------------------------------------------------------------------------------------------------

SHAPE = (150, 128, 128)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Manifest]:
    """A home, a folder of results of the small head, and the manifest: an image of two windows, one of one."""
    home = tmp_path_factory.mktemp("windows")
    pictures, annotations = write_ade(home, ((96, 120), (64, 64)))
    prepared = prepare_segmentation(pictures, annotations, SEG, home / "data", processes=1)
    folder = home / "result"
    folder.mkdir()
    for sample in prepared.manifest.samples:
        assert sample.windows is not None
        paths = manifest.window_paths(prepared.directory, sample.name, sample.windows)
        for path, logits in zip(paths, logits_of(sample), strict=True):
            write(folder, f"{path.stem}_0.bin", logits)
    return home, folder, prepared.manifest


def logits_of(sample: Sample) -> list[NDArray[np.float32]]:
    assert sample.windows is not None
    return [scores(int(xxh3, 16), int(np.prod(SHAPE))).reshape(SHAPE) for xxh3 in sample.windows.xxh3]


def test_windows_are_merged_into_label_maps(images: tuple[Path, Path, Manifest]) -> None:
    home, folder, data = images
    answers, areas = {}, np.zeros((3, 150), np.int64)
    for sample in data.samples:
        assert sample.windows is not None
        label_map = slide_merge.merge(logits_of(sample), sample.windows.original, sample.windows.resized)
        answers[sample.name] = hashlib.sha256(label_map.tobytes()).hexdigest()
        areas += miou.areas(label_map, read_annotation(home / "annotations" / f"{sample.name}.png"))

    by_manifest = ingest(Settings(home=home), "swin", folder)
    by_annotations = ingest(Settings(home=home / "none"), "swin", folder, truth=home / "annotations")

    assert by_manifest["digest"] == by_annotations["digest"] == answers_digest(answers.items())
    assert by_manifest["metrics"]["miou"] == by_annotations["metrics"]["miou"] == miou.metrics(areas).miou
    assert by_manifest["samples"]["scored"] == 2
    assert len(by_manifest["classes"]) == 150


def test_an_image_that_lacks_a_window_is_named_with_it(images: tuple[Path, Path, Manifest], tmp_path: Path) -> None:
    home, folder, data = images
    partial = tmp_path / "partial"
    partial.mkdir()
    for path in sorted(folder.iterdir())[1:]:
        (partial / path.name).symlink_to(path)

    found = ingest(Settings(home=home), "swin", partial)

    first = data.samples[0].name
    assert found["lacking"] == [
        {"name": first, "reason": "has no results of its window 0,0,512,512-96,120,3-1,512,640"}
    ]
    assert found["samples"]["scored"] == 1


def test_an_image_that_was_not_prepared_lacks_results(images: tuple[Path, Path, Manifest], tmp_path: Path) -> None:
    _, folder, data = images
    directory = manifest.bins_dir(tmp_path / "data", "seg")
    directory.mkdir(parents=True)
    broken = Sample(data.samples[1].name, 0, UNPREPARED, "is no picture")
    manifest.write(directory, data.header, [data.samples[0], broken])

    found = ingest(Settings(home=tmp_path), "swin", folder)

    assert {"name": broken.name, "reason": "was not prepared: is no picture"} in found["lacking"]
    assert len(found["strangers"]) == 1
