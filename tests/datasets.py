"""Small prepared datasets and tiny real ONNX artifacts, made in milliseconds."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from farm import artifacts, zoo
from farm.artifacts import Artifact, TensorInfo
from farm.data import manifest
from farm.data.manifest import Header, Manifest, Sample
from tests import fake_acl

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

LVVIT = zoo.get("lvvit")


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def write_bins(data_dir: Path, count: int, *, seed: int = 0) -> Manifest:
    """`count` random bins of LV-ViT's input shape and their manifest, with random labels."""
    directory = manifest.bins_dir(data_dir, LVVIT.recipe)
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(1, count + 1):
        data = rng.standard_normal(LVVIT.input.shape, dtype=np.float32).tobytes()
        manifest.bin_path(directory, name_of(number)).write_bytes(data)
        samples.append(Sample(name_of(number), int(rng.integers(1000)), xxhash.xxh3_64_hexdigest(data)))
    header = Header(recipe=LVVIT.recipe, recipe_digest="0" * 64, dtype="float32", shape=LVVIT.input.shape, classes=1000)
    return manifest.write(directory, header, samples)


def load_bin(data_dir: Path, name: str) -> NDArray[np.float32]:
    """One bin as float32 [3, 224, 224]."""
    path = manifest.bin_path(manifest.bins_dir(data_dir, LVVIT.recipe), name)
    return np.fromfile(path, dtype=np.float32).reshape(LVVIT.input.shape)


