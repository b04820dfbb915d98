"""
Checkpoint to ONNX: one file of fixed batch size each, not stored before onnxruntime agrees with PyTorch about it.

What runs the file, and what compiles it for a card, is elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from farm import artifacts, canary, nets
from farm.artifacts import Artifact, TensorInfo
from farm.data import disk
from farm.data.recipes import RECIPES, normalisation
from farm.errors import DataError, FarmError, UsageError
from farm.export.checkpoint import fingerprint, load_checkpoint
from farm.versions import versions
from farm.zoo.spec import ModelSpec
from farm.zoo.spec import Tensor as TensorSpec

Run = Callable[[Tensor], npt.NDArray[np.float32]]

OPSETS = range(11, 21)  #: 20 is the last that the tracing exporter writes
DTYPES = ("float32", "uint8")  #: of a graph's input
SEED = 310
PIXELS_AT_ONCE = 4 * 224 * 224
LEAST_PROBABILITY = 1e-20  #: rarer ones are not compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """One batch size done."""

    artifact: Artifact
    path: Path
    reused: bool  #: it was there already, of the same weights and form, and is intact


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is exported of a model, batch size apart."""

    spec: ModelSpec
    opset: int
    head: str = ""  #: one of the spec's heads, if it has several
    dtype: str = "float32"  #: of the input; "uint8" pixels are normalised in the graph
    simplify: bool = False

    @property
    def input(self) -> TensorSpec:
        return replace(self.spec.input, dtype=self.dtype)

    @property
    def output(self) -> TensorSpec:
        return self.spec.output_of(self.head)

    def file_name(self, bs: int, weights_sha256: str) -> str:
        """An unusual form is part of the name, so that it never replaces the file that jobs run on."""
        unusual = (
            ("" if self.head == _usual_head(self.spec) else self.head),
            ("" if self.dtype == self.spec.input.dtype else self.dtype),
            ("" if self.opset == self.spec.opset else f"opset{self.opset}"),
            ("sim" if self.simplify else ""),
        )
        return "_".join([self.spec.name, f"bs{bs}", weights_sha256[:8], *filter(None, unusual)]) + ".onnx"


def export(
    spec: ModelSpec,
    weights: Path,
    batch_sizes: Sequence[int],
    data_dir: Path,
    *,
    opset: int | None = None,
    head: str | None = None,
    dtype: str = "float32",
    simplify: bool = False,
) -> Iterator[Exported]:
    """
    Store one verified ONNX artifact for each batch size and yield it when done; the weights are loaded once at most.

    Arguments are checked at the call, work begins with the first `next`. `UsageError`: batch size, opset, head, type of
    input, no such file. `DataError`: the checkpoint does not fit. `StorageError`: no room to write. Plain `FarmError`:
    the graph cannot be made or differs from PyTorch by more than the spec's tolerance; nothing of it is stored.
    """
    form = Form(
        spec=spec,
        opset=spec.opset if opset is None else opset,
        head=_usual_head(spec) if head is None else head,
        dtype=dtype,
        simplify=simplify,
    )
    _check_request(batch_sizes, form)
    return _export_each(form, weights, fingerprint(weights), list(dict.fromkeys(batch_sizes)), data_dir)


def _usual_head(spec: ModelSpec) -> str:
    return next(iter(spec.heads), "")


def _check_request(batch_sizes: Sequence[int], form: Form) -> None:
    if not batch_sizes:
        raise UsageError("no batch size to export for: give at least one")
    if too_small := [bs for bs in batch_sizes if bs < 1]:
        raise UsageError(f"batch size {too_small[0]} does not exist: it must be 1 or more")
    if form.opset not in OPSETS:
        raise UsageError(f"opset {form.opset} cannot be exported: choose one from {OPSETS[0]} to {OPSETS[-1]}")
    if form.head not in (form.spec.heads or [""]):
        known = ", ".join(form.spec.heads) or "one only, so leave --head out"
        raise UsageError(f"{form.spec.name} has no head {form.head!r}: it has {known}")
    if form.dtype not in DTYPES:
        raise UsageError(f"no graph takes {form.dtype!r}: --input is one of {', '.join(DTYPES)}")


