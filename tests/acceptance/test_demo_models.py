"""`farm demo --model`: each classifier's network, export, preparation and job, against an answer known before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farm import zoo
from tests.acceptance.conftest import Farm

COUNT = 12


@pytest.mark.parametrize("model", ["twins", "focal", "conformer"])
def test_the_farm_finds_what_was_planted_at_both_batch_sizes(model: str, tmp_path: Path) -> None:
    farm = Farm(tmp_path / "home")

    done = farm.run("demo", "--model", model, "--count", str(COUNT), "--bs", "1,4", "--json", timeout=280)

    found = json.loads(done.stdout)
    assert found["equal"]
    assert [(job["bs"], job["measured"]) for job in found["jobs"]] == [(1, found["expected"]), (4, found["expected"])]
    assert 0 < found["expected"]["top1"] < found["expected"]["top5"]
    assert found["expected"]["scored"] == COUNT
    assert f"$ farm submit {model} --bs 1,4" in done.stderr
    assert (farm.home / "demo" / model / "data" / "bins" / f"{zoo.get(model).recipe}-float32" / "manifest").is_file()


def test_a_model_without_a_demo_is_refused(tmp_path: Path) -> None:
    assert "there is no demo of swin" in Farm(tmp_path).run("demo", "--model", "swin", code=2).stderr
