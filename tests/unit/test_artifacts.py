import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from farm import artifacts, zoo
from farm.artifacts import Artifact, TensorInfo
from farm.errors import DataError, UsageError

LVVIT = zoo.get("lvvit")


def artifact_of(**changes: object) -> Artifact:
    """An artifact of LV-ViT; state what matters, e.g. ``artifact_of(bs=4, sha256="ab" * 32)``."""
    bs = changes.get("bs", 1)
    assert isinstance(bs, int)
    fields: dict[str, object] = {
        "model": LVVIT.name,
        "bs": bs,
        "backend": "ort",
        "soc": "cpu",
        "file": f"lvvit_bs{bs}.onnx",
        "sha256": "0" * 64,
        "input": TensorInfo.of(LVVIT.input, bs),
        "output": TensorInfo.of(LVVIT.output, bs),
    }
    return Artifact.model_validate(fields | changes)


def store(data_dir: Path, *stored: Artifact) -> None:
    directory = artifacts.directory(data_dir, LVVIT.name)
    directory.mkdir(parents=True, exist_ok=True)
    for artifact in stored:
        artifacts.write_sidecar(directory, artifact)


def choose(
    data_dir: Path, *, bs: int = 1, backend: str | None = None, wanted: str | None = None, dtype: str | None = None
) -> Artifact:
    return artifacts.choose(data_dir, LVVIT, bs, backend=backend, wanted=wanted, dtype=dtype)


def of_pixels(bs: int = 1, **changes: object) -> Artifact:
    """An artifact that takes uint8."""
    return artifact_of(bs=bs, input=TensorInfo(name="image", dtype="uint8", shape=(bs, 3, 224, 224)), **changes)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
@pytest.mark.parametrize("sha256_of", [artifacts.sha256_of, artifacts._sha256], ids=["here", "python 3.10"])
def test_a_files_identity_is_the_sha256_of_its_bytes(
    tmp_path: Path, size: int, sha256_of: Callable[[Path], str]
) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])

    assert sha256_of(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_a_sidecar_lies_beside_its_file() -> None:
    assert artifacts.sidecar_of(Path("/data/lvvit_bs4.onnx")) == Path("/data/lvvit_bs4.json")


def test_a_written_sidecar_is_read_back(tmp_path: Path) -> None:
    artifact = artifact_of(bs=4, opset=13, versions={"torch": "2.6"}, max_abs_diff=1e-6)

    path = artifacts.write_sidecar(tmp_path, artifact)

    assert artifacts.read_sidecar(path) == artifact


def test_writing_a_sidecar_leaves_nothing_else_behind(tmp_path: Path) -> None:
    artifacts.write_sidecar(tmp_path, artifact_of())

    assert [path.name for path in tmp_path.iterdir()] == ["lvvit_bs1.json"]


def test_a_sidecar_replaces_the_one_before(tmp_path: Path) -> None:
    artifacts.write_sidecar(tmp_path, artifact_of(sha256="a" * 64))

    path = artifacts.write_sidecar(tmp_path, artifact_of(sha256="b" * 64))

    assert artifacts.read_sidecar(path).sha256 == "b" * 64


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON", '{"model": "lvvit"}', "\x00"])
def test_a_file_that_is_no_sidecar_is_a_data_error_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)

    with pytest.raises(DataError, match=r"(?s)x\.json is no artifact sidecar: .* Export the model again"):
        artifacts.read_sidecar(tmp_path / "x.json")


def test_a_sidecar_that_is_not_there_is_a_data_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.json is no artifact sidecar"):
        artifacts.read_sidecar(tmp_path / "x.json")


def test_a_sidecar_of_a_newer_version_asks_for_a_newer_farm(tmp_path: Path) -> None:
    path = artifacts.write_sidecar(tmp_path, artifact_of(version=artifacts.VERSION + 1))

    with pytest.raises(DataError, match="has version 2, this farm knows up to 1: upgrade the farm"):
        artifacts.read_sidecar(path)


def test_fields_nobody_knows_are_passed_over(tmp_path: Path) -> None:
    path = artifacts.write_sidecar(tmp_path, artifact_of())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "blue"}))

    assert artifacts.read_sidecar(path) == artifact_of()


def test_a_tensors_shape_begins_with_the_batch_size() -> None:
    assert TensorInfo.of(LVVIT.input, 4).shape == (4, *LVVIT.input.shape)


def test_stored_artifacts_come_by_file_name(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(file="b.onnx"), artifact_of(file="a.onnx"), artifact_of(file="c.onnx"))

    assert [artifact.file for artifact in artifacts.stored(tmp_path, "lvvit")] == ["a.onnx", "b.onnx", "c.onnx"]


def test_a_model_without_artifacts_has_none_stored(tmp_path: Path) -> None:
    assert list(artifacts.stored(tmp_path, "lvvit")) == []


def test_the_only_artifact_of_a_batch_size_is_chosen(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(bs=1), artifact_of(bs=4))

    assert choose(tmp_path, bs=4).bs == 4


