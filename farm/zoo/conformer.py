"""Conformer-base/16 at 224 x 224. Figures: the deployment guide's, for one Ascend 310P3."""

from farm.zoo.spec import Guide, ModelSpec, Tensor

SPEC = ModelSpec(
    name="conformer",
    title="Conformer-base",
    net="farm.nets.conformer",
    dataset="imagenet",
    recipe="in256",
    input=Tensor(name="input", dtype="float32", shape=(3, 224, 224)),
    output=Tensor(name="probs", dtype="float32", shape=(1000,)),
    probabilities=True,
    opset=11,
    batch_sizes=(1, 4, 8, 16, 32, 64),
    reference={"top1": 83.85},
    reference_fps={1: 142.4363, 4: 208.2684, 8: 257.7437, 16: 231.9296, 32: 220.9309, 64: 208.0021},
    guide=Guide(
        upstream="github.com/open-mmlab/mmclassification, configs/conformer",
        commit="v0.24.1",
        upstream_name="conformer-base-p16_8xb128_in1k",
        weights="conformer-base-p16_3rdparty_8xb128_in1k_20211206-bfdf8637.pth",
        weights_from="OpenMMLab, mmclassification/v0/conformer",
        upstream_metrics={"top1": 83.82},
        accuracy_at="1",
        driver="22.0.2",
        cann="5.1.RC2",
        python="3.7.5",
        pytorch="1.9.0",
        card="310P",
        atc_options=(),
        baseline="GPU",
        baseline_fps={1: 151.8395, 4: 211.3495, 8: 218.5971, 16: 221.4235, 32: 222.7179, 64: 138.7254},
    ),
)
