"""token_masking: padding that does not repeat the prompt's end token (Kim and No, CVPR 2026 Findings)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.errors import InvalidInput, UnsupportedModel
from sharpcore.repair.method import Repair, check_positive
from sharpcore.repair.samples import Samples

VARIANTS = ("partial", "replace")


@dataclass(frozen=True)
class TokenMasking(Repair):
    """Zeroes embeddings of the padding behind the prompt, or pads with another token and zeroes the end's.

    arXiv 2605.02908, section 4: CLIP's end token is also the padding of Stable Diffusion 1.x, so that what it
    says is repeated in every empty place.

    Parameters
    ----------
    variant
        "partial": the first `share` of the padding embeddings, those next to the end token, become zero; 0.7
        in the paper, which found that all of it breaks images. "replace": the prompt is encoded anew with
        `pad` ("!" in the paper) as padding, and the end token's embedding becomes zero; for pipelines with
        one text encoder.
    """

    name = "token_masking"
    source = (
        "Kim and No, Memorization In Stable Diffusion Is Unexpectedly Driven by CLIP Embeddings, CVPR 2026 "
        "Findings, arXiv 2605.02908"
    )
    changes = ("prompt embeddings",)
    cost = "none; the variant replace encodes the prompts once more"

    variant: str = "partial"
    share: float = 0.7
    pad: str = "!"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InvalidInput(f"variant: expected one of {', '.join(VARIANTS)}; got {self.variant!r}")
        check_positive(share=self.share)
        if self.share > 1:
            raise InvalidInput(f"share: expected at most 1; got {self.share!r}")
        if not isinstance(self.pad, str) or not self.pad:
            raise InvalidInput(f"pad: expected a token; got {self.pad!r}")

    @torch.no_grad()
    def prepare(self, samples: Samples) -> None:
        """Replace the conditional embeddings."""
        lengths = [text.end_token(samples.pipe, prompt) + 1 for prompt in samples.prompts]
        hidden = samples.conditional["encoder_hidden_states"].clone()
        if self.variant == "replace":
            for row, (prompt, length) in enumerate(zip(samples.prompts, lengths, strict=True)):
                hidden[row] = self._encode(samples.pipe, prompt, length).to(hidden)
                hidden[row, length - 1] = 0
        else:
            for row, length in enumerate(lengths):
                masked = int((hidden.shape[1] - length) * self.share)
                hidden[row, length : length + masked] = 0
        samples.conditional["encoder_hidden_states"] = hidden

    def _encode(self, pipe: Any, prompt: str, length: int) -> Tensor:
        """The embedding [tokens, channels] of a prompt with other padding."""
        pairs = text._pairs(pipe)
        if len(pairs) != 1:
            raise UnsupportedModel(
                f"pipeline {type(pipe).__name__}: the variant 'replace' of token_masking needs one text "
                f"encoder, it has {len(pairs)}"
            )
        tokenizer, encoder = pairs[0]
        pad = tokenizer.convert_tokens_to_ids(self.pad)
        if pad is None or (pad == tokenizer.unk_token_id and self.pad != tokenizer.unk_token):
            raise InvalidInput(f"pad: expected a token of the tokenizer; got {self.pad!r}")
        convert = getattr(pipe, "maybe_convert_prompt", None)
        words = convert(prompt, tokenizer) if convert is not None else prompt
        with text._TOKENIZING:
            ids = tokenizer(
                words,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        ids[:, length:] = pad
        return encoder(ids.to(encoder.device))[0][0]
