"""What B samples show at one state of their trajectory: computed when a detector asks for it, and once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharpcore.branches import Branch, predict
from sharpcore.conditioning import Conditioning, concat_conditioning, select_conditioning
from sharpcore.detect.attention import LayerAttention, reading_attention
from sharpcore.detect.operators import EvidenceCurvature, EvidenceJacobian
from sharpcore.errors import InvalidInput
from sharpcore.krylov.probes import probes
from sharpcore.score import noise_level, prediction_type_of, score_factors
from sharpcore.states import Predicted, Side

# Vectors that are multiplied at once: more take memory without being faster.
_BLOCK = 8
# Of the random probes; latents have seeds of their own, which number the samples.
_SEED = 0

Spectrum = list[dict[str, Any]]
T = TypeVar("T")


@dataclass
class State:
    """Where B samples are, and how to find out more there.

    `x` [B, C, H, W] is the latent as the network sees it, `timestep` [B] and `step` say when; `seeds` number
    the samples' random probes; `conditional` and `unconditional` have B rows; `end_tokens` are the places of
    the prompts' end tokens, where the prompts are known. `with_prompt` and `without` make the two sides; None
    means a pass of the network, in which cross-attention is read if `reads_attention`.
    `known` keeps, for states that several prompts share (the first step), what depends on the seed alone.
    """

    network: Any
    scheduler: Any
    step: int | None
    x: Tensor
    timestep: Tensor
    seeds: Sequence[int]
    conditional: Conditioning
    unconditional: Conditioning
    with_prompt: Callable[[], Side] | None = None
    without: Callable[[], Side] | None = None
    units: str = "score"
    end_tokens: Sequence[int] | None = None
    reads_attention: bool = False
    embedding_branch: Branch | None = None
    known: dict[tuple[Hashable, int], Tensor] | None = None


class Evidence:
    """The two scores of B samples and what else detectors look at, all in the units that were asked for.

    "score" units (the gradient of log p), or "eps" units, where the score stands for the predicted noise and
    the Jacobian for its Jacobian. Everything is computed at most once. Tensors are in the network's dtype
    unless said otherwise; K vectors of B samples are [K, B, C, H, W].
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._readings: list[LayerAttention] | None = None
        self._found: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave when first called for this key: for what detectors share or ask for again."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    # -- the two sides ---------------------------------------------------------------------------------------

    @cached_property
    def with_prompt(self) -> Side:
        """The branch with the prompt: prediction and products of the network itself."""
        state = self.state
        if state.with_prompt is not None:
            return state.with_prompt()
        with self._reading(slice(None), state.reads_attention):
            return Predicted(self._predict(state.x, state.timestep, state.conditional))

    @cached_property
    def without(self) -> Side:
        """The branch without a prompt."""
        state = self.state
        if state.without is not None:
            return state.without()
        return Predicted(self._predict(state.x, state.timestep, state.unconditional))

    def predict_together(self) -> None:
        """Make the predictions of both branches in one pass of 2 B samples."""
        state = self.state
        both = concat_conditioning([state.unconditional, state.conditional])
        with self._reading(slice(state.x.shape[0], None), state.reads_attention):
            pair = self._predict(torch.cat([state.x] * 2), torch.cat([state.timestep] * 2), both)
        self.without, self.with_prompt = (Predicted(part) for part in pair.chunk(2))

    @contextlib.contextmanager
    def _reading(self, rows: slice, wanted: bool = True) -> Iterator[None]:
        if not wanted:
            yield
            return
        with reading_attention(self.state.network, rows, self.state.end_tokens) as found:
            yield
        self._readings = found

    @cached_property
    def level(self) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B], float64: x = alpha x_0 + sigma e."""
        return noise_level(self.state.scheduler, self.state.timestep)

    def _affine(self, level: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """score = first * prediction + second * x, each [B, 1, 1, 1]."""
        state = self.state
        return score_factors(state.x, *level, prediction_type_of(state.scheduler), state.units)

    @cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        return self._affine(self.level)

    def _score_of(self, prediction: Tensor) -> Tensor:
        factor, offset = self._factors
        return factor * prediction + offset * self.state.x

    @cached_property
    def score(self) -> Tensor:
        """s(x, prompt), [B, C, H, W]."""
        return self._score_of(self.with_prompt.value)

    @cached_property
    def unconditional_score(self) -> Tensor:
        """s(x, no prompt), [B, C, H, W]."""
        return self._score_of(self.without.value)

    @cached_property
    def difference(self) -> Tensor:
        """s_D = s(x, prompt) - s(x, no prompt), [B, C, H, W]; the term in x cancels."""
        return self._factors[0] * (self.with_prompt.value - self.without.value)

    # -- products --------------------------------------------------------------------------------------------

    @cached_property
    def hessian_difference_product(self) -> Tensor:
        """H_D s_D, [B, C, H, W], by the plain (not symmetrized) Jacobians, as in arXiv 2412.04140."""
        vectors = self.difference.unsqueeze(0)
        return self._factors[0] * (self.with_prompt.jvp(vectors) - self.without.jvp(vectors)).squeeze(0)

    def common_probes(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """K random sign vectors z, J z with the prompt, and J z without: each [K, B, C, H, W].

        A sample's vectors depend on its seed alone, so that prompts are compared by the same ones and the
        branch without a prompt multiplies them once for all prompts.
        """
        return self.once(("probes", count), lambda: self._probe(count))

    def _probe(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        x, (factor, offset) = self.state.x, self._factors
        z = probes(
            "rademacher", _SEED, samples=self.state.seeds, count=count, dimension=x[0].numel(),
            device=x.device, dtype=x.dtype,
        ).reshape(-1, *x.shape)  # fmt: skip
        with_prompt, without = (
            torch.cat(
                [
                    factor * side.jvp(part, ("probes", i, len(part))) + offset * part
                    for i, part in enumerate(z.split(_BLOCK))
                ]
            )
            for side in (self.with_prompt, self.without)
        )
        return z, with_prompt, without

    def jacobian(self, *, difference: bool = False) -> EvidenceJacobian:
        """The Jacobian of s(x, prompt), or of s_D, as an operator for `sharpcore.krylov`."""
        sides = [self.with_prompt, self.without] if difference else [self.with_prompt]
        return EvidenceJacobian(self.state.x, sides, self._factors)

    def spectrum(self, **how: Any) -> Spectrum:
        """The numbers of `sharpcore.spectrum` for H(x, prompt), a dictionary a sample; `how` are the fields
        of `sharpcore.eigenvalues.Numbers`."""
        from sharpcore.eigenvalues import Numbers, compute

        key = ("spectrum", *sorted(how.items()))
        return self.once(key, lambda: compute(EvidenceCurvature(self), Numbers(**how), lambda: None))

    def embedding_gradients(self, cotangents: Tensor) -> Tensor:
        """The Jacobian of s(x, prompt) in the prompt's embedding, transposed, times K vectors.

        [K, B, C, H, W] to [K, B, L, D]; of `encoder_hidden_states`, the pooled embeddings of an XL pipeline
        held fixed. One pass of the network, and K products.
        """
        state = self.state
        if state.embedding_branch is None:
            raise InvalidInput("these samples have no prompt embedding to differentiate in")
        lin = state.embedding_branch.at(state.x, state.timestep, state.conditional)
        factor = self._factors[0]
        return torch.cat([lin.vjp((factor * part).contiguous()) for part in cotangents.split(_BLOCK)])

    # -- further passes --------------------------------------------------------------------------------------

    @torch.no_grad()
    def _predict(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.state.network, x, timestep, conditioning)

    def scores_at(self, timestep: float) -> tuple[Tensor, Tensor]:
        """s(x, prompt) and s(x, no prompt) at these x for another timestep and its noise level."""
        return self.once(("at", timestep), lambda: self._scores_at(timestep))

    def _scores_at(self, timestep: float) -> tuple[Tensor, Tensor]:
        state = self.state
        times = torch.full_like(state.timestep, timestep)
        factor, offset = self._affine(noise_level(state.scheduler, times))
        conditional = self._predict(state.x, times, state.conditional)
        unconditional = self._of_seeds(
            ("at", timestep),
            lambda rows: self._predict(
                state.x[rows], times[rows], select_conditioning(state.unconditional, rows)
            ).unsqueeze(0),
        ).squeeze(0)
        return factor * conditional + offset * state.x, factor * unconditional + offset * state.x

    def unconditional_scores(self, shifts: Tensor, key: Hashable) -> Tensor:
        """s(x + shift, no prompt) at K shifts of each sample, [K, B, C, H, W]: K passes of the network.

        Shifts that depend on the seed alone have a `key` of their own, under which they are kept.
        """
        state, (factor, offset) = self.state, self._factors

        def scores(rows: list[int]) -> Tensor:
            conditioning = select_conditioning(state.unconditional, rows)
            found = []
            for shift in shifts[:, rows]:
                x = state.x[rows] + shift
                prediction = self._predict(x, state.timestep[rows], conditioning)
                found.append(factor[rows] * prediction + offset[rows] * x)
            return torch.stack(found)

        return self._of_seeds(key, scores)

    def _of_seeds(self, key: Hashable, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """What `compute` gives for rows, [K, rows, ...], of the branch without a prompt; where prompts share
        states, for one row of each seed that is not known yet."""
        seeds, known = self.state.seeds, self.state.known
        if known is None:
            return compute(list(range(len(seeds))))
        key = (key, self.state.units)
        missing = [seed for seed in dict.fromkeys(seeds) if (key, seed) not in known]
        if missing:
            rows = [list(seeds).index(seed) for seed in missing]
            known.update(zip([(key, seed) for seed in missing], compute(rows).unbind(1), strict=True))
        return torch.stack([known[key, seed] for seed in seeds], 1)

    @cached_property
    def attention(self) -> list[LayerAttention]:
        """What the cross-attention layers do with the prompt, in their order: read in the pass of the
        prediction, or in one of its own where that was no pass of the network."""
        state = self.state
        if self._readings is None and state.with_prompt is None:
            _ = self.with_prompt
        if self._readings is None:
            with self._reading(slice(None)):
                self._predict(state.x, state.timestep, state.conditional)
        if not self._readings:
            raise InvalidInput("attention: this network has no cross-attention to read")
        return self._readings
