"""The parity fixtures: weights and inputs made by `fill`, and what each upstream network made of them."""

from __future__ import annotations

import hashlib
import json
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.golden import fill

HERE = Path(__file__).parent
UPSTREAM = {
    "lvvit": "lvvit_s",
    "twins": "alt_gvt_large",
    "focal": "focalv2_small",
    "conformer": "conformer_base",
    "swin": "upernet_swin_s",
}
CLASSIFIERS = ("lvvit", "twins", "focal", "conformer")

#: Trained with, not evaluated with: in swin's checkpoint, not in the network.
AUXILIARY = "auxiliary_head."


class Fixture:
    """One model's."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.upstream = UPSTREAM[model]

    @cached_property
    def facts(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((HERE / f"{self.upstream}.json").read_text())
        return loaded

    @cached_property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Outputs for all images; `inter_*`, values inside the network for image 0 alone."""
        with np.load(HERE / f"{self.upstream}.npz") as file:
            return dict(file)

    @cached_property
    def inside(self) -> list[str]:
        """Paths of the modules whose outputs are known; ``x[1]`` is the second of a tuple."""
        return [str(name) for name in self.arrays["inter_names"]]

    @cached_property
    def keys(self) -> list[tuple[str, list[int], str]]:
        """Name, shape and type of the official checkpoint's tensors, in its order."""
        return [(name, shape, dtype) for name, shape, dtype, *_ in self.facts["state_dict"]]

    def weights(self) -> dict[str, Tensor]:
        """The official checkpoint's keys, filled."""
        return _weights(self.model)

    def state(self) -> dict[str, Tensor]:
        """`weights` without what the network does not need."""
        return {name: tensor for name, tensor in self.weights().items() if not name.startswith(AUXILIARY)}

    @cached_property
    def images(self) -> npt.NDArray[np.float32]:
        """[4, 3, 224, 224], of swin [1, 3, 512, 512]"""
        side = 512 if self.model == "swin" else 224
        known = list(self.arrays["input_sha256"])
        made = np.stack([fill.make_input(self.upstream, index, (3, side, side)) for index in range(len(known))])
        assert [hashlib.sha256(image.tobytes()).hexdigest() for image in made] == known
        return made

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """What the deployed network of a classifier puts out for `images`: [4, 1000]"""
        found: npt.NDArray[np.float64] = self.arrays["probs_f64" if self.model == "conformer" else "logits_f64"]
        return found

    def computed(self) -> dict[str, Tensor]:
        """The tables that a checkpoint holds although they can be computed, by name."""
        made = {name: self._table(name, shape) for name, shape, *_, rule in self._state_dict if rule == "computed"}
        for name, tensor in made.items():
            known = self.facts["computed_sha256"][name]
            assert hashlib.sha256(tensor.numpy().tobytes()).hexdigest() == known, name
        return made

    @property
    def _state_dict(self) -> list[list[Any]]:
        rows: list[list[Any]] = self.facts["state_dict"]
        return rows

    def _table(self, name: str, shape: list[int]) -> Tensor:
        last = name.rpartition(".")[2]
        if last == "relative_position_index":
            return torch.from_numpy(self.arrays["relative_position_index"].astype(np.int64))
        inside = np.stack(np.meshgrid(np.arange(-3, 4), np.arange(-3, 4), indexing="ij"), axis=-1)
        if last == "window_coords":
            return torch.from_numpy(inside)
        stage, level = int(name.split(".")[1]), int(last[-1])
        keys = self.arrays[f"topk_index_stage{stage}_level{level}"].astype(np.int64)
        if last.startswith("topk_cloest_indice"):
            return torch.from_numpy(keys).reshape(shape)
        # From each key to each query of a window, in pixels; a coarse key stands at the centre of its window.
        across = 56 >> stage
        windows = np.stack(np.divmod(np.arange(len(keys)), across // 7), axis=-1)
        if level == 0:
            away = 7 * windows[:, None] + 3 - np.stack(np.divmod(keys, across), axis=-1)
        else:
            away = 7 * (windows[:, None] - np.stack(np.divmod(keys, across // 7), axis=-1))
        coords = inside.reshape(1, 49, 1, 2) + away[:, None]
        return torch.from_numpy(coords.astype(np.float32)).reshape(shape)


@cache
def of(model: str) -> Fixture:
    return Fixture(model)


@lru_cache(maxsize=2)  # each some hundred megabytes
def _weights(model: str) -> dict[str, Tensor]:
    fixture = of(model)
    filled = fill.fill_state({name: (shape, dtype) for name, shape, dtype in fixture.keys})
    digest = hashlib.sha256()
    for values in filled.values():
        digest.update(values.tobytes())
    assert digest.hexdigest() == fixture.facts["weights_sha256"]
    tensors = {name: torch.from_numpy(values) for name, values in filled.items()} | fixture.computed()
    return {name: tensors[name] for name, *_ in fixture.keys}
