"""farm models: what the farm can evaluate, and the figures it answers to."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(
    model: Annotated[str | None, typer.Argument(help="One of them, with all that is known of it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object, or a list of all.")] = False,
) -> None:
    """List the models with their reference figures, or show one with its guide's every detail.

    farm models lvvit
    """
    from rich.console import Console

    from farm import zoo
    from farm.reports import models as report

    specs = [zoo.get(name) for name in ([model] if model else zoo.MODELS)]
    if as_json:
        found = [report.as_json(spec) for spec in specs]
        print(json.dumps(found[0] if model else found, indent=2))
    elif model:
        report.show(specs[0], Console())
    else:
        report.show_all(specs, Console())
