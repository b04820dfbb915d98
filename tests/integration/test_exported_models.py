"""Every model's exported graphs in onnxruntime against upstream's numbers. Each is exported once a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from farm import artifacts, zoo
from farm.data.recipes import RECIPES, normalisation
from farm.errors import DataError, UsageError
from farm.export import onnx as exporting
from farm.export.onnx import Exported, Form, export
from tests.datasets import session_of
from tests.golden import parity

#: lvvit's graphs have a file of tests of their own.
BATCH_SIZES = {"twins": (1, 4), "focal": (1, 4), "conformer": (1, 4), "swin": (1, 2)}
OPSETS = {"twins": 11, "focal": 13, "conformer": 11, "swin": 11}

#: Nodes of graphs that compute sizes as they run, or that batch norms were not folded into.
WASTE = {"Shape", "Expand", "ConstantOfShape", "Where", "BatchNormalization", "Range", "NonZero"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@cache
def exported(model: str, directory: Path) -> Mapping[int, Exported]:
    """A model's artifacts by batch size, with the parity fixture's weights in the form of the official checkpoint."""
    sizes = BATCH_SIZES[model]
    return {done.artifact.bs: done for done in export(zoo.get(model), checkpoint(model, directory), sizes, directory)}


def checkpoint(model: str, directory: Path) -> Path:
    path = directory / f"{model}.pth"
    if not path.exists():
        wrapper = {"focal": "model", "conformer": "state_dict", "swin": "state_dict"}.get(model)
        weights = parity.of(model).weights()
        torch.save({wrapper: weights, "meta": {"epoch": 1}} if wrapper else weights, path)
    return path


def run(path: Path, images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Outputs for images by onnxruntime, batch by batch of the size the graph has; the last one padded."""
    session = session_of(path)
    (given,) = session.get_inputs()
    bs = given.shape[0]
    padded = np.concatenate([images, np.zeros((-len(images) % bs, *images.shape[1:]), images.dtype)])
    outputs = [session.run(None, {given.name: padded[i : i + bs]})[0] for i in range(0, len(padded), bs)]
    return np.concatenate(outputs)[: len(images)]


EACH = [(model, bs) for model, sizes in BATCH_SIZES.items() for bs in sizes]


@pytest.mark.parametrize(("model", "bs"), EACH)
def test_the_exported_graph_gives_upstreams_scores(model: str, bs: int, directory: Path) -> None:
    fixture = parity.of(model)

    scores = run(exported(model, directory)[bs].path, fixture.images)

    if model == "swin":
        found, wanted = scores.ravel()[fixture.arrays["logits_index"]], fixture.arrays["logits_value_f64"]
    elif zoo.get(model).probabilities:
        found, wanted = np.log(scores), np.log(fixture.scores)
    else:
        found, wanted = scores, fixture.scores
    np.testing.assert_allclose(found, wanted, rtol=0, atol=zoo.get(model).tolerance)


@pytest.mark.parametrize(("model", "bs"), EACH)
def test_the_graph_is_the_deployments_with_a_fixed_batch_and_computes_no_sizes(
    model: str, bs: int, directory: Path
) -> None:
    spec = zoo.get(model)
    loaded = onnx.load(exported(model, directory)[bs].path)

    tensors = [
        (t.name, [d.dim_value for d in t.type.tensor_type.shape.dim])
        for t in (*loaded.graph.input, *loaded.graph.output)
    ]
    assert tensors == [(spec.input.name, [bs, *spec.input.shape]), (spec.output.name, [bs, *spec.output.shape])]
    assert [opset.version for opset in loaded.opset_import] == [OPSETS[model]]
    assert WASTE.isdisjoint(node.op_type for node in loaded.graph.node)


