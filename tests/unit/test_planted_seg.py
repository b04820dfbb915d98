"""The planted truth of segmentation: that it is right, that it is independent, and that it notices what it must."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from farm import zoo
from farm.data import seg
from farm.data.recipes import SEG
from farm.export import planted, planted_seg
from farm.export.planted import LEAD
from farm.export.planted_seg import BIAS, Centred, Expected, Planted, Scored
from tests.golden import fill

GOLDEN = Path(__file__).parent.parent / "golden"
FACTS = json.loads((GOLDEN / "preprocess.json").read_text())
PICTURES = tuple(name for name in FACTS if not name.startswith("_"))
SLIDES = json.loads((GOLDEN / "slide.json").read_text())
CLASSES = 150
HEAD = ("decode_head.conv_seg.weight", "decode_head.bottleneck.conv.weight", "decode_head.fpn_bottleneck.conv.weight")


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The eight pictures of the preprocessing fixture."""
    directory = tmp_path_factory.mktemp("jpegs")
    paths = {name: directory / f"{name}.jpeg" for name in PICTURES}
    with np.load(GOLDEN / "preprocess.npz") as golden:
        for name, path in paths.items():
            path.write_bytes(golden[f"{name}/jpeg"].tobytes())
    return paths


def scored(original: tuple[int, int], resized: tuple[int, int], seed: int = 0) -> Scored:
    """A picture with scores of nothing, in patches, and with favourite classes, as a seeded network's."""
    generator = torch.Generator().manual_seed(seed)
    windows = len(planted_seg.corners(resized))
    patches = torch.randn(windows, CLASSES, 6, 6, generator=generator)
    favourites = 3 * torch.randn(CLASSES, 1, 1, generator=torch.Generator().manual_seed(0))
    scores = torch.nn.functional.interpolate(patches, size=(128, 128), mode="bilinear") + favourites
    return Scored(original=original, resized=resized, windows=scores)


@pytest.fixture(scope="module")
def pictures() -> list[Scored]:
    """Of one window, of two side by side, of two one above the other."""
    return [scored((331, 331), (512, 512), 1), scored((301, 377), (512, 641), 2), scored((441, 300), (753, 512), 3)]


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {"backbone.weight": torch.ones(3), BIAS: torch.zeros(CLASSES)}


@pytest.fixture(scope="module")
def centred(weights: dict[str, Tensor], pictures: list[Scored]) -> Centred:
    return planted_seg.centre_head(weights, pictures)


@pytest.fixture(scope="module")
def truths(centred: Centred) -> list[Planted]:
    return list(planted_seg.plant(centred.pictures, seed=1))


@pytest.fixture(scope="module")
def truth(truths: list[Planted]) -> Expected:
    return planted_seg.expected(truths, CLASSES)


def label_maps(pictures: list[Scored]) -> list[npt.NDArray[np.uint8]]:
    return [planted_seg.merge(picture).argmax(dim=0).numpy().astype(np.uint8) for picture in pictures]


def measured(maps: list[npt.NDArray[np.uint8]], truths: list[Planted]) -> Expected:
    """What label maps come to against the planted annotations."""
    pairs = zip(maps, truths, strict=True)
    return planted_seg.expected([replace(truth, label_map=answer) for answer, truth in pairs], CLASSES)


@pytest.mark.parametrize("name", PICTURES)
def test_the_reference_prepares_a_picture_to_the_bit(name: str, jpegs: dict[str, Path]) -> None:
    facts = FACTS[name]["seg"]

    picture, original = planted_seg.prepare(jpegs[name])

    assert list(original) == facts["ori_shape_hwc"][:2]
    assert list(picture.shape) == facts["shape"]
    assert hashlib.sha256(picture.numpy().tobytes()).hexdigest() == facts["f32_sha256"]


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "panorama"])
def test_the_farm_cuts_a_picture_into_the_references_windows(name: str, jpegs: dict[str, Path]) -> None:
    by_reference = list(planted_seg.cut(planted_seg.prepare(jpegs[name])[0]))

    by_farm = [array.copy() for _, array in seg.cut(seg.resize(seg.decode(jpegs[name]), jpegs[name]), SEG)]

    assert len(by_farm) == len(by_reference)
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(by_farm, by_reference, strict=True))


def test_a_picture_that_lies_on_its_side_is_turned(jpegs: dict[str, Path]) -> None:
    data = np.frombuffer(jpegs["exif_rotated"].read_bytes(), np.uint8)
    stored = cv2.imdecode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    assert stored is not None

    picture, original = planted_seg.prepare(jpegs["exif_rotated"])

    assert original == stored.shape[1::-1] == (431, 288)
    assert picture.shape[1:] == (766, 512)


