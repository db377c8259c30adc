"""Conditioning: what a text-to-image network needs besides the latent, made from prompts, and its batching.

Pipelines are used by capability, not by class: a `unet`, an `encode_prompt`, a `tokenizer`. This covers
Stable Diffusion 1.x, 2.x and XL; diffusers itself is never imported here. A conditioning is a dictionary of
keyword arguments of the network: tensors with one row a sample, or such dictionaries again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInput, UnsupportedModel
from .score import prediction_type_of

Conditioning = dict[str, Any]

# Tokenizers keep padding and truncation of their last call as a state: of two threads at once, with whatever
# scorers, one would encode a prompt without padding.
_TOKENIZING = threading.Lock()


def check_pipeline(pipe: Any) -> None:
    """Raise UnsupportedModel, with the reason, when the scores of this pipeline are not defined here."""
    name = type(pipe).__name__
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise UnsupportedModel(f"pipeline {name}: it has no UNet (`pipe.unet`)")
    if not callable(getattr(pipe, "encode_prompt", None)):
        raise UnsupportedModel(f"pipeline {name}: it has no `encode_prompt`, so prompts cannot be encoded")
    if not _pairs(pipe):
        raise UnsupportedModel(f"pipeline {name}: it has no text encoder with a tokenizer")
    if getattr(pipe, "scheduler", None) is None:
        raise UnsupportedModel(f"pipeline {name}: it has no scheduler")
    prediction_type_of(pipe.scheduler)
    config = unet.config
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise UnsupportedModel(
            f"pipeline {name}: a guidance-distilled model (time_cond_proj_dim={config.time_cond_proj_dim}) "
            "has no unconditional branch to compare with"
        )
    if config.in_channels != config.out_channels:
        raise UnsupportedModel(
            f"pipeline {name}: the UNet takes {config.in_channels} channels and predicts "
            f"{config.out_channels}; a score needs the same number (inpainting and image-conditioned "
            "models have none)"
        )
    if getattr(config, "addition_embed_type", None) not in (None, "text_time"):
        raise UnsupportedModel(
            f"pipeline {name}: addition_embed_type={config.addition_embed_type!r}; expected None or "
            "'text_time'"
        )
    for option in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if getattr(config, option, None) is not None:
            raise UnsupportedModel(
                f"pipeline {name}: {option}={getattr(config, option)!r} needs more than a prompt"
            )


@torch.no_grad()
def encode_prompts(
    pipe: Any, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
) -> Conditioning:
    """The network's keyword arguments for P prompts, each encoded as the pipeline does.

    Returns ``encoder_hidden_states`` [P, tokens, channels] and, for an XL pipeline, ``added_cond_kwargs``
    with ``text_embeds`` [P, channels] and ``time_ids`` [P, 6] (image of ``height`` x ``width`` pixels,
    not cropped), in the UNet's dtype and on its device. Each prompt is encoded alone, so that its
    embedding does not depend, not even in the last bit, on the others; a prompt beyond the tokenizer's
    window is cut as the pipeline cuts it (see `dropped_tokens`). Raises InvalidInput for an empty list or
    a blank prompt, UnsupportedModel as `check_pipeline` does.
    """
    check_pipeline(pipe)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidInput(f"prompts: expected a list of strings, got {type(prompts).__name__}")
    if not prompts:
        raise InvalidInput("prompts: expected at least one prompt, got an empty list")
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompts[{row}]: expected a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise InvalidInput(f"prompts[{row}]: expected words, got a blank prompt {prompt!r}")
    encoded = []
    for prompt in prompts:
        parts = _encode(pipe, prompt, guidance=False)
        encoded.append(
            _network_arguments(pipe, parts[0], parts[2] if len(parts) > 2 else None, height, width)
        )
    return concat_conditioning(encoded)


@torch.no_grad()
def encode_unconditional(pipe: Any, *, height: int | None = None, width: int | None = None) -> Conditioning:
    """The network's keyword arguments for no prompt (batch 1): the pipeline's own unconditional branch.

    An XL pipeline with ``force_zeros_for_empty_prompt`` uses zeros here, not the embedding of "". Keys and
    shapes are those of `encode_prompts` with P = 1. Raises UnsupportedModel as `check_pipeline` does.
    """
    check_pipeline(pipe)
    parts = _encode(pipe, "", guidance=True)
    return _network_arguments(pipe, parts[1], parts[3] if len(parts) > 2 else None, height, width)


def _encode(pipe: Any, prompt: str, guidance: bool) -> tuple[Any, ...]:
    device = getattr(pipe, "_execution_device", None) or pipe.device
    with _TOKENIZING:
        encoded = pipe.encode_prompt(
            prompt=prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guidance
        )
    return tuple(encoded)


def _network_arguments(
    pipe: Any, hidden: Tensor, pooled: Tensor | None, height: int | None, width: int | None
) -> Conditioning:
    place = next(pipe.unet.parameters())
    arguments: Conditioning = {"encoder_hidden_states": hidden.to(place)}
    if getattr(pipe.unet.config, "addition_embed_type", None) is None:
        return arguments
    if pooled is None:
        raise UnsupportedModel(
            f"pipeline {type(pipe).__name__}: the UNet wants a pooled text embedding, "
            "`encode_prompt` gives none"
        )
    _, rows, columns = latent_shape(pipe, height, width)
    size = (rows * pipe.vae_scale_factor, columns * pipe.vae_scale_factor)
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=place.dtype, device=place.device)
    wanted = pipe.unet.add_embedding.linear_1.in_features
    given = pipe.unet.config.addition_time_embed_dim * time_ids.shape[1] + pooled.shape[1]
    if wanted != given:
        raise UnsupportedModel(
            f"pipeline {type(pipe).__name__}: the UNet's added conditions have {wanted} entries, "
            f"those of a prompt and an image size {given} (an XL refiner wants an aesthetic score as well)"
        )
    arguments["added_cond_kwargs"] = {"text_embeds": pooled.to(place), "time_ids": time_ids}
    return arguments


def repeat_conditioning(conditioning: Conditioning, n: int) -> Conditioning:
    """Repeat a conditioning ``n`` times along the batch, as a block: rows 0..P-1, then 0..P-1 again."""
    if n < 1:
        raise InvalidInput(f"n: expected at least 1, got {n}")
    return _each_tensor(conditioning, lambda tensor: tensor.repeat(n, *[1] * (tensor.ndim - 1)))


def select_conditioning(
    conditioning: Conditioning, indices: int | slice | Sequence[int] | Tensor
) -> Conditioning:
    """The given rows of a conditioning, in the given order; an integer keeps a batch of one."""
    rows = slice(indices, indices + 1 or None) if isinstance(indices, int) else indices
    return _each_tensor(
        conditioning, lambda tensor: tensor[rows if isinstance(rows, (slice, Tensor)) else list(rows)]
    )


def concat_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings of the same keys along the batch. Raises InvalidInput when their keys differ."""
    if not parts:
        raise InvalidInput("parts: expected at least one conditioning, got none")
    first = parts[0]
    for part in parts[1:]:
        if part.keys() != first.keys():
            raise InvalidInput(f"parts: expected the keys {sorted(first)} in each, got {sorted(part)}")
    joined: Conditioning = {}
    for name, value in first.items():
        values = [part[name] for part in parts]
        if isinstance(value, dict):
            joined[name] = concat_conditioning(values)
        elif isinstance(value, Tensor):
            joined[name] = torch.cat(values)
        else:
            joined[name] = value
    return joined


