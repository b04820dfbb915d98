"""What the farm must know of a model to run and score it. The network itself is in `farm.nets`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes."""
    import numpy as np  # who only reads of models and jobs does without

    return prod(shape) * np.dtype(dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One input or output of a model's graph, without its batch axis."""

    name: str
    dtype: str  #: numpy's name, e.g. "float32"
    shape: tuple[int, ...]  #: of one sample

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guide:
    """What the model's deployment guide says of where its figures come from."""

    upstream: str  #: repository and branch
    commit: str
    upstream_name: str  #: of the model, there
    weights: str  #: the official checkpoint's file name
    weights_from: str
    upstream_metrics: Mapping[str, float]  #: what the authors report, percent
    accuracy_at: str  #: the batch sizes the accuracy was taken at
    driver: str
    cann: str
    python: str
    pytorch: str
    card: str
    atc_options: tuple[str, ...] = ("--input_format=NCHW",)
    baseline: str = ""  #: the GPU the guide compares with
    baseline_fps: Mapping[int, float] = field(default_factory=dict)  #: of that GPU, by batch size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model as its deployment guide fixes it."""

    name: str  #: what a user types
    title: str
    net: str  #: module of the network, imported only to export
    dataset: str  #: "imagenet" or "ade20k"
    recipe: str  #: key of `farm.data.recipes.RECIPES`
    input: Tensor
    output: Tensor
    opset: int
    batch_sizes: tuple[int, ...]  #: those that work
    impossible: Mapping[int, str] = field(default_factory=dict)  #: other batch sizes of the guide's, with the reason
    probabilities: bool = False  #: the output has been through a softmax
    heads: Mapping[str, Tensor] = field(default_factory=dict)  #: outputs to choose from, the guide's first
    training_only: tuple[str, ...] = ()  #: how keys of the checkpoint begin that the network has no use for
    tolerance: float = 5e-5  #: largest difference of raw scores between two ways to compute them in float32
    reference: Mapping[str, float] = field(default_factory=dict)  #: metric in percent
    reference_fps: Mapping[int, float] = field(default_factory=dict)  #: device fps of one 310P3, by batch size
    guide: Guide | None = None  #: none for a model that no guide describes

    def output_of(self, head: str) -> Tensor:
        """The output with this head; "" is the model's own."""
        return self.heads[head] if head else self.output

    def atc_command(self, bs: int, *, graph: str, output: str, soc: str = "Ascend310P3") -> list[str]:
        """The guide's command that compiles `graph`, an ONNX file, into `output`.om for one batch size."""
        shape = ",".join(map(str, (bs, *self.input.shape)))
        options = self.guide.atc_options if self.guide else ()
        return [
            "atc", "--framework=5", f"--model={graph}", f"--output={output}", *options,
            f"--input_shape={self.input.name}:{shape}", "--log=error", f"--soc_version={soc}",
        ]  # fmt: skip
