"""The pipeline's autoencoder: images of latents and latents of images, scaled as pipelines scale them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Images [N, 3, H, W], float32 in [0, 1] on the CPU, of final latents [N, C, H, W], as pipelines do."""
    vae = pipe.vae
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        # It overflows in half precision; the pipeline would convert its own.
        vae = copy.deepcopy(vae).float()
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    latents = latents.float() / vae.config.scaling_factor + shift
    if mean is not None and std is not None:
        latents = latents * std + mean
    decoded = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()


@torch.no_grad()
def encode_images(pipe: Any, images: Tensor) -> Tensor:
    """Latents [N, C, h, w], float32 on the CPU, of images [N, 3, H, W] in [0, 1]: the mean of the encoder."""
    vae = pipe.vae
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae = copy.deepcopy(vae).float()
    latents = vae.encode((2 * images - 1).to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = (_per_channel(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        latents = (latents - mean) / std
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((latents - shift) * vae.config.scaling_factor).cpu()


def _per_channel(vae: Any, name: str, like: Tensor) -> Tensor | None:
    values = getattr(vae.config, name, None)
    if values is None:
        return None
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(1, -1, 1, 1)
