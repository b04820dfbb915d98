"""The models the farm knows: a plain table of names, each the module that holds its ``SPEC``."""

from __future__ import annotations

from importlib import import_module

from farm.errors import UsageError
from farm.zoo.spec import ModelSpec

MODELS = {
    "lvvit": "farm.zoo.lvvit",
    "twins": "farm.zoo.twins",
    "focal": "farm.zoo.focal",
    "conformer": "farm.zoo.conformer",
    "swin": "farm.zoo.swin",
}


def get(name: str) -> ModelSpec:
    """The spec of one model; `UsageError` with the known names for any other."""
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}: the farm knows {', '.join(MODELS)}")
    spec: ModelSpec = import_module(MODELS[name]).SPEC
    return spec
