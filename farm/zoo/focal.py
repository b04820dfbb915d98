"""Focal-Transformer, fast and small, at 224 x 224. Figures: the deployment guide's, for one Ascend 310P3."""

from farm.zoo.spec import Guide, ModelSpec, Tensor

SPEC = ModelSpec(
    name="focal",
    title="Focal-Transformer-S (focalv2-small-useconv-is224-ws7)",
    net="farm.nets.focal",
    dataset="imagenet",
    recipe="in256",
    input=Tensor(name="image", dtype="float32", shape=(3, 224, 224)),
    output=Tensor(name="class", dtype="float32", shape=(1000,)),
    opset=13,
    batch_sizes=(1, 4, 8, 16, 32, 64),
    reference={"top1": 83.588},
    reference_fps={1: 6.06, 4: 6.57, 8: 6.72, 16: 6.74, 32: 6.99, 64: 6.99},
    guide=Guide(
        upstream="github.com/microsoft/Focal-Transformer, master",
        commit="57bb3031582a2afb2d2a6916612bc4311316f9fc",
        upstream_name="Focal-fast-S, focalv2-small-useconv-is224-ws7",
        weights="focalv2-small-useconv-is224-ws7.pth",
        weights_from="Baidu pan, 1psU8YUmGifNiLoNTySwOfg, code tbsz",
        upstream_metrics={"top1": 83.6},
        accuracy_at="1 only",
        driver="1.0.15",
        cann="5.1.RC2",
        python="3.7.13",
        pytorch="1.8.1 (torchvision 0.9.1)",
        card="310P3",
    ),
)