def _each_tensor(conditioning: Conditioning, change: Any) -> Conditioning:
    changed: Conditioning = {}
    for name, value in conditioning.items():
        if isinstance(value, dict):
            changed[name] = _each_tensor(value, change)
        else:
            changed[name] = change(value) if isinstance(value, Tensor) else value
    return changed


def _pairs(pipe: Any) -> list[tuple[Any, Any]]:
    """The pipeline's (tokenizer, text encoder) pairs: one, or two in an XL pipeline."""
    names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
    found = [(getattr(pipe, a, None), getattr(pipe, b, None)) for a, b in names]
    return [
        (tokenizer, encoder) for tokenizer, encoder in found if tokenizer is not None and encoder is not None
    ]


def dropped_tokens(pipe: Any, prompt: str) -> int:
    """How many tokens of a prompt the pipeline cuts off: those beyond the tokenizer's window (0 if it fits).

    An XL pipeline has two tokenizers; the larger number counts.
    """
    most = 0
    for tokenizer, _ in _pairs(pipe):
        convert = getattr(pipe, "maybe_convert_prompt", None)
        text = convert(prompt, tokenizer) if convert is not None else prompt
        with _TOKENIZING:
            tokens = tokenizer(text, truncation=False, verbose=False).input_ids
        most = max(most, len(tokens) - tokenizer.model_max_length)
    return most


def end_token(pipe: Any, prompt: str) -> int:
    """The place of a prompt's end token in its embedding: behind its words, or the last where it is cut off.

    An XL pipeline's first tokenizer counts.
    """
    tokenizer, _ = _pairs(pipe)[0]
    convert = getattr(pipe, "maybe_convert_prompt", None)
    words = convert(prompt, tokenizer) if convert is not None else prompt
    with _TOKENIZING:
        tokens = tokenizer(words, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return len(tokens) - 1


def latent_shape(pipe: Any, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """The latent's (channels, height, width) for an image of ``height`` x ``width`` pixels.

    Without a size, the size that the UNet was trained for. Raises InvalidInput when a size is not a positive
    multiple of the autoencoder's scale factor.
    """
    factor = pipe.vae_scale_factor
    trained = pipe.unet.config.sample_size
    rows, columns = (trained, trained) if isinstance(trained, int) else tuple(trained)
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels < factor or pixels % factor):
            raise InvalidInput(f"{name}: expected a positive multiple of {factor} pixels, got {pixels}")
    rows = rows if height is None else height // factor
    columns = columns if width is None else width // factor
    return pipe.unet.config.in_channels, rows, columns


def cast_conditioning(conditioning: Conditioning, like: Tensor) -> Conditioning:
    """Move every tensor of a conditioning to the dtype and device of ``like``."""
    return _each_tensor(conditioning, lambda tensor: tensor.to(like))
