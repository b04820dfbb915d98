"""The planted truth: that it is right, that it is independent, and that it notices what it must notice."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from farm import nets, zoo
from farm.errors import FarmError
from farm.export import planted
from farm.export.checkpoint import load_checkpoint
from farm.export.planted import Centred, Planted, Scores, centre_head, plant_labels, reference_scores, seeded_weights

GOLDEN = Path(__file__).parent.parent / "golden"
SPEC = zoo.get("lvvit")
FACTS = json.loads((GOLDEN / "preprocess.json").read_text())
PICTURES = tuple(name for name in FACTS if not name.startswith("_"))


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The eight pictures of the preprocessing fixture."""
    directory = tmp_path_factory.mktemp("jpegs")
    paths = {name: directory / f"{name}.jpeg" for name in PICTURES}
    with np.load(GOLDEN / "preprocess.npz") as golden:
        for name, path in paths.items():
            path.write_bytes(golden[f"{name}/jpeg"].tobytes())
    return paths


@pytest.fixture(scope="session")
def images(jpegs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Thirty-two pictures: each of the eight, and three pieces of it."""
    directory = tmp_path_factory.mktemp("images")
    paths = []
    for name, piece in itertools.product(jpegs, range(4)):
        with Image.open(jpegs[name]) as whole:
            width, height = whole.size
            left, top = width // 3 * (piece % 2), height // 3 * (piece // 2 % 2)
            box = (left, top, left + 2 * width // 3, top + 2 * height // 3) if piece < 3 else (0, 0, width, height)
            paths.append(directory / f"{name}-{piece}.png")
            whole.convert("RGB").crop(box).save(paths[-1])
    return paths


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    return seeded_weights(SPEC, seed=1)


@pytest.fixture(scope="session")
def scores(images: list[Path], weights: dict[str, torch.Tensor]) -> Scores:
    return reference_scores(images, SPEC, weights)


@pytest.fixture(scope="session")
def centred(weights: dict[str, torch.Tensor], scores: Scores) -> Centred:
    return centre_head(weights, scores)


@pytest.fixture(scope="session")
def truth(centred: Centred) -> Planted:
    return plant_labels(centred.scores, seed=1)


def noise(samples: int, seed: int = 0) -> Scores:
    """Scores of nothing, [samples, 1000]."""
    return np.random.default_rng(seed).normal(size=(samples, 1000)).astype(np.float32)


def correct(scores: Scores, labels: np.ndarray[Any, Any], k: int) -> int:
    """How many labels are among their sample's k best, by counting who is better."""
    own = scores[np.arange(len(scores)), labels]
    return int(((scores > own[:, None]).sum(axis=1) < k).sum())


def largest_share(scores: Scores) -> float:
    return float(np.bincount(scores.argmax(axis=1)).max()) / len(scores)


@pytest.mark.parametrize("recipe", ["lvvit", "in256"])
@pytest.mark.parametrize("name", PICTURES)
def test_the_reference_prepares_an_image_to_the_bit(name: str, recipe: str, jpegs: dict[str, Path]) -> None:
    expected = FACTS[name][recipe]

    tensor = planted.prepare(jpegs[name], recipe)

    assert list(tensor.shape) == expected["shape"]
    assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == expected["f32_sha256"]


def test_the_reference_shares_no_preparation_or_metric_with_the_farm() -> None:
    tree = ast.parse(Path(planted.__file__).read_text())

    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    ours = {module for module in imported if module.split(".")[0] in ("farm", "workers", "tasks", "db")}
    assert ours == {"farm", "farm.errors", "farm.zoo.spec"}


def test_seeded_weights_make_a_checkpoint_that_the_network_takes(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    net = nets.build(SPEC)

    planted.save_weights(weights, tmp_path / "lvvit.pth.tar")
    load_checkpoint(tmp_path / "lvvit.pth.tar", net)

    state = net.state_dict()
    assert list(state) == list(weights)
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in weights.items()
    )


def test_one_seed_makes_one_checkpoint_file(tmp_path: Path) -> None:
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        planted.save_weights(seeded_weights(SPEC, seed=5), directory / "lvvit.pth.tar")

    assert (tmp_path / "a" / "lvvit.pth.tar").read_bytes() == (tmp_path / "b" / "lvvit.pth.tar").read_bytes()


def test_another_seed_makes_other_weights(weights: dict[str, torch.Tensor]) -> None:
    other = seeded_weights(SPEC, seed=2)

    assert not torch.equal(other["blocks.3.attn.qkv.weight"], weights["blocks.3.attn.qkv.weight"])


def test_reference_scores_are_those_of_the_network_image_by_image(
    images: list[Path], weights: dict[str, torch.Tensor], scores: Scores
) -> None:
    net = nets.build(SPEC)
    net.load_state_dict(weights)

    with torch.inference_mode():
        last = net(planted.prepare(images[-1], "lvvit")[None])

    np.testing.assert_allclose(scores[-1], last[0].numpy(), rtol=0, atol=1e-5)


def test_progress_ends_with_all_images_also_where_the_last_batch_is_short(
    images: list[Path], weights: dict[str, torch.Tensor]
) -> None:
    told: list[tuple[int, int]] = []

    reference_scores(images[:5], SPEC, weights, progress=lambda done, total: told.append((done, total)))

    assert told == [(4, 5), (5, 5)]


def test_a_seeded_network_has_favourite_classes_before_it_is_centred(scores: Scores) -> None:
    assert largest_share(scores) > planted.MOST


def test_no_class_is_the_answer_to_more_than_a_tenth_once_it_is_centred(centred: Centred) -> None:
    assert largest_share(centred.scores) <= 0.1


def test_centring_evens_out_scores_that_vary_along_one_direction_only() -> None:
    # Given samples that differ in a single number: the mean alone would leave two classes with half of them each
    line = np.linspace(-1, 1, 200)[:, None] * np.random.default_rng(0).normal(size=1000)
    scores = line.astype(np.float32)
    assert largest_share(scores - scores.mean(axis=0)) > 0.4

    centred = centre_head({"head.bias": torch.zeros(1000)}, scores)

    assert largest_share(centred.scores) <= 0.1


def test_centring_changes_the_bias_of_the_class_head_alone(weights: dict[str, torch.Tensor], centred: Centred) -> None:
    changed = [name for name, tensor in centred.state.items() if not torch.equal(tensor, weights[name])]

    assert list(centred.state) == list(weights)
    assert changed == ["head.bias"]
    assert centred.state["head.bias"].dtype == torch.float32


def test_centred_scores_are_what_the_network_answers_with_the_centred_weights(
    images: list[Path], centred: Centred
) -> None:
    scores = reference_scores(images[:6], SPEC, centred.state)

    np.testing.assert_allclose(centred.scores[:6], scores, rtol=0, atol=1e-5)


def test_images_that_are_all_the_same_cannot_be_centred() -> None:
    with pytest.raises(FarmError, match="too many of the images are the same"):
        centre_head({"head.bias": torch.zeros(1000)}, np.repeat(noise(2), 20, axis=0))


@pytest.mark.parametrize(("samples", "wrong"), [(40, 0.2), (250, 0.2), (250, 0.0), (250, 1.0), (7, 0.3)])
def test_planted_counts_are_those_of_counting_again(samples: int, wrong: float) -> None:
    scores = noise(samples)

    truth = plant_labels(scores, seed=3, wrong=wrong)

    assert truth.labels.shape == (samples,)
    assert (truth.top1_correct, truth.top5_correct) == tuple(correct(scores, truth.labels, k) for k in (1, 5))
    assert (truth.top1, truth.top5) == (100 * truth.top1_correct / samples, 100 * truth.top5_correct / samples)


def test_a_fifth_is_planted_wrong_and_half_of_that_beyond_the_top_five() -> None:
    truth = plant_labels(noise(1000), seed=3)

    # a few samples are too close to call and get a worse label than meant for them
    assert truth.top1 == pytest.approx(80, abs=1.0)
    assert truth.top5 == pytest.approx(90, abs=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_no_label_changes_its_side_when_scores_move_by_less_than_half_the_lead(seed: int) -> None:
    scores = noise(1000)
    truth = plant_labels(scores, seed=3)

    moved = scores + np.random.default_rng(seed).uniform(-4.5e-4, 4.5e-4, size=scores.shape).astype(np.float32)

    own = np.arange(len(scores)), truth.labels
    for k in (1, 5):
        before = (scores > scores[own][:, None]).sum(axis=1) < k
        after = (moved > moved[own][:, None]).sum(axis=1) < k
        assert (before == after).all()


def row(*best: float) -> Scores:
    """One sample's scores: these first, all other classes far below."""
    return np.concatenate((best, np.linspace(-50, -90, 1000 - len(best)))).astype(np.float32)[None]


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        pytest.param(row(9, 8, 7, 6, 5, 4), {0}, id="clear"),
        pytest.param(row(9, 8.9995, 7, 6, 5, 4), {2, 3, 4}, id="first and second too close"),
        pytest.param(row(9, 8.9995, 4, 4, 4, 4), set(range(6, 1000)), id="fifth and sixth too close as well"),
        pytest.param(row(9, 8.9995, 7, 4, 4, 4), {2}, id="only the third is clear"),
    ],
)
def test_a_sample_too_close_to_call_gets_a_label_that_is_not(scores: Scores, ranks: set[int]) -> None:
    planted_labels = {int(plant_labels(scores, seed, wrong=0.0).labels[0]) for seed in range(40)}

    assert planted_labels <= ranks
    assert len(planted_labels) >= min(3, len(ranks))


