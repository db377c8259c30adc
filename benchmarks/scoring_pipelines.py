"""The pipelines that are scored: the shipped "tiny", and "mid", "sd14" and "sd20" with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import configs
import torch


def tiny() -> Any:
    """The trained pipeline that the package ships."""
    from diffusers import StableDiffusionPipeline

    import sharpcore

    path = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def mid() -> Any:
    """The tiny pipeline with the "mid" network and a random text encoder of its width in it."""
    return _with(configs.mid_unet(), layers=2, heads=4, tokens=32)


def sd14(device: str = "cpu") -> Any:
    """The UNet of Stable Diffusion 1.4 on `device` and a text encoder of the size of its own, both random."""
    return _with(configs.sd14_unet(device), layers=12, heads=12, tokens=77)


def sd20(device: str = "cpu") -> Any:
    """As `sd14`, of Stable Diffusion 2.0 at 768 pixels, which predicts v."""
    pipe = _with(configs.sd21_unet(device), layers=23, heads=16, tokens=77)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def _with(unet: Any, *, layers: int, heads: int, tokens: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    pipe = tiny()
    width = unet.config.cross_attention_dim
    config = {
        **pipe.text_encoder.config.to_dict(),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": tokens,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**config)).eval()
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.model_max_length = tokens
    pipe.unet = unet.requires_grad_(False)
    return pipe


PIPELINES = {"tiny": tiny, "mid": mid, "sd14": sd14}
