"""Windows through the pipeline: batches that cross images, buffers that are held, faults that name an image."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from farm.data import manifest
from farm.data.manifest import UNPREPARED, Manifest, Sample
from farm.data.prepare import prepare_segmentation
from farm.data.recipes import SEG
from farm.errors import DeviceCrashed
from farm.jobs import ResultState, SampleResult, ShardResult
from farm.metrics import slide_merge
from tests.datasets import write_ade
from workers.backends.base import Load, TensorSpec
from workers.backends.simulated import scores
from workers.pipeline import NonFinite, Pipeline, Plan

CELLS = 32  #: of a window's head along either side: small, for the simulated device makes noise for each
#: Two windows, one, three, five, two one above the other.
SIZES = ((96, 120), (64, 64), (64, 130), (60, 230), (120, 96))
WINDOWS = (2, 1, 3, 5, 2)
BS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The bins' directory and the manifest."""
    scratch = tmp_path_factory.mktemp("windows")
    images, annotations = write_ade(scratch, SIZES)
    prepared = prepare_segmentation(images, annotations, SEG, scratch / "data", processes=1)
    assert [sample.parts for sample in prepared.manifest.samples] == list(WINDOWS)
    return prepared.directory, prepared.manifest


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        yield pipeline


def simulated(*faults: Mapping[str, object], bs: int = BS) -> Load:
    return Load(
        backend="simulated",
        path="",
        input=TensorSpec(name="input", dtype="float32", shape=(bs, 3, 512, 512)),
        output=TensorSpec(name="output", dtype="float32", shape=(bs, 150, CELLS, CELLS)),
        device="h:0",
        options={"simulated": json.dumps({"compute_ms": 0, "faults": faults})},
    )


def plan_of(
    data: tuple[Path, Manifest], load: Load, *, attempt_id: int = 1, isolating: bool = False, before: bool = False
) -> Plan:
    directory, found = data
    return Plan(
        attempt_id=attempt_id,
        load=load,
        dataset="ade20k",
        directory=directory,
        samples=found.samples,
        isolating=isolating,
        non_finite_before=before,
    )


def hash_of(sample: Sample, part: int) -> str:
    assert sample.windows is not None
    return sample.windows.xxh3[part]


def expected(sample: Sample) -> NDArray[np.uint8]:
    """What the merge makes of what the simulated device answers, computed here."""
    windows = sample.windows
    assert windows is not None
    logits = [scores(int(xxh3, 16), 150 * CELLS * CELLS).reshape(150, CELLS, CELLS) for xxh3 in windows.xxh3]
    return slide_merge.merge(logits, windows.original, windows.resized)


def label_map(row: SampleResult) -> NDArray[np.uint8]:
    assert row.segments is not None
    with Image.open(io.BytesIO(row.segments.label_map)) as image:
        found = np.array(image)
    assert hashlib.sha256(found.tobytes()).hexdigest() == row.segments.sha256
    assert found.shape == (row.segments.height, row.segments.width)
    return found


def assert_right(result: ShardResult, data: tuple[Path, Manifest], *, but: Mapping[str, str] | None = None) -> None:
    """Every image is as computed here, but for those named, which failed for a reason that holds these words."""
    failed = but or {}
    assert [row.name for row in result.samples] == [sample.name for sample in data[1].samples]
    for row, sample in zip(result.samples, data[1].samples, strict=True):
        if sample.name in failed:
            assert row.state is ResultState.FAILED
            assert failed[sample.name] in row.reason
            assert row.segments is None
        else:
            assert row.state is ResultState.SCORED, row.reason
            np.testing.assert_array_equal(label_map(row), expected(sample))


@pytest.mark.parametrize("bs", [1, 2, 4, 8])
def test_label_maps_are_the_merged_windows_at_any_batch_size(
    bs: int, pipeline: Pipeline, data: tuple[Path, Manifest]
) -> None:
    result = pipeline.run(plan_of(data, simulated(bs=bs)))

    assert_right(result, data)
    assert len(result.batch_ms) == {1: 13, 2: 7, 4: 4, 8: 2}[bs]


def test_more_threads_change_no_pixel_and_serve_all_runs(data: tuple[Path, Manifest]) -> None:
    with closing(Pipeline(deadline_s=60.0, threads=3)) as pipeline:
        for attempt in (1, 2, 3):
            assert_right(pipeline.run(plan_of(data, simulated(bs=2), attempt_id=attempt)), data)

        assert 1 <= sum(thread.name.startswith("merge") for thread in threading.enumerate()) <= 3


def test_areas_are_counted_against_the_annotation(pipeline: Pipeline, data: tuple[Path, Manifest]) -> None:
    directory, found = data

    result = pipeline.run(plan_of(data, simulated()))

    for row, sample in zip(result.samples, found.samples, strict=True):
        assert row.segments is not None
        with Image.open(manifest.annotation_path(directory, sample.name)) as image:
            truth = np.array(image).astype(int)
        known = (truth > 0) & (truth < 151)
        predicted = expected(sample).astype(int)
        areas = np.frombuffer(row.segments.areas, "<u4").reshape(3, 150)
        for label in range(150):
            assert areas[0, label] == np.sum(known & (predicted == label) & (truth == label + 1))
            assert areas[1, label] == np.sum(known & (predicted == label))
            assert areas[2, label] == np.sum(truth == label + 1)


def test_many_shards_in_a_row_leave_no_buffer_behind(pipeline: Pipeline, data: tuple[Path, Manifest]) -> None:
    load = simulated(bs=1)
    for attempt in range(1, 5):
        pipeline.read_ahead(plan_of(data, load, attempt_id=attempt + 1))
        assert_right(pipeline.run(plan_of(data, load, attempt_id=attempt)), data)


@pytest.mark.parametrize("part", [0, 2, 4])
def test_an_isolating_attempt_names_the_image_whose_window_breaks_the_device(
    part: int, pipeline: Pipeline, data: tuple[Path, Manifest]
) -> None:
    culprit = data[1].samples[3]
    load = simulated({"kind": "crash", "sample": hash_of(culprit, part)})
    with pytest.raises(DeviceCrashed, match=culprit.name):
        pipeline.run(plan_of(data, load))

    result = pipeline.run(plan_of(data, load, attempt_id=2, isolating=True))

    assert_right(result, data, but={culprit.name: "breaks the device process"})


def test_logits_that_are_no_numbers_are_seen_twice_and_then_fail_their_image(
    pipeline: Pipeline, data: tuple[Path, Manifest]
) -> None:
    culprit = data[1].samples[2]
    load = simulated({"kind": "nan", "sample": hash_of(culprit, 1)})
    with pytest.raises(NonFinite, match=culprit.name):
        pipeline.run(plan_of(data, load))

    result = pipeline.run(plan_of(data, load, attempt_id=2, before=True))

    assert_right(result, data, but={culprit.name: "not finite numbers"})


def test_an_image_that_was_not_prepared_is_its_own_failure(pipeline: Pipeline, data: tuple[Path, Manifest]) -> None:
    directory, found = data
    broken = Sample(found.samples[1].name, 0, UNPREPARED, "has no annotation of its name")
    samples = (found.samples[0], broken, *found.samples[2:])

    result = pipeline.run(plan_of((directory, Manifest(found.header, samples)), simulated()))

    assert_right(result, data, but={broken.name: "was not prepared: has no annotation of its name"})
