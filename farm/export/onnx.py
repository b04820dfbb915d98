"""
Checkpoint to ONNX: one file of fixed batch size each, not stored before onnxruntime agrees with PyTorch about it.

What runs the file, and what compiles it for a card, is elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from farm import artifacts, nets
from farm.artifacts import Artifact, TensorInfo
from farm.data import disk
from farm.errors import DataError, FarmError, UsageError
from farm.export.checkpoint import fingerprint, load_checkpoint
from farm.versions import versions
from farm.zoo.spec import ModelSpec

OPSETS = range(11, 21)  #: 20 is the last that the tracing exporter writes
MAX_ABS_DIFF = 5e-5  #: on raw scores; float32 noise of the networks themselves is about 1e-5
SEED = 310
CHUNK = 4  #: images PyTorch takes at once: more spill the stem's activations out of the processor's caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One batch size done."""

    artifact: Artifact
    path: Path
    reused: bool  #: it was there already, of the same weights and opset, and is intact


def export(
    spec: ModelSpec, weights: Path, batch_sizes: Sequence[int], data_dir: Path, *, opset: int | None = None
) -> Iterator[Exported]:
    """
    Store one verified ONNX artifact for each batch size and yield it when done; the weights are loaded once at most.

    Arguments are checked at the call, work begins with the first `next`. `UsageError`: batch size, opset, no such file.
    `DataError`: the checkpoint does not fit. `StorageError`: no room to write. Plain `FarmError`: the graph cannot be
    made or differs from PyTorch by more than `MAX_ABS_DIFF`; nothing of it is stored.
    """
    opset = spec.opset if opset is None else opset
    _check_request(batch_sizes, opset)
    return _export_each(spec, weights, fingerprint(weights), list(dict.fromkeys(batch_sizes)), data_dir, opset)


def file_name(spec: ModelSpec, bs: int, weights_sha256: str, opset: int) -> str:
    """An unusual opset is part of the name, so that it never replaces the file that jobs run on."""
    suffix = "" if opset == spec.opset else f"_opset{opset}"
    return f"{spec.name}_bs{bs}_{weights_sha256[:8]}{suffix}.onnx"


def _check_request(batch_sizes: Sequence[int], opset: int) -> None:
    if not batch_sizes:
        raise UsageError("no batch size to export for: give at least one")
    if too_small := [bs for bs in batch_sizes if bs < 1]:
        raise UsageError(f"batch size {too_small[0]} does not exist: it must be 1 or more")
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} cannot be exported: choose one from {OPSETS[0]} to {OPSETS[-1]}")


