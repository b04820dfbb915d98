"""LV-ViT-S's parity fixture: weights and inputs made by `fill`, and what the upstream network made of them."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.golden import fill

HERE = Path(__file__).parent


@cache
def facts() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((HERE / "lvvit_s.json").read_text())
    return loaded


@cache
def arrays() -> dict[str, npt.NDArray[Any]]:
    """`logits` and `logits_f64`, [4, 1000] each; `inter_*`, values inside the network for image 0 alone."""
    with np.load(HERE / "lvvit_s.npz") as file:
        return dict(file)


def keys() -> list[tuple[str, list[int], str]]:
    """Name, shape and type of the official checkpoint's tensors, in its order."""
    return [(name, shape, dtype) for name, shape, dtype, *_ in facts()["state_dict"]]


@cache
def weights() -> dict[str, Tensor]:
    filled = fill.fill_state({name: (shape, dtype) for name, shape, dtype in keys()})
    digest = hashlib.sha256()
    for values in filled.values():
        digest.update(values.tobytes())
    assert digest.hexdigest() == facts()["weights_sha256"]
    return {name: torch.from_numpy(values) for name, values in filled.items()}


@cache
def images() -> npt.NDArray[np.float32]:
    """[4, 3, 224, 224]"""
    made = np.stack([fill.make_input("lvvit_s", index, (3, 224, 224)) for index in range(4)])
    assert [hashlib.sha256(image.tobytes()).hexdigest() for image in made] == list(arrays()["input_sha256"])
    return made
