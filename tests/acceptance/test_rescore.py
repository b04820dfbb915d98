"""`farm rescore` of a classifier: other labels, the same rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.acceptance.conftest import Farm
from tests.datasets import name_of, write_bins, write_tiny_onnx

COUNT = 24


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    """A job of 24 samples is done."""
    farm = Farm(tmp_path_factory.mktemp("rescore") / "home")
    write_bins(farm.home / "data", COUNT)
    write_tiny_onnx(farm.home / "data", 4)
    farm.submit("--bs", "4")
    return farm


def answers(farm: Farm) -> dict[str, list[int]]:
    """The five best classes of each sample."""
    rows = farm.sql("SELECT name, class1, class2, class3, class4, class5 FROM result ORDER BY name")
    return {name: list(classes) for name, *classes in rows}


def write_labels(path: Path, labels: dict[str, int]) -> str:
    path.write_text("".join(f"{name}.JPEG {label}\n" for name, label in labels.items()))
    return str(path)


@pytest.mark.parametrize(("rank", "top1", "top5"), [(0, 100.0, 100.0), (1, 0.0, 100.0), (4, 0.0, 100.0)])
def test_labels_of_a_rank_give_the_accuracy_of_that_rank(
    rank: int, top1: float, top5: float, farm: Farm, tmp_path: Path
) -> None:
    labels = write_labels(tmp_path / "labels.txt", {name: best[rank] for name, best in answers(farm).items()})
    before = farm.json("report", "1")

    found = farm.json("rescore", "1", "--labels", labels)

    assert found["metrics"] == {"top1": top1, "top5": top5}
    assert found["samples"] == {"scored": COUNT}
    assert farm.json("report", "1") == before
    assert f"{top5:.3f} %" in farm.run("rescore", "1", "--labels", labels).stdout


def test_a_label_beyond_the_fifth_is_wrong(farm: Farm, tmp_path: Path) -> None:
    labels = {name: next(c for c in range(6) if c not in best) for name, best in answers(farm).items()}

    found = farm.json("rescore", "1", "--labels", write_labels(tmp_path / "labels.txt", labels))

    assert found["metrics"] == {"top1": 0.0, "top5": 0.0}


def test_a_sample_without_a_label_is_named(farm: Farm, tmp_path: Path) -> None:
    labels = {name: best[0] for name, best in answers(farm).items()}
    del labels[name_of(7)]

    done = farm.run("rescore", "1", "--labels", write_labels(tmp_path / "labels.txt", labels), code=1)

    assert f"has no label for {name_of(7)}" in done.stderr


def test_what_cannot_be_rescored_is_said(farm: Farm, tmp_path: Path) -> None:
    assert "there is no job 9" in farm.run("rescore", "9", "--labels", "x", code=2).stderr
    assert "cannot read the labels" in farm.run("rescore", "1", "--labels", str(tmp_path / "none"), code=2).stderr
    assert "is no segmentation" in farm.run("show", "1", "--sample", name_of(1), code=2).stderr
    assert "--per-class is for segmentation" in farm.run("report", "1", "--per-class", code=2).stderr
