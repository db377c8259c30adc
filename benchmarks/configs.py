"""The networks of the benchmarks: "mid", "sd14", "sdxl" and smaller ones, all with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharpcore.memory import available_bytes

MID: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (64, 128, 256, 256),
    "cross_attention_dim": 256,
    "attention_head_dim": 8,
}
# The structure of "mid" with tensors so small that what is left is the price of running instructions at all.
OVERHEAD: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 32, 32, 32),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
# The defaults of UNet2DConditionModel are those of Stable Diffusion 1.x but for the width of the prompt.
SD14: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
# Stable Diffusion 2.1 at 768 pixels: heads of 64 channels, linear projections.
SD21: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
# Stable Diffusion XL; the depth of its innermost transformers is set to what memory allows.
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
# Small enough for Triton's interpreter.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16, 16, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
# The memory budget of the rows that have one, in bytes. That of "sd14" keeps the peak of linearizing and of a
# product within two and a half times that of a forward pass.
BUDGETS = {"mid": 64 * 2**20, "sd14": 720 * 2**20}
SDXL_DEPTHS = (10, 8, 6, 4, 2, 1)
# What products may take beside the weights at 32x32: residuals, tangents, packed convolution weights.
SDXL_WORKSPACE = 8 * 2**30


@dataclass(frozen=True)
class Pair:
    """A network at one latent under several prompts, as classifier-free guidance evaluates it (two: a pair).

    Its weights need no gradients, so that no rival computes or keeps anything for them.
    """

    unet: nn.Module
    x: Tensor
    timestep: Tensor | None = None
    prompt: Tensor | None = None
    added: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False)

    def f(self, sample: Tensor) -> Tensor:
        """The network as a function of its latent alone."""
        if self.prompt is None:
            return self.unet(sample)
        added = {"added_cond_kwargs": self.added} if self.added else {}
        return self.unet(sample, self.timestep, self.prompt, return_dict=False, **added)[0]

    def inputs(self, dtype: torch.dtype) -> Pair:
        """The same network object with its inputs in another dtype."""
        added = {key: value.to(dtype) for key, value in self.added.items()}
        prompt = None if self.prompt is None else self.prompt.to(dtype)
        return Pair(self.unet, self.x.to(dtype), self.timestep, prompt, added)

    def to(self, dtype: torch.dtype) -> Pair:
        """The same network in another dtype, all of it; this one's module is copied first."""
        moved = self.inputs(dtype)
        # diffusers' own `to` warns about casts.
        unet = nn.Module.to(copy.deepcopy(self.unet), dtype)
        return Pair(unet, moved.x, moved.timestep, moved.prompt, moved.added)


def micro(size: int = 8) -> Pair:
    """A convolution, a normalization and attention: what the harness itself is tested with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = Micro().eval()
    return Pair(unet, torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(42)))


class Micro(nn.Module):
    """[B, 4, H, W] -> [B, 4, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.conv(x)))
        tokens = hidden.flatten(2).transpose(1, 2).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens).squeeze(1).transpose(1, 2)
        return self.head(hidden + mixed.reshape(hidden.shape))


def mid(size: int = 32, width: float = 1.0, batch: int = 2) -> Pair:
    """35 M parameters, 32x32 latent, PyTorch's own initialization; `width` multiplies the channels."""
    channels = tuple(int(width * channels) for channels in MID["block_out_channels"])
    return _inputs(_initialized({**MID, "block_out_channels": channels}), size, batch)


def overhead() -> Pair:
    """As "mid", at an 8x8 latent and 32 channels."""
    return _inputs(_initialized(OVERHEAD), OVERHEAD["sample_size"])


def mid_unet() -> nn.Module:
    """The network of "mid"."""
    return _initialized(MID)


def sd14(size: int = 64, device: str = "cpu") -> Pair:
    """The UNet of Stable Diffusion 1.4, 860 M parameters on `device`, at a guidance pair on the CPU."""
    return _inputs(sd14_unet(device), size)


def sd14_unet(device: str = "cpu") -> nn.Module:
    """The network of "sd14"."""
    return _filled(_on_meta(SD14), device)