def test_scores_that_are_all_alike_have_no_truth() -> None:
    with pytest.raises(FarmError, match="all alike"):
        plant_labels(np.zeros((1, 1000), np.float32), seed=0)


def test_one_seed_plants_the_same_labels(centred: Centred, truth: Planted) -> None:
    np.testing.assert_array_equal(plant_labels(centred.scores, seed=1).labels, truth.labels)


def test_another_seed_plants_other_labels(centred: Centred, truth: Planted) -> None:
    assert (plant_labels(centred.scores, seed=2).labels != truth.labels).any()


@pytest.mark.parametrize("by", [1, -1])
def test_labels_shifted_by_one_sample_change_the_score_by_far(by: int, centred: Centred, truth: Planted) -> None:
    shifted = np.roll(truth.labels, by)

    assert correct(centred.scores, shifted, 1) < truth.top1_correct / 2


def test_two_samples_that_change_places_change_the_score(centred: Centred, truth: Planted) -> None:
    """Whichever two they are, as long as both are right and answer differently; that is most pairs."""
    answers = centred.scores.argmax(axis=1)
    right = np.flatnonzero(answers == truth.labels)
    pairs = [(a, b) for a, b in itertools.combinations(right, 2) if answers[a] != answers[b]]
    assert len(pairs) > 0.9 * len(right) * (len(right) - 1) / 2

    for first, second in pairs:
        swapped = np.arange(len(answers))
        swapped[[first, second]] = second, first
        assert correct(centred.scores[swapped], truth.labels, 1) == truth.top1_correct - 2
