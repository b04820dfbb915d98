"""Exported graphs against upstream's numbers, and what export stores, reuses and refuses."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch

from farm import artifacts, canary, zoo
from farm.artifacts import Artifact, TensorInfo
from farm.errors import DataError, FarmError, StorageError, UsageError
from farm.export import INSTALL, require_torch
from farm.export import onnx as exporting
from farm.export.onnx import Exported, export
from tests.datasets import session_of
from tests.golden import parity

SPEC = zoo.get("lvvit")
LVVIT = parity.of("lvvit")
BATCH_SIZES = (1, 4)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "lvvit_s-golden.pth.tar"
    torch.save(LVVIT.weights(), path)
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def exported(checkpoint: Path, data_dir: Path) -> Mapping[int, Exported]:
    """By batch size. Stored once a session, so tests must leave the files as they are."""
    return {done.artifact.bs: done for done in export(SPEC, checkpoint, BATCH_SIZES, data_dir)}


def export_one(checkpoint: Path, data_dir: Path, bs: int = 1) -> Exported:
    (done,) = export(SPEC, checkpoint, [bs], data_dir)
    return done


def run(path: Path, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scores of images by onnxruntime, batch by batch of the size the graph has."""
    session = session_of(path)
    bs = session.get_inputs()[0].shape[0]
    batches = [session.run(["features"], {"image": images[i : i + bs]})[0] for i in range(0, len(images), bs)]
    return np.concatenate(batches)


