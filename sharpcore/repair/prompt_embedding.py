"""prompt_embedding: an embedding of the prompt that moves the score less (Wen et al., ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharpcore.repair.descent import Descent, gradient_of, squared_norms
from sharpcore.repair.method import Repair, check_count, check_not_negative, check_positive, check_threshold
from sharpcore.repair.samples import Samples


@dataclass(frozen=True)
class PromptEmbedding(Repair):
    """AdamW on ||e_D|| over the prompt's embedding at the first step, until below a target.

    e_D is the difference of predicted noises at the drawn latent; the embedding of the first token stays
    (arXiv 2407.21720, section 5, and its released code: lr 0.05, 10 steps, targets 1 to 5 for Stable
    Diffusion 1.4, the target of 3 being common in comparisons). There the images of a prompt share one
    embedding; here each sample has its own, so that it does not depend on the others. Pooled embeddings (XL)
    stay.
    """

    name = "prompt_embedding"
    source = (
        "Wen et al., Detecting, Explaining, and Mitigating Memorization in Diffusion Models, ICLR 2024, "
        "arXiv 2407.21720"
    )
    changes = ("prompt embeddings",)
    cost = "in each round one forward and one backward pass of both branches, and one forward at the end"

    target: float | None = 3.0
    rounds: int = 10
    lr: float = 0.05
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_threshold(target=self.target)
        check_count(rounds=self.rounds)
        check_positive(lr=self.lr)
        check_not_negative(weight_decay=self.weight_decay)

    def prepare(self, samples: Samples) -> None:
        """Replace the conditional embeddings."""
        x = samples.seen(samples.noise)
        given = samples.conditional["encoder_hidden_states"]

        def evaluate(
            hidden: Tensor, rows: Sequence[int], wanted: bool
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.set_grad_enabled(wanted):
                hidden = hidden.detach().requires_grad_(wanted)
                network = hidden.to(given.dtype)
                difference = samples.difference(x[list(rows)], rows, hidden=network, units="eps")
                loss = squared_norms(difference).sqrt()
            gradient = None
            if wanted:
                # The half without the prompt is no function of the embedding, but runs backwards, too.
                gradient = gradient_of(loss, hidden, rows, samples, 2)
                gradient = torch.cat([torch.zeros_like(gradient[:, :1]), gradient[:, 1:]], 1)
            return loss.detach(), loss.detach(), gradient

        start = given.float() if given.dtype in (torch.float16, torch.bfloat16) else given
        descent = Descent(self.lr, self.rounds, self.target, self.weight_decay)
        found = descent.run(start, evaluate, samples)
        samples.conditional["encoder_hidden_states"] = found.to(given.dtype)
