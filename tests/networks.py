"""Small score networks of diffusers, one for each option that changes what the network computes.

Every entry is built from float32 draws of a local generator and cast afterwards, so that the float32 and the
float64 network are the same function up to rounding. Parameters that start at zero or one (biases, norms,
gates, the second LoRA factor) are made random: a derivative that forgets them is then wrong by percents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn

EXACT = "exact"
EXACT_OR_UNSUPPORTED = "exact or a clear UnsupportedOperation"


@dataclass
class Case:
    """A function of one tensor, two points of its domain and the module behind it (None: no module)."""

    f: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor
    x2: torch.Tensor
    module: nn.Module | None = None


@dataclass(frozen=True)
class Network:
    """How to build one network: its configuration, the arguments of its call and what is changed after."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    call: Callable[[torch.Generator, int], dict[str, Any]] | None = None
    prepare: Callable[[nn.Module, torch.Generator], None] | None = None
    unconditional: bool = False
    batch: int = 1
    size: tuple[int, int] = (8, 8)
    channels_last: bool = False
    # Relative error allowed in float64; larger where the network itself computes a part in float32.
    tolerance: float = 1e-10
    expectation: str = EXACT
    # The first version of diffusers that runs it in float64.
    since: str = "0.36"

    def build(self, dtype: torch.dtype = torch.float64) -> Case:
        """The same weights and inputs for every dtype; skips the test where diffusers is too old."""
        if Version(metadata.version("diffusers")) < Version(self.since):
            pytest.skip(f"diffusers before {self.since} runs this network in float32 only")
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, config = self._module()
        module = module.eval()
        _randomise(module, generator)
        if self.prepare is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.prepare(module, generator)
        # diffusers' own `to` warns about every cast.
        nn.Module.to(module, dtype)
        x, x2 = (_normal(generator, self.batch, config.in_channels, *self.size).to(dtype) for _ in range(2))
        arguments: dict[str, Any] = {"timestep": torch.tensor([601, 23][: self.batch])}
        if not self.unconditional:
            arguments["encoder_hidden_states"] = _normal(generator, self.batch, 5, PROMPT_WIDTH)
        if self.call is not None:
            arguments.update(self.call(generator, self.batch))
        arguments = _cast(arguments, dtype)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
            x, x2 = (t.to(memory_format=torch.channels_last) for t in (x, x2))

        def f(sample: torch.Tensor) -> torch.Tensor:
            return module(sample, return_dict=False, **arguments)[0]

        return Case(f, x, x2, module)

    def _module(self) -> tuple[nn.Module, Any]:
        from diffusers import UNet2DConditionModel, UNet2DModel

        if self.unconditional:
            module: nn.Module = UNet2DModel(**(UNCONDITIONAL | self.config))
        else:
            module = UNet2DConditionModel(**(CONDITIONAL | self.config))
        return module, module.config


PROMPT_WIDTH = 12

CONDITIONAL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": PROMPT_WIDTH,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

UNCONDITIONAL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    return [_cast(item, dtype) for item in value] if isinstance(value, list) else value


@torch.no_grad()
def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim <= 1:
            parameter += 0.3 * noise
        elif not parameter.any():
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        if ".to_q." in name or ".to_k." in name:
            # Attention at initialization is flat, which would hide most of the softmax derivative.
            parameter *= 2


def _processor(name: str) -> Callable[[nn.Module, torch.Generator], None]:
    def prepare(unet: nn.Module, generator: torch.Generator) -> None:
        from diffusers.models import attention_processor

        unet.set_attn_processor(getattr(attention_processor, name)())

    return prepare


def _fuse_qkv(unet: nn.Module, generator: torch.Generator) -> None:
    unet.fuse_qkv_projections()


def _slice_attention(unet: nn.Module, generator: torch.Generator) -> None:
    unet.set_attention_slice(1)


