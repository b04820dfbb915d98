"""farm export: weights become artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from farm.cli.arguments import batch_sizes


def export(
    model: Annotated[str, typer.Argument(help="e.g. lvvit")],
    weights: Annotated[Path, typer.Option(help="The official checkpoint, or one of the same keys.")],
    bs: Annotated[str, typer.Option(help="Batch sizes, one file each: 1,4,8.")] = "1",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the model's own if not given.")] = None,
    head: Annotated[str | None, typer.Option(help="Of swin: full, small (no last resize) or deployed.")] = None,
    input_dtype: Annotated[
        str, typer.Option("--input", help="float32, or uint8: pixels, normalised on the device; bins 4 times smaller.")
    ] = "float32",
    simplify: Annotated[bool, typer.Option("--simplify", help="Through onnxslim.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The sidecars, as JSON.")] = False,
) -> None:
    """Turn weights into ONNX artifacts with a sidecar each, checked in onnxruntime against PyTorch."""
    from rich.console import Console

    from farm import zoo
    from farm.export import require_torch
    from farm.settings import load_settings

    settings, spec, sizes = load_settings(), zoo.get(model), batch_sizes(bs)
    require_torch(*(["onnxslim"] if simplify else []))
    from farm.export.onnx import export as run

    console = Console(stderr=True)
    done = []
    with console.status(f"exporting {spec.name}") as line:
        for exported in run(
            spec, weights, sizes, settings.data_dir, opset=opset, head=head, dtype=input_dtype, simplify=simplify
        ):
            artifact = exported.artifact
            done.append(artifact)
            how = "there already, " if exported.reused else ""
            how += f"within {artifact.max_abs_diff:.1e} of PyTorch"
            how += " on float32 input" if artifact.input.dtype == "uint8" else ""
            line.update(f"exporting {spec.name}: {len(done)} of {len(sizes)} done")
            if not as_json:
                print(f"{spec.name} bs {artifact.bs}: {exported.path} ({how})", flush=True)
    if as_json:
        print(json.dumps([artifact.model_dump(mode="json") for artifact in done], indent=2))
