"""Segmentation through the farm: real windows, a real graph with swin's tensors, against the published arithmetic."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm import artifacts
from farm.data import manifest, slide
from farm.data.manifest import Header, Sample, Windows
from farm.data.recipes import SEG
from farm.data.slide import Size
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import ADE_SIZES, ade_name, published_logits, write_ade, write_swin_onnx

SIZES = Path(__file__).parents[1] / "golden" / "ade20k_val_sizes.csv"
NAMES = [ade_name(number) for number in range(1, len(ADE_SIZES) + 1)]
#: Logits closer than this may change places by rounding in float32; they are about 3 apart on average.
NEAR = 1e-4


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    """A home with bins and annotations of all kinds of sizes, and a graph for each head and batch size."""
    farm = Farm(tmp_path_factory.mktemp("ade") / "home")
    images, annotations = write_ade(farm.home.parent)
    farm.run("prepare", "swin", "--images", str(images), "--annotations", str(annotations))
    for bs, head in ((1, "full"), (1, "small"), (4, "small")):
        write_swin_onnx(farm.home / "data", bs, head)
    return farm


@pytest.fixture(scope="module")
def logits(prepared: Farm) -> Mapping[str, NDArray[np.float64]]:
    """What the published way takes the argmax of, by name."""
    data_dir = prepared.home / "data"
    graph = artifacts.directory(data_dir, "swin") / "tiny_bs1_full_0.onnx"
    return {name: published_logits(data_dir, graph, name) for name in NAMES}


@pytest.fixture
def copy(prepared: Farm, tmp_path: Path) -> Farm:
    """The same in a home of its own, to be tampered with."""
    shutil.copytree(prepared.home / "data", tmp_path / "home" / "data")
    return Farm(tmp_path / "home")


def label_maps(farm: Farm, job: int) -> dict[str, NDArray[np.uint8]]:
    rows = farm.sql("SELECT name, label_map, sha256 FROM segments WHERE job_id = ? AND superseded = 0", job)
    found = {}
    for name, png, sha256 in rows:
        with Image.open(io.BytesIO(png)) as image:
            found[name] = np.array(image)
        assert hashlib.sha256(found[name].tobytes()).hexdigest() == sha256
    return found


def assert_published(found: Mapping[str, NDArray[np.uint8]], logits: Mapping[str, NDArray[np.float64]]) -> None:
    """Every label map is the argmax, but for pixels whose two best logits are nearly equal."""
    assert list(found) == NAMES
    for name, label_map in found.items():
        expected = logits[name].argmax(axis=0)
        assert label_map.shape == expected.shape
        rows, columns = np.nonzero(label_map != expected)
        lead = (
            logits[name][expected[rows, columns], rows, columns] - logits[name][label_map[rows, columns], rows, columns]
        )
        assert (lead < NEAR).all(), f"{name}: {len(rows)} pixels differ, one by {lead.max()}"


def metrics_of(farm: Farm, maps: Mapping[str, NDArray[np.uint8]]) -> dict[str, float]:
    """Percent, by plain counting over all pixels of all images."""
    predicted, truth = [], []
    for name, label_map in maps.items():
        with Image.open(farm.home / "data/bins/seg-float32/annotations" / f"{name}.png") as image:
            annotation = np.array(image)
        known = (annotation != 0) & (annotation != 255)
        predicted.append(label_map[known])
        truth.append(annotation[known].astype(int) - 1)
    p, t = np.concatenate(predicted), np.concatenate(truth)
    both = np.array([np.sum((p == c) & (t == c)) for c in range(150)])
    either = np.array([np.sum((p == c) | (t == c)) for c in range(150)])
    labelled = np.array([np.sum(t == c) for c in range(150)])
    return {
        "miou": 100 * float(np.mean(both[either > 0] / either[either > 0])),
        "aacc": 100 * float(both.sum() / labelled.sum()),
        "macc": 100 * float(np.mean(both[labelled > 0] / labelled[labelled > 0])),
    }


@pytest.mark.parametrize(("bs", "head"), [(1, "full"), (1, "small"), (4, "small")])
def test_label_maps_are_the_published_ones_and_the_metrics_theirs(
    bs: int, head: str, prepared: Farm, logits: Mapping[str, NDArray[np.float64]]
) -> None:
    report = prepared.submit("--bs", str(bs), "--head", head, model="swin")

    maps = label_maps(prepared, report["job"])
    assert_published(maps, logits)
    assert report["state"] == "done"
    assert report["metrics"] == pytest.approx(metrics_of(prepared, maps), abs=1e-9)
    assert report["samples"] == {"total": 7, "scored": 7, "failed": 0}
    assert report["windows"] == 2 + 1 + 2 + 5 + 2 + 5 + 2
    if bs == 1:  # at 4 it is two shards, and one device may be quick enough to take both
        assert {line["device"] for line in report["devices"]} == {"localhost:0", "localhost:1"}
    lines = (f"{name}\t{hashlib.sha256(maps[name].tobytes()).hexdigest()}\n" for name in NAMES)
    assert report["digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_digest_is_the_same_on_one_device_and_with_workers_killed(copy: Farm) -> None:
    calm = copy.submit("--bs", "4", "--head", "small", "--devices", "localhost:1", model="swin")
    copy.run("up")
    try:
        copy.run("submit", "swin", "--bs", "4", "--head", "small", "--no-wait")
        for _ in range(6):
            for pid in copy.pids("tasks.worker"):
                os.kill(pid, signal.SIGKILL)
            sleep(0.4)
        copy.run("wait", "2")
        report = copy.json("report", "2")
    finally:
        copy.run("down")

    assert report["digest"] == calm["digest"]
    assert_one_row_a_sample(copy, 2, NAMES)
    assert len(label_maps(copy, 2)) == len(NAMES)


def test_what_is_missing_or_was_altered_is_that_samples_failure_by_name(copy: Farm) -> None:
    directory = copy.home / "data/bins/seg-float32"
    (directory / "annotations" / f"{NAMES[0]}.png").unlink()
    with (directory / "annotations" / f"{NAMES[2]}.png").open("r+b") as file:
        file.seek(60)
        file.write(b"\xff")
    last = sorted(directory.glob(f"{NAMES[3]}-*.bin"))[-1]
    last.write_bytes(last.read_bytes()[:-4])

    report = copy.submit("--bs", "4", "--head", "small", model="swin", code=3)

    failed = {line["name"]: line["reason"] for line in report["failed"]}
    assert list(failed) == [NAMES[0], NAMES[2], NAMES[3]]
    assert "No such file" in failed[NAMES[0]]
    assert "annotation was altered" in failed[NAMES[2]]
    assert "bin has 3145724 bytes, expected 3145728" in failed[NAMES[3]]
    assert report["samples"] == {"total": 7, "scored": 4, "failed": 3}
    maps = label_maps(copy, report["job"])
    assert sorted(maps) == [NAMES[1], *NAMES[4:]]
    assert report["metrics"] == pytest.approx(metrics_of(copy, maps), abs=1e-9)


@pytest.fixture(scope="module")
def job(prepared: Farm) -> int:
    number: int = prepared.submit("--bs", "1", "--head", "small", model="swin")["job"]
    return number


def test_a_mask_is_the_label_map_as_the_dataset_stores_it(prepared: Farm, job: int, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"

    prepared.run("show", str(job), "--sample", NAMES[0], "--format", "mask", "-o", str(path))

    with Image.open(path) as image:
        assert image.mode == "L"
        np.testing.assert_array_equal(np.array(image), label_maps(prepared, job)[NAMES[0]] + 1)


@pytest.mark.parametrize("number", [0, 5])
def test_a_picture_shows_the_image_beside_what_was_made_of_it(
    number: int, prepared: Farm, job: int, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"

    printed = prepared.run("show", str(job), "--sample", NAMES[number], "-o", str(path)).stdout

    assert printed == f"{path}\n"
    height, width = ADE_SIZES[number]
    with Image.open(path) as image:
        assert image.width == 4 * width + 5 * 8
        assert image.height > height
        shown = np.array(image.crop((8, 44, 8 + width, 44 + height)), np.int16)
    with Image.open(prepared.home.parent / "images" / f"{NAMES[number]}.jpg") as original:
        assert np.abs(shown - np.array(original, np.int16)).max() == 0


def test_what_cannot_be_shown_is_said(prepared: Farm, job: int) -> None:
    assert "no label map of 'nobody'" in prepared.run("show", str(job), "--sample", "nobody", code=2).stderr
    assert (
        "expected picture or mask" in prepared.run("show", str(job), "--sample", "x", "--format", "gif", code=2).stderr
    )


def test_rescoring_against_the_same_annotations_changes_nothing(prepared: Farm, job: int, tmp_path: Path) -> None:
    before: dict[str, Any] = prepared.json("report", str(job))
    annotations = prepared.home.parent / "annotations"

    again = prepared.json("rescore", str(job), "--labels", str(annotations))

    assert again["metrics"] == before["metrics"]
    assert again["classes"] == before["classes"]
    shutil.copytree(annotations, tmp_path / "perfect")
    for name, label_map in label_maps(prepared, job).items():
        Image.fromarray(label_map + 1).save(tmp_path / "perfect" / f"{name}.png")
    assert prepared.json("rescore", str(job), "--labels", str(tmp_path / "perfect"))["metrics"] == {
        "miou": 100.0,
        "aacc": 100.0,
        "macc": 100.0,
    }
    (tmp_path / "perfect" / f"{NAMES[1]}.png").unlink()
    done = prepared.run("rescore", str(job), "--labels", str(tmp_path / "perfect"), code=1)
    assert f"has no annotation for {NAMES[1]}" in done.stderr


def test_the_table_by_class_is_the_guides(prepared: Farm, job: int) -> None:
    printed = prepared.run("report", str(job), "--per-class").stdout
    lines = printed[printed.index("per class results:") :].splitlines()

    assert (
        lines[1:4]
        == [
            "+---------------------+-------+-------+",
            "|        Class        |  IoU  |  Acc  |",
            "+---------------------+-------+-------+",
        ]
        or lines[2].replace(" ", "") == "|Class|IoU|Acc|"
    )
    assert len(lines) == 1 + 3 + 150 + 1 + 2 + 5
    assert lines[4].strip("| ").startswith("wall")
    assert lines[-4].replace(" ", "") == "|aAcc|mIoU|mAcc|"


def test_a_dry_run_tells_windows_and_buffers(prepared: Farm) -> None:
    plan = prepared.json("submit", "swin", "--bs", "1", "--head", "full", "--dry-run")

    assert (plan["samples"], plan["windows"]) == (7, 19)
    assert plan["bytes"] == 19 * 3_145_728
    assert plan["ring_bytes"] == 4096 + 4 * 3_145_728 + 3 * 157_286_400  # a page says how far the device is


def test_a_dry_run_on_the_real_sizes_has_3686_windows(tmp_path: Path) -> None:
    directory = manifest.bins_dir(tmp_path / "data", "seg")
    directory.mkdir(parents=True)
    with SIZES.open() as file:
        rows = [(row["name"], Size(int(row["height"]), int(row["width"]))) for row in csv.DictReader(file)]
    samples = []
    for name, size in rows:
        resized = slide.resized(size)
        hashes = ("0" * 16,) * len(slide.windows(resized))
        samples.append(Sample(name, 0, str(Windows(original=size, resized=resized, annotation="0" * 16, xxh3=hashes))))
    header = Header(recipe="seg", recipe_digest=SEG.digest, dtype="float32", shape=SEG.shape, classes=150)
    manifest.write(directory, header, samples)
    farm = Farm(tmp_path)

    plan = farm.json("submit", "swin", "--backend", "simulated", "--head", "small", "--dry-run")

    assert (plan["samples"], plan["windows"]) == (2000, 3686)
    assert plan["bytes"] == 3686 * 3_145_728
    assert plan["expected_s"] == pytest.approx(3686 / (16.74 * 2), abs=0.1)
    assert plan["shards"] > 40


def test_nothing_is_left(prepared: Farm) -> None:
    wait_for(lambda: not prepared.processes(), 6.0, "processes end")
    assert manifest.read(prepared.home / "data/bins/seg-float32").samples
