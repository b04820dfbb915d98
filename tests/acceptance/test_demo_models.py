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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "nobody"], "nobody"),
        (["--count", "9"], "--count 9: expected 10 to 50000 photographs for lvvit"),
        (["--model", "swin", "--count", "61"], "--count 61: expected 1 to 60 photographs for swin"),
        (["--model", "swin", "--count", "0"], "--count 0: expected 1 to 60 photographs for swin"),
        (["--model", "swin", "--bs", "x"], "--bs x: expected different batch sizes"),
    ],
)
def test_what_there_is_no_demo_of_is_refused(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    farm = Farm(tmp_path / "home")

    assert sentence in farm.run("demo", *arguments, code=2).stderr
    assert not (farm.home / "demo").exists()
