"""
Conformer-base/16: a convolutional branch and a transformer branch side by side, telling each other what they see.

Sizes are constants: this is one network, not a family. Training only parts (dropout, stochastic depth) are left out.
Names of modules and parameters, and their order, are those of the official checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from farm.nets.layers import Attention, Ffn

CLASSES = 1000
WIDTH = 576  #: of the tokens
HEADS = 9
FFN_WIDTH = 4 * WIDTH
SIDE = 14
PATCHES = SIDE * SIDE
STEM_WIDTH = 64
EPS = 1e-6  #: but 1e-5, PyTorch's own, in the stem and behind the last unit


class Unit(NamedTuple):
    """A step of both branches. The middle width of its convolution blocks is a quarter of `width`."""

    fan_in: int
    width: int
    stride: int  #: of its first convolution block
    factor: int  #: pixels of its maps to a token, along either axis
    last_stride: int = 1  #: of its second convolution block


#: Units 2 to 12; the first has no exchange and is part of the backbone itself.
UNITS = (
    Unit(fan_in=384, width=384, stride=1, factor=4),
    Unit(fan_in=384, width=384, stride=1, factor=4),
    Unit(fan_in=384, width=384, stride=1, factor=4),
    Unit(fan_in=384, width=768, stride=2, factor=2),
    Unit(fan_in=768, width=768, stride=1, factor=2),
    Unit(fan_in=768, width=768, stride=1, factor=2),
    Unit(fan_in=768, width=768, stride=1, factor=2),
    Unit(fan_in=768, width=1536, stride=2, factor=1),
    Unit(fan_in=1536, width=1536, stride=1, factor=1),
    Unit(fan_in=1536, width=1536, stride=1, factor=1),
    Unit(fan_in=1536, width=1536, stride=1, factor=1, last_stride=2),
)


def _to_tokens(features: Tensor) -> Tensor:
    """[B, 576, 14, 14] to [B, 196, 576]"""
    return features.permute(0, 2, 3, 1).reshape(-1, PATCHES, WIDTH)


class Bottleneck(nn.Module):
    """A residual block of three convolutions on maps; what goes in and comes out beside those, its heirs decide."""

    def __init__(self, fan_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        middle = width // 4
        self.conv1 = nn.Conv2d(fan_in, middle, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle, eps=EPS)
        self.conv2 = nn.Conv2d(middle, middle, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle, eps=EPS)
        self.conv3 = nn.Conv2d(middle, width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width, eps=EPS)
        self.projects = stride != 1 or fan_in != width
        if self.projects:
            self.residual_conv = nn.Conv2d(fan_in, width, kernel_size=1, stride=stride, bias=False)
            self.residual_bn = nn.BatchNorm2d(width, eps=EPS)

    def narrowed(self, x: Tensor) -> Tensor:
        """[B, fan in, H, W] to [B, width / 4, H, W]"""
        return torch.relu(self.bn1(self.conv1(x)))

    def seen(self, narrow: Tensor) -> Tensor:
        """[B, width / 4, H, W] to [B, width / 4, H / stride, W / stride]: each pixel looks at those around it."""
        return torch.relu(self.bn2(self.conv2(narrow)))

    def widened(self, middle: Tensor, x: Tensor) -> Tensor:
        """What was `seen`, and the block's input, to its output [B, width, H / stride, W / stride]."""
        shortcut = self.residual_bn(self.residual_conv(x)) if self.projects else x
        return torch.relu(self.bn3(self.conv3(middle)) + shortcut)


