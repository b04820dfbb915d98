"""``farm prepare`` and ``farm import``: images, or bins that others made, to bins and a manifest; others' .om files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from farm.data.prepare import Prepared
    from farm.data.recipes import Recipe

DONE_WITH_ERRORS = 3

#: Between two lines of progress where there is no terminal for a bar.
LINE_EVERY_S = 15.0
#: Failed images named on a terminal; `--json` and the manifest have them all.
MOST_NAMED = 50


_Subset = Annotated[bool, typer.Option("--subset", help="Allow labels or annotations without an image.")]
_Processes = Annotated[int | None, typer.Option(min=1, help="Images worked on at a time; default: all cores.")]
_Input = Annotated[
    str,
    typer.Option(
        "--input", metavar="float32|uint8", help="What the model takes; uint8: pixels that the device normalises."
    ),
]
_Labels = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text file, a line an image: ILSVRC2012_val_00000001.JPEG 65")
]
_Annotations = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Segmentation: folder of ADE_val_*.png files, like the images.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def prepare(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="Prepare the images for this model.")],
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of images, or of 1000 class folders (no --labels then).")
    ] = None,
    labels: _Labels = None,
    annotations: _Annotations = None,
    synthetic: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="No images: N samples of noise, to simulate with and to measure speed."),
    ] = None,
    input_type: _Input = "float32",
    subset: _Subset = False,
    processes: _Processes = None,
    json: _Json = False,
) -> None:
    """Turn images into the arrays a model takes, once; go on where an interrupted run stopped.

    Without --images, say whether they are there already. What is prepared for a model serves all of its recipe.

    Exit codes: 0 done, 3 done but some images could not be used, 1 failed, 2 usage.

    farm prepare lvvit --images ILSVRC2012/images --labels val_label.txt

    farm prepare swin --images images/validation --annotations annotations/validation
    """
    asked = _Asked(name=model, recipe=_recipe(model, input_type), json=json)
    _check_truth(asked, labels, annotations)
    if synthetic is not None:
        _make_up(asked, synthetic, images or labels or annotations)
        return
    if images is None:
        if labels or annotations:
            raise UsageError(f"no --images: type {asked.command}")
        print(asked.answer(_look(asked)))
        return
    work = _preparation(asked, images, labels, annotations)
    with _shown() as progress:
        prepared = work(subset=subset, processes=processes, progress=progress)
    _finish(asked, prepared)


def import_(
    path: Annotated[Path, typer.Argument(metavar="BINS|OM", help="Folder of .bin files, or an .om that ATC made.")],
    recipe: Annotated[str | None, typer.Option(metavar="RECIPE", help="What made bins: lvvit, in256 or seg.")] = None,
    labels: _Labels = None,
    annotations: _Annotations = None,
    input_type: Annotated[
        str | None, typer.Option("--input", metavar="float32|uint8", help="Type of the bins, or what the .om takes.")
    ] = None,
    subset: _Subset = False,
    processes: _Processes = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Of an .om: which model it is.")] = None,
    bs: Annotated[int | None, typer.Option(help="Of an .om: its batch size.")] = None,
    soc: Annotated[str | None, typer.Option(help="Of an .om: its chip, Ascend310P3 if not given.")] = None,
    head: Annotated[str | None, typer.Option(help="Of an .om of swin: full, small or deployed.")] = None,
    onnx: Annotated[
        str | None, typer.Option(help="Of an .om: the exported graph it was compiled from, sha256 or file.")
    ] = None,
    json: _Json = False,
) -> None:
    """Take over bins that the published scripts made, or a model that ATC compiled elsewhere, after a look at each.

    Bins are linked where possible, an .om is copied to where farm export and farm compile put theirs.

    Exit codes: 0 done, 3 done but some bins could not be used, 1 failed, 2 usage.

    farm import databin --recipe in256 --labels val_label.txt

    farm import lvvit_bs4.om --model lvvit --bs 4
    """
    of_bins = {"--recipe": recipe, "--labels": labels, "--annotations": annotations, "--subset": subset or None}
    of_om = {"--model": model, "--bs": bs, "--soc": soc, "--head": head, "--onnx": onnx}
    if path.suffix == ".om":
        _check_kind(path, "an .om, which takes --model and --bs", {**of_bins, "--processes": processes})
        if model is None or bs is None:
            raise UsageError(f"say what {path} is: farm import {path} --model MODEL --bs N")
        from farm.cli.compiling import import_om

        import_om(path, model, bs, soc=soc, head=head, dtype=input_type, graph=onnx, as_json=json)
        return
    if path.is_file():
        raise UsageError(f"{path} is a file that does not end in .om: expected an .om, or a folder of .bin files")
    _check_kind(path, "a folder of bins, which takes --recipe", of_om)
    if recipe is None:
        raise UsageError(f"say what made the bins in {path}: farm import {path} --recipe lvvit, in256 or seg")
    from farm.data import recipes
    from farm.data.importing import import_bins
    from farm.settings import load_settings

    asked = _Asked(name=recipe, recipe=recipes.get(recipe, input_type or "float32"), json=json)
    _check_truth(asked, labels, annotations)
    truth = annotations if asked.is_segmentation else labels
    if truth is None:
        raise UsageError(f"--recipe {recipe} also takes {asked.truth}")
    data_dir = load_settings().data_dir
    with _shown() as progress:
        prepared = import_bins(
            path, truth, asked.recipe, data_dir, subset=subset, processes=processes, progress=progress
        )
    _finish(asked, prepared)


def _check_kind(path: Path, kind: str, others: Mapping[str, object]) -> None:
    """`UsageError` for options of the other kind."""
    if strange := [option for option, value in others.items() if value is not None]:
        raise UsageError(f"{path} is {kind}: leave out {', '.join(strange)}")


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the user wants prepared, and how to say what came of it."""

    name: str  #: of a model or a recipe
    recipe: Recipe
    json: bool

    @property
    def is_segmentation(self) -> bool:
        from farm.data.recipes import Segmentation

        return isinstance(self.recipe, Segmentation)

    @property
    def truth(self) -> str:
        """The option that says what images show."""
        return "--annotations DIR" if self.is_segmentation else "--labels val_label.txt"

    @property
    def command(self) -> str:
        """What to type."""
        kind = "" if self.recipe.dtype == "float32" else f" --input {self.recipe.dtype}"
        return f"farm prepare {self.name} --images DIR {self.truth}{kind}"

    @property
    def serves(self) -> list[str]:
        """The models of this recipe."""
        from farm import zoo

        return [name for name in zoo.MODELS if zoo.get(name).recipe == self.recipe.name]

    def answer(self, prepared: Prepared) -> str:
        return _as_json(self, prepared) if self.json else _summary(self, prepared)


