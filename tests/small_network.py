"""A network of a few layers with named parts, for tests that look at one property of linearize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stem(nn.Module):
    """Convolution, normalization, activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Small(nn.Module):
    """A network of two named parts with attention between them; x [B, 3, H, W] -> [B, 3, H, W]."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = Stem(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        q, k, v = self.qkv(hidden.flatten(2).transpose(1, 2)).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return self.head(hidden + mixed.reshape(hidden.shape))


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_network() -> Small:
    """The same float64 weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().double().eval()