class TellingBlock(Bottleneck):
    """Maps [B, fan in, H, W] to the output and, for the tokens, the middle [B, width / 4, H / stride, W / stride]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.seen(self.narrowed(x))
        return self.widened(middle, x), middle


class HearingBlock(Bottleneck):
    """Maps [B, fan in, H, W] and, from the tokens if at all, [B, width / 4, H, W] to the output alone."""

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        narrow = self.narrowed(x)
        if told is not None:
            narrow = narrow + told
        return self.widened(self.seen(narrow), x)


class Squeeze(nn.Module):
    """A map [B, middle, 14 f, 14 f] to tokens [B, 197, 576], the class token being that of `tokens`."""

    def __init__(self, middle: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv_project = nn.Conv2d(middle, WIDTH, kernel_size=1)
        self.ln = nn.LayerNorm(WIDTH, eps=EPS)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        # Before the projection, not behind it: the same up to rounding, and up to 16 times less to project.
        if self.factor > 1:
            features = nn.functional.avg_pool2d(features, self.factor)
        patches = nn.functional.gelu(self.ln(_to_tokens(self.conv_project(features))))
        return torch.cat((tokens[:, :1], patches), dim=1)


class Expand(nn.Module):
    """Tokens [B, 197, 576] to a map [B, middle, 14 f, 14 f], each patch f x f equal pixels."""

    def __init__(self, middle: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv_project = nn.Conv2d(WIDTH, middle, kernel_size=1)
        self.bn = nn.BatchNorm2d(middle, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, 1:].reshape(-1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
        features = torch.relu(self.bn(self.conv_project(patches)))
        if self.factor > 1:
            features = nn.functional.interpolate(features, scale_factor=self.factor, mode="nearest")
        return features


class TransformerLayer(nn.Module):
    """A pre-norm transformer block on tokens [B, 197, 576]."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(WIDTH, eps=EPS)
        self.attn = Attention(WIDTH, HEADS)
        self.ln2 = nn.LayerNorm(WIDTH, eps=EPS)
        self.ffn = Ffn(WIDTH, FFN_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        processed: Tensor = x + self.ffn(self.ln2(x))
        return processed


class ConvTransUnit(nn.Module):
    """A map [B, fan in, H, W] and tokens [B, 197, 576] to the next ones, after an exchange between the two."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        middle = unit.width // 4
        self.cnn_block = TellingBlock(unit.fan_in, unit.width, unit.stride)
        self.fusion_block = HearingBlock(unit.width, unit.width, unit.last_stride)
        self.squeeze_block = Squeeze(middle, unit.factor)
        self.expand_block = Expand(middle, unit.factor)
        self.trans_block = TransformerLayer()

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features, middle = self.cnn_block(features)
        # The class token is in both, so it counts twice: so it was trained.
        tokens = self.trans_block(self.squeeze_block(middle, tokens) + tokens)
        return self.fusion_block(features, self.expand_block(tokens)), tokens


class Backbone(nn.Module):
    """Images [B, 3, 224, 224] to what either branch makes of them: [B, 1536] and [B, 576]."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.conv_1 = HearingBlock(STEM_WIDTH, UNITS[0].fan_in)
        self.trans_patch_conv = nn.Conv2d(STEM_WIDTH, WIDTH, kernel_size=4, stride=4)
        self.trans_1 = TransformerLayer()
        for number, unit in enumerate(UNITS, start=2):
            self.add_module(f"conv_trans_{number}", ConvTransUnit(unit))
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.trans_norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        stem = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        features = self.conv_1(stem)
        # A plain int and copies instead of `expand`: the exporter folds them into one constant.
        class_tokens = torch.cat([self.cls_token] * int(images.shape[0]))
        tokens = self.trans_1(torch.cat((class_tokens, _to_tokens(self.trans_patch_conv(stem))), dim=1))
        for number in range(2, 2 + len(UNITS)):
            features, tokens = self.get_submodule(f"conv_trans_{number}")(features, tokens)
        return self.pooling(features).flatten(1), self.trans_norm(tokens)[:, 0]


class Head(nn.Module):
    """What the branches found, [B, 1536] and [B, 576], to raw scores [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_cls_head = nn.Linear(UNITS[-1].width, CLASSES)
        self.trans_cls_head = nn.Linear(WIDTH, CLASSES)

    def forward(self, features: Tensor, class_token: Tensor) -> Tensor:
        scores: Tensor = self.conv_cls_head(features) + self.trans_cls_head(class_token)
        return scores


class Conformer(nn.Module):
    """Normalised images, float32 [B, 3, 224, 224], to probabilities [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = Head()

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(*self.backbone(images))
        return scores.softmax(dim=-1)


def build() -> nn.Module:
    return Conformer()