def sd21(size: int = 96, device: str = "cpu") -> Pair:
    """The UNet of Stable Diffusion 2.1, 866 M parameters on `device`, at a guidance pair on the CPU."""
    return _inputs(sd21_unet(device), size)


def sd21_unet(device: str = "cpu") -> nn.Module:
    """The network of "sd21", which is that of Stable Diffusion 2.0 as well."""
    return _filled(_on_meta(SD21), device)


def small_sd(linear: bool = False) -> Pair:
    """The blocks of Stable Diffusion 1.x, or (linear) 2.x, with few of them and few channels."""
    return _inputs(_initialized({**SMALL, "use_linear_projection": linear}), SMALL["sample_size"])


def sdxl(size: int = 32, depth: int = 10, device: str = "cpu") -> Pair:
    """The UNet of Stable Diffusion XL (2.6 G parameters at depth 10) on `device`, at a guidance pair on the
    CPU."""
    return _with_added(_inputs(_filled(_sdxl_on_meta(depth), device), size), 1280)


def small_sdxl() -> Pair:
    """The blocks of Stable Diffusion XL with few of them and few channels."""
    layers = SDXL["down_block_types"]
    config = {**SDXL, **SMALL, "block_out_channels": SMALL["block_out_channels"][: len(layers)]}
    width = 32
    config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": width + 6 * 8}
    config |= {"down_block_types": layers, "up_block_types": SDXL["up_block_types"]}
    config |= {"transformer_layers_per_block": (1, 1, 2)}
    return _with_added(_inputs(_initialized(config), SMALL["sample_size"]), width)


def _with_added(pair: Pair, width: int) -> Pair:
    """The further inputs of Stable Diffusion XL, its pooled text embedding of this width."""
    generator = torch.Generator().manual_seed(43)
    times = torch.tensor([1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]).repeat(2, 1)
    added = {"text_embeds": torch.randn(2, width, generator=generator), "time_ids": times}
    return Pair(pair.unet, pair.x, pair.timestep, pair.prompt, added)


def sdxl_depth() -> int:
    """The depth of the innermost transformers that free memory allows, at most that of the real network."""
    free = available_bytes(torch.device("cpu"))
    for depth in SDXL_DEPTHS:
        weights = sum(4 * parameter.numel() for parameter in _sdxl_on_meta(depth).parameters())
        if free is None or weights + SDXL_WORKSPACE <= free:
            return depth
    return SDXL_DEPTHS[-1]


def _sdxl_on_meta(depth: int) -> nn.Module:
    return _on_meta({**SDXL, "transformer_layers_per_block": (1, 2, depth)})


def _initialized(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**config).eval()


def _on_meta(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@torch.no_grad()
def _filled(unet: nn.Module, device: str = "cpu") -> nn.Module:
    """Normal weights of variance 1/fan-in, written in place: the network is never in memory twice."""
    unet = unet.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return unet


def _inputs(unet: Any, size: int, batch: int = 2) -> Pair:
    generator = torch.Generator().manual_seed(42)
    latent = torch.randn(1, 4, size, size, generator=generator)
    prompt = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    x = latent.expand(batch, -1, -1, -1).contiguous()
    return Pair(unet, x, torch.full((batch,), 981), prompt)


@contextmanager
def float64_layers(unet: nn.Module) -> Iterator[None]:
    """Every layer computes in float64 while it runs, from its own weights: no second copy of the network.

    For evaluations without gradients at float64 inputs, of networks whose parameters belong to their layers.
    """
    kept: dict[nn.Module, dict[str, Tensor]] = {}

    def enter(layer: nn.Module, _: Any) -> None:
        kept[layer] = {name: parameter.data for name, parameter in layer.named_parameters(recurse=False)}
        for parameter in layer.parameters(recurse=False):
            parameter.data = parameter.data.double()

    def leave(layer: nn.Module, *_: Any) -> None:
        for name, data in kept.pop(layer).items():
            getattr(layer, name).data = data

    layers = [layer for layer in unet.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


NETWORKS: dict[str, Callable[..., Pair]] = {
    "micro": micro,
    "mid": mid,
    "overhead": overhead,
    "sd14": sd14,
    "sdxl": sdxl,
}
