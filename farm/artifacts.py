"""
Artifacts: a compiled or exported model file for one batch size, and its JSON sidecar beside it.

A file's sha256 is its identity everywhere; names are for people.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from farm.errors import DataError, UsageError
from farm.zoo.spec import ModelSpec, Tensor, nbytes

VERSION = 1


class TensorInfo(BaseModel):
    """A graph's tensor with its batch axis."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @classmethod
    def of(cls, tensor: Tensor, bs: int) -> TensorInfo:
        return cls(name=tensor.name, dtype=tensor.dtype, shape=(bs, *tensor.shape))


class Artifact(BaseModel):
    """The sidecar: what the file is, where it came from, how it was checked."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = VERSION
    model: str
    bs: int
    backend: Literal["ort", "acl", "simulated"]
    soc: str  #: "cpu", or e.g. "Ascend310P3"
    file: str  #: name beside the sidecar; empty for the simulated backend, which needs none
    sha256: str
    input: TensorInfo
    output: TensorInfo
    opset: int | None = None
    head: str = ""  #: which of the model's, if it has several
    simplified: bool = False
    weights: str = ""  #: name of the checkpoint
    weights_sha256: str = ""
    versions: Mapping[str, str] = {}
    max_abs_diff: float | None = None  #: against PyTorch in float32, on seeded input, at this batch size
    created: str = ""
    source_sha256: str = ""  #: of the ONNX file that it was compiled from
    command: str = ""  #: the compiler's, as it can be typed
    conf_sha256: Mapping[str, str] = {}  #: of the files that the command names beside the graph, by path

    @property
    def chip(self) -> str:
        """The soc that a device must have, to the letter: what was compiled for one does not load on another."""
        return "" if (self.backend, self.soc) == ("simulated", "cpu") else self.soc

    def runs_on(self, backends: Collection[str], soc: str) -> bool:
        """Whether a device with these backends and this soc can run it."""
        return self.backend in backends and self.chip in ("", soc)

    def __str__(self) -> str:
        form = [f"head {self.head}"] if self.head else []
        form += [f"input {self.input.dtype}"] if self.input.dtype != "float32" else []
        backend = f"acl on {self.soc}" if self.backend == "acl" else self.backend
        about = ", ".join([backend, f"bs {self.bs}", *form, f"sha256 {self.sha256[:12]}"])
        return f"{self.file or self.backend} ({about})"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(path)


def _sha256(path: Path) -> str:
    """Python 3.10 has no `hashlib.file_digest`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sidecar_of(path: Path) -> Path:
    return path.with_suffix(".json")


def write_sidecar(directory: Path, artifact: Artifact) -> Path:
    """Put the sidecar beside its file, whole or not at all."""
    path = sidecar_of(directory / artifact.file)
    partial = path.with_suffix(".json.tmp")
    partial.write_text(artifact.model_dump_json(indent=2) + "\n")
    os.replace(partial, path)
    return path


def read_sidecar(path: Path) -> Artifact:
    """`DataError` for a sidecar that is none or of a newer schema."""
    try:
        fields = json.loads(path.read_bytes())
        version = fields.get("version", VERSION)
        if version <= VERSION:
            return Artifact.model_validate(fields)
    except (OSError, AttributeError, TypeError, ValueError) as exc:  # pydantic's and json's errors are ValueErrors
        raise DataError(f"{path} is no artifact sidecar: {exc}. Export the model again.") from exc
    raise DataError(f"{path} has version {version}, this farm knows up to {VERSION}: upgrade the farm")


def directory(data_dir: Path, model: str) -> Path:
    return data_dir / "artifacts" / model


def stored(data_dir: Path, model: str) -> Iterator[Artifact]:
    """All artifacts of a model, by file name."""
    for path in sorted(directory(data_dir, model).glob("*.json")):
        yield read_sidecar(path)


def simulated(spec: ModelSpec, bs: int, head: str = "", soc: str = "cpu", dtype: str | None = None) -> Artifact:
    """What a simulated device "runs": no file, an identity all the same, and another one for another chip or input."""
    output = spec.output_of(head)
    given = spec.input if dtype is None else replace(spec.input, dtype=dtype)
    other = "" if soc == "cpu" else f" {soc}"
    other += "" if given == spec.input else f" {dtype}"
    sha256 = hashlib.sha256(f"simulated {spec.name} bs{bs} {output.shape}{other}".encode()).hexdigest()
    return Artifact(
        model=spec.name, bs=bs, backend="simulated", soc=soc, file="", sha256=sha256, head=head,
        input=TensorInfo.of(given, bs), output=TensorInfo.of(output, bs),
    )  # fmt: skip


def choose(
    data_dir: Path,
    spec: ModelSpec,
    bs: int,
    *,
    backend: str | None,
    wanted: str | None,
    head: str | None = None,
    dtype: str | None = None,
    soc: str = "cpu",
) -> Artifact:
    """
    The one artifact a job freezes: the only one that fits model, batch size, head and input, or the one asked for.

    `wanted` is a sha256 prefix or a path, `soc` the chip that is simulated. `UsageError` when none or several fit.
    """
    if head is not None and head not in spec.heads:
        raise UsageError(f"{spec.name} has no head {head!r}: it has {', '.join(spec.heads) or 'one only'}")
    if backend == "simulated":
        if wanted:
            raise UsageError("--artifact does not go with --backend simulated, which runs no file")
        return simulated(spec, bs, head or next(iter(spec.heads), ""), soc, dtype)
    everything = list(stored(data_dir, spec.name))
    fitting = [a for a in everything if a.bs == bs and backend in (None, a.backend) and head in (None, a.head)]
    fitting = [a for a in fitting if dtype in (None, a.input.dtype)]
    if wanted:
        sha256 = sha256_of(Path(wanted)) if Path(wanted).is_file() else wanted.lower()
        fitting = [a for a in fitting if a.sha256.startswith(sha256) or a.file == wanted]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listing = "\n".join(f"  {a}" for a in fitting)
        differing = {
            "--backend": len({a.backend for a in fitting}) > 1,
            "--input": len({a.input.dtype for a in fitting}) > 1,
            "--head": bool(spec.heads),
        }
        options = " or ".join(["--artifact SHA", *(name for name, helps in differing.items() if helps)])
        raise UsageError(f"several artifacts of {spec.name} fit bs {bs}; choose one with {options}:\n{listing}")
    exported = ", ".join(sorted({str(a.bs) for a in everything})) or "none"
    raise UsageError(
        f"no artifact of {spec.name} for bs {bs}"
        + (f" and backend {backend}" if backend else "")
        + (f" and {dtype} input" if dtype else "")
        + (f" matches {wanted!r}" if wanted else "")
        + f" in {directory(data_dir, spec.name)} (batch sizes there: {exported}). "
        f"Make one: farm export {spec.name} --weights CKPT --bs {bs}"
        + (f" --head {head}" if head else "")
        + (f" --input {dtype}" if dtype not in (None, spec.input.dtype) else "")
        + (f", then farm compile {spec.name} --bs {bs}" if backend == "acl" else "")
    )
