"""attention_entropy: how widely a prompt's tokens share the cross-attention, in one layer and on average."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sharpcore.detect.detector import Cost, Detector
from sharpcore.detect.evidence import Evidence
from sharpcore.detect.options import check_integer
from sharpcore.errors import InvalidInput

_SOURCE = (
    "Ren et al., Unveiling and Mitigating Memorization in Text-to-image Diffusion Models through Cross "
    "Attention, ECCV 2024, arXiv 2403.11052"
)


class AttentionEntropy(Detector):
    """The entropy of the attention over the tokens, in nats, a mean over all cross-attention layers.

    A layer's attention is averaged over heads and places first; the published finding is that it stays
    spread over the words of memorized prompts and gathers at the first token for others. For the average over
    a trajectory score several steps and take the mean of the rows.
    """

    name = "attention_entropy"
    source = _SOURCE
    needs_attention = True

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return {"attention": Cost(passes=1)}

    def compute(self, evidence: Evidence) -> Tensor:
        return torch.stack([layer.entropy for layer in evidence.attention]).mean(0)


class LayerAttentionEntropy(Detector):
    """The entropy of the attention over the tokens in one layer, in nats.

    Option: `layer`, its place among the network's cross-attention layers in the order they run, from 0. The
    publication chose one of Stable Diffusion's by looking; which one tells most is a matter of the model.
    """

    name = "attention_entropy_layer"
    source = _SOURCE
    needs_attention = True

    def __init__(self, *, layer: int = 0) -> None:
        self.layer = check_integer("layer", layer, 0)

    def parts(self, dimension: int) -> Mapping[str, Cost]:
        return {"attention": Cost(passes=1)}

    def compute(self, evidence: Evidence) -> Tensor:
        layers = evidence.attention
        if self.layer >= len(layers):
            raise InvalidInput(
                f"layer: expected less than {len(layers)}, the number of cross-attention layers; "
                f"got {self.layer}"
            )
        return layers[self.layer].entropy
