"""Hessians of the shipped model in the middle of sampling, a prompt each: what the eigensolvers work on."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import torch
from eigensolvers import Array, Operator, Pairs
from scoring_pipelines import tiny
from torch import Tensor

import sharpcore

STEPS, STEP, GUIDANCE, SEED = 50, 25, 7.5, 42
CHUNK = 32  # vectors of a product
TOLERANCE = 1e-6  # of every residual, in units of ||A||
# Products are rounded to float32, and so is the residual that is measured with them: by 3e-7 ||A|| there.
SLACK = 3e-7


class Hessians:
    """B samples of d = 1024 entries: prompts by turns memorized by the model and not, latents of seed 42.

    `f` is the score of all of them, `score(i)` that of one. States are those before step 25 of 50 of DDIM
    with guidance 7.5. Linearizations are made once.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        pipe = tiny()
        folder = Path(sharpcore.__file__).parent / "models" / "tiny-sd-eps"
        lists = [(folder / f"prompts_{kind}.txt").read_text().splitlines() for kind in ("mem", "nonmem")]
        prompts = [prompt for pair in zip(*lists, strict=False) for prompt in pair][:samples]
        self.x = _states(pipe, prompts)
        pipe.scheduler.set_timesteps(STEPS)
        timestep = pipe.scheduler.timesteps[STEP]
        sigma = float((1 - pipe.scheduler.alphas_cumprod[timestep]).sqrt())
        with torch.no_grad():
            context = pipe.encode_prompt(prompts, "cpu", 1, False)[0]

        def score(x: Tensor, context: Tensor) -> Tensor:
            return -pipe.unet(x, timestep, context, return_dict=False)[0] / sigma

        self._score, self._context = score, context
        self._hessians: dict[int | None, sharpcore.Hessian] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.x.shape[1:])

    @property
    def dimension(self) -> int:
        """Entries of one sample."""
        return self.x[0].numel()

    def f(self, x: Tensor) -> Tensor:
        """The score of all samples."""
        return self._score(x, self._context)

    def score(self, sample: int) -> tuple[baselines.TensorFunction, Tensor]:
        """The score of one sample, and its point."""
        context = self._context[sample : sample + 1]
        return lambda x: self._score(x, context), self.x[sample : sample + 1]

    def hessian(self, sample: int | None = None) -> sharpcore.Hessian:
        """Of one sample, or of all in lock-step."""
        if sample not in self._hessians:
            f, x = (self.f, self.x) if sample is None else self.score(sample)
            self._hessians[sample] = sharpcore.Hessian(sharpcore.linearize(f, x))
        return self._hessians[sample]

    def ours(self, sample: int) -> Operator:
        """The Hessian of a sample by sharpcore's products, for the rivals."""
        return Operator.of_scipy(self.hessian(sample).to_scipy())

    def usual(self, sample: int, symmetric: bool = True) -> Operator:
        """By torch.func.jvp and an autograd vjp; not symmetric: the Jacobian by torch.func.jvp alone."""
        f, x = self.score(sample)
        forward, backward = baselines.forward_mode(f, x), baselines.autograd_vjp(f, x)

        def products(rows: Tensor) -> Tensor:
            vectors = rows.unsqueeze(1)
            if not symmetric:
                return forward(vectors)
            return (forward(vectors) + backward(vectors)) / 2

        return Operator.of_tensors(products, self.shape)

    @cached_property
    def matrices(self) -> Array:
        """[B, d, d] float64, symmetrized: products with every unit vector."""
        hessian, d = self.hessian(), self.dimension
        unit = torch.eye(d).reshape(d, 1, *self.shape).expand(-1, self.samples, *self.shape)
        rows = [hessian @ chunk.contiguous() for chunk in unit.split(CHUNK)]
        found = torch.cat(rows).double().reshape(d, self.samples, d).transpose(0, 1)
        return ((found + found.mT) / 2).numpy()

    @cached_property
    def spectra(self) -> Array:
        """[B, d] ascending."""
        return np.linalg.eigvalsh(self.matrices)

    def norm(self, sample: int) -> float:
        """||A||."""
        return float(np.abs(self.spectra[sample]).max())

    def check(self, sample: int, pairs: Pairs, operator: Operator | None = None) -> float:
        """The largest residual in units of ||A||.

        Raises where it is more than was asked for, or the pairs are not those of the two ends. `operator`
        measures it; default: sharpcore's Hessian.
        """
        count = len(pairs.values) // 2
        expected = np.concatenate([self.spectra[sample][:count], self.spectra[sample][-count:]])
        if np.abs(pairs.values - expected).max() > 10 * TOLERANCE * self.norm(sample):
            raise RuntimeError("the pairs are not the extremal ones")
        return self.residual(sample, pairs, self.ours(sample) if operator is None else operator)

    def residual(self, sample: int, pairs: Pairs, operator: Operator) -> float:
        """As `check`, of pairs that are not compared with the spectrum."""
        residual = float(operator.residuals(pairs).max()) / self.norm(sample)
        if not residual <= TOLERANCE + SLACK:
            raise RuntimeError(f"the largest residual is {residual:.1e} ||A||")
        return residual

    def reached(self, sample: int, pairs: Pairs, operator: Operator | None = None) -> bool:
        """Whether these are the pairs that were asked for; see `check`."""
        try:
            self.check(sample, pairs, operator)
        except RuntimeError:
            return False
        return True


def _states(pipe: Any, prompts: list[str]) -> Tensor:
    found: list[Tensor] = []

    def keep(pipe: Any, step: int, _: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == STEP - 1:
            found.append(tensors["latents"].clone())
            pipe._interrupt = True  # what is left of the loop does nothing
        return tensors

    pipe(
        prompts,
        height=32,
        width=32,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator("cpu").manual_seed(SEED) for _ in prompts],
        output_type="latent",
        callback_on_step_end=keep,
    )
    return found[0]