def session_of(graph: Path) -> InferenceSession:
    """A graph in onnxruntime on one core: tests run side by side, and idle threads of its pool spin."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def write_tiny_onnx(data_dir: Path, bs: int, *, work: int = 0, seed: int = 0) -> Artifact:
    """
    A real graph with LV-ViT's tensors: 16 x 16 means and a random linear layer.

    `work` useless matrix products make it slow and change no bit of its answer.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((588, 1000), dtype=np.float32)
    initializers = [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([bs, 588]), "flat")]
    nodes = [
        helper.make_node("AveragePool", ["image"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Reshape", ["pooled", "flat"], ["x0"]),
    ]
    if work:  # beside the answer, which it must not change: its mean counts nothing
        square = np.linalg.qr(rng.standard_normal((588, 588)))[0].astype(np.float32)
        initializers.append(numpy_helper.from_array(square, "square"))
        initializers.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
        nodes += [helper.make_node("MatMul", [f"x{i}", "square"], [f"x{i + 1}"]) for i in range(work)]
        nodes.append(helper.make_node("ReduceMean", [f"x{work}"], ["mean"], axes=[1], keepdims=1))
        nodes.append(helper.make_node("Mul", ["mean", "nothing"], ["zero"]))
        nodes.append(helper.make_node("MatMul", ["x0", "weights"], ["answer"]))
        nodes.append(helper.make_node("Add", ["answer", "zero"], ["features"]))
    else:
        nodes.append(helper.make_node("MatMul", ["x0", "weights"], ["features"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [bs, 3, 224, 224])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [bs, 1000])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    directory = artifacts.directory(data_dir, LVVIT.name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"tiny_bs{bs}_{seed}.onnx"
    onnx.save(model, path)
    artifact = Artifact(
        model=LVVIT.name,
        bs=bs,
        backend="ort",
        soc="cpu",
        file=path.name,
        sha256=artifacts.sha256_of(path),
        input=TensorInfo.of(LVVIT.input, bs),
        output=TensorInfo.of(LVVIT.output, bs),
    )
    artifacts.write_sidecar(directory, artifact)
    return artifact


def write_tiny_om(data_dir: Path, bs: int, *, soc: str = "Ascend310P3", **behaviour: object) -> Artifact:
    """LV-ViT's tensors, for the stand-in of the vendor's module; what it answers is `expected_om_digest`."""
    directory = artifacts.directory(data_dir, LVVIT.name)
    path = directory / f"lvvit_bs{bs}.om"
    given, wanted = TensorInfo.of(LVVIT.input, bs), TensorInfo.of(LVVIT.output, bs)
    fake_acl.write_om(
        path,
        [(given.name, given.dtype, given.shape)],
        [(f"Gemm_9:0:{wanted.name}", wanted.dtype, wanted.shape)],
        soc=soc,
        **behaviour,
    )
    artifact = Artifact(
        model=LVVIT.name, bs=bs, backend="acl", soc=soc, file=path.name, sha256=artifacts.sha256_of(path),
        input=given, output=wanted,
    )  # fmt: skip
    artifacts.write_sidecar(directory, artifact)
    return artifact


def expected_om_digest(data_dir: Path, count: int) -> str:
    """What the farm must answer for `write_bins` and `write_tiny_om`: numbers drawn from the hash of each bin."""
    digest = hashlib.sha256()
    for number in range(1, count + 1):
        seed = xxhash.xxh3_64_intdigest(load_bin(data_dir, name_of(number)).tobytes())
        best = np.argsort(-np.random.Generator(np.random.SFC64(seed)).standard_normal(1000, np.float32), kind="stable")
        digest.update(f"{name_of(number)}\t{','.join(map(str, best[:5]))}\n".encode())
    return digest.hexdigest()


def expected_digest(data_dir: Path, count: int, *, bs: int = 4, seed: int = 0) -> str:
    """What the farm must answer for `write_bins` and `write_tiny_onnx`: plain onnxruntime, numpy and hashlib."""
    with tempfile.TemporaryDirectory() as scratch:
        artifact = write_tiny_onnx(Path(scratch), bs, seed=seed)
        path = artifacts.directory(Path(scratch), LVVIT.name) / artifact.file
        session = session_of(path)
    digest = hashlib.sha256()
    for start in range(1, count + 1, bs):
        names = [name_of(number) for number in range(start, min(start + bs, count + 1))]
        batch = np.zeros((bs, *LVVIT.input.shape), np.float32)
        for place, name in enumerate(names):
            batch[place] = load_bin(data_dir, name)
        (scores,) = session.run(None, {"image": batch})
        for name, row in zip(names, scores, strict=False):
            best = np.argsort(-row, kind="stable")[:5]
            digest.update(f"{name}\t{','.join(map(str, best))}\n".encode())
    return digest.hexdigest()


SWIN = zoo.get("swin")
#: Of pictures, height and width: of two windows, of one, of two without a resize, of five, of two one above the other,
#: of five lower ones, of two.
ADE_SIZES = ((480, 640), (512, 512), (512, 700), (300, 1150), (640, 480), (200, 1000), (500, 333))


def ade_name(number: int) -> str:
    return f"ADE_val_{number:08d}"


def write_ade(directory: Path, sizes: Sequence[tuple[int, int]] = ADE_SIZES, *, seed: int = 0) -> tuple[Path, Path]:
    """Folders of images and annotations in ADE20K's layout: soft colours and patches, each with all kinds of values."""
    images, annotations = directory / "images", directory / "annotations"
    for folder in (images, annotations):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes, start=1):
        grid = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC).save(
            images / f"{ade_name(number)}.jpg", quality=95
        )
        patches = rng.integers(0, 151, (7, 7), dtype=np.uint8)
        patches[0, 0] = 255
        Image.fromarray(patches).resize((width, height), Image.Resampling.NEAREST).save(
            annotations / f"{ade_name(number)}.png"
        )
    return images, annotations


def write_swin_onnx(data_dir: Path, bs: int, head: str, *, seed: int = 0) -> Artifact:
    """A real graph with swin's tensors: means of 4 x 4 pixels, a random 1 x 1 convolution, for a full head a resize."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    tensors = {
        "weights": rng.standard_normal((150, 3, 1, 1), dtype=np.float32),
        "bias": rng.standard_normal(150, dtype=np.float32),
        "scales": np.array([1, 1, 4, 4], np.float32),
        "roi": np.zeros(0, np.float32),
    }
    small = "output" if head == "small" else "small"
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Conv", ["pooled", "weights", "bias"], [small], kernel_shape=[1, 1]),
    ]
    if head != "small":
        nodes.append(
            helper.make_node(
                "Resize",
                ["small", "roi", "scales"],
                ["output"],
                mode="linear",
                coordinate_transformation_mode="half_pixel",
            )
        )
    output = SWIN.output_of(head)
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [bs, 3, 512, 512])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [bs, *output.shape])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8)
    directory = artifacts.directory(data_dir, SWIN.name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"tiny_bs{bs}_{head}_{seed}.onnx"
    onnx.save(model, path)
    artifact = Artifact(
        model=SWIN.name,
        bs=bs,
        backend="ort",
        soc="cpu",
        file=path.name,
        sha256=artifacts.sha256_of(path),
        head=head,
        input=TensorInfo.of(SWIN.input, bs),
        output=TensorInfo.of(output, bs),
    )
    artifacts.write_sidecar(directory, artifact)
    return artifact


def published_logits(data_dir: Path, graph: Path, name: str) -> NDArray[np.float64]:
    """
    What the published post-processing takes the argmax of, float64 [150, H, W]: a canvas, a division, a resize.

    `graph` has the full head and batch size 1. Nothing of the farm's merge or geometry is used.
    """
    import torch

    session = session_of(graph)
    total: torch.Tensor | None = None
    for path in sorted(manifest.bins_dir(data_dir, "seg").glob(f"{name}-*.bin")):
        *_, box, original, last = path.stem.rsplit("-", 3)
        x1, y1, x2, y2 = map(int, box.split(","))
        *_, height, width = map(int, last.split(","))
        if total is None:
            total, count = torch.zeros(150, height, width, dtype=torch.float64), torch.zeros(height, width)
        (logits,) = session.run(None, {"input": np.fromfile(path, np.float32).reshape(1, 3, 512, 512)})
        total[:, y1:y2, x1:x2] += torch.from_numpy(logits[0, :, : y2 - y1, : x2 - x1]).double()
        count[y1:y2, x1:x2] += 1
    assert total is not None
    size = tuple(map(int, original.split(",")[:2]))
    merged = torch.nn.functional.interpolate((total / count)[None], size=size, mode="bilinear", align_corners=False)
    found: NDArray[np.float64] = merged[0].numpy()
    return found
