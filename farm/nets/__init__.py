"""The networks in plain PyTorch, a module each. They know nothing of weights' files, of export or of devices."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from farm.zoo.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(spec: ModelSpec) -> nn.Module:
    """The spec's network in eval mode, with weights as PyTorch happens to initialise them."""
    net: nn.Module = import_module(spec.net).build()
    return net.eval()