@pytest.mark.parametrize("model", ["twins", "focal", "conformer"])
def test_exported_twice_the_graph_is_the_same_to_the_byte(
    model: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_verified", lambda *_: 0.0)  # the first was

    (again,) = export(zoo.get(model), checkpoint(model, directory), [1], tmp_path)

    assert again.artifact.sha256 == exported(model, directory)[1].artifact.sha256
    assert not again.reused


def test_a_graph_that_takes_pixels_scores_them_as_the_one_that_takes_what_the_recipe_makes_of_them(
    directory: Path,
) -> None:
    spec, model = zoo.get("twins"), "twins"
    (done,) = export(spec, checkpoint(model, directory), [4], directory, dtype="uint8")
    pixels = np.random.default_rng(0).integers(0, 256, (4, *spec.input.shape), np.uint8)
    table = normalisation(RECIPES[spec.recipe])
    normalised = np.stack([table[channel][pixels[:, channel]] for channel in range(3)], axis=1)

    from_pixels, from_floats = run(done.path, pixels), run(exported(model, directory)[4].path, normalised)

    assert done.path.stem == f"{exported(model, directory)[4].path.stem}_uint8"
    assert done.artifact.input.dtype == "uint8"
    assert np.ptp(from_floats) > 1
    np.testing.assert_allclose(from_pixels, from_floats, rtol=0, atol=spec.tolerance)


def test_swins_small_head_is_what_the_full_one_resizes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_answers", lambda *_: np.zeros((4, 1), np.float32))  # nobody asks for them here
    fixture = parity.of("swin")
    (done,) = export(zoo.get("swin"), checkpoint("swin", directory), [1], directory, head="small")

    logits = run(done.path, fixture.images)

    assert (done.artifact.head, done.artifact.output.shape) == ("small", (1, 150, 128, 128))
    assert done.path.stem.endswith("_small")
    found = logits.ravel()[fixture.arrays["head_index"]]
    np.testing.assert_allclose(found, fixture.arrays["head_value_f64"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", [{"head": "tall"}, {"head": ""}, {"dtype": "int8"}])
def test_a_form_there_is_not_is_refused_at_the_call(form: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"full, small, deployed|float32, uint8"):
        export(zoo.get("swin"), tmp_path / "none.pth", [1], tmp_path, **form)  # type: ignore[arg-type]


def test_a_head_of_a_model_that_has_one_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lvvit has no head 'small': it has one only"):
        export(zoo.get("lvvit"), tmp_path / "none.pth", [1], tmp_path, head="small")


def test_tables_that_point_beyond_the_image_are_no_traceback(directory: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in parity.of("focal").weights().items()}
    weights["layers.0.blocks.0.attn.topk_cloest_indice_0"][0, 0] = 56 * 56
    torch.save({"model": weights}, tmp_path / "focal.pth")

    with pytest.raises(DataError, match="does not run with these weights"):
        list(export(zoo.get("focal"), tmp_path / "focal.pth", [1], tmp_path))

    assert not list(tmp_path.glob("**/*.onnx"))


def test_every_form_has_a_file_name_of_its_own() -> None:
    usual = Form(spec=zoo.get("swin"), opset=11, head="full")
    forms = [
        usual,
        replace(usual, opset=13),
        replace(usual, head="small"),
        replace(usual, dtype="uint8"),
        replace(usual, simplify=True),
    ]

    names = [form.file_name(4, "0123456789abcdef") for form in forms]

    assert names == [
        "swin_bs4_01234567.onnx",
        "swin_bs4_01234567_opset13.onnx",
        "swin_bs4_01234567_small.onnx",
        "swin_bs4_01234567_uint8.onnx",
        "swin_bs4_01234567_sim.onnx",
    ]


def test_a_simplified_graph_is_smaller_and_right(directory: Path) -> None:
    spec, fixture = zoo.get("lvvit"), parity.of("lvvit")
    torch.save(fixture.weights(), directory / "lvvit.pth")
    plain, simplified = (
        next(export(spec, directory / "lvvit.pth", [1], directory, simplify=simplify)) for simplify in (False, True)
    )

    scores = run(simplified.path, fixture.images)

    np.testing.assert_allclose(scores, fixture.scores, rtol=0, atol=5e-5)
    assert len(onnx.load(simplified.path).graph.node) < len(onnx.load(plain.path).graph.node)
    assert simplified.artifact.simplified
    assert "onnxslim" in simplified.artifact.versions
    assert artifacts.sha256_of(simplified.path) == simplified.artifact.sha256
