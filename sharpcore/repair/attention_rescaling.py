"""attention_rescaling: cross-attention to the beginning token, not the padding (Ren et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.errors import UnsupportedModel
from sharpcore.repair.method import Repair, check_positive
from sharpcore.repair.samples import Samples

# The run of the thread that generates: its hooks leave the passes of others through the same network alone.
_run: ContextVar[object] = ContextVar("run", default=None)


@dataclass(frozen=True)
class AttentionRescaling(Repair):
    """Masks the tokens behind the prompt in every cross-attention, and multiplies the first token's logits.

    arXiv 2403.11052, section on inference-time mitigation, as its released code (github.com/renjie3/MemAttn)
    does it: tokens behind the prompt's end token are masked ("summary tokens"), in both branches, and the
    logits of the beginning token are multiplied by `factor`, at every step. A logit is linear in its key, so
    the beginning token's key is what is multiplied: this works with every attention processor that calls
    `to_k`.

    Parameters
    ----------
    factor
        1.25 in the released command; 1.1 to 1.5 in comparisons.
    mask_end
        Whether the end token itself is masked as well; the released command does not.
    """

    name = "attention_rescaling"
    source = (
        "Ren et al., Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross "
        "Attention, ECCV 2024, arXiv 2403.11052"
    )
    changes = ("cross-attention",)
    cost = "none"

    factor: float = 1.25
    mask_end: bool = False

    def __post_init__(self) -> None:
        check_positive(factor=self.factor)

    def prepare(self, samples: Samples) -> None:
        """Add a mask of the tokens to both conditionings."""
        hidden = samples.conditional["encoder_hidden_states"]
        mask = torch.ones(hidden.shape[:2], dtype=hidden.dtype, device=hidden.device)
        for row, prompt in enumerate(samples.prompts):
            length = text.end_token(samples.pipe, prompt) + 1
            mask[row, max(1, length - self.mask_end) :] = 0
        for conditioning in (samples.conditional, samples.unconditional):
            conditioning["encoder_attention_mask"] = mask

    @contextmanager
    def running(self, samples: Samples) -> Iterator[None]:
        """Multiply the beginning token's keys while the samples are generated."""
        keys = [_keys_of(name, module) for name, module in _cross_attentions(samples.pipe.unet)]
        handles = []
        run = object()
        token = _run.set(run)

        def rescale(projection: torch.nn.Module, inputs: Any, keys: Tensor) -> Tensor:
            if _run.get() is not run:
                return keys
            return torch.cat([self.factor * keys[:, :1], keys[:, 1:]], 1)

        try:
            for projection in keys:
                handles.append(projection.register_forward_hook(rescale))
            yield
        finally:
            for handle in handles:
                handle.remove()
            _run.reset(token)


def _cross_attentions(unet: torch.nn.Module) -> list[tuple[str, Any]]:
    found = [
        (name, module)
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    ]
    if not found:
        raise UnsupportedModel(f"{type(unet).__name__}: it has no cross-attention to rescale")
    return found


def _keys_of(name: str, attention: Any) -> torch.nn.Module:
    """The projection to keys. Raises UnsupportedModel where its output is not the keys of the logits."""
    if getattr(attention, "fused_projections", False) or getattr(attention, "to_k", None) is None:
        raise UnsupportedModel(f"{name}: its keys are made together with the values; unfuse the projections")
    if getattr(attention, "norm_k", None) is not None:
        raise UnsupportedModel(f"{name}: its keys are normalized, so that multiplying them changes nothing")
    return attention.to_k
