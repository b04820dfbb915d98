"""LV-ViT-S at 224 x 224. Figures: the deployment guide's table for one Ascend 310P3."""

from farm.zoo.spec import ModelSpec, Tensor

SPEC = ModelSpec(
    name="lvvit",
    title="LV-ViT-S",
    net="farm.nets.lvvit",
    dataset="imagenet",
    recipe="lvvit",
    input=Tensor(name="image", dtype="float32", shape=(3, 224, 224)),
    output=Tensor(name="features", dtype="float32", shape=(1000,)),
    opset=13,
    batch_sizes=(1, 4, 8, 16, 32, 64),
    reference={"top1": 83.17},
    reference_fps={1: 59.2, 4: 76.0, 8: 59.9, 16: 26.4, 32: 11.5, 64: 5.1},
)