def _lora(unet: nn.Module, generator: torch.Generator) -> None:
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"])
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    unet.eval()


def _hooks(unet: nn.Module, generator: torch.Generator) -> None:
    unet.down_blocks[0].resnets[0].register_forward_hook(lambda module, inputs, output: 1.7 * output)
    unet.mid_block.resnets[0].register_forward_hook(lambda module, inputs, output: output + inputs[0].tanh())
    unet.conv_out.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] * inputs[0].sigmoid(), *inputs[1:])
    )


def _drop_prompt_mask(unet: nn.Module, generator: torch.Generator) -> None:
    """DualTransformer2DModel does not take the mask (None here) that its callers in diffusers pass."""
    from diffusers.models import DualTransformer2DModel

    def drop(
        module: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        return inputs, {key: value for key, value in arguments.items() if key != "encoder_attention_mask"}

    for module in unet.modules():
        if isinstance(module, DualTransformer2DModel):
            module.register_forward_pre_hook(drop, with_kwargs=True)


def _ip_adapter(unet: nn.Module, generator: torch.Generator) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor2_0()
        else:
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            processors[name] = IPAdapterAttnProcessor2_0(width, PROMPT_WIDTH, num_tokens=(4,), scale=0.6)
    unet.set_attn_processor(processors)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(6, PROMPT_WIDTH, 4)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


def _freeu(unet: nn.Module, generator: torch.Generator) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _keep_mask(generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length)
    mask[0, 1] = 0
    mask[-1, length - 2 :] = 0
    return mask


def _sdxl_call(generator: torch.Generator, batch: int) -> dict[str, Any]:
    ids = torch.tensor([[64, 64, 0, 3, 64, 60]], dtype=torch.float32).repeat(batch, 1)
    return {"added_cond_kwargs": {"text_embeds": _normal(generator, batch, 10), "time_ids": ids}}


def _gligen_call(generator: torch.Generator, batch: int) -> dict[str, Any]:
    boxes = torch.rand(batch, 3, 4, generator=generator)
    masks = torch.tensor([[1.0, 1.0, 0.0]]).repeat(batch, 1)
    phrases = _normal(generator, batch, 3, PROMPT_WIDTH)
    gligen = {"boxes": boxes, "positive_embeddings": phrases, "masks": masks}
    return {"cross_attention_kwargs": {"gligen": gligen}}


def _gligen_text_image_call(generator: torch.Generator, batch: int) -> dict[str, Any]:
    gligen = {
        "boxes": torch.rand(batch, 3, 4, generator=generator),
        "masks": torch.tensor([[1.0, 1.0, 0.0]]).repeat(batch, 1),
        "phrases_masks": torch.tensor([[1.0, 0.0, 0.0]]).repeat(batch, 1),
        "image_masks": torch.tensor([[0.0, 1.0, 0.0]]).repeat(batch, 1),
        "phrases_embeddings": _normal(generator, batch, 3, PROMPT_WIDTH),
        "image_embeddings": _normal(generator, batch, 3, PROMPT_WIDTH),
    }
    return {"cross_attention_kwargs": {"gligen": gligen}}


def _controlnet_call(generator: torch.Generator, batch: int) -> dict[str, Any]:
    shapes = [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4)]
    return {
        "down_block_additional_residuals": [_normal(generator, batch, *shape) for shape in shapes],
        "mid_block_additional_residual": _normal(generator, batch, 16, 4, 4),
    }


def _labels(*shape: int) -> Callable[[torch.Generator, int], dict[str, Any]]:
    return lambda generator, batch: {"class_labels": _normal(generator, batch, *shape)}


