"""Twins-SVT-L at 224 x 224. Figures: the deployment guide's, for one Ascend 310P3."""

from farm.zoo.spec import Guide, ModelSpec, Tensor

SPEC = ModelSpec(
    name="twins",
    title="Twins-SVT-L",
    net="farm.nets.twins",
    dataset="imagenet",
    recipe="in256",
    input=Tensor(name="input", dtype="float32", shape=(3, 224, 224)),
    output=Tensor(name="modelOutput", dtype="float32", shape=(1000,)),
    opset=11,
    batch_sizes=(1, 4, 8, 16, 32, 64),
    reference={"top1": 83.7},
    reference_fps={1: 131.1062, 4: 129.6842, 8: 175.2209, 16: 161.2279, 32: 156.05, 64: 148.1286},
    guide=Guide(
        upstream="github.com/Meituan-AutoML/Twins, master",
        commit="4700293a2d0a91826ab357fc5b9bc1468ae0e987",
        upstream_name="alt_gvt_large",
        weights="alt_gvt_large.pth",
        weights_from="Google Drive, id 1um39wxIaicmOquP2fr_SiZdxNCUou8w-",
        upstream_metrics={"top1": 83.7},
        accuracy_at="1, 4, 8, 16, 32, 64 (no difference)",
        driver="22.0.2",
        cann="6.0.0",
        python="3.7.5",
        pytorch="1.7.0",
        card="310P",
        baseline="GPU",
        baseline_fps={1: 61.9636, 4: 77.006, 8: 79.461, 16: 83.6408, 32: 83.805, 64: 89.759},
    ),
)
