"""The input of segmentation's demo: complete or not there, the same every time. The network is a cheap one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from farm.data import ade20k
from farm.demo import home_of
from farm.demo.classification import ClassificationHome
from farm.demo.home import Home, Input
from farm.demo.segmentation import Outcome, SegmentationHome, Truth
from farm.export import planted_seg
from farm.export.planted_seg import Planted

COUNT = 6


def nobody(_done: int, _total: int) -> None:
    pass


class MadeAgain(Exception):
    """Raised where making an input begins."""


class Net(nn.Module):
    """Scores of the small head's shape that depend on the pixels, by few multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.decode_head = nn.ModuleDict({"conv_seg": nn.Conv2d(6, 150, kernel_size=1)})

    def forward(self, images: Tensor) -> Tensor:
        small = nn.functional.avg_pool2d(images, 4)
        scores: Tensor = self.decode_head["conv_seg"](torch.cat((small, small.sin() - small.flip(1) ** 2), dim=1))
        return scores


@pytest.fixture(autouse=True)
def cheap_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.nets.build", lambda _spec, _head="": Net().eval())


@pytest.fixture
def only_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        raise MadeAgain

    monkeypatch.setattr("farm.export.require_torch", begin)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return SegmentationHome(tmp_path_factory.mktemp("demo"), "swin")


@pytest.fixture(scope="module")
def made(home: Home) -> Input:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("farm.nets.build", lambda _spec, _head="": Net().eval())
        return home.input(COUNT, nobody)


def contents(home: Home) -> dict[str, bytes]:
    """Every file of the input."""
    folders = [*(home.root / home.images).iterdir(), *(home.root / home.labels).iterdir()]
    paths = [*folders, *(home.root / path for path in (home.weights, home.expected))]
    return {path.name: path.read_bytes() for path in paths}


def truth_of(made: Input) -> Truth:
    assert isinstance(made.truth, Truth)
    return made.truth


@pytest.fixture(scope="module")
def answers(home: Home, made: Input) -> list[np.ndarray]:
    """Label maps of the weights as they were saved."""
    net = Net().eval()
    net.load_state_dict(torch.load(home.root / home.weights))
    with torch.inference_mode():
        return [label_map(net, path) for path in home.image_paths(COUNT)]


def recounted(answers: Sequence[np.ndarray], annotations: Sequence[np.ndarray]) -> Outcome:
    truths = [Planted(label_map=a, annotation=b) for a, b in zip(answers, annotations, strict=True)]
    found = planted_seg.expected(truths, 150)
    return Outcome(miou=found.miou, aacc=found.aacc, macc=found.macc, scored=COUNT, failed=0)


def label_map(net: nn.Module, path: Path) -> np.ndarray:
    picture, original = planted_seg.prepare(path)
    windows = torch.stack([net(window[None])[0] for window in planted_seg.cut(picture)])
    height, width = picture.shape[1:]
    merged = planted_seg.merge(planted_seg.Scored(original=original, resized=(height, width), windows=windows))
    return merged.argmax(dim=0).numpy().astype(np.uint8)


def stored(home: Home) -> list[np.ndarray]:
    return [ade20k.read_annotation(path) for path in sorted((home.root / home.labels).iterdir())]


def test_the_home_of_a_model_is_its_datasets(tmp_path: Path) -> None:
    assert isinstance(home_of(tmp_path, "swin"), SegmentationHome)
    assert isinstance(home_of(tmp_path, "twins"), ClassificationHome)


def test_images_and_annotations_are_as_ade20k_has_them(home: Home, made: Input) -> None:
    found = ade20k.load(home.root / home.images, home.root / home.labels)

    assert [picture.name for picture in found] == [f"ADE_val_{number:08}" for number in range(1, COUNT + 1)]
    for picture in found:
        assert picture.annotation is not None
        pixels = cv2.imread(str(picture.path))
        assert pixels is not None
        annotation = ade20k.check_annotation(picture.annotation.read_bytes(), None)
        assert annotation.shape == pixels.shape[:2]
        assert {0, 255} < set(np.unique(annotation))


def test_the_saved_weights_give_the_figures_that_are_expected(
    home: Home, made: Input, answers: list[np.ndarray]
) -> None:
    assert recounted(answers, stored(home)).agrees(made.truth.outcome)
    assert 75 < truth_of(made).aacc < 85
    assert 10 < truth_of(made).miou < truth_of(made).aacc
    assert truth_of(made).favourite_share <= 0.3


