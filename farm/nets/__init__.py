"""The networks in plain PyTorch, a module each. They know nothing of weights' files, of export or of devices."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from farm.zoo.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(spec: ModelSpec, head: str = "") -> nn.Module:
    """
    The spec's network in eval mode, with weights as PyTorch happens to initialise them.

    `head` is one of `ModelSpec.heads`, for a model that has several; by default the first.
    """
    module = import_module(spec.net)
    net: nn.Module = module.build(head) if head else module.build()
    return net.eval()


def freeze(net: nn.Module) -> None:
    """
    Compute once what depends on the weights alone, in every module that has a `freeze` of its own.

    The outputs stay as they are, the graph gets constants. From here on the weights must not change.
    """
    for module in net.modules():
        compute = getattr(module, "freeze", None)
        if callable(compute):
            compute()
