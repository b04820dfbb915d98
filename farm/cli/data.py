"""``farm prepare``: images to bins."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from farm.data.prepare import Prepared

DONE_WITH_ERRORS = 3

#: Between two lines of progress where there is no terminal for a bar.
LINE_EVERY_S = 15.0
#: Failed images named on a terminal; `--json` and the manifest have them all.
MOST_NAMED = 50


def prepare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Prepare the images for this model.")],
    images: Annotated[Path, typer.Option(help="Folder of ILSVRC2012_val_*.JPEG files.")],
    labels: Annotated[Path, typer.Option(help="Text file, a line an image: ILSVRC2012_val_00000001.JPEG 65")],
    subset: Annotated[bool, typer.Option("--subset", help="Allow labels without an image.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Images worked on at a time; default: all cores.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Turn images into the arrays a model takes, once; go on where an interrupted run stopped.

    Exit codes: 0 done, 3 done but some images could not be used, 1 failed, 2 usage.

    farm prepare lvvit --images ILSVRC2012/images --labels val_label.txt
    """
    from farm import zoo
    from farm.data.prepare import prepare_dataset
    from farm.data.recipes import RECIPES
    from farm.settings import load_settings

    recipe = RECIPES[zoo.get(model).recipe]
    data_dir = load_settings().data_dir
    try:
        with _shown() as progress:
            prepared = prepare_dataset(
                images, labels, recipe, data_dir, subset=subset, processes=processes, progress=progress
            )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise
    _name_failures(prepared)
    print(_as_json(model, prepared) if json else _summary(model, prepared))
    if prepared.failures:
        raise typer.Exit(DONE_WITH_ERRORS)


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """A progress callback that draws a bar on stderr, or writes a line now and then if that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _bar(console) as show:
            yield show
    else:
        yield _Lines()


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    pace = _Pace()
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with Progress(TextColumn("preparing"), *columns, console=console) as progress:
        task = progress.add_task("", total=None)

        def show(settled: int, total: int) -> None:
            pace.note(settled)
            # What was there before must not count as speed.
            if pace.is_first:
                progress.reset(task, total=total, completed=settled)
            progress.update(task, completed=settled, description=f"{pace.per_s:.0f} images/s")

        yield show


class _Pace:
    """Images a second since the first note."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None
        self.is_first = False
        self.per_s = 0.0

    def note(self, settled: int) -> None:
        now = time.monotonic()
        self.is_first = self._start is None
        if self._start is None:
            self._start = (settled, now)
        count, seconds = settled - self._start[0], now - self._start[1]
        self.per_s = count / seconds if seconds > 0 else 0.0


class _Lines:
    """Progress in plain lines, sparse enough for a log."""

    def __init__(self) -> None:
        self._pace = _Pace()
        self._next = 0.0

    def __call__(self, settled: int, total: int) -> None:
        self._pace.note(settled)
        if self._pace.is_first:
            print(f"preparing {total} images, {settled} of them were there", file=sys.stderr)
            self._next = time.monotonic() + LINE_EVERY_S
        elif time.monotonic() >= self._next:
            left_s = (total - settled) / self._pace.per_s if self._pace.per_s else 0.0
            print(f"{settled} of {total}, {self._pace.per_s:.0f} images/s, {left_s:.0f} s left", file=sys.stderr)
            self._next = time.monotonic() + LINE_EVERY_S


def _name_failures(prepared: Prepared) -> None:
    for failure in prepared.failures[:MOST_NAMED]:
        print(f"{failure.name} {failure.problem}", file=sys.stderr)
    if prepared.failed > MOST_NAMED:
        print(f"and {prepared.failed - MOST_NAMED} more: see {prepared.directory / 'manifest'}", file=sys.stderr)


def _summary(model: str, prepared: Prepared) -> str:
    pace = f", {prepared.done / prepared.seconds:.0f} images/s" if prepared.done else ""
    return (
        f"{model}: {len(prepared.manifest.samples)} samples in {prepared.directory}: {prepared.done} made, "
        f"{prepared.reused} were there, {prepared.failed} failed "
        f"({prepared.seconds:.1f} s{pace})\nmanifest {prepared.manifest.digest}"
    )


def _as_json(model: str, prepared: Prepared) -> str:
    from dataclasses import asdict
    from json import dumps

    return dumps(
        {
            "schema": 1,
            "model": model,
            "recipe": prepared.manifest.header.recipe,
            "directory": str(prepared.directory),
            "manifest": prepared.manifest.digest,
            "samples": {
                "total": len(prepared.manifest.samples),
                "made": prepared.done,
                "reused": prepared.reused,
                "failed": prepared.failed,
            },
            "failures": [asdict(failure) for failure in prepared.failures],
            "seconds": round(prepared.seconds, 3),
        }
    )
