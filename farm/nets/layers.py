"""What several of the networks are made of, and nothing else. Names of parameters are the checkpoints'."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear layers around an exact GELU, on each token by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return projected


class Ffn(nn.Module):
    """The same maths as `Mlp`, under the names that OpenMMLab's checkpoints have."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.layers(x)
        return projected


class Attention(nn.Module):
    """Multi-head self-attention among tokens [B, N, width]; B may be images, or windows of images."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # A plain int: a traced size would leave shape arithmetic in the graph.
        tokens, head_width = int(x.shape[1]), self.width // self.heads
        # The outputs of `qkv` lie as [3][heads][head width]: seen as three times as many heads, one four-dimensional
        # transpose serves queries, keys and values alike. Five-dimensional ones are slow on the card.
        heads = self.qkv(x).reshape(-1, tokens, 3 * self.heads, head_width).transpose(1, 2)
        query, key, value = torch.split(heads, self.heads, dim=1)
        attention = (query * head_width**-0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        joined = (attention @ value).transpose(1, 2).reshape(-1, tokens, self.width)
        projected: Tensor = self.proj(joined)
        return projected