def _export_each(
    spec: ModelSpec, weights: Path, weights_sha256: str, batch_sizes: Sequence[int], data_dir: Path, opset: int
) -> Iterator[Exported]:
    net: nn.Module | None = None
    frozen: nn.Module | None = None
    for bs in batch_sizes:
        path = artifacts.directory(data_dir, spec.name) / file_name(spec, bs, weights_sha256, opset)
        artifact = _intact(path, spec, bs, weights_sha256, opset)
        if artifact is not None:
            yield Exported(artifact=artifact, path=path, reused=True)
            continue
        if net is None or frozen is None:
            net = nets.build(spec)
            load_checkpoint(weights, net)
            # Two: what is checked must not have been through the same hands as what it is checked against.
            frozen = deepcopy(net)
            nets.freeze(frozen)
        graph = _graph(frozen, spec, bs, opset)
        artifact = Artifact(
            model=spec.name, bs=bs, backend="ort", soc="cpu", file=path.name, sha256=hashlib.sha256(graph).hexdigest(),
            input=TensorInfo.of(spec.input, bs), output=TensorInfo.of(spec.output, bs), opset=opset,
            weights=weights.name, weights_sha256=weights_sha256,
            versions=_versions(),
            max_abs_diff=_verified(net, graph, spec, bs),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        _store(path, graph, artifact)
        yield Exported(artifact=artifact, path=path, reused=False)


def _intact(path: Path, spec: ModelSpec, bs: int, weights_sha256: str, opset: int) -> Artifact | None:
    """The artifact already there, if it is what an export would make and its bytes are what its sidecar says."""
    try:
        there = artifacts.read_sidecar(artifacts.sidecar_of(path))
    except DataError:
        return None
    wanted = {
        "model": spec.name, "bs": bs, "opset": opset, "weights_sha256": weights_sha256,
        "input": TensorInfo.of(spec.input, bs), "output": TensorInfo.of(spec.output, bs),
    }  # fmt: skip
    if any(getattr(there, name) != value for name, value in wanted.items()) or not path.is_file():
        return None
    return there if artifacts.sha256_of(path) == there.sha256 else None


def _graph(net: nn.Module, spec: ModelSpec, bs: int, opset: int) -> bytes:
    """The serialised ONNX graph: the same bytes for the same weights, batch size, opset and PyTorch."""
    buffer = io.BytesIO()
    # Zeros, so that nothing of the input checked later can have been frozen into the graph.
    images = torch.zeros(bs, *spec.input.shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it says at length that it is the older exporter
        try:
            torch.onnx.export(
                net,
                (images,),
                buffer,  # type: ignore[arg-type]  # annotated as a path, yet this exporter takes any file
                input_names=[spec.input.name],
                output_names=[spec.output.name],
                opset_version=opset,
                do_constant_folding=True,
                dynamo=False,
            )
        except Exception as exc:
            raise FarmError(
                f"PyTorch cannot export {spec.title} at batch size {bs} and opset {opset}: {_first_line(exc)}"
            ) from exc
    return buffer.getvalue()


def _verified(net: nn.Module, graph: bytes, spec: ModelSpec, bs: int) -> float:
    """Largest absolute difference of onnxruntime to PyTorch on a batch of seeded noise; `FarmError` if too large."""
    images = torch.randn((bs, *spec.input.shape), generator=torch.Generator().manual_seed(SEED))
    with torch.inference_mode():
        expected = torch.cat([net(chunk) for chunk in torch.split(images, CHUNK)]).numpy()
    difference = float(np.abs(_scores(graph, spec, images) - expected).max())
    if not difference <= MAX_ABS_DIFF:  # NaN is not
        raise FarmError(
            f"the exported graph of {spec.title} at batch size {bs} differs from PyTorch by {difference:.2g}, "
            f"allowed are {MAX_ABS_DIFF:.0e}: it was not stored. Another --opset or PyTorch may export it right."
        )
    return difference


def _scores(graph: bytes, spec: ModelSpec, images: Tensor) -> npt.NDArray[np.float32]:
    """What onnxruntime makes of images, float32 [bs, ...]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        (scores,) = session.run([spec.output.name], {spec.input.name: images.numpy()})
    except Exception as exc:  # its exceptions have no common base
        raise FarmError(f"onnxruntime cannot run the exported graph of {spec.title}: {_first_line(exc)}") from exc
    expected = (images.shape[0], *spec.output.shape)
    if scores.shape != expected:
        raise FarmError(f"the exported graph of {spec.title} gives {scores.shape} scores, expected {expected}")
    return np.asarray(scores, dtype=np.float32)


def _store(path: Path, graph: bytes, artifact: Artifact) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Killed from here on there is no artifact, rather than one whose sidecar tells of another file.
        artifacts.sidecar_of(path).unlink(missing_ok=True)
        try:
            disk.replace(path, graph, partial=partial, durable=True)
        finally:
            partial.unlink(missing_ok=True)
        artifacts.write_sidecar(path.parent, artifact)


def _versions() -> dict[str, str]:
    known = versions()
    return {name: known.get(name) or version(name) for name in ("torch", "onnx", "onnxruntime", "farm")}


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
