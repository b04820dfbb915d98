"""The demo's input: complete or not there, the same every time, and its truth of a kind that notices."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from farm import nets, zoo
from farm.data import imagenet, recipes
from farm.demo.classification import ClassificationHome, Outcome, Truth
from farm.demo.home import Home, Input
from farm.errors import UsageError
from farm.export import planted
from farm.export.checkpoint import load_checkpoint
from farm.export.planted import Scores

COUNT = 24
SPEC = zoo.get("lvvit")


def nobody(_done: int, _total: int) -> None:
    pass


class MadeAgain(Exception):
    """Raised where making an input begins."""


@pytest.fixture
def only_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        raise MadeAgain

    monkeypatch.setattr("farm.export.require_torch", begin)


def truth_of(made: Input) -> Truth:
    assert isinstance(made.truth, Truth)
    return made.truth


def contents(home: Home) -> dict[str, bytes]:
    """Every file of the input."""
    paths = [*(home.root / home.images).iterdir(), *(home.root / p for p in (home.labels, home.weights, home.expected))]
    return {path.name: path.read_bytes() for path in paths}


def correct(scores: Scores, labels: list[int], k: int) -> int:
    """How many labels are among their sample's k best, by counting who is better."""
    own = scores[np.arange(len(scores)), labels]
    return int(((scores > own[:, None]).sum(axis=1) < k).sum())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("demo")
    return ClassificationHome(root, "lvvit")


@pytest.fixture(scope="module")
def made(home: Home) -> Input:
    return home.input(COUNT, nobody)


@pytest.fixture(scope="module")
def images(home: Home, made: Input) -> list[Path]:
    return sorted((home.root / home.images).iterdir())


@pytest.fixture(scope="module")
def labels(home: Home, made: Input) -> list[int]:
    """By the farm's own reader, in order of the images."""
    return [picture.label for picture in imagenet.load(home.root / home.images, home.root / home.labels)]


@pytest.fixture(scope="module")
def scores(home: Home, images: list[Path]) -> Scores:
    """What the weights answer as they were saved, by the reference's preparation."""
    net = nets.build(SPEC)
    load_checkpoint(home.root / home.weights, net)
    return planted.reference_scores(images, SPEC, net.state_dict())


def test_images_and_labels_are_as_ilsvrc2012_has_them(home: Home, images: list[Path]) -> None:
    lines = (home.root / home.labels).read_text().splitlines()
    assert [line.split()[0] for line in lines] == [image.name for image in images]
    assert images[0].name == "ILSVRC2012_val_00000001.JPEG"
    assert all(0 <= int(line.split()[1]) < 1000 for line in lines)
    modes = set()
    for path in images:
        with Image.open(path) as image:
            modes.add((image.format, image.mode))
    assert {("JPEG", "RGB"), ("JPEG", "L")} <= modes


def test_the_saved_weights_give_the_accuracy_that_is_expected(made: Input, labels: list[int], scores: Scores) -> None:
    outcome = truth_of(made).outcome
    assert (outcome.top1_correct, outcome.top5_correct) == (correct(scores, labels, 1), correct(scores, labels, 5))
    assert (outcome.scored, outcome.failed) == (COUNT, 0)
    assert outcome.top1_correct < outcome.top5_correct < COUNT, "some labels are wrong, and some of those beyond rank 5"


def test_no_class_is_the_answer_to_more_than_a_tenth(made: Input, scores: Scores) -> None:
    share = np.bincount(scores.argmax(axis=1)).max() / COUNT
    assert share <= 0.1
    assert share == made.truth.favourite_share


def test_the_farm_prepares_every_image_as_the_reference_does(images: list[Path]) -> None:
    for image in images:
        by_farm = recipes.prepare(image, recipes.RECIPES[SPEC.recipe])
        assert torch.equal(torch.from_numpy(by_farm), planted.prepare(image, "lvvit")), image.name


@pytest.mark.parametrize("by", [1, -1])
def test_labels_that_slip_by_one_line_change_the_score(by: int, made: Input, labels: list[int], scores: Scores) -> None:
    slipped = list(np.roll(labels, by))
    assert correct(scores, slipped, 1) < truth_of(made).top1_correct / 2
    assert correct(scores, slipped, 5) < truth_of(made).top5_correct


@pytest.mark.parametrize("by", [1, -1])
def test_labels_counted_from_one_more_or_less_change_the_score(
    by: int, made: Input, labels: list[int], scores: Scores
) -> None:
    assert correct(scores, [(label + by) % 1000 for label in labels], 1) < truth_of(made).top1_correct / 2


