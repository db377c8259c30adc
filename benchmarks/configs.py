"""The networks of the benchmarks: "mid" and "sd14" with random weights, and the shipped "tiny" pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MID: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 256,
    "attention_head_dim": 8,
}
# The defaults of UNet2DConditionModel are those of Stable Diffusion 1.x but for the width of the prompt.
SD14: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@dataclass(frozen=True)
class Pair:
    """A network at one latent with and without prompt, as classifier-free guidance evaluates it."""

    unet: nn.Module
    f: Callable[[Tensor], Tensor]
    x: Tensor
    timestep: Tensor
    prompt: Tensor

    def to(self, dtype: torch.dtype) -> Pair:
        """The same network in another dtype; this one's module is copied first."""
        import copy

        unet = copy.deepcopy(self.unet)
        nn.Module.to(unet, dtype)
        return _pair(unet, self.x.to(dtype), self.timestep, self.prompt.to(dtype))


def _pair(unet: nn.Module, x: Tensor, timestep: Tensor, prompt: Tensor) -> Pair:
    def f(sample: Tensor) -> Tensor:
        return unet(sample, timestep, prompt, return_dict=False)[0]

    return Pair(unet, f, x, timestep, prompt)


def mid(size: int = 32) -> Pair:
    """35 M parameters, 32x32 latent, batch 2, float32, PyTorch's own initialization."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = mid_unet()
    return _inputs(unet, size, MID["cross_attention_dim"])


def mid_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**MID).eval()


def sd14(size: int = 64) -> Pair:
    """The UNet of Stable Diffusion 1.4 with normal weights of variance 1/fan-in, float32, batch 2."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD14)
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
    return _inputs(unet, size, SD14["cross_attention_dim"])


def _inputs(unet: nn.Module, size: int, width: int) -> Pair:
    generator = torch.Generator().manual_seed(42)
    latent = torch.randn(1, 4, size, size, generator=generator)
    prompt = torch.randn(2, 77, width, generator=generator)
    return _pair(unet, latent.expand(2, -1, -1, -1).contiguous(), torch.tensor([981, 981]), prompt)


def tiny_pipeline() -> Any:
    """The trained pipeline that the package ships."""
    from diffusers import StableDiffusionPipeline

    import sharpcore

    path = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mid_pipeline() -> Any:
    """The tiny pipeline with the "mid" network and a random text encoder of its width in it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet = mid_unet()
        config = CLIPTextConfig(
            **{
                **pipe.text_encoder.config.to_dict(),
                "hidden_size": MID["cross_attention_dim"],
                "intermediate_size": 4 * MID["cross_attention_dim"],
                "projection_dim": MID["cross_attention_dim"],
            }
        )
        pipe.text_encoder = CLIPTextModel(config).eval()
    return pipe
