"""A classifier that the package does not know: all that one takes, in one file. See README, "A sixth classifier"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from farm.zoo.spec import ModelSpec, Tensor

if TYPE_CHECKING:
    from torch import nn

SPEC = ModelSpec(
    name="sixth",
    title="Sixth",
    net=__name__,
    dataset="imagenet",
    recipe="in256",
    input=Tensor(name="pixels", dtype="float32", shape=(3, 224, 224)),
    output=Tensor(name="scores", dtype="float32", shape=(1000,)),
    opset=13,
    batch_sizes=(1, 4),
)


def build() -> nn.Module:
    from torch import nn  # not above: whoever submits a job needs no torch

    return nn.Sequential(nn.Conv2d(3, 16, 32, stride=32), nn.ReLU(), nn.Flatten(), nn.Linear(784, 1000))
