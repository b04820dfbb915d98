"""farm export: weights become artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farm.cli.arguments import batch_sizes


def export(
    model: Annotated[str, typer.Argument(help="e.g. lvvit")],
    weights: Annotated[Path, typer.Option(help="The official checkpoint, or one of the same keys.")],
    bs: Annotated[str, typer.Option(help="Batch sizes, one file each: 1,4,8.")] = "1",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the model's own if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The sidecars, as JSON.")] = False,
) -> None:
    """Turn weights into ONNX artifacts with a sidecar each, checked in onnxruntime against PyTorch."""
    raise NotImplementedError((model, weights, batch_sizes(bs), opset, as_json))