def test_a_batch_size_without_artifact_is_a_usage_error_that_says_what_there_is(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(bs=1), artifact_of(bs=4))

    with pytest.raises(UsageError, match=r"no artifact of lvvit for bs 8 .*\(batch sizes there: 1, 4\)"):
        choose(tmp_path, bs=8)


def test_a_model_without_artifact_is_a_usage_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"batch sizes there: none.* farm export lvvit --weights CKPT --bs 1"):
        choose(tmp_path)


def test_several_artifacts_are_a_usage_error_that_lists_them(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(file="a.onnx", sha256="a" * 64), artifact_of(file="b.onnx", sha256="b" * 64))

    with pytest.raises(
        UsageError, match=r"(?s)several .* --artifact SHA:.*a\.onnx.*aaaaaaaaaaaa.*b\.onnx.*bbbbbbbbbbbb"
    ):
        choose(tmp_path)


def test_a_graph_and_what_was_compiled_from_it_are_chosen_between_by_backend(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(file="a.onnx"), artifact_of(file="b.om", backend="acl", soc="Ascend310P3"))

    with pytest.raises(
        UsageError, match=r"(?s)choose one with --artifact SHA or --backend:.*b\.om \(acl on Ascend310P3, bs 1, sha256"
    ):
        choose(tmp_path)


def test_artifacts_that_take_other_bins_are_chosen_between_by_input(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(file="a.onnx"), of_pixels(file="b.onnx"))

    with pytest.raises(
        UsageError, match=r"(?s)choose one with --artifact SHA or --input:.*b\.onnx \(ort, .*input uint8"
    ):
        choose(tmp_path)
    assert [choose(tmp_path, dtype=dtype).file for dtype in ("float32", "uint8")] == ["a.onnx", "b.onnx"]


def test_an_artifact_for_npus_is_made_by_compiling(tmp_path: Path) -> None:
    store(tmp_path, artifact_of())

    with pytest.raises(UsageError, match=r"farm export lvvit --weights CKPT --bs 1, then farm compile lvvit --bs 1$"):
        choose(tmp_path, backend="acl")


@pytest.mark.parametrize("wanted", ["bb", "b" * 64, "b.onnx"])
def test_of_several_artifacts_the_one_asked_for_is_chosen(tmp_path: Path, wanted: str) -> None:
    store(tmp_path, artifact_of(file="a.onnx", sha256="a" * 64), artifact_of(file="b.onnx", sha256="b" * 64))

    assert choose(tmp_path, wanted=wanted).file == "b.onnx"


def test_an_artifact_asked_for_must_be_there(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(sha256="a" * 64))

    with pytest.raises(UsageError, match="no artifact of lvvit for bs 1 matches 'ff'"):
        choose(tmp_path, wanted="ff")


def test_an_artifact_asked_for_must_fit_the_batch_size(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(bs=4, sha256="a" * 64))

    with pytest.raises(UsageError, match="no artifact of lvvit for bs 1"):
        choose(tmp_path, wanted="aa")


def test_a_backend_chooses_among_the_artifacts(tmp_path: Path) -> None:
    store(tmp_path, artifact_of(file="a.onnx"), artifact_of(file="b.om", backend="acl"))

    assert choose(tmp_path, backend="acl").file == "b.om"


def test_a_backend_without_artifact_is_named(tmp_path: Path) -> None:
    store(tmp_path, artifact_of())

    with pytest.raises(UsageError, match="no artifact of lvvit for bs 1 and backend acl in"):
        choose(tmp_path, backend="acl")


def test_a_simulated_device_needs_no_artifact(tmp_path: Path) -> None:
    artifact = choose(tmp_path, bs=4, backend="simulated")

    assert (artifact.backend, artifact.file, artifact.bs) == ("simulated", "", 4)


def test_a_simulated_artifact_is_the_same_wherever_it_is_made() -> None:
    assert artifacts.simulated(LVVIT, 4) == artifacts.simulated(LVVIT, 4)


def test_simulated_artifacts_of_two_batch_sizes_differ() -> None:
    assert artifacts.simulated(LVVIT, 1).sha256 != artifacts.simulated(LVVIT, 4).sha256


def test_a_simulated_artifact_has_the_models_tensors() -> None:
    artifact = artifacts.simulated(LVVIT, 4)

    assert (artifact.input.shape, artifact.output.shape) == ((4, 3, 224, 224), (4, 1000))


def test_a_simulated_artifact_takes_the_bins_it_is_asked_to(tmp_path: Path) -> None:
    usual, named, pixels = (choose(tmp_path, backend="simulated", dtype=dtype) for dtype in (None, "float32", "uint8"))

    assert usual == named
    assert (usual.input.dtype, pixels.input.dtype) == ("float32", "uint8")
    assert usual.sha256 != pixels.sha256


def test_a_sidecar_of_a_newer_version_with_other_fields_asks_for_a_newer_farm(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"version": 2, "network": "lvvit"}')

    with pytest.raises(DataError, match="upgrade the farm"):
        artifacts.read_sidecar(tmp_path / "x.json")