@pytest.mark.parametrize("name", ["same", "rescaled", "panorama"])
def test_windows_lie_where_the_published_scripts_have_them(name: str) -> None:
    height, width = SLIDES[name]["resized_hw"]

    found = planted_seg.corners((height, width))

    assert found == [(top, left) for left, top, _, _ in SLIDES[name]["windows"]]


def test_windows_are_merged_as_the_published_scripts_do() -> None:
    """Three windows, of which some pixels lie in all."""
    facts = SLIDES["panorama"]
    bias = 1.5 * fill.unit("slide/panorama/classbias", CLASSES)[:, None, None]
    fields = (fill.field(f"slide/panorama/window{k}/field", CLASSES, 7, 512, 512) for k in range(3))
    windows = torch.stack([torch.from_numpy((4.0 * field + bias).astype(np.float32)) for field in fields])
    height, width = facts["resized_hw"]

    scores = planted_seg.merge(Scored(original=(250, 488), resized=(height, width), windows=windows))

    with np.load(GOLDEN / "slide.npz") as golden:
        different = scores.argmax(dim=0).numpy() != golden["panorama/label_map"]
    assert different.sum() <= facts["margin_below_1e_4"]


def test_figures_are_those_of_the_published_counting() -> None:
    with np.load(GOLDEN / "slide.npz") as golden:
        truths = [
            Planted(label_map=golden[f"{name}/label_map"], annotation=golden[f"{name}/annotation"])
            for name in ("same", "rescaled", "panorama")
        ]

    found = planted_seg.expected(truths, CLASSES)

    metrics = SLIDES["metrics"]
    assert found.aacc == pytest.approx(100 * metrics["aAcc"], abs=1e-9)
    assert found.miou == pytest.approx(100 * metrics["mIoU"], abs=1e-9)
    assert found.macc == pytest.approx(100 * metrics["mAcc"], abs=1e-9)


def test_figures_are_those_of_counting_by_hand() -> None:
    answers = np.array([[0, 0, 1, 1], [2, 2, 2, 0]], np.uint8)
    annotation = np.array([[1, 1, 1, 2], [0, 255, 4, 1]], np.uint8)

    found = planted_seg.expected([Planted(label_map=answers, annotation=annotation)], 150)

    # class 0: 3 of 4; class 1: 1 of 2; class 2: answered, never true; class 3: true, never answered
    assert found.aacc == pytest.approx(100 * 4 / 6)
    assert found.miou == pytest.approx(100 * (3 / 4 + 1 / 2 + 0 + 0) / 4)
    assert found.macc == pytest.approx(100 * (3 / 4 + 1 + 0) / 3)
    assert found.favourite_share == 3 / 8


def test_the_reference_shares_nothing_with_the_farm_but_the_network() -> None:
    tree = ast.parse(Path(planted_seg.__file__).read_text())

    froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    ours = {module for module in froms | plain if module.split(".")[0] in ("farm", "workers", "tasks", "db")}
    assert ours == {"farm", "farm.export.planted", "farm.zoo.spec"}


def test_of_the_seeded_head_only_the_last_layer_is_wide() -> None:
    weights = planted.seeded_weights(zoo.get("swin"), seed=1)

    gains = {name: float(weights[name].var() * weights[name][0].numel()) for name in HEAD}
    assert gains == pytest.approx({name: 9 if "conv_seg" in name else 2 for name in HEAD}, rel=0.05)


def test_a_network_without_centring_would_have_a_favourite_class(pictures: list[Scored]) -> None:
    assert max(np.bincount(each.ravel()).max() / each.size for each in label_maps(pictures)) > 0.3


def test_no_class_has_more_than_three_tenths_of_the_pixels_once_it_is_centred(
    centred: Centred, truth: Expected
) -> None:
    answers = np.concatenate([each.ravel() for each in label_maps(list(centred.pictures))])

    assert truth.favourite_share == np.bincount(answers).max() / len(answers)
    assert truth.favourite_share <= 0.3


def test_centring_changes_the_last_bias_alone(weights: dict[str, Tensor], centred: Centred) -> None:
    changed = [name for name, tensor in centred.state.items() if not torch.equal(tensor, weights[name])]

    assert list(centred.state) == list(weights)
    assert changed == [BIAS]
    assert centred.state[BIAS].dtype == torch.float32


def test_centred_scores_are_those_of_a_layer_with_the_centred_bias(
    pictures: list[Scored], weights: Mapping[str, Tensor], centred: Centred
) -> None:
    moved = (centred.state[BIAS] - weights[BIAS])[:, None, None]

    for before, after in zip(pictures, centred.pictures, strict=True):
        torch.testing.assert_close(after.windows, before.windows + moved, rtol=0, atol=1e-5)


