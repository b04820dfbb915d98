"""farm show, results, rescore: what a job holds beside its report; farm ingest: results that others made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

JobId = Annotated[int, typer.Argument(help="Number of the job.")]
FORMATS = ("picture", "mask")
DONE_WITH_ERRORS = 3
#: Of samples with one thing wrong with them; `--json` names all.
MOST_NAMED = 20


def show(
    job: JobId,
    sample: Annotated[str, typer.Option(help="Name of the image, e.g. ADE_val_00000001.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File; default SAMPLE.png here.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="picture, or mask: the classes as ADE20K stores them.")
    ] = "picture",
) -> None:
    """Write what a segmentation job made of an image as a PNG: image, prediction, annotation, difference.

    farm show 3 --sample ADE_val_00000001
    """
    from db.engine import open_database
    from farm.data import disk, manifest
    from farm.errors import UsageError
    from farm.reports import picture
    from farm.reports.rescore import label_map, of_sample
    from farm.settings import load_settings

    if form not in FORMATS:
        raise UsageError(f"--format {form}: expected {' or '.join(FORMATS)}")
    settings = load_settings()
    found, segments = of_sample(open_database(settings), job, sample)
    predicted = label_map(segments)
    if form == "mask":
        image = picture.mask(predicted)
    else:
        from farm.data import ade20k

        directory = manifest.bins_dir(settings.data_dir, found.spec.recipe, found.spec.dtype)
        data = manifest.read(directory)
        windows = next((entry.windows for entry in data.samples if entry.name == sample), None)
        if windows is None:
            raise UsageError(f"{sample} is not in {directory} any more; --format mask needs nothing of it")
        annotation = ade20k.read_annotation(manifest.annotation_path(directory, sample))
        mark = ", simulated" if found.simulated else ""
        title = f"{sample}, job {job}: {found.spec.model} bs {found.spec.bs} on {found.spec.artifact.backend}{mark}"
        image = picture.side_by_side(
            picture.original(directory, data.header, sample, windows), predicted, annotation, title
        )
    path = output or Path(f"{sample}.png")
    with disk.writing(path):
        image.save(path, format="PNG")
    print(path)


def rescore(
    job: JobId,
    labels: Annotated[Path, typer.Option(help="A file of labels, or for segmentation a folder of annotations.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Compute a job's metrics against other labels, from its rows; no device is needed, nothing is changed.

    farm rescore 3 --labels val_label.txt
    """
    from rich.console import Console

    from db.engine import open_database
    from farm.reports.rescore import rescore as run
    from farm.reports.terminal import show_metrics
    from farm.settings import load_settings

    found = run(open_database(load_settings()), job, labels)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show_metrics(found, Console())


def results(
    job: JobId,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="A folder that is not there, or empty.")
    ],
    outfmt: Annotated[str, typer.Option(help="TXT, BIN or NPY.")] = "BIN",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """
    Write the raw outputs of a job as ais_bench would have: a file a bin, and DIR_summary.json beside them.

    For jobs submitted with --keep-logits; each host has the outputs of what it ran.

    farm results 3 --outfmt TXT --output result/lvvit_bs4
    """
    from db.engine import open_database
    from farm.reports.outputs import absent, write
    from farm.settings import load_settings

    settings = load_settings()
    found = write(open_database(settings), settings, job, outfmt, output)
    if found.job.simulated:
        print("simulated: these are outputs of a device that is none", file=sys.stderr)
    for name, reason in found.failed.items():
        print(f"left out: {name}, {reason}", file=sys.stderr)
    for clause in absent(found):
        print(f"left out: {clause}", file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                {
                    "job": job,
                    "simulated": found.job.simulated,
                    "folder": str(output),
                    "format": outfmt,
                    "files": found.files,
                    "failed": [{"name": name, "reason": reason} for name, reason in found.failed.items()],
                    "elsewhere": {host: [w.shard for w in those] for host, those in found.elsewhere.items()},
                    "removed": [winner.shard for winner in found.gone],
                    "altered": found.altered,
                },
                indent=2,
            )
        )
    else:
        print(f"{output}: {found.files} files")
    if absent(found) or len(found.failed) > found.job.spec.allow_failed:
        raise typer.Exit(DONE_WITH_ERRORS)


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
