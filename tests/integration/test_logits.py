"""Raw outputs kept by a pipeline: those of each sample, nothing of an attempt that came to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from farm.data import manifest, slide
from farm.data.manifest import Manifest
from farm.data.prepare import prepare_segmentation
from farm.data.recipes import SEG
from farm.errors import DeviceCrashed, HostError
from farm.jobs import ResultState
from farm.logits import Reader
from tests.datasets import write_ade, write_bins
from workers.backends.base import Load, TensorSpec
from workers.backends.simulated import scores
from workers.pipeline import Aborted, NonFinite, Pipeline, Plan

BS, COUNT, CELLS = 4, 10, 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    scratch = tmp_path_factory.mktemp("bins")
    return manifest.bins_dir(scratch, "lvvit"), write_bins(scratch, COUNT)


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    with closing(Pipeline(deadline_s=60.0)) as pipeline:
        yield pipeline


def plan_of(
    data: tuple[Path, Manifest],
    path: Path | None,
    *faults: dict[str, object],
    attempt_id: int = 1,
    isolating: bool = False,
    before: bool = False,
) -> Plan:
    directory, found = data
    is_segmentation = found.samples[0].windows is not None
    return Plan(
        attempt_id=attempt_id,
        load=Load(
            backend="simulated",
            path="",
            input=TensorSpec(name="x", dtype="float32", shape=(BS, *found.header.shape)),
            output=TensorSpec(
                name="y", dtype="float32", shape=(BS, 150, CELLS, CELLS) if is_segmentation else (BS, 1000)
            ),
            device="h:0",
            options={"simulated": json.dumps({"compute_ms": 0, "faults": faults})},
        ),
        dataset="ade20k" if is_segmentation else "imagenet",
        directory=directory,
        samples=found.samples,
        isolating=isolating,
        non_finite_before=before,
        logits=path,
    )


def kept(path: Path) -> dict[str, NDArray[np.float32]]:
    """By sample, in the order of the file."""
    found = {}
    for row, output in Reader(path, "float32", (1000,)).outputs():
        assert output is not None
        found[row.sample] = output
    return found


def answers(data: tuple[Path, Manifest]) -> dict[str, NDArray[np.float32]]:
    """What the simulated device says to each sample, computed here."""
    return {sample.name: scores(int(sample.xxh3, 16), 1000) for sample in data[1].samples}


def assert_kept(path: Path, data: tuple[Path, Manifest], *, but: str = "") -> None:
    """All but that sample's, in order, and no padding."""
    expected = {name: row for name, row in answers(data).items() if name != but}
    found = {name: row for name, row in kept(path).items() if name != but}
    assert list(found) == list(expected)
    for name, row in found.items():
        np.testing.assert_array_equal(row, expected[name])


def test_every_samples_output_is_kept_in_order_without_padding(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    pipeline.read_ahead(plan_of(data, tmp_path / "j" / "1.2.bin", attempt_id=2))
    pipeline.run(plan_of(data, tmp_path / "j" / "0.1.bin"))
    pipeline.run(plan_of(data, tmp_path / "j" / "1.2.bin", attempt_id=2))

    assert_kept(tmp_path / "j" / "0.1.bin", data)
    assert_kept(tmp_path / "j" / "1.2.bin", data)
    assert len(list((tmp_path / "j").iterdir())) == 2


def test_an_attempt_that_fails_leaves_nothing_and_the_isolating_one_keeps_the_others(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    culprit = data[1].samples[5]
    crash: dict[str, object] = {"kind": "crash", "sample": culprit.xxh3}
    with pytest.raises(DeviceCrashed):
        pipeline.run(plan_of(data, tmp_path / "0.1.bin", crash))
    assert list(tmp_path.iterdir()) == []

    pipeline.run(plan_of(data, tmp_path / "0.2.bin", crash, attempt_id=2, isolating=True))

    assert_kept(tmp_path / "0.2.bin", data, but=culprit.name)
    assert culprit.name not in kept(tmp_path / "0.2.bin")


def test_scores_that_are_no_numbers_leave_nothing_either(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    culprit = data[1].samples[9]
    nan: dict[str, object] = {"kind": "nan", "sample": culprit.xxh3}
    with pytest.raises(NonFinite):
        pipeline.run(plan_of(data, tmp_path / "0.1.bin", nan))
    assert list(tmp_path.iterdir()) == []

    result = pipeline.run(plan_of(data, tmp_path / "0.2.bin", nan, attempt_id=2, before=True))

    assert result.samples[9].state is ResultState.FAILED
    assert_kept(tmp_path / "0.2.bin", data, but=culprit.name)


def test_what_was_read_ahead_and_is_taken_away_leaves_nothing(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    pipeline.read_ahead(plan_of(data, tmp_path / "1.2.bin", attempt_id=2))
    pipeline.run(plan_of(data, None, attempt_id=3))  # afterwards the other is through, too

    pipeline.drop([2])

    assert list(tmp_path.iterdir()) == []
    pipeline.run(plan_of(data, None, attempt_id=4))


def test_an_attempt_that_is_dropped_when_it_is_through_is_aborted(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    plan = plan_of(data, tmp_path / "1.2.bin", attempt_id=2)
    pipeline.read_ahead(plan)
    pipeline.run(plan_of(data, None, attempt_id=3))
    run = pipeline._runs[2]
    pipeline.drop([2])
    pipeline._runs[2] = run  # as if its end had just been awaited

    with pytest.raises(Aborted):
        pipeline.run(plan)

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_fails_its_own_attempt_only(
    pipeline: Pipeline, data: tuple[Path, Manifest], tmp_path: Path
) -> None:
    (tmp_path / "logits").touch()
    refused = plan_of(data, tmp_path / "logits" / "0.2.bin", attempt_id=2)
    pipeline.read_ahead(refused)

    result = pipeline.run(plan_of(data, tmp_path / "0.1.bin"))

    assert len(result.samples) == COUNT
    with pytest.raises(HostError, match="cannot keep the raw outputs"):
        pipeline.run(refused)
    assert_kept(tmp_path / "0.1.bin", data)


def test_windows_are_kept_under_the_names_of_their_bins(pipeline: Pipeline, tmp_path: Path) -> None:
    images, annotations = write_ade(tmp_path, ((96, 120), (64, 64), (60, 230)))
    prepared = prepare_segmentation(images, annotations, SEG, tmp_path / "data", processes=1)

    pipeline.run(plan_of((prepared.directory, prepared.manifest), tmp_path / "0.1.bin"))

    expected = []
    for sample in prepared.manifest.samples:
        assert sample.windows is not None
        paths = manifest.window_paths(prepared.directory, sample.name, sample.windows)
        expected += [(sample.name, path.stem, xxh3) for path, xxh3 in zip(paths, sample.windows.xxh3, strict=True)]
    assert len(expected) == 2 + 1 + 5
    found = list(Reader(tmp_path / "0.1.bin", "float32", (150, CELLS, CELLS)).outputs())
    assert [(row.sample, row.stem) for row, _ in found] == [(name, stem) for name, stem, _ in expected]
    for (row, output), (_, _, xxh3) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(output, scores(int(xxh3, 16), 150 * CELLS * CELLS).reshape(150, CELLS, CELLS))
        assert slide.parse_name(f"{row.stem}.bin").stem == row.sample
