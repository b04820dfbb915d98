"""``farm ingest``: results that ais_bench wrote, scored here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

DONE_WITH_ERRORS = 3
#: Of samples with one thing wrong with them; `--json` names all.
MOST_NAMED = 20


def ingest(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results: NAME_0.txt, .bin or .npy.")],
    model: Annotated[str, typer.Option(help="Whose results they are, e.g. lvvit.")],
    outfmt: Annotated[str | None, typer.Option(help="TXT, BIN or NPY, where there are several.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Labels of all samples; default: those that were prepared.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Segmentation: annotations of all images.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """
    Score a folder of results that ais_bench wrote, and prove that each sample is there once. Nothing is stored.

    Exit codes: 0 done, 3 done but samples lack results or files belong to none, 1 failed, 2 usage.

    farm ingest result/lvvit_bs4 --model lvvit
    """
    from rich.console import Console

    from farm import zoo
    from farm.errors import UsageError
    from farm.reports.ingest import ingest as run
    from farm.reports.terminal import show_ingested
    from farm.settings import load_settings

    given, other = (labels, annotations) if zoo.get(model).dataset == "imagenet" else (annotations, labels)
    if other is not None:
        option = "--annotations" if other is annotations else "--labels"
        raise UsageError(f"{option} is not for {model}")
    found = run(load_settings(), model, folder, outfmt=outfmt, truth=given)
    _name("lacks results", [f"{each['name']} {each['reason']}" for each in found["lacking"]])
    _name("belongs to no sample", found["strangers"])
    hidden = ", the difference perhaps beyond six decimals" if found["format"] == "TXT" else ""
    _name(f"has equal scores among its best{hidden}: the lowest class went first", found["ties"])
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_ingested(found, Console())
    if found["lacking"] or found["strangers"]:
        raise typer.Exit(DONE_WITH_ERRORS)


def _name(what: str, lines: list[str]) -> None:
    for line in lines[:MOST_NAMED]:
        print(f"{what}: {line}", file=sys.stderr)
    if len(lines) > MOST_NAMED:
        print(f"{what}: and {len(lines) - MOST_NAMED} more, in --json", file=sys.stderr)
