"""What the farm must know of a model to run and score it. The network itself is in `farm.nets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One input or output of a model's graph, without its batch axis."""

    name: str
    dtype: str  #: numpy's name, e.g. "float32"
    shape: tuple[int, ...]  #: of one sample

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as its deployment guide fixes it."""

    name: str  #: what a user types
    title: str
    net: str  #: module of the network, imported only to export
    dataset: str
    recipe: str  #: key of `farm.data.recipes.RECIPES`
    input: Tensor
    output: Tensor
    opset: int
    batch_sizes: tuple[int, ...]  #: those the guide measured
    reference: Mapping[str, float] = field(default_factory=dict)  #: metric in percent
    reference_fps: Mapping[int, float] = field(default_factory=dict)  #: device fps of one 310P3, by batch size