def files_under(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_the_exported_graph_gives_upstreams_scores(bs: int, exported: Mapping[int, Exported]) -> None:
    scores = run(exported[bs].path, LVVIT.images)

    np.testing.assert_allclose(scores, LVVIT.arrays["logits_f64"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_the_graph_has_the_specs_tensors_with_a_fixed_batch(bs: int, exported: Mapping[int, Exported]) -> None:
    graph = onnx.load(exported[bs].path).graph

    tensors = [(t.name, [d.dim_value for d in t.type.tensor_type.shape.dim]) for t in (*graph.input, *graph.output)]
    assert tensors == [("image", [bs, 3, 224, 224]), ("features", [bs, 1000])]


def test_the_graph_has_the_specs_opset(exported: Mapping[int, Exported]) -> None:
    (opset,) = onnx.load(exported[1].path).opset_import

    assert opset.version == SPEC.opset == 13


def test_the_graph_computes_no_shapes(exported: Mapping[int, Exported]) -> None:
    operators = {node.op_type for node in onnx.load(exported[4].path).graph.node}

    assert operators.isdisjoint({"Shape", "Expand", "ConstantOfShape", "Where", "BatchNormalization", "Identity"})


@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_the_sidecar_tells_what_was_exported(
    bs: int, exported: Mapping[int, Exported], checkpoint: Path, data_dir: Path
) -> None:
    done = exported[bs]

    sidecar = artifacts.read_sidecar(artifacts.sidecar_of(done.path))

    weights_sha256 = artifacts.sha256_of(checkpoint)
    assert done.path == data_dir / "artifacts" / "lvvit" / f"lvvit_bs{bs}_{weights_sha256[:8]}.onnx"
    assert sidecar == done.artifact
    assert sidecar == Artifact(
        model="lvvit", bs=bs, backend="ort", soc="cpu", file=done.path.name, sha256=artifacts.sha256_of(done.path),
        input=TensorInfo(name="image", dtype="float32", shape=(bs, 3, 224, 224)),
        output=TensorInfo(name="features", dtype="float32", shape=(bs, 1000)), opset=13,
        weights="lvvit_s-golden.pth.tar", weights_sha256=weights_sha256,
        versions=sidecar.versions, max_abs_diff=sidecar.max_abs_diff, created=sidecar.created,
    )  # fmt: skip
    assert set(sidecar.versions) == {"torch", "onnx", "onnxruntime", "farm"}
    assert sidecar.versions["onnxruntime"] == onnxruntime.__version__
    assert sidecar.max_abs_diff is not None
    assert 0 < sidecar.max_abs_diff <= 5e-5
    assert sidecar.created.endswith("+00:00")


@pytest.mark.parametrize("bs", BATCH_SIZES)
def test_what_onnxruntime_says_to_a_canary_lies_beside_the_graph(bs: int, exported: Mapping[int, Exported]) -> None:
    given = np.empty((bs, *SPEC.input.shape), np.float32)
    canary.fill(given, 3)

    found = canary.distance(exported[bs].path, run(exported[bs].path, given), 3)
    assert found is not None
    assert found < 1e-6
    mirrored = canary.distance(exported[bs].path, run(exported[bs].path, given[:, :, ::-1].copy()), 3)
    assert mirrored is not None
    assert mirrored > 1e-3


def test_only_artifacts_and_what_belongs_to_them_are_stored(exported: Mapping[int, Exported], data_dir: Path) -> None:
    endings = (".onnx", ".json", ".canary.npy")
    expected = [done.path.stem + ending for done in exported.values() for ending in endings]

    assert files_under(data_dir) == sorted(expected)


def test_a_job_finds_the_artifact(exported: Mapping[int, Exported], data_dir: Path) -> None:
    assert artifacts.choose(data_dir, SPEC, 4, backend=None, wanted=None) == exported[4].artifact


def test_exported_twice_the_graph_is_the_same_to_the_byte(
    exported: Mapping[int, Exported], checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = export_one(checkpoint, tmp_path)

    assert not again.reused
    assert again.path.read_bytes() == exported[1].path.read_bytes()
    assert capfd.readouterr() == ("", ""), "exporting must not talk"


def test_an_artifact_that_is_there_is_reused(
    exported: Mapping[int, Exported], checkpoint: Path, data_dir: Path
) -> None:
    before = exported[1].path.stat().st_mtime_ns

    again = export_one(checkpoint, data_dir)

    assert again == Exported(artifact=exported[1].artifact, path=exported[1].path, reused=True)
    assert exported[1].path.stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["graph", "sidecar", "other opset"])
def test_an_artifact_that_is_not_what_its_sidecar_says_is_exported_anew(
    damage: str,
    exported: Mapping[int, Exported],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exporting, "_graph", lambda *_: exported[1].path.read_bytes())
    path = artifacts.directory(tmp_path, "lvvit") / exported[1].path.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut short" if damage == "graph" else exported[1].path.read_bytes())
    opset = 12 if damage == "other opset" else 13
    artifacts.write_sidecar(path.parent, exported[1].artifact.model_copy(update={"opset": opset}))
    if damage == "sidecar":
        artifacts.sidecar_of(path).write_text("{")

    again = export_one(checkpoint, tmp_path)

    assert not again.reused
    assert artifacts.sha256_of(path) == again.artifact.sha256 == exported[1].artifact.sha256
    assert artifacts.read_sidecar(artifacts.sidecar_of(path)) == again.artifact


def test_a_batch_size_asked_for_twice_is_exported_once(
    exported: Mapping[int, Exported], checkpoint: Path, data_dir: Path
) -> None:
    assert [done.artifact.bs for done in export(SPEC, checkpoint, [4, 1, 4], data_dir)] == [4, 1]


def test_another_opset_makes_another_file_which_is_right_too(
    exported: Mapping[int, Exported], checkpoint: Path, tmp_path: Path
) -> None:
    (done,) = export(SPEC, checkpoint, [1], tmp_path, opset=17)

    assert done.path.stem == f"{exported[1].path.stem}_opset17"
    assert done.artifact.opset == 17
    np.testing.assert_allclose(run(done.path, LVVIT.images), LVVIT.arrays["logits_f64"], rtol=0, atol=5e-5)


def test_a_graph_that_differs_from_pytorch_is_not_stored(
    exported: Mapping[int, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given weights of which one score's bias is off by 1e-4, twice what is allowed, from those in the graph
    weights = {name: tensor.clone() for name, tensor in LVVIT.weights().items()}
    weights["head.bias"][7] += 1e-4
    torch.save(weights, tmp_path / "other.pth")
    monkeypatch.setattr(exporting, "_graph", lambda *_: exported[1].path.read_bytes())

    with pytest.raises(FarmError, match=r"differs from PyTorch by \S+, allowed are 5e-05"):
        export_one(tmp_path / "other.pth", tmp_path / "data")

    assert files_under(tmp_path) == ["other.pth"]


def test_a_graph_with_another_batch_size_is_not_stored(
    exported: Mapping[int, Exported], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_graph", lambda *_: exported[4].path.read_bytes())

    with pytest.raises(FarmError, match="onnxruntime cannot run the exported graph"):
        export_one(checkpoint, tmp_path)

    assert files_under(tmp_path) == []


def test_weights_that_give_no_numbers_are_not_stored(tmp_path: Path) -> None:
    weights = {**LVVIT.weights(), "patch_embed.bn1.running_var": torch.full((64,), -1.0)}
    torch.save(weights, tmp_path / "negative.pth")

    with pytest.raises(FarmError, match="differs from PyTorch by nan"):
        export_one(tmp_path / "negative.pth", tmp_path / "data")

    assert files_under(tmp_path) == ["negative.pth"]


def test_a_checkpoint_of_another_network_stores_nothing(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(10, 384)}, tmp_path / "other.pth")

    with pytest.raises(DataError, match=r"does not fit LVViT: of 204 keys expected and 1 found, 203 missing"):
        export_one(tmp_path / "other.pth", tmp_path / "data")

    assert files_under(tmp_path) == ["other.pth"]


@pytest.mark.parametrize(
    ("batch_sizes", "opset", "message"),
    [
        ([], None, "no batch size"),
        ([0], None, "batch size 0 does not exist"),
        ([4, -1], None, "batch size -1 does not exist"),
        ([1], 10, "opset 10 cannot be exported: choose one from 11 to 20"),
        ([1], 21, "opset 21 cannot be exported"),
    ],
)
def test_a_request_that_cannot_be_is_refused_at_the_call(
    batch_sizes: list[int], opset: int | None, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(SPEC, checkpoint, batch_sizes, tmp_path, opset=opset)


def test_missing_weights_are_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint"):
        export(SPEC, tmp_path / "none.pth", [1], tmp_path)


def test_a_data_directory_that_cannot_be_written_is_named(
    exported: Mapping[int, Exported], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    monkeypatch.setattr(exporting, "_graph", lambda *_: exported[1].path.read_bytes())

    with pytest.raises(StorageError, match="cannot write"):
        export_one(checkpoint, tmp_path / "data")


@pytest.mark.parametrize("module", ["torch", "onnx"])
def test_a_missing_extra_is_answered_with_the_line_to_type(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # what makes an import of it fail

    with pytest.raises(UsageError) as caught:
        require_torch()

    assert f"exporting needs {module}" in str(caught.value)
    assert str(caught.value).endswith(INSTALL)


def test_with_the_extra_installed_nothing_is_asked_for() -> None:
    require_torch()


def test_the_line_to_type_installs_what_the_extra_asks_for() -> None:
    extra = [line.split(";")[0].strip() for line in requires("farm") or [] if 'extra == "export"' in line]

    assert extra
    assert all(f'"{requirement}"' in INSTALL for requirement in extra)
