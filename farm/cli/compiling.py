"""farm compile, and farm import of an .om: artifacts for NPUs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.arguments import Input, batch_sizes, check_input
from farm.errors import UsageError

if TYPE_CHECKING:
    from farm.compiled import Compiled


def compile_(
    model: Annotated[str, typer.Argument(help="e.g. lvvit")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ATC_OPTION...]", help="More for ATC, e.g. -- --precision_mode=allow_mix_precision"),
    ] = None,
    bs: Annotated[str, typer.Option(help="Batch sizes, one file each: 1,4,8.")] = "1",
    soc: Annotated[str, typer.Option(help="The chip: Ascend, and what npu-smi info says.")] = "Ascend310P3",
    head: Annotated[str | None, typer.Option(help="Of swin: full, small or deployed.")] = None,
    input_dtype: Input = None,
    artifact: Annotated[
        str | None, typer.Option(help="The exported graph, where several fit: sha256 (or its beginning) or file.")
    ] = None,
    only_print: Annotated[bool, typer.Option("--print", help="Print ATC's command lines only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The sidecars, as JSON.")] = False,
) -> None:
    """Compile exported graphs for NPUs with ATC, by the model's guide; it takes minutes, and no NPU.

    farm compile lvvit --bs 4

    farm compile conformer --bs 8 -- --precision_mode=allow_mix_precision
    """
    from farm import compiled, zoo
    from farm.settings import load_settings, make_home

    if only_print and as_json:
        raise UsageError("--print is for a shell, --json for machines: choose one")
    check_input(input_dtype)
    settings, spec, sizes = load_settings(), zoo.get(model), batch_sizes(bs)
    orders = compiled.orders(
        spec, sizes, settings.data_dir, soc=soc, wanted=artifact, head=head, dtype=input_dtype, options=options or ()
    )
    if only_print:
        print("\n".join(order.line for order in orders))
        return
    make_home(settings)
    if any(order.further.has_aipp for order in orders):
        said = "the file of --insert_op_conf decides what the model takes: jobs refuse it unless their bins are that"
        print(said, file=sys.stderr)
    done = []
    with _interruptible():
        for order in orders:
            with _shown(f"compiling {spec.name} bs {order.source.bs} for {soc}"):
                made = compiled.compile_one(order, settings.log_dir)
            done.append(made.artifact)
            if not as_json:
                print(_said(made, f"by {_compiler(made)}"), flush=True)
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in done], indent=2))


def import_om(
    file: Path,
    model: str,
    bs: int,
    *,
    soc: str | None,
    head: str | None,
    dtype: str | None,
    graph: str | None,
    as_json: bool,
) -> None:
    """Take over an .om that ATC made elsewhere."""
    from farm import atc, compiled, zoo
    from farm.settings import load_settings

    made = compiled.import_om(
        file,
        zoo.get(model),
        bs,
        load_settings().data_dir,
        soc=soc or atc.SOC,
        head=head,
        dtype=dtype,
        graph=graph,
    )
    print(json.dumps(made.artifact.model_dump(mode="json"), indent=2) if as_json else _said(made, "imported"))


def _said(made: Compiled, how: str) -> str:
    artifact = made.artifact
    compared = "" if made.compared else ", nothing of onnxruntime's to compare its answers with"
    return f"{artifact.model} bs {artifact.bs}: {made.path} ({'there already' if made.reused else how}{compared})"


def _compiler(made: Compiled) -> str:
    cann = made.artifact.versions.get("cann")
    return f"ATC of CANN {cann}" if cann else "ATC"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Have SIGTERM, and a terminal that goes away, end this as Ctrl-C does: with all that was started."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _shown(what: str) -> Iterator[None]:
    """Say on stderr what takes so long, on a terminal with the time that went by."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{what}: ATC takes minutes", highlight=False)
        yield
        return
    columns = SpinnerColumn(), TextColumn("{task.description}: ATC takes minutes"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
