"""The networks and the scheduler of the pipeline, fresh, and the finishing of the autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .settings import CAPTION_TOKENS, IMAGE_SIZE, LATENT_SHAPE


@contextmanager
def _initialised_from(seed: int) -> Iterator[None]:
    # Modules draw their first weights from torch's global generator; the fork gives it back untouched.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def new_autoencoder(seed: int) -> AutoencoderKL:
    """An AutoencoderKL from images [B, 3, 32, 32] in [-1, 1] to latents [B, 4, 16, 16]."""
    with _initialised_from(seed):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            latent_channels=LATENT_SHAPE[0],
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
        )


def new_unet(seed: int) -> UNet2DConditionModel:
    """The denoiser: latents [B, 4, 16, 16] and text states [B, 32, 64] to a prediction [B, 4, 16, 16]."""
    with _initialised_from(seed):
        return UNet2DConditionModel(
            sample_size=LATENT_SHAPE[1],
            in_channels=LATENT_SHAPE[0],
            out_channels=LATENT_SHAPE[0],
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 128),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=2,
        )


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModel:
    """The text encoder: token numbers [B, 32] to text states [B, 32, 64]."""
    with _initialised_from(seed):
        return CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=256,
                projection_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CAPTION_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def new_scheduler(prediction: str) -> DDIMScheduler:
    """DDIM with the noise schedule of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means [N, 4, 16, 16] of images [N, 3, 32, 32] in [-1, 1], before scaling_factor."""
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(100)])


@torch.no_grad()
def equalise_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Centre the latent channels, give them one standard deviation, and set scaling_factor to its inverse.

    The change of variables goes into the 1x1 convolutions on either side of the latent, so the autoencoder as
    a whole computes what it did before. Returns the scaled latents [N, 4, 16, 16] of the images, of mean zero
    and standard deviation one in each channel.
    """
    latents = encode(vae, images)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    common = deviation.square().mean().sqrt()
    gain = common / deviation
    channels = len(gain)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    # quant_conv puts out the mean and, behind it, the log-variance, which grows by log gain^2.
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) * gain
    into.bias[channels:] += 2 * gain.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=float(1 / common))
    return (latents - mean[:, None, None]) / deviation[:, None, None]