def _class_numbers(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {"class_labels": torch.tensor([3, 1][:batch])}


def _image_embeds(width: int) -> Callable[[torch.Generator, int], dict[str, Any]]:
    return lambda generator, batch: {"added_cond_kwargs": {"image_embeds": _normal(generator, batch, width)}}


def _ip_call(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {"added_cond_kwargs": {"image_embeds": [_normal(generator, batch, 1, 6)]}}


def _prompt(width: int, length: int = 5) -> Callable[[torch.Generator, int], dict[str, Any]]:
    return lambda generator, batch: {"encoder_hidden_states": _normal(generator, batch, length, width)}


def _masks(*names: str, length: int = 5) -> Callable[[torch.Generator, int], dict[str, Any]]:
    return lambda generator, batch: {name: _keep_mask(generator, batch, length) for name in names}


SIMPLE_CROSS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 4,
    "resnet_time_scale_shift": "scale_shift",
}
# The K blocks normalize in groups of 32 channels and need four levels whose last two widths agree.
LATENT_UPSCALER: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": (
        "KDownBlock2D",
        "KCrossAttnDownBlock2D",
        "KCrossAttnDownBlock2D",
        "KCrossAttnDownBlock2D",
    ),
    "mid_block_type": None,
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "norm_num_groups": None,
    "only_cross_attention": False,
    "time_cond_proj_dim": 10,
    "time_embedding_type": "fourier",
    "timestep_post_act": "gelu",
    "resnet_time_scale_shift": "scale_shift",
}
SKIP: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "time_embedding_type": "fourier",
    "mid_block_scale_factor": 2**0.5,
}

