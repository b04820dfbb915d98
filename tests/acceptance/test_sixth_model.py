"""A model that is one file and one line, and bins of pixels: the whole way, against plain PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from farm import nets, zoo
from farm.data import synthetic
from farm.export import planted
from tests.acceptance.conftest import Farm
from tests.sixth import SPEC

ROOT = Path(__file__).parents[2]
COUNT = 10
#: The line that the package's table would have.
FARM_WITH_SIX = "from farm import zoo; zoo.MODELS['sixth'] = 'tests.sixth'; from farm.__main__ import main; main()"


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Farm:
    """Images, labels that are each the right answer, and weights."""
    home = tmp_path_factory.mktemp("sixth")
    images = synthetic.write_imagenet(home / "images", COUNT, seed=6)
    torch.manual_seed(6)
    weights = {name: 3 * tensor for name, tensor in nets.build(SPEC).state_dict().items()}
    planted.save_weights(weights, home / "sixth.pth")
    answers = planted.reference_scores(images, SPEC, weights).argmax(axis=1)
    lines = (f"{image.name} {answer}\n" for image, answer in zip(images, answers, strict=True))
    (home / "labels.txt").write_text("".join(lines))
    return Farm(home, env={"PYTHONPATH": str(ROOT)}, command=(sys.executable, "-c", FARM_WITH_SIX))


@pytest.mark.parametrize(("dtype", "nbytes"), [("float32", 602_112), ("uint8", 150_528)])
def test_it_is_prepared_exported_and_evaluated_like_the_five(farm: Farm, dtype: str, nbytes: int) -> None:
    home = farm.home
    farm.run(
        "prepare", "sixth", "--images", str(home / "images"), "--labels", str(home / "labels.txt"), "--input", dtype
    )
    farm.run("export", "sixth", "--weights", str(home / "sixth.pth"), "--bs", "4", "--input", dtype)
    graph = next(
        path for path in (home / "data/artifacts/sixth").glob("*.onnx") if ("uint8" in path.name) == (dtype == "uint8")
    )

    report = farm.submit("--bs", "4", "--artifact", str(graph), model="sixth")

    assert report["metrics"] == {"top1": 100.0, "top5": 100.0}
    assert report["samples"] == {"total": COUNT, "scored": COUNT, "failed": 0}
    sizes = {path.stat().st_size for path in (home / f"data/bins/in256-{dtype}").glob("*.bin")}
    assert sizes == {nbytes}


def test_the_package_does_not_know_it() -> None:
    assert "sixth" not in zoo.MODELS


def test_it_is_listed_and_shown(farm: Farm) -> None:
    assert "\nsixth " in farm.run("models").stdout
    assert "recipe in256" in farm.run("models", "sixth").stdout