def _export_each(
    form: Form, weights: Path, weights_sha256: str, batch_sizes: Sequence[int], data_dir: Path
) -> Iterator[Exported]:
    spec = form.spec
    net: nn.Module | None = None
    frozen: nn.Module | None = None
    answers: npt.NDArray[np.float32] | None = None  # one graph's will do: each was held against PyTorch
    for bs in batch_sizes:
        path = artifacts.directory(data_dir, spec.name) / form.file_name(bs, weights_sha256)
        artifact = _intact(path, form, bs, weights_sha256)
        if artifact is not None:
            yield Exported(artifact=artifact, path=path, reused=True)
            continue
        if net is None or frozen is None:
            net = nets.build(spec, form.head)
            load_checkpoint(weights, net, training_only=spec.training_only)
            # Two: what is checked must not have been through the same hands as what it is checked against.
            frozen = deepcopy(net)
            with _running(spec):
                nets.freeze(frozen)
        graph = _graph(frozen, form, bs)
        run = _runner(graph, form)
        artifact = Artifact(
            model=spec.name, bs=bs, backend="ort", soc="cpu", file=path.name, sha256=hashlib.sha256(graph).hexdigest(),
            input=TensorInfo.of(form.input, bs), output=TensorInfo.of(form.output, bs), opset=form.opset,
            head=form.head, simplified=form.simplify, weights=weights.name, weights_sha256=weights_sha256,
            versions=_versions(form),
            max_abs_diff=_verified(net, run, form, bs),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )  # fmt: skip
        answers = _answers(run, form, bs) if answers is None else answers
        _store(path, graph, artifact, answers)
        yield Exported(artifact=artifact, path=path, reused=False)


def _intact(path: Path, form: Form, bs: int, weights_sha256: str) -> Artifact | None:
    """The artifact already there, if it is what an export would make and its bytes are what its sidecar says."""
    try:
        there = artifacts.read_sidecar(artifacts.sidecar_of(path))
    except DataError:
        return None
    wanted = {
        "model": form.spec.name, "bs": bs, "opset": form.opset, "weights_sha256": weights_sha256,
        "head": form.head, "simplified": form.simplify,
        "input": TensorInfo.of(form.input, bs), "output": TensorInfo.of(form.output, bs),
    }  # fmt: skip
    if any(getattr(there, name) != value for name, value in wanted.items()) or not path.is_file():
        return None
    return there if artifacts.sha256_of(path) == there.sha256 else None


