"""`farm demo --model swin` as a user runs it: the real network on two photographs of three windows in all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm.demo.segmentation import Truth
from tests.acceptance.conftest import Farm

COUNT = 2
IMAGES = "ADEChallengeData2016/images/validation"
ANNOTATIONS = "ADEChallengeData2016/annotations/validation"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A home in which a demo ran once."""

    outer: Farm  #: where `farm demo` is run
    inner: Farm  #: the farm home it made
    printed: str
    talked: str

    @property
    def truth(self) -> Truth:
        return Truth.model_validate_json((self.inner.home / "expected.json").read_bytes())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    outer = Farm(tmp_path_factory.mktemp("demo") / "home")
    done = outer.run("demo", "--model", "swin", "--count", str(COUNT), "--json", timeout=280)
    return Demo(outer=outer, inner=Farm(outer.home / "demo" / "swin"), printed=done.stdout, talked=done.stderr)


def test_the_farm_finds_what_was_planted(demo: Demo) -> None:
    found: dict[str, Any] = json.loads(demo.printed)

    assert found["equal"]
    assert found["expected"] == demo.truth.outcome.as_json()
    assert found["jobs"][0]["measured"] == pytest.approx(found["expected"], abs=1e-9, rel=0)
    assert (found["jobs"][0]["bs"], found["expected"]["scored"]) == (1, COUNT)
    assert 75 < found["expected"]["aacc"] < 85
    assert 10 < found["expected"]["miou"] < found["expected"]["aacc"]
    assert found["input"]["favourite_share"] <= 0.3
    assert demo.inner.json("report", "1")["windows"] == 3


def test_it_types_what_a_user_would(demo: Demo) -> None:
    typed = [line.removeprefix("$ ") for line in demo.talked.splitlines() if line.startswith("$ farm ")]

    assert typed == [
        f"farm prepare swin --images {IMAGES} --annotations {ANNOTATIONS}",
        "farm export swin --weights swin-seeded.pth --bs 1 --head small",
        "farm submit swin --bs 1 --head small",
    ]


def test_annotations_shifted_by_one_class_are_found_out(demo: Demo) -> None:
    for path in (demo.inner.home / ANNOTATIONS).iterdir():
        shift_by_one_class(path)

    done = demo.outer.run("demo", "--model", "swin", "--count", str(COUNT), code=1)

    measured = demo.inner.json("report", "2")["metrics"]
    assert measured["aacc"] < demo.truth.aacc / 4
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("aAcc ")]
    assert line.split() == ["aAcc", f"{demo.truth.aacc:.6f}", "%", f"{measured['aacc']:.6f}", "%", "differs"]
    assert "Equal" not in done.stdout
    assert "error: the farm did not find what was planted: job 2 (bs 1) has aAcc " in done.stderr


def shift_by_one_class(path: Path) -> None:
    with Image.open(path) as image:
        values = np.array(image)
    nowhere = (values == 0) | (values == 255)
    shifted = np.where(nowhere, values, values % 150 + 1).astype(np.uint8)
    Image.fromarray(shifted).save(path)
