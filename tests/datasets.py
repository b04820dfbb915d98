"""Small prepared datasets and tiny real ONNX artifacts, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from farm import artifacts, zoo
from farm.artifacts import Artifact, TensorInfo
from farm.data import manifest
from farm.data.manifest import Header, Manifest, Sample

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


def write_tiny_onnx(data_dir: Path, bs: int, *, work: int = 0, seed: int = 0) -> Artifact:
    """
    A real graph with LV-ViT's tensors: 16 x 16 means, a random linear layer, and `work` useless matrix products.
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
    if work:
        square = np.linalg.qr(rng.standard_normal((588, 588)))[0].astype(np.float32)
        initializers.append(numpy_helper.from_array(square, "square"))
        nodes += [helper.make_node("MatMul", [f"x{i}", "square"], [f"x{i + 1}"]) for i in range(work)]
    nodes.append(helper.make_node("MatMul", [f"x{work}", "weights"], ["features"]))
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
