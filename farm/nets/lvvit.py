"""
LV-ViT-S: a vision transformer behind a convolutional stem, scored by the class token and by its patch tokens.

Sizes are constants: this is one network, not a family. Training only parts (dropout, stochastic depth, MixToken) are
left out. Names of modules and parameters, and their order, are those of the official checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from farm.nets.layers import Attention, Mlp

CLASSES = 1000
WIDTH = 384
DEPTH = 16
HEADS = 6
MLP_WIDTH = 3 * WIDTH
STEM_WIDTH = 64
PATCHES = 14 * 14
TOKENS = 1 + PATCHES  #: the class token comes first


class Stem(nn.Module):
    """Images [B, 3, 224, 224] to one feature vector a patch, [B, 384, 14, 14]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM_WIDTH, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_WIDTH)
        self.conv2 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(STEM_WIDTH)
        self.conv3 = nn.Conv2d(STEM_WIDTH, STEM_WIDTH, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(STEM_WIDTH)
        self.proj = nn.Conv2d(STEM_WIDTH, WIDTH, kernel_size=8, stride=8)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(images)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        projected: Tensor = self.proj(x)
        return projected


class Block(nn.Module):
    """A pre-norm transformer block whose two residual branches count half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.attn = Attention(WIDTH, HEADS, qkv_bias=False)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp(WIDTH, MLP_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) / 2
        processed: Tensor = x + self.mlp(self.norm2(x)) / 2
        return processed


class LVViT(nn.Module):
    """Normalised images, float32 [B, 3, 224, 224], to raw scores [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.patch_embed = Stem()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.aux_head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images).reshape(-1, WIDTH, PATCHES).transpose(1, 2)
        # A plain int and copies instead of `expand`: the exporter folds them into one constant, where a traced size
        # would leave a dozen nodes of shape arithmetic in the graph.
        class_tokens = torch.cat([self.cls_token] * int(images.shape[0]))
        x = torch.cat((class_tokens, patches), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # For each class the patch that speaks loudest for it, not all scores of one best patch.
        loudest = self.aux_head(x[:, 1:]).amax(dim=1)
        scores: Tensor = self.head(x[:, 0]) + 0.5 * loudest
        return scores


def build() -> nn.Module:
    return LVViT()
