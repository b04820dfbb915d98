"""LV-ViT-S at 224 x 224. Figures: the deployment guide's, for one Ascend 310P3."""

from farm.zoo.spec import Guide, ModelSpec, Tensor

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
    guide=Guide(
        upstream="github.com/zihangJiang/TokenLabeling, master",
        commit="2a217161fd5656312c8fac447fffbb6b3c091af7",
        upstream_name="lvvit_s",
        weights="lvvit_s-26M-224-83.3.pth.tar",
        weights_from="TokenLabeling's releases, 1.0",
        upstream_metrics={"top1": 83.3},
        accuracy_at="1, 4, 8, 16, 32, 64 (all alike)",
        driver="1.0.17",
        cann="6.0.RC1",
        python="3.7.5",
        pytorch="",
        card="310P",
    ),
)