@pytest.mark.parametrize("by", [1, -1])
def test_annotations_shifted_by_one_class_change_every_figure(
    by: int, home: Home, made: Input, answers: list[np.ndarray]
) -> None:
    shifted = [
        np.where((a == 0) | (a == 255), a, (a.astype(int) - 1 + by) % 150 + 1).astype(np.uint8) for a in stored(home)
    ]

    found, wanted = recounted(answers, shifted), truth_of(made)

    assert not found.agrees(wanted.outcome)
    assert (found.aacc < wanted.aacc / 4, found.miou < wanted.miou / 4) == (True, True)


def test_a_complete_input_is_not_made_again(home: Home, made: Input, only_reused: None) -> None:
    before = contents(home)

    again = home.input(COUNT, nobody)

    assert (made.reused, again.reused) == (False, True)
    assert again.truth == made.truth
    assert contents(home) == before


def write_hollow(home: Home, truth: str) -> None:
    """An image and its annotation and weights that are empty, and a truth that vouches for them."""
    for path in (home.images / "ADE_val_00000001.jpg", home.labels / "ADE_val_00000001.png", home.weights):
        (home.root / path).parent.mkdir(parents=True, exist_ok=True)
        (home.root / path).touch()
    (home.root / home.expected).write_text(truth)


@pytest.mark.parametrize("lost", ["images", "labels", "weights", "expected"])
def test_an_input_that_lacks_something_is_made_again(lost: str, made: Input, only_reused: None, tmp_path: Path) -> None:
    home = SegmentationHome(tmp_path, "swin")
    key = made.truth.key.model_copy(update={"count": 1})
    write_hollow(home, made.truth.model_copy(update={"key": key}).model_dump_json())
    assert home.input(1, nobody).reused

    path = home.root / getattr(home, lost)
    (next(path.iterdir()) if path.is_dir() else path).unlink()

    with pytest.raises(MadeAgain):
        home.input(1, nobody)


@pytest.mark.parametrize("change", [{"version": 0}, {"seed": 1}, {"packages": {}}, {"count": 2}])
def test_an_input_of_another_kind_is_made_again(
    change: dict[str, object], made: Input, only_reused: None, tmp_path: Path
) -> None:
    home = SegmentationHome(tmp_path, "swin")
    key = made.truth.key.model_copy(update={"count": 1, **change})
    write_hollow(home, made.truth.model_copy(update={"key": key}).model_dump_json())

    with pytest.raises(MadeAgain):
        home.input(1, nobody)


def test_opencvs_version_is_part_of_what_the_truth_depends_on(made: Input) -> None:
    assert "opencv-python-headless" in made.truth.key.packages


def test_an_interrupt_leaves_no_truth_and_nothing_of_the_input_before(made: Input, tmp_path: Path) -> None:
    home = SegmentationHome(tmp_path, "swin")
    write_hollow(home, made.truth.model_dump_json())

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        home.input(2, interrupt)
    assert not (tmp_path / home.expected).exists()
    assert not (tmp_path / home.labels).exists()


def test_the_same_input_is_made_anywhere(home: Home, made: Input, tmp_path: Path) -> None:
    again = SegmentationHome(tmp_path, "swin")

    assert again.input(COUNT, nobody).truth == made.truth
    assert contents(again) == contents(home)


def test_annotations_are_pngs_of_one_channel_of_8_bits(home: Home, made: Input) -> None:
    for path in (home.root / home.labels).iterdir():
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert (image.format, image.mode) == ("PNG", "L")


def test_a_report_agrees_to_the_last_digit_but_one() -> None:
    report = {"metrics": {"miou": 50.0, "aacc": 80.0, "macc": 60.0}, "samples": {"scored": 2, "failed": 0}}
    found = Outcome.of(report)

    assert found == Outcome(miou=50.0, aacc=80.0, macc=60.0, scored=2, failed=0)
    assert found.agrees(Outcome(miou=50.0 + 1e-12, aacc=80.0, macc=60.0, scored=2, failed=0))
    assert not found.agrees(Outcome(miou=50.0 + 1e-8, aacc=80.0, macc=60.0, scored=2, failed=0))
    assert not found.agrees(Outcome(miou=50.0, aacc=80.0, macc=60.0, scored=1, failed=1))


def test_a_report_of_nothing_scored_has_no_figures() -> None:
    report = {"metrics": {"miou": None, "aacc": None, "macc": None}, "samples": {"scored": 0, "failed": 4}}

    assert Outcome.of(report).as_json() == {"miou": 0.0, "aacc": 0.0, "macc": 0.0, "scored": 0, "failed": 4}