def test_a_bias_goes_through_the_merge_as_it_is(pictures: list[Scored]) -> None:
    bias = torch.linspace(-3, 3, CLASSES)[:, None, None]
    moved = replace(pictures[1], windows=pictures[1].windows + bias)

    torch.testing.assert_close(planted_seg.merge(moved), planted_seg.merge(pictures[1]) + bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(331, 487), (512, 512), (37, 41)])
def test_a_sixth_is_wrong_and_an_eighteenth_each_is_unlabelled_and_ignored(shape: tuple[int, int]) -> None:
    label_map = np.random.default_rng(0).integers(0, CLASSES, shape).astype(np.uint8)

    annotation = planted_seg.annotate(label_map, CLASSES, np.random.default_rng(1))

    unlabelled, ignored = annotation == 0, annotation == 255
    wrong = ~unlabelled & ~ignored & (annotation != label_map + 1)
    assert wrong.mean() == pytest.approx(6 / 36, abs=0.02)
    assert unlabelled.mean() == pytest.approx(2 / 36, abs=0.01)
    assert ignored.mean() == pytest.approx(2 / 36, abs=0.01)
    assert annotation[~ignored].max() <= CLASSES


def test_pixels_too_close_to_call_count_nowhere(centred: Centred, truths: list[Planted]) -> None:
    close = 0
    for picture, truth in zip(centred.pictures, truths, strict=True):
        best = planted_seg.merge(picture).topk(2, dim=0).values
        lead = (best[0] - best[1]).numpy()
        close += int((lead < LEAD).sum())
        assert (truth.annotation[lead < LEAD] == 0).all()
    assert close > 0


def test_a_device_that_rounds_differently_measures_the_same(
    centred: Centred, truths: list[Planted], truth: Expected
) -> None:
    generator = torch.Generator().manual_seed(5)
    moved = []
    for picture in centred.pictures:
        noise = (torch.rand(picture.windows.shape, generator=generator) - 0.5) * 0.9 * LEAD
        moved.append(replace(picture, windows=picture.windows + noise))
    maps = label_maps(moved)

    assert any((a != t.label_map).any() for a, t in zip(maps, truths, strict=True))
    # The close pixels' answers themselves are no part of it.
    assert replace(measured(maps, truths), favourite_share=0) == replace(truth, favourite_share=0)


def test_one_seed_plants_the_same_and_another_other_annotations(centred: Centred, truths: list[Planted]) -> None:
    again, other = (next(planted_seg.plant(centred.pictures[:1], seed)).annotation for seed in (1, 2))

    np.testing.assert_array_equal(again, truths[0].annotation)
    assert (other != truths[0].annotation).any()


def test_four_fifths_of_the_pixels_are_right(truth: Expected) -> None:
    assert truth.aacc == pytest.approx(100 * (1 - 6 / 32), abs=1.5)


@pytest.mark.parametrize("by", [1, -1])
def test_classes_counted_from_one_more_or_less_change_every_figure(
    by: int, truths: list[Planted], truth: Expected
) -> None:
    shifted = [((t.label_map.astype(int) + by) % CLASSES).astype(np.uint8) for t in truths]

    found = measured(shifted, truths)

    assert found.aacc < truth.aacc / 4
    assert found.miou < truth.miou / 4
    assert found.macc < truth.macc / 4


def test_a_single_wrong_pixel_changes_every_figure(truths: list[Planted], truth: Expected) -> None:
    answer = truths[0].label_map.copy()
    row, column = np.argwhere(truths[0].annotation == answer + 1)[0]
    answer[row, column] = (answer[row, column] + 1) % CLASSES

    found = measured([answer, *(t.label_map for t in truths[1:])], truths)

    assert truth.aacc - found.aacc > 1e-6
    assert abs(truth.miou - found.miou) > 1e-6
    assert truth.macc - found.macc > 1e-6


@pytest.mark.parametrize("how", ["mirrored", "windows swapped", "a pixel to the right"])
def test_what_goes_wrong_with_one_picture_changes_the_score(
    how: str, centred: Centred, truths: list[Planted], truth: Expected
) -> None:
    maps = [t.label_map for t in truths]
    if how == "windows swapped":
        swapped = replace(centred.pictures[1], windows=centred.pictures[1].windows.flip(0))
        maps[1] = label_maps([swapped])[0]
    else:
        maps[1] = maps[1][:, ::-1] if how == "mirrored" else np.roll(maps[1], 1, axis=1)

    found = measured(maps, truths)

    assert truth.aacc - found.aacc > 0.5
    assert truth.miou - found.miou > 0.5
