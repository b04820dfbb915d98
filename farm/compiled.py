"""
An ``.om`` in the store: compiled here from an exported graph, or by somebody else and imported.

It keeps the graph's provenance, and what onnxruntime made of the graph's canaries: what an NPU answers is compared with
that.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from farm import artifacts, atc, canary
from farm.artifacts import Artifact, TensorInfo
from farm.data import disk
from farm.errors import DataError, UsageError
from farm.zoo.spec import ModelSpec

#: What aclruntime wants of a model's file.
_MODE, _DEPTH = 0o640, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One artifact done."""

    artifact: Artifact
    path: Path
    reused: bool  #: it was there already, and is intact
    compared: bool  #: with onnxruntime, when a device answers canaries


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What shall be compiled, and where to."""

    source: Artifact
    graph: Path
    soc: str
    command: Sequence[str]
    further: atc.Further
    path: Path

    @property
    def line(self) -> str:
        """The command as it can be typed, in any directory."""
        return shlex.join(self.command)


def orders(
    spec: ModelSpec,
    batch_sizes: Iterable[int],
    data_dir: Path,
    *,
    soc: str = atc.SOC,
    wanted: str | None = None,
    head: str | None = None,
    dtype: str | None = None,
    options: Sequence[str] = (),
) -> list[Order]:
    """What to compile for each batch size. `UsageError` or `DataError` before anything is begun."""
    _check_soc(soc)
    return [
        _order(spec, _source(spec, bs, data_dir, wanted, head, dtype), data_dir, soc, options) for bs in batch_sizes
    ]


def _source(
    spec: ModelSpec, bs: int, data_dir: Path, wanted: str | None, head: str | None, dtype: str | None
) -> Artifact:
    """The exported graph to compile, intact."""
    source = artifacts.choose(data_dir, spec, bs, backend="ort", wanted=wanted, head=head, dtype=dtype)
    graph = artifacts.directory(data_dir, spec.name) / source.file
    if _sha256(graph) != source.sha256:
        raise DataError(f"{graph} is not the file its sidecar tells of: export {spec.name} again")
    return source


def _order(spec: ModelSpec, source: Artifact, data_dir: Path, soc: str, options: Sequence[str]) -> Order:
    graph = artifacts.directory(data_dir, spec.name) / source.file
    plain = f"{graph.stem}_{soc}"
    further = atc.further(options, spec.atc_command(source.bs, graph=str(graph), output=plain, soc=soc))
    marks = "\n".join((*further.options, *further.files.values()))
    name = f"{plain}_{hashlib.sha256(marks.encode()).hexdigest()[:6]}" if marks else plain
    path = graph.with_name(f"{name}.om")
    _check_place(path)
    command = spec.atc_command(source.bs, graph=str(graph), output=name, soc=soc)
    return Order(source=source, graph=graph, soc=soc, command=(*command, *further.options), further=further, path=path)


def compile_one(order: Order, log_dir: Path) -> Compiled:
    """
    Compile, and store the result with its sidecar, unless it is there.

    `UsageError`: no ATC. `StorageError`: no room to write, looked at before ATC runs. Plain `FarmError`: ATC failed.
    """
    cann = atc.version()
    if there := _intact(order, cann):
        return Compiled(artifact=there, path=order.path, reused=True, compared=canary.has_reference(order.path))
    atc.find()
    with disk.writing(order.path):
        tempfile.TemporaryFile(dir=order.path.parent).close()
    source, log = order.source, log_dir / f"atc-{order.path.stem}.log"
    with tempfile.TemporaryDirectory(prefix="farm-atc-", ignore_cleanup_errors=True) as work:
        try:
            made = atc.run(order.command, order.path.stem, Path(work), log)
        except KeyboardInterrupt:
            log.unlink(missing_ok=True)
            raise
        artifact = source.model_copy(
            update={
                "backend": "acl", "soc": order.soc, "file": order.path.name,
                "max_abs_diff": None,  # which is the graph's
                "source_sha256": source.sha256, "command": order.line, "conf_sha256": order.further.files,
                "versions": {**source.versions, **({"cann": cann} if cann else {})}, "created": _now(),
            }
        )  # fmt: skip
        # A file of --insert_op_conf decides what the model takes: canaries of the graph's input say nothing of it.
        reference = None if order.further.has_aipp else order.graph
        return _store(made, order.path, artifact, reference)


def _intact(order: Order, cann: str) -> Artifact | None:
    """The artifact already there, if it was made from the same by the same, and its bytes are what its sidecar says."""
    try:
        there = artifacts.read_sidecar(artifacts.sidecar_of(order.path))
        if _sha256(order.path) != there.sha256:
            return None
    except DataError:
        return None
    same = (
        there.source_sha256 == order.source.sha256
        and _without_graph(shlex.split(there.command)) == _without_graph(order.command)
        and list(there.conf_sha256.values()) == list(order.further.files.values())
        # What an older CANN compiled, a newer one may refuse to load.
        and cann in ("", there.versions.get("cann", cann))
    )
    return there if same else None


def _without_graph(command: Sequence[str]) -> list[str]:
    """A command wherever the store is."""
    return [part for part in command if not part.startswith("--model=")]


def import_om(
    file: Path,
    spec: ModelSpec,
    bs: int,
    data_dir: Path,
    *,
    soc: str = atc.SOC,
    head: str | None = None,
    dtype: str | None = None,
    graph: str | None = None,
) -> Compiled:
    """
    Copy an ``.om`` into the store and say what it is. `graph` names the exported artifact that it was compiled from.

    `UsageError` for what the model does not have, or what contradicts the store. `DataError`: no such file.
    """
    _check_soc(soc)
    if bs < 1:
        raise UsageError(f"--bs {bs}: a batch size is 1 or more")
    if not file.is_file():
        raise DataError(f"{file} is no file: expected the .om that ATC made")
    sha256 = _sha256(file)
    source = _source(spec, bs, data_dir, graph, head, dtype) if graph else None
    artifact = source or _described(spec, bs, head, dtype or spec.input.dtype)
    path = artifacts.directory(data_dir, spec.name) / f"{spec.name}_bs{bs}_{sha256[:8]}_{soc}.om"
    _check_place(path)
    artifact = artifact.model_copy(
        update={
            "backend": "acl", "soc": soc, "file": path.name, "sha256": sha256, "max_abs_diff": None,
            "source_sha256": source.sha256 if source else "", "created": _now(),
        }
    )  # fmt: skip
    if there := next((a for a in artifacts.stored(data_dir, spec.name) if a.sha256 == sha256), None):
        path = path.with_name(there.file)
        if _what(there) != _what(artifact) or (source and there.source_sha256 not in ("", source.sha256)):
            raise UsageError(
                f"{file} is in the store as {there}, and an .om is one artifact. If that was wrong, remove {path} and "
                f"{artifacts.sidecar_of(path).name}, then import it again"
            )
        if there.source_sha256 or not source:
            if path.is_file() and _sha256(path) == sha256:
                return Compiled(artifact=there, path=path, reused=True, compared=canary.has_reference(path))
            return _store(file, path, there, path)
        artifact = artifact.model_copy(update={"file": there.file})
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    return _store(file, path, artifact, path.with_name(source.file) if source else None)


def _described(spec: ModelSpec, bs: int, head: str | None, dtype: str) -> Artifact:
    """What a user says of a file."""
    head = next(iter(spec.heads), "") if head is None else head
    if head not in (spec.heads or [""]):
        known = ", ".join(spec.heads) or "one only, so leave --head out"
        raise UsageError(f"{spec.name} has no head {head!r}: it has {known}")
    if dtype not in ("float32", "uint8"):
        raise UsageError(f"no bins are of {dtype!r}: --input is float32 or uint8")
    return Artifact(
        model=spec.name, bs=bs, backend="acl", soc="", file="", sha256="", head=head,
        input=TensorInfo.of(replace(spec.input, dtype=dtype), bs), output=TensorInfo.of(spec.output_of(head), bs),
    )  # fmt: skip


def _what(artifact: Artifact) -> tuple[object, ...]:
    return artifact.bs, artifact.soc, artifact.head, artifact.input, artifact.output


def _store(made: Path, path: Path, artifact: Artifact, reference: Path | None) -> Compiled:
    """Put a file into its place with its sidecar and its canaries' reference, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk.writing(path):
        try:
            with made.open("rb") as source, partial.open("wb") as file:
                os.fchmod(file.fileno(), _MODE)
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            artifact = artifact.model_copy(update={"sha256": _sha256(partial)})
            # Killed from here on there is no artifact, rather than one whose sidecar tells of another file.
            artifacts.sidecar_of(path).unlink(missing_ok=True)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        canary.copy_reference(reference, path)
        artifacts.write_sidecar(path.parent, artifact)
    return Compiled(artifact=artifact, path=path, reused=False, compared=canary.has_reference(path))


def _check_soc(soc: str) -> None:
    if not re.fullmatch(r"Ascend\w+", soc, re.ASCII):
        raise UsageError(f"--soc {soc}: expected a name such as {atc.SOC}, which is Ascend and what npu-smi info says")


def _check_place(path: Path) -> None:
    """`UsageError` where aclruntime would not load a model from, before minutes go by."""
    if not re.fullmatch(r"[A-Za-z0-9_./-]+", str(path)):
        raise UsageError(
            f"no NPU could load {path}: aclruntime takes only letters, digits, '_', '.', '/' and '-' in a path. "
            "Set FARM_DATA to such a place"
        )
    if len(path.parts) - 1 > _DEPTH:
        raise UsageError(f"no NPU could load {path}: aclruntime takes {_DEPTH} levels at most. Set FARM_DATA to others")


def _sha256(path: Path) -> str:
    try:
        return artifacts.sha256_of(path)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror}") from exc


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
