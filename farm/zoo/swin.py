"""UPerNet on Swin-S, windows of 512 x 512. Figures: the deployment guide's, for one Ascend 310P3."""

from farm.zoo.spec import Guide, ModelSpec, Tensor

FULL = Tensor(name="output", dtype="float32", shape=(150, 512, 512))
SMALL = Tensor(name="output", dtype="float32", shape=(150, 128, 128))

SPEC = ModelSpec(
    name="swin",
    title="UPerNet Swin-S",
    net="farm.nets.swin",
    dataset="ade20k",
    recipe="seg",
    input=Tensor(name="input", dtype="float32", shape=(3, 512, 512)),
    output=FULL,
    # "small" leaves out the last resize; "deployed" pools 6 x 6 cells as the published graph does, which is not quite
    # the network that was trained.
    heads={"full": FULL, "small": SMALL, "deployed": FULL},
    training_only=("auxiliary_head.",),
    tolerance=2e-4,
    opset=11,
    batch_sizes=(1, 4, 8),
    impossible={16: "out of memory", 32: "out of memory", 64: "out of memory"},
    reference={"miou": 47.92, "aacc": 82.49, "macc": 59.5},
    reference_fps={1: 16.74, 4: 16.06, 8: 16.2},
    guide=Guide(
        upstream="github.com/open-mmlab/mmsegmentation, v0.28.0, configs/swin",
        commit="b51670b61339e5b10c5ab6c277de6b6a387fdff0",
        upstream_name="upernet_swin_small_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K",
        weights="upernet_swin_small_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210526_192015-ee2fff1c.pth",
        weights_from="OpenMMLab, mmsegmentation/v0.5/swin",
        upstream_metrics={"miou": 47.72},
        accuracy_at="1 and 4 (no difference)",
        driver="22.0.2, firmware 1.82.22.2.220",
        cann="5.1.RC2",
        python="3.8",
        pytorch="1.10.0 (mmcv-full 1.6.0)",
        card="Atlas 300I Pro (310P)",
        baseline="T4",
        baseline_fps={1: 5.24, 4: 4.65, 8: 4.35},
    ),
)