_NETWORKS = [
    Network("sd1", size=(9, 7)),
    Network("sd1_batch", batch=2, size=(7, 5)),
    Network(
        "sd1_deep",
        {
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    Network("sd2", {"use_linear_projection": True, "attention_head_dim": [2, 4]}, batch=2),
    Network("sd2_odd", {"use_linear_projection": True, "attention_head_dim": [1, 4]}, size=(9, 7)),
    Network(
        "sdxl",
        {
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 34,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        _sdxl_call,
        batch=2,
    ),
    Network("scale_shift", {"resnet_time_scale_shift": "scale_shift"}, batch=2),
    Network("skip_time_act", SIMPLE_CROSS | {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4}),
    Network("class_timestep", {"class_embed_type": "timestep"}, _class_numbers, batch=2),
    Network(
        "class_projection",
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
        _labels(6),
    ),
    Network("class_identity", {"class_embed_type": "identity"}, _labels(32)),
    Network("class_numbers", {"num_class_embeds": 5}, _class_numbers, batch=2),
    Network(
        "class_concat",
        {
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 6,
            "class_embeddings_concat": True,
        },
        _labels(6),
    ),
    # Each of the two transformers takes its own part of the prompt: 77 and 257 tokens, fixed in diffusers.
    Network(
        "dual_cross_attention",
        {"dual_cross_attention": True},
        _prompt(PROMPT_WIDTH, 77 + 257),
        _drop_prompt_mask,
    ),
    Network("only_cross_attention", {"only_cross_attention": True}, size=(7, 5)),
    Network("prompt_mask", {}, _masks("encoder_attention_mask"), batch=2),
    Network("latent_mask", SIMPLE_CROSS, _masks("attention_mask"), batch=2),
    Network("upcast_attention", {"upcast_attention": True}),
    Network(
        "upcast_attention_classic",
        {"upcast_attention": True},
        prepare=_processor("AttnProcessor"),
        # Scores and softmax are float32 inside; measured 2.3e-7.
        tolerance=2e-6,
    ),
    Network("simple_cross", SIMPLE_CROSS),
    Network("simple_cross_classic", SIMPLE_CROSS, prepare=_processor("AttnAddedKVProcessor"), tolerance=2e-6),
    Network("simple_cross_mask", SIMPLE_CROSS, _masks("encoder_attention_mask"), batch=2),
    Network(
        "simple_cross_only",
        SIMPLE_CROSS | {"only_cross_attention": True, "mid_block_only_cross_attention": True},
    ),
    Network(
        "cross_attention_layer_norm",
        SIMPLE_CROSS | {"cross_attention_norm": "layer_norm", "cross_attention_dim": 16},
        _prompt(16),
    ),
    # The norm has 32 groups, fixed in diffusers.
    Network(
        "cross_attention_group_norm",
        SIMPLE_CROSS
        | {"cross_attention_norm": "group_norm", "cross_attention_dim": 64, "block_out_channels": (8, 64)},
        _prompt(64),
    ),
    Network(
        "latent_upscaler", LATENT_UPSCALER, lambda g, b: {"timestep_cond": _normal(g, b, 10)}, size=(16, 16)
    ),
    Network("no_mid_block", {"mid_block_type": None}, size=(7, 5)),
    Network("plain_mid_block", {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.3}),
    Network("gligen", {"attention_type": "gated"}, _gligen_call, batch=2),
    Network("gligen_text_image", {"attention_type": "gated-text-image"}, _gligen_text_image_call),
    Network("prompt_projection", {"encoder_hid_dim": 6, "encoder_hid_dim_type": "text_proj"}, _prompt(6)),
    Network(
        "kandinsky22",
        dict(
            encoder_hid_dim=6, encoder_hid_dim_type="image_proj", addition_embed_type="image", **SIMPLE_CROSS
        ),
        _image_embeds(6),
    ),
    Network(
        "kandinsky21",
        dict(encoder_hid_dim=6, encoder_hid_dim_type="text_image_proj", **SIMPLE_CROSS),
        lambda g, b: _prompt(6)(g, b) | _image_embeds(PROMPT_WIDTH)(g, b),
    ),
    Network("text_addition", {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}),
    Network("fourier_time", {"time_embedding_type": "fourier", "time_embedding_act_fn": "silu"}, batch=2),
    Network(
        "center_input",
        {"center_input_sample": True, "act_fn": "gelu", "dropout": 0.4, "downsample_padding": 0},
    ),
    Network("mish", {"act_fn": "mish", "conv_in_kernel": 5, "conv_out_kernel": 1}),
    Network("controlnet_residuals", {}, _controlnet_call),
    Network("classic_attention", batch=2, prepare=_processor("AttnProcessor"), size=(7, 5)),
    Network(
        "classic_attention_mask", {}, _masks("encoder_attention_mask"), _processor("AttnProcessor"), batch=2
    ),
    Network("fused_qkv", prepare=_fuse_qkv, size=(9, 7)),
    Network("sliced_attention", prepare=_slice_attention),
    Network("channels_last", channels_last=True, batch=2),
    Network("lora", prepare=_lora, batch=2),
    Network("hooks", prepare=_hooks, size=(7, 5)),
    Network("ip_adapter", {}, _ip_call, _ip_adapter, batch=2),
    Network("freeu", prepare=_freeu, tolerance=2e-6, expectation=EXACT_OR_UNSUPPORTED),
    Network("unconditional", unconditional=True, batch=2),
    Network("unconditional_one_head", {"attention_head_dim": None}, unconditional=True),
    Network(
        "unconditional_plain",
        {
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "add_attention": False,
        },
        unconditional=True,
        batch=2,
    ),
    Network(
        "unconditional_resnet_sampling",
        {"downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift"},
        unconditional=True,
    ),
    Network(
        "unconditional_resnet_blocks",
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
            "num_class_embeds": 5,
        },
        _class_numbers,
        unconditional=True,
    ),
    Network(
        "skip_blocks",
        SKIP
        | {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
        unconditional=True,
        since="0.39",
    ),
    Network("unconditional_channels_last", unconditional=True, channels_last=True, batch=2),
]


NETWORKS: dict[str, Network] = {network.name: network for network in _NETWORKS}


@functools.lru_cache(maxsize=8)
def build(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The named network, built once for consecutive tests on it; tests leave it as they found it."""
    return NETWORKS[name].build(dtype)
