"""
The demo's input: photographs, weights and labels whose right answer is known before the farm has seen any of them.

All in a farm home of its own, so that nothing seeded ever mixes with what a user measures. Runs no job: a user's
commands do, and `farm.cli.demo` types them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from farm import zoo
from farm.demo.home import Home

#: By dataset of the model: a module with a `HOME`, of a class of its own.
HOMES = {"imagenet": "farm.demo.classification", "ade20k": "farm.demo.segmentation"}


def home_of(root: Path, model: str) -> Home:
    """The demo's home of a model of the zoo, in this directory."""
    made: Home = import_module(HOMES[zoo.get(model).dataset]).HOME(root, model)
    return made
