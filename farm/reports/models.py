"""The models as `farm models` shows them: the reference table, and all that a model's deployment guide says."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from farm.zoo.spec import ModelSpec

SCHEMA = 1
METRICS = {"top1": "top-1", "miou": "mIoU", "aacc": "aAcc", "macc": "mAcc"}


def as_json(spec: ModelSpec) -> dict[str, Any]:
    return {"schema": SCHEMA, **asdict(spec), "atc": shlex.join(_atc(spec))}


def show_all(specs: Sequence[ModelSpec], console: Console) -> None:
    """The reference table: a row a model."""
    sizes = sorted({size for spec in specs for size in (*spec.batch_sizes, *spec.impossible)})
    table = Table("model", "310P3", "upstream", box=None, pad_edge=False)
    for size in sizes:
        table.add_column(f"bs {size}", justify="right")
    for spec in specs:
        best = _best(spec)
        fps = [f"[bold]{_short(spec, size)}[/]" if size == best else _short(spec, size) for size in sizes]
        upstream = list(spec.guide.upstream_metrics.values()) if spec.guide else []
        table.add_row(spec.name, _main(spec.reference), str(upstream[0] if upstream else "-"), *fps)
    console.print(table)
    console.print("fps: of one 310P3, device time alone, the best in bold; x: not possible.", style="dim")
    console.print("farm models MODEL shows everything its deployment guide says.", style="dim")


def show(spec: ModelSpec, console: Console) -> None:
    """One model, with everything its guide says."""
    console.print(f"[bold]{spec.name}[/]: {spec.title}", highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(spec):
        table.add_row(name, escape(value))
    console.print(table, highlight=False)
    console.print()
    console.print(_speed(spec))


def _facts(spec: ModelSpec) -> list[tuple[str, str]]:
    facts = [
        ("data", f"{spec.dataset}, recipe {spec.recipe}"),
        ("input", _tensor(spec.input.name, spec.input.dtype, spec.input.shape)),
        *(
            (f"output, head {head}" if head else "output", _tensor(tensor.name, tensor.dtype, tensor.shape))
            for head, tensor in (spec.heads or {"": spec.output}).items()
        ),
        ("opset", str(spec.opset)),
        ("accuracy on 310P3", _percent(spec.reference)),
    ]
    if spec.probabilities:
        facts.append(("scores", "probabilities: the graph ends in a softmax"))
    if guide := spec.guide:
        facts += [
            ("taken at bs", guide.accuracy_at),
            ("accuracy upstream", _percent(guide.upstream_metrics)),
            ("upstream", f"{guide.upstream}, {guide.commit}"),
            ("called there", guide.upstream_name),
            ("weights", guide.weights),
            ("from", guide.weights_from),
            ("measured on", f"{guide.card}, driver {guide.driver}, CANN {guide.cann}"),
            ("exported with", f"Python {guide.python}, PyTorch {guide.pytorch or 'not said'}"),
        ]
    facts.append(("compiled by", shlex.join(_atc(spec))))
    return facts


def _speed(spec: ModelSpec) -> Table:
    guide = spec.guide
    baseline = guide.baseline_fps if guide else {}
    table = Table("batch size", box=None, pad_edge=False)
    table.add_column("310P3 fps", justify="right")
    if guide and baseline:
        table.add_column(f"{guide.baseline} fps", justify="right")
        table.add_column("ratio", justify="right")
    best = _best(spec)
    for size in (*spec.batch_sizes, *spec.impossible):
        row = [f"{size} (best)" if size == best else str(size), _fps(spec, size)]
        if baseline:
            ours, theirs = spec.reference_fps.get(size), baseline.get(size)
            row += [str(theirs or "-"), f"{ours / theirs:.2f}x" if ours and theirs else "-"]
        table.add_row(*row)
    return table


def _atc(spec: ModelSpec) -> list[str]:
    bs = _best(spec) or 1
    return spec.atc_command(bs, graph=f"{spec.name}_bs{bs}.onnx", output=f"{spec.name}_bs{bs}")


def _best(spec: ModelSpec) -> int | None:
    # The smallest of equals.
    return max(spec.reference_fps, key=lambda size: (spec.reference_fps[size], -size), default=None)


def _fps(spec: ModelSpec, size: int) -> str:
    return str(spec.reference_fps.get(size) or spec.impossible.get(size, "-"))


def _short(spec: ModelSpec, size: int) -> str:
    fps = spec.reference_fps.get(size)
    return "x" if size in spec.impossible else f"{fps:.4g}" if fps else "-"


def _main(metrics: Mapping[str, float]) -> str:
    """The metric a model is known by: the first."""
    return _percent(dict(list(metrics.items())[:1]))


def _percent(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{METRICS.get(name, name)} {value} %" for name, value in metrics.items()) or "-"


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> str:
    return f"{name} {dtype} [bs,{','.join(map(str, shape))}]"
