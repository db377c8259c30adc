"""Small pipelines, an independent formula for their scores, and a count of what a scorer runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sharpcore
from sharpcore import branches
from sharpcore.linearization import Linearization
from sharpcore.program import Program

MODEL = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
METRICS = ("score_difference", "hessian_score_difference")


def load_tiny_pipeline() -> Any:
    """The trained pipeline of the package; latents [4, 16, 16]."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**options: Any) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    ).eval()
    # To untrained cross-attention the prompt hardly matters, and float32 would leave little of the branches'
    # difference.
    for name, parameter in unet.named_parameters():
        if "attn2.to_out.0.weight" in name:
            parameter.data.mul_(30)
    return unet


def make_sd2_pipeline(tiny: Any) -> Any:
    """As Stable Diffusion 2: linear projections, v-prediction; random weights, latents [4, 8, 8]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = _unet(cross_attention_dim=64, attention_head_dim=(2, 4), use_linear_projection=True)
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler.from_config(tiny.scheduler.config, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_xl_pipeline(tiny: Any) -> Any:
    """As Stable Diffusion XL: two text encoders, added conditions; random weights, latents [4, 8, 8]."""
    tokenizer = tiny.tokenizer

    def text_config(width: int) -> Any:
        return transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            projection_dim=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        unet = _unet(
            cross_attention_dim=40,
            attention_head_dim=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        )
        encoders = (
            transformers.CLIPTextModel(text_config(16)).eval(),
            transformers.CLIPTextModelWithProjection(text_config(24)).eval(),
        )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent(seed: int, shape: tuple[int, int, int] = (4, 16, 16)) -> Tensor:
    return torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed))


def oracle_scores(
    unet: Any,
    x: Tensor,
    timestep: Any,
    conditional: dict[str, Any],
    unconditional: dict[str, Any],
    *,
    abar: float,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """||s_D|| and ||H_D s_D|| of each sample, [B], by torch.func.jvp and nothing of the package."""
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5

    def score(x: Tensor, condition: dict[str, Any]) -> Tensor:
        out = unet(x, timestep, **condition).sample
        noise = alpha * out + sigma * x if prediction_type == "v_prediction" else out
        return -noise / sigma

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        difference = score(x, conditional) - score(x, unconditional)
        products = [
            torch.func.jvp(lambda x, c=condition: score(x, c), (x,), (difference,))[1]
            for condition in (conditional, unconditional)
        ]
    return difference.flatten(1).norm(dim=1), (products[0] - products[1]).flatten(1).norm(dim=1)


class Work:
    """What was run: forward passes (real or replayed) and products, in samples; and the number of traces."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.forwards = self.products = self.traces = 0

    def patch(self, monkeypatch: Any) -> Work:
        def counting(original: Callable[..., Any], name: str, samples: Callable[..., int]) -> Any:
            @functools.wraps(original)
            def run(*args: Any, **kwargs: Any) -> Any:
                setattr(self, name, getattr(self, name) + samples(*args))
                return original(*args, **kwargs)

            return run

        for owner, method, name, samples in (
            (diffusers.UNet2DConditionModel, "forward", "forwards", lambda unet, x, *_: x.shape[0]),
            (Program, "replay", "forwards", lambda program, values, *_: values[program.x].shape[0]),
            (Linearization, "jvp", "products", lambda lin, v: v.shape[0] * v.shape[1]),
            (branches, "Linearization", "traces", lambda *_: 1),
        ):
            monkeypatch.setattr(owner, method, counting(getattr(owner, method), name, samples))
        return self


def relative_difference(rows: Any, others: Any) -> float:
    """The largest relative difference of per-seed values of two tables with the same prompts and steps."""
    worst = 0.0
    for row, other in zip(rows, others, strict=True):
        assert (row["prompt"], row["step"]) == (other["prompt"], other["step"])
        for metric in METRICS:
            a, b = (torch.tensor(r[f"{metric}_seeds"], dtype=torch.float64) for r in (row, other))
            worst = max(worst, float(((a - b) / b).abs().max()))
    return worst
