"""A small diffusers UNet in float32, for tests that look at one property of linearize."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn


@cache
def small_unet() -> nn.Module:
    """Every kind of layer that Stable Diffusion's UNet has; the same weights each time."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()


def prediction(dtype: torch.dtype = torch.float32) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The UNet at a timestep and a prompt, and a latent [2, 4, 16, 16]."""
    import copy

    unet = copy.deepcopy(small_unet()).to(dtype)
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn((2, 7, 16), generator=generator).to(dtype)
    x = torch.randn((2, 4, 16, 16), generator=generator).to(dtype)
    timestep = torch.tensor([981, 500])
    return lambda sample: unet(sample, timestep, prompt, return_dict=False)[0], x


def vectors(k: int, x: Tensor, seed: int = 5) -> Tensor:
    """K tangents or cotangents [K, *x.shape] of x's dtype; the first ones are the same for every K."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(x.shape, generator=generator) for _ in range(k)]).to(x.dtype)
