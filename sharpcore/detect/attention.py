"""Reads cross-attention while a network runs: reductions of the probabilities, one head of one layer at a
time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore.errors import UnsupportedModel


@dataclass(frozen=True)
class LayerAttention:
    """What one cross-attention layer gives its tokens.

    `module` is its name in the network, `mass` [B, L] the share of the attention that each token gets, a mean
    over heads and places (rows sum to one), `end` [B, N] the share that each of N places gives to the
    prompt's end token, a mean over heads, or None where that token is not known. float64.
    """

    module: str
    mass: Tensor
    end: Tensor | None

    @property
    def entropy(self) -> Tensor:
        """-sum over tokens of mass log mass, [B], in nats."""
        return torch.special.entr(self.mass).sum(1)


@contextlib.contextmanager
def reading_attention(
    network: Any, rows: slice, end_tokens: Sequence[int] | None
) -> Iterator[list[LayerAttention]]:
    """While this is open, a pass of the network appends what its cross-attention layers do, in their order.

    `rows` are the samples of the pass to read, `end_tokens` the place of each one's end token. Queries and
    keys are formed again from a layer's inputs, so that the layer itself goes on through fused attention; no
    more than the probabilities of one head are in memory. Raises UnsupportedModel for layers whose
    probabilities are not a softmax of queries times keys.
    """
    found: list[LayerAttention] = []
    thread = threading.get_ident()  # passes of others through the same network are not looked at

    def hook(name: str) -> Any:
        def read(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            if context is None or threading.get_ident() != thread:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            mask = kwargs.get("attention_mask")
            found.append(_read(name, module, hidden, context, mask, rows, end_tokens))

        return read

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in network.named_modules()
        if all(hasattr(module, part) for part in ("to_q", "to_k", "heads", "scale"))
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _read(
    name: str,
    layer: Any,
    hidden: Tensor,
    context: Tensor,
    mask: Tensor | None,
    rows: slice,
    end_tokens: Sequence[int] | None,
) -> LayerAttention:
    for part in ("spatial_norm", "norm_q", "norm_k"):
        if getattr(layer, part, None) is not None:
            raise UnsupportedModel(f"{name}: its attention has a {part}, which readings do not know")
    hidden, context = hidden[rows], context[rows]
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if getattr(layer, "group_norm", None) is not None:
        hidden = layer.group_norm(hidden.transpose(1, 2)).transpose(1, 2)
    if getattr(layer, "norm_cross", None):
        context = layer.norm_encoder_hidden_states(context)
    heads = layer.heads
    queries, keys = (
        t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (layer.to_q(hidden), layer.to_k(context))
    )
    samples, _, places, _ = queries.shape
    bias = None if mask is None else mask[rows].reshape(samples, -1, mask.shape[-1])[:, -1:]
    mass = hidden.new_zeros(samples, context.shape[1], dtype=torch.float64)
    end = None if end_tokens is None else hidden.new_zeros(samples, places, dtype=torch.float64)
    for head in range(heads):
        scores = (queries[:, head].float() @ keys[:, head].float().mT) * layer.scale
        probabilities = (scores if bias is None else scores + bias.float()).softmax(-1)
        mass += probabilities.double().mean(1) / heads
        if end is not None:
            index = torch.tensor(end_tokens, device=hidden.device).reshape(-1, 1, 1).expand(-1, places, 1)
            end += probabilities.gather(2, index).squeeze(2).double() / heads
    return LayerAttention(name, mass.cpu(), None if end is None else end.cpu())