def test_any_two_samples_that_change_places_change_the_score_if_both_are_right_and_differ(
    made: Input, labels: list[int], scores: Scores
) -> None:
    answers = scores.argmax(axis=1)
    right = np.flatnonzero(answers == labels)
    pairs = [(a, b) for a, b in itertools.combinations(right, 2) if answers[a] != answers[b]]
    assert len(pairs) > 0.9 * len(right) * (len(right) - 1) / 2
    for first, second in pairs:
        places = np.arange(COUNT)
        places[[first, second]] = second, first
        assert correct(scores[places], labels, 1) == truth_of(made).top1_correct - 2


def test_a_complete_input_is_not_made_again(home: Home, made: Input, only_reused: None) -> None:
    before = contents(home)
    again = home.input(COUNT, nobody)
    assert (made.reused, again.reused) == (False, True)
    assert again.truth == made.truth
    assert contents(home) == before


@pytest.mark.parametrize("lost", ["images", "labels", "weights", "expected"])
def test_an_input_that_lacks_something_is_made_again(lost: str, made: Input, only_reused: None, tmp_path: Path) -> None:
    home = ClassificationHome(tmp_path, "lvvit")
    key = made.truth.key.model_copy(update={"count": 1})
    write_hollow(home, made.truth.model_copy(update={"key": key}).model_dump_json())
    assert home.input(1, nobody).reused

    path = home.root / getattr(home, lost)
    (path / "ILSVRC2012_val_00000001.JPEG" if lost == "images" else path).unlink()

    with pytest.raises(MadeAgain):
        home.input(1, nobody)


@pytest.mark.parametrize(
    "change", [{"version": 0}, {"farm": "0.0.0"}, {"seed": 1}, {"packages": {}}, {"count": 2}, {"model": "twins"}]
)
def test_an_input_of_another_kind_is_made_again(
    change: dict[str, object], made: Input, only_reused: None, tmp_path: Path
) -> None:
    home = ClassificationHome(tmp_path, "lvvit")
    key = made.truth.key.model_copy(update={"count": 1, **change})
    write_hollow(home, made.truth.model_copy(update={"key": key}).model_dump_json())

    with pytest.raises(MadeAgain):
        home.input(1, nobody)


def test_a_truth_that_is_none_is_made_again(only_reused: None, tmp_path: Path) -> None:
    home = ClassificationHome(tmp_path, "lvvit")
    write_hollow(home, '{"key": ')
    with pytest.raises(MadeAgain):
        home.input(1, nobody)


def write_hollow(home: Home, truth: str) -> None:
    """One image, labels and weights that are empty, and a truth that vouches for them."""
    (home.root / home.images).mkdir(parents=True)
    for path in (home.images / "ILSVRC2012_val_00000001.JPEG", home.labels, home.weights):
        (home.root / path).touch()
    (home.root / home.expected).write_text(truth)


def test_an_interrupt_leaves_no_truth_and_nothing_of_the_input_before(made: Input, tmp_path: Path) -> None:
    home = ClassificationHome(tmp_path, "lvvit")
    write_hollow(home, made.truth.model_dump_json())
    artifact = tmp_path / "data" / "artifacts" / "lvvit" / "lvvit_bs4_0.onnx"
    artifact.parent.mkdir(parents=True)
    artifact.touch()

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        home.input(4, interrupt)
    assert not (tmp_path / home.expected).exists()
    assert not artifact.exists(), "a second artifact of a batch size would make submit ask which"


def test_the_same_input_is_made_anywhere(home: Home, made: Input, tmp_path: Path) -> None:
    again = ClassificationHome(tmp_path, "lvvit")
    assert again.input(COUNT, nobody).truth == made.truth
    assert contents(again) == contents(home)


def test_one_demo_at_a_time(tmp_path: Path) -> None:
    home = ClassificationHome(tmp_path / "demo", "lvvit")
    with (
        home.claimed(),
        pytest.raises(UsageError, match="another farm demo is at work"),
        home.claimed(),
    ):
        pass
    with home.claimed():
        pass


def test_a_report_is_read_as_counts() -> None:
    report = {"metrics": {"top1": 100 * 29 / 48, "top5": 100 * 43 / 48}, "samples": {"scored": 48, "failed": 2}}
    assert Outcome.of(report) == Outcome(top1_correct=29, top5_correct=43, scored=48, failed=2)


def test_a_report_of_nothing_scored_has_no_correct_answers() -> None:
    report = {"metrics": {"top1": None, "top5": None}, "samples": {"scored": 0, "failed": 4}}
    outcome = Outcome.of(report)
    assert outcome == Outcome(top1_correct=0, top5_correct=0, scored=0, failed=4)
    assert json.dumps(outcome.as_json()) == '{"top1": 0.0, "top5": 0.0, "scored": 0, "failed": 4}'