class FromPixels(nn.Module):
    """A network behind its recipe's normalisation: takes pixels, uint8 [B, 3, H, W]."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, recipe: str) -> None:
        super().__init__()
        self.net = net
        # From what the recipe makes of black and of white: its arithmetic need not be known here.
        values = torch.from_numpy(normalisation(RECIPES[recipe]).astype(np.float64))
        scale = (values[:, 255] - values[:, 0]) / 255
        self.register_buffer("scale", scale.float().reshape(1, 3, 1, 1))
        self.register_buffer("shift", values[:, 0].float().reshape(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.net(pixels.to(torch.float32) * self.scale + self.shift)
        return scores


def _graph(net: nn.Module, form: Form, bs: int) -> bytes:
    """The serialised ONNX graph: the same bytes for the same weights, batch size, form and packages."""
    buffer = io.BytesIO()
    # Zeros, so that nothing of the input checked later can have been frozen into the graph.
    images = torch.zeros(bs, *form.input.shape, dtype=getattr(torch, form.dtype))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it says at length that it is the older exporter
        try:
            torch.onnx.export(
                net if form.dtype == form.spec.input.dtype else FromPixels(net, form.spec.recipe).eval(),
                (images,),
                buffer,  # type: ignore[arg-type]  # annotated as a path, yet this exporter takes any file
                input_names=[form.input.name],
                output_names=[form.output.name],
                opset_version=form.opset,
                do_constant_folding=True,
                dynamo=False,
            )
        except Exception as exc:
            raise FarmError(
                f"PyTorch cannot export {form.spec.title} at batch size {bs} and opset {form.opset}: {_first_line(exc)}"
            ) from exc
    return _simplified(buffer.getvalue(), form) if form.simplify else buffer.getvalue()


def _simplified(graph: bytes, form: Form) -> bytes:
    import onnx
    import onnxslim

    try:
        slimmed: bytes = onnxslim.slim(onnx.load_from_string(graph)).SerializeToString(deterministic=True)
    except Exception as exc:  # any of a hundred rewriting rules
        raise FarmError(
            f"onnxslim cannot simplify {form.spec.title}: {_first_line(exc)}. Leave out --simplify"
        ) from exc
    return slimmed


def _verified(net: nn.Module, run: Run, form: Form, bs: int) -> float:
    """
    Largest difference of onnxruntime's scores to PyTorch's on a batch of seeded noise; `FarmError` if too large.

    A graph that takes pixels is compared with what PyTorch makes of them normalised by the recipe, in float32.
    """
    generator = torch.Generator().manual_seed(SEED)
    shape = (bs, *form.input.shape)
    if form.dtype == "uint8":
        given = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images = _normalised(given, form.spec.recipe)
    else:
        given = images = torch.randn(shape, generator=generator)
    with _running(form.spec), torch.inference_mode():
        expected = torch.cat([net(chunk) for chunk in torch.split(images, _chunk(form))]).numpy()
    difference = float(np.abs(_raw(run(given), form) - _raw(expected, form)).max())
    if not difference <= form.spec.tolerance:  # NaN is not
        raise FarmError(
            f"the exported graph of {form.spec.title} at batch size {bs} differs from PyTorch by {difference:.2g}, "
            f"allowed are {form.spec.tolerance:.0e}: it was not stored. Another --opset or PyTorch may export it right."
        )
    return difference


def _answers(run: Run, form: Form, bs: int) -> npt.NDArray[np.float32]:
    """What onnxruntime makes of the canaries, [canary.COUNT, ...]."""
    answers = []
    for number in range(0, canary.COUNT, min(bs, canary.COUNT)):
        given = np.empty((bs, *form.input.shape), form.dtype)
        canary.fill(given, number)
        answers.append(run(torch.from_numpy(given))[: canary.COUNT])
    return np.concatenate(answers)[: canary.COUNT]


@contextmanager
def _running(spec: ModelSpec) -> Iterator[None]:
    """What PyTorch cannot run with the weights that were loaded, e.g. tables that point beyond the image."""
    try:
        yield
    except Exception as exc:
        raise DataError(f"{spec.title} does not run with these weights: {_first_line(exc)}") from exc


def _normalised(pixels: Tensor, recipe: str) -> Tensor:
    """What preparation by the recipe makes of pixels, uint8 [bs, 3, H, W] to float32."""
    table = torch.from_numpy(normalisation(RECIPES[recipe]).copy())
    return torch.stack([table[channel][pixels[:, channel].long()] for channel in range(3)], dim=1)


def _chunk(form: Form) -> int:
    """Images PyTorch takes at once: more spill the first layers' activations out of the processor's caches."""
    return max(1, PIXELS_AT_ONCE // prod(form.input.shape[1:]))


def _raw(scores: npt.NDArray[np.float32], form: Form) -> npt.NDArray[np.float32]:
    """Scores before a softmax, up to a constant: on probabilities of many classes no tolerance says anything."""
    return np.log(np.maximum(scores, LEAST_PROBABILITY)) if form.spec.probabilities else scores


def _runner(graph: bytes, form: Form) -> Run:
    """What makes scores of images [bs, ...] with onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session: onnxruntime.InferenceSession | None = None

    def run(images: Tensor) -> npt.NDArray[np.float32]:
        nonlocal session
        title = form.spec.title
        try:
            if session is None:
                session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            (scores,) = session.run([form.output.name], {form.input.name: images.numpy()})
        except Exception as exc:  # its exceptions have no common base
            raise FarmError(f"onnxruntime cannot run the exported graph of {title}: {_first_line(exc)}") from exc
        expected = (images.shape[0], *form.output.shape)
        if scores.shape != expected:
            raise FarmError(f"the exported graph of {title} gives {scores.shape} scores, expected {expected}")
        return np.asarray(scores, dtype=np.float32)

    return run


def _store(path: Path, graph: bytes, artifact: Artifact, answers: npt.NDArray[np.float32]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Killed from here on there is no artifact, rather than one whose sidecar tells of another file.
        artifacts.sidecar_of(path).unlink(missing_ok=True)
        try:
            disk.replace(path, graph, partial=partial, durable=True)
        finally:
            partial.unlink(missing_ok=True)
        canary.write_reference(path, answers)
        artifacts.write_sidecar(path.parent, artifact)


def _versions(form: Form) -> dict[str, str]:
    known = versions()
    names = ("torch", "onnx", "onnxruntime", "farm", *(("onnxslim",) if form.simplify else ()))
    return {name: known.get(name) or version(name) for name in names}


def _first_line(exc: Exception) -> str:
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]
