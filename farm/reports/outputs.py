"""The raw outputs that a job kept, written as ais_bench would have written them: a file a bin, and its summary."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from db import jobs, results
from db.engine import Database
from db.results import Winner
from farm import logits
from farm.data import manifest
from farm.errors import DataError, StorageError, UsageError
from farm.jobs import Job, ResultState
from farm.logits import Reader
from farm.reports.published import check_finished, result_stems, timings
from farm.settings import Settings

FORMATS = ("TXT", "BIN", "NPY")
#: Whatever the umask.
FILE_MODE, FOLDER_MODE = 0o640, 0o750


@dataclass(kw_only=True)
class Written:
    """What became of a job's outputs."""

    job: Job
    files: int = 0
    failed: Mapping[str, str]  #: samples, and why
    altered: list[str] = field(default_factory=list)  #: files, and bins of which the outputs are not what they were
    elsewhere: dict[str, list[Winner]] = field(default_factory=dict)  #: shards whose files are on other hosts
    gone: list[Winner] = field(default_factory=list)  #: whose files are not where they were written: on this host


def write(database: Database, settings: Settings, job_id: int, form: str, folder: Path) -> Written:
    """
    Write what is on this host. `UsageError`: a job that kept nothing or is not done, or a folder that is not empty.

    `DataError` where nothing is here. Nothing is overwritten; the summary comes last.
    """
    if form not in FORMATS:
        raise UsageError(f"--outfmt {form}: expected {', '.join(FORMATS)}")
    with database.read() as conn:
        job = jobs.get(conn, job_id)
        if not job.spec.keep_logits:
            raise UsageError(f"{job} kept no raw outputs: submit it again with --keep-logits")
        check_finished(job)
        winners = results.winners(conn, job_id)
        failed = {row.name: row.reason for row in results.rows(conn, job_id, state=ResultState.FAILED)}
        times = results.attempt_times(conn, job_id)
        kept = logits.directory(settings.data_dir, job)
        logits.tidy(kept, partial(results.useless, conn))
    found = Written(job=job, failed=failed)
    readers = list(_readers(kept, winners, settings.host_name, found))
    if not readers:
        raise DataError(f"no raw outputs of job {job_id} are on this host, in {kept}: {'; '.join(absent(found))}")
    stems = result_stems(row.stem for reader in readers for row in reader.rows if row.sample not in failed)
    bins = manifest.bins_dir(settings.data_dir, job.spec.recipe, job.spec.dtype)
    infos: dict[str, Any] = {}
    with _writing(folder):
        _make(folder)
        for reader in readers:
            for row, output in reader.outputs():
                if row.sample in failed:
                    continue
                if output is None:
                    found.altered.append(row.stem)
                    continue
                path = folder / f"{stems[row.stem]}_0.{form.lower()}"
                _write(path, encoded(output, form))
                infos[str(found.files)] = {"infiles": [str(bins / f"{row.stem}.bin")], "outfiles": [str(path)]}
                found.files += 1
        summary = {
            "filesinfo": infos,
            "args": sys.argv,
            **timings(np.concatenate([each.batch_ms for each in times]), job.spec.bs),
            "pid": os.getpid(),
            **({"simulated": True} if job.simulated else {}),
        }
        _write(summary_of(folder), [json.dumps(summary).encode()])
    return found


def summary_of(folder: Path) -> Path:
    """Where ais_bench puts what it says of a folder of results."""
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}_summary.json")


def absent(found: Written) -> list[str]:
    """A clause for each reason why outputs that the job made were not written."""
    said = [
        f"{_shards(those)} {'are' if len(those) > 1 else 'is'} on host {host}: run farm results there"
        for host, those in sorted(found.elsewhere.items())
    ]
    said += [f"files of {_shards(found.gone)} were removed from this host"] if found.gone else []
    return said + [f"what was kept of {what} was altered on this host's disk" for what in found.altered]


def _shards(winners: list[Winner]) -> str:
    count = sum(winner.samples for winner in winners)
    numbers = ", ".join(str(winner.shard) for winner in winners)
    return f"shard{'s' if len(winners) > 1 else ''} {numbers} ({count} samples)"


def _readers(kept: Path, winners: Iterable[Winner], host: str, found: Written) -> Iterator[Reader]:
    output = found.job.spec.artifact.output
    for winner in winners:
        path = kept / logits.file_name(winner.shard, winner.attempt_id)
        if path.exists():
            try:
                yield Reader(path, output.dtype, output.shape[1:])
            except DataError:
                found.altered.append(path.name)
        elif winner.host == host:
            found.gone.append(winner)
        else:
            found.elsewhere.setdefault(winner.host, []).append(winner)


def encoded(output: NDArray[Any], form: str) -> Iterator[bytes]:
    """One output in pieces. Lines of its text are the rows of its last axis, each value is followed by a blank."""
    if form == "TXT":
        line = ("%f " if output.dtype.kind == "f" else "%d ") * output.shape[-1] + "\n"
        for row in output.reshape(-1, output.shape[-1]):
            yield (line % tuple(row.tolist())).encode()
    elif form == "BIN":
        yield output.tobytes()
    else:
        data = BytesIO()
        np.save(data, output[np.newaxis])
        yield data.getvalue()


def _make(folder: Path) -> None:
    """`UsageError` for a folder that holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty: name another --output, nothing is overwritten")
    if summary_of(folder).exists():
        raise UsageError(f"{summary_of(folder)} is there already: name another --output, nothing is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(FOLDER_MODE)


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE), "wb") as file:
        os.fchmod(file.fileno(), FILE_MODE)
        for piece in pieces:
            file.write(piece)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(
            f"cannot write {exc.filename or folder}: {exc.strerror or exc}. Remove {folder}, free or open up the "
            "place, then run the same command again"
        ) from exc
