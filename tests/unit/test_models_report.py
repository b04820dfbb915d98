"""`farm models`: the reference figures, and every detail of the guides, as files here hold them."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from farm import zoo
from farm.reports import models
from tests.golden import parity

#: The deployment guides' figures, written down a second time: fps of one 310P3 by batch size.
FPS = {
    "lvvit": {1: 59.2, 4: 76.0, 8: 59.9, 16: 26.4, 32: 11.5, 64: 5.1},
    "twins": {1: 131.1062, 4: 129.6842, 8: 175.2209, 16: 161.2279, 32: 156.0500, 64: 148.1286},
    "focal": {1: 6.06, 4: 6.57, 8: 6.72, 16: 6.74, 32: 6.99, 64: 6.99},
    "conformer": {1: 142.4363, 4: 208.2684, 8: 257.7437, 16: 231.9296, 32: 220.9309, 64: 208.0021},
    "swin": {1: 16.74, 4: 16.06, 8: 16.20},
}
BEST = {"lvvit": 4, "twins": 8, "focal": 32, "conformer": 8, "swin": 1}


def shown(model: str) -> str:
    console = Console(file=StringIO(), width=80)
    models.show(zoo.get(model), console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_the_table_is_for_the_five_models_and_fits_a_terminal() -> None:
    console = Console(file=StringIO(), width=80)

    models.show_all([zoo.get(name) for name in zoo.MODELS], console)

    assert isinstance(console.file, StringIO)
    header, *rows = console.file.getvalue().splitlines()
    assert [row.split()[0] for row in rows[:5]] == ["lvvit", "twins", "focal", "conformer", "swin"]
    assert rows[1].split()[1:] == ["top-1", "83.7", "%", "83.7", "131.1", "129.7", "175.2", "161.2", "156.1", "148.1"]
    assert rows[4].split()[-3:] == ["x", "x", "x"]
    assert "…" not in header + "".join(rows)


@pytest.mark.parametrize("model", zoo.MODELS)
def test_the_figures_are_the_guides(model: str) -> None:
    found = models.as_json(zoo.get(model))

    assert found["reference_fps"] == FPS[model]
    assert f"{BEST[model]} (best)" in shown(model)
    assert json.loads(json.dumps(found))["guide"]["weights"] == parity.of(model).facts["checkpoint"]["file"]


def test_a_model_is_shown_with_all_that_its_guide_says() -> None:
    text = " ".join(shown("conformer").split())

    for part in (
        "input float32 [bs,3,224,224]",
        "probs float32 [bs,1000]",
        "top-1 83.85 %",
        "top-1 83.82 %",
        "conformer-base-p16_8xb128_in1k",
        "driver 22.0.2, CANN 5.1.RC2",
        "Python 3.7.5, PyTorch 1.9.0",
        "--input_shape=input:8,3,224,224 --log=error --soc_version=Ascend310P3",
        "64 208.0021 138.7254 1.50x",
    ):
        assert part in text
    assert "--input_format" not in text, "the guide's command for this one has none"


def test_a_batch_size_that_is_not_possible_comes_with_the_reason() -> None:
    assert "16 out of memory" in " ".join(shown("swin").split())


def test_the_compiler_gets_its_options_as_arguments_of_their_own() -> None:
    command = zoo.get("lvvit").atc_command(4, graph="a b.onnx", output="out")

    assert command == [
        "atc",
        "--framework=5",
        "--model=a b.onnx",
        "--output=out",
        "--input_format=NCHW",
        "--input_shape=image:4,3,224,224",
        "--log=error",
        "--soc_version=Ascend310P3",
    ]