def _recipe(name: str, input_type: str) -> Recipe:
    """Of a model, or the one of this name."""
    from farm import zoo
    from farm.data import recipes

    if name in zoo.MODELS:
        return recipes.get(zoo.get(name).recipe, input_type)
    if name in recipes.RECIPES:
        return recipes.get(name, input_type)
    raise UsageError(
        f"unknown model {name!r}: the farm knows {', '.join(zoo.MODELS)}, and the recipes {', '.join(recipes.RECIPES)}"
    )


def _check_truth(asked: _Asked, labels: Path | None, annotations: Path | None) -> None:
    """`UsageError` for labels of segmentation, or annotations of classification."""
    given = [("--labels", labels, not asked.is_segmentation), ("--annotations", annotations, asked.is_segmentation)]
    for option, value, fits in given:
        if value and not fits:
            raise UsageError(f"{option} is not for {asked.name}, which takes {asked.truth}")


def _make_up(asked: _Asked, count: int, other: Path | None) -> None:
    from farm.data import made_up
    from farm.settings import load_settings

    if other is not None:
        raise UsageError(f"--synthetic makes samples up, {other} is for real ones: choose one")
    print(asked.answer(made_up.make(asked.recipe, load_settings().data_dir, count)))


def _look(asked: _Asked) -> Prepared:
    from farm.data.prepare import look
    from farm.settings import load_settings

    try:
        return look(asked.recipe, load_settings().data_dir)
    except DataError as exc:
        raise UsageError(f"{exc} ({asked.command})") from exc


def _preparation(asked: _Asked, images: Path, labels: Path | None, annotations: Path | None) -> Callable[..., Prepared]:
    """What there is to do, but for how."""
    from farm.data.prepare import prepare_dataset, prepare_segmentation
    from farm.data.recipes import Segmentation
    from farm.settings import load_settings

    data_dir = load_settings().data_dir
    if not isinstance(asked.recipe, Segmentation):
        return partial(prepare_dataset, images, labels, asked.recipe, data_dir)
    if annotations is None:
        raise UsageError(f"{asked.name} also takes {asked.truth}")
    return partial(prepare_segmentation, images, annotations, asked.recipe, data_dir)


def _finish(asked: _Asked, prepared: Prepared) -> None:
    _name_failures(prepared)
    print(asked.answer(prepared))
    if prepared.failures:
        raise typer.Exit(DONE_WITH_ERRORS)


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    """A progress callback that draws a bar on stderr, or writes a line now and then if that is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    try:
        if console.is_terminal:
            with _bar(console) as show:
                yield show
        else:
            yield _Lines()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise


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


def _summary(asked: _Asked, prepared: Prepared) -> str:
    pace = f", {prepared.done / prepared.seconds:.0f} images/s" if prepared.done else ""
    samples = f"{len(prepared.manifest.samples)} samples in {prepared.directory}"
    counts = f"{prepared.done} made, {prepared.reused} were there, {prepared.failed} failed"
    lines = [
        f"{asked.name}: {samples}: {counts} ({prepared.seconds:.1f} s{pace})",
        f"manifest {prepared.manifest.digest}",
    ]
    if prepared.reused and not prepared.done:
        lines.insert(0, f"{asked.recipe.name}-{asked.recipe.dtype} was there: serves {', '.join(asked.serves)}")
    return "\n".join(lines)


def _as_json(asked: _Asked, prepared: Prepared) -> str:
    from dataclasses import asdict
    from json import dumps

    return dumps(
        {
            "schema": 1,
            "model": asked.name,
            "recipe": asked.recipe.name,
            "input": asked.recipe.dtype,
            "serves": asked.serves,
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
