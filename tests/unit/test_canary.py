"""Canary inputs are the same everywhere and for ever; answers are measured against what lies beside the artifact."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from farm import canary


def batch(bs: int, number: int, dtype: str = "float32") -> canary.Array:
    array = np.empty((bs, 3, 8, 8), dtype)
    canary.fill(array, number)
    return array


def test_the_inputs_never_change() -> None:
    # PCG64 seeded with 0: its stream is a promise of numpy's, and other hosts run other versions.
    assert batch(1, 0, "uint8").ravel()[:8].tolist() == [95, 130, 194, 217, 207, 235, 15, 163]


@pytest.mark.parametrize("bs", [1, 3, 4, 9])
@pytest.mark.parametrize("number", range(canary.COUNT))
def test_a_place_holds_the_input_whose_turn_it_is(bs: int, number: int) -> None:
    first = [batch(1, index)[0] for index in range(canary.COUNT)]

    for place, found in enumerate(batch(bs, number)):
        assert np.array_equal(found, first[(number + place) % canary.COUNT])


def test_the_inputs_differ() -> None:
    assert len({batch(1, index).tobytes() for index in range(canary.COUNT)}) == canary.COUNT


def test_values_are_about_as_large_as_normalised_pixels() -> None:
    values = batch(4, 0)

    assert -2 <= values.min() < -1.9
    assert 1.9 < values.max() <= 2


@pytest.fixture
def outputs() -> canary.Array:
    return np.random.default_rng(1).standard_normal((canary.COUNT, 2500)).astype(np.float32)


@pytest.fixture
def artifact(tmp_path: Path, outputs: canary.Array) -> Path:
    path = tmp_path / "model.onnx"
    canary.write_reference(path, outputs)
    return path


@pytest.mark.parametrize("number", range(canary.COUNT))
def test_what_onnxruntime_said_is_at_no_distance(artifact: Path, outputs: canary.Array, number: int) -> None:
    said = np.stack([outputs[(number + place) % canary.COUNT] for place in range(7)])

    assert canary.distance(artifact, said, number) == 0


def test_the_distance_is_relative_to_the_largest_value(artifact: Path, outputs: canary.Array) -> None:
    said = outputs.copy()
    said[2, 0] += 0.5

    assert canary.distance(artifact, said, 0) == pytest.approx(0.5 / np.abs(outputs[:, ::2]).max(), rel=1e-5)


def test_what_is_no_number_is_at_no_tolerable_distance(artifact: Path, outputs: canary.Array) -> None:
    said = outputs.copy()
    said[1, 0] = np.nan

    found = canary.distance(artifact, said, 0)
    assert found is not None
    assert math.isnan(found)


def test_without_a_reference_there_is_no_distance(tmp_path: Path, outputs: canary.Array) -> None:
    assert canary.distance(tmp_path / "model.onnx", outputs, 0) is None


@pytest.mark.parametrize("content", [b"", b"no array", b"\x93NUMPY\x01\x00"])
def test_a_damaged_reference_is_none(artifact: Path, outputs: canary.Array, content: bytes) -> None:
    artifact.with_suffix(".canary.npy").write_bytes(content)

    assert canary.distance(artifact, outputs, 0) is None


def test_a_reference_of_another_output_is_none(artifact: Path, outputs: canary.Array) -> None:
    assert canary.distance(artifact, outputs[:, :100], 0) is None


def test_a_compiled_artifact_is_compared_with_its_source(artifact: Path, outputs: canary.Array) -> None:
    compiled = artifact.with_name("compiled.om")

    canary.copy_reference(artifact, compiled)

    assert canary.has_reference(compiled)
    assert canary.distance(compiled, outputs, 0) == 0


@pytest.mark.parametrize("source", [None, Path("none.onnx")])
def test_without_a_source_nothing_of_another_file_is_left(source: Path | None, artifact: Path) -> None:
    canary.copy_reference(source and artifact.with_name(source.name), artifact)

    assert not canary.has_reference(artifact)
