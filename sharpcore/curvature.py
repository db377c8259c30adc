"""Curvature operators of a text-to-image pipeline: at given states, or along its guided trajectory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import (
    FIRST_SEED,
    check_guidance,
    check_latent_size,
    check_prompts,
    check_seeds,
    check_steps,
    is_number,
)
from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.linearization import Linearization
from sharpcore.lowering import WeightCopies, check_precision
from sharpcore.operators import Hessian, HessianDifference, ScoreJacobian
from sharpcore.score import UNITS, ScoreFunction
from sharpcore.trajectory import (
    guided_states,
    initial_latents,
    pixels,
    scaled_noise,
    seeded_generators,
    trajectory_scheduler,
)

if TYPE_CHECKING:
    from sharpcore.posterior import PosteriorCovariance

#: Which Hessian: H(x, prompt), H(x, no prompt), or their difference.
CONDITIONS = ("prompt", "none", "difference")


@dataclass(frozen=True)
class Products:
    """How scores are linearized: their units, and the arguments of `sharpcore.linearize`."""

    units: str = "score"
    backend: str = "auto"
    precision: str = "float32"
    memory_budget: int | None = None

    def check(self, pipe: Any) -> None:
        """Raise InvalidInput unless they can be made for this pipeline."""
        if self.units not in UNITS:
            raise InvalidInput(f"units: expected one of {', '.join(UNITS)}; got {self.units!r}")
        if self.memory_budget is not None and not (is_number(self.memory_budget) and self.memory_budget > 0):
            raise InvalidInput(
                f"memory_budget: expected a positive number of bytes; got {self.memory_budget!r}"
            )
        get_backend(self.backend, device="cpu", dtype=torch.float32)
        check_precision(self.precision, pipe.unet.dtype, pipe.unet.device)


@dataclass(frozen=True)
class Curvature:
    """The score of a pipeline's network and its derivatives at B states x of one timestep.

    Everything is linearized when first asked for, each branch once, and stays valid as long as the network's
    weights do: what it refers to is freed with this object. Products of the operators take K vectors of
    all B samples, [K, *x.shape]; `sharpcore.krylov` treats the samples as independent problems.

    Attributes
    ----------
    x
        The states as the network sees them, [B, C, H, W].
    step, timestep
        Index into the scheduler's timesteps (None where the timestep was given itself), and the timestep.
    alpha, sigma
        The noise level: x = alpha x_0 + sigma e.
    prompts, seeds
        One a sample; `seeds` is None for states or latents that were given.
    units
        "score", or "eps": then score and operators are those of the predicted noise, -sigma times as large.
    """

    x: Tensor = field(repr=False)
    step: int | None
    timestep: float
    alpha: float
    sigma: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...] | None
    units: str
    _functions: tuple[ScoreFunction, ScoreFunction] = field(repr=False)
    _products: Products = field(repr=False)
    _copies: WeightCopies = field(repr=False, default_factory=dict)

    @cached_property
    def conditional(self) -> Linearization:
        """The linearized score with the prompts."""
        return self._linearize(self._functions[0])

    @cached_property
    def unconditional(self) -> Linearization:
        """The linearized score without a prompt, at the same states."""
        return self._linearize(self._functions[1])

    @property
    def score(self) -> Tensor:
        """s(x, prompt), [B, C, H, W]."""
        return self.conditional.value

    @property
    def unconditional_score(self) -> Tensor:
        """s(x, no prompt), [B, C, H, W]."""
        return self.unconditional.value

    @property
    def jacobian(self) -> ScoreJacobian:
        """The Jacobian of s(x, prompt), not symmetrized."""
        return ScoreJacobian(self.conditional)

    @property
    def hessian(self) -> Hessian:
        """H(x, prompt), the symmetric part of `jacobian`."""
        return Hessian(self.conditional)

    @property
    def unconditional_hessian(self) -> Hessian:
        """H(x, no prompt)."""
        return Hessian(self.unconditional)

    @property
    def hessian_difference(self) -> HessianDifference:
        """H(x, prompt) - H(x, no prompt)."""
        return HessianDifference(self.conditional, self.unconditional)

    @property
    def noise_curvature(self) -> float:
        """The Hessian of pure noise is this times the identity: -1 / sigma^2, or 1 / sigma in eps units.

        What `hessian`, `unconditional_hessian` and `jacobian` are near t = T but for a little: to be given as
        `shift=` to `sharpcore.krylov.trace`, `diagonal`, `trace_power` and `frobenius`.
        """
        return -1 / self.sigma**2 if self.units == "score" else 1 / self.sigma

    @property
    def posterior_covariance(self) -> PosteriorCovariance:
        """Cov[x_0 | x_t = x, prompt]. Raises InvalidInput in eps units."""
        from sharpcore.posterior import PosteriorCovariance

        self._in_score_units("posterior_covariance")
        return PosteriorCovariance(self.hessian, self.alpha, self.sigma)

    @property
    def posterior_mean(self) -> Tensor:
        """E[x_0 | x_t = x, prompt] = (x + sigma^2 s) / alpha, of x's shape. In eps units: InvalidInput."""
        self._in_score_units("posterior_mean")
        return (self.x + self.sigma**2 * self.score) / self.alpha

    def operator(self, condition: str = "prompt") -> Hessian | HessianDifference:
        """The Hessian under a condition out of `CONDITIONS`: "prompt", "none" or "difference"."""
        if condition not in CONDITIONS:
            raise InvalidInput(f"condition: expected one of {', '.join(CONDITIONS)}; got {condition!r}")
        if condition == "difference":
            return self.hessian_difference
        return self.hessian if condition == "prompt" else self.unconditional_hessian

    def _in_score_units(self, name: str) -> None:
        if self.units != "score":
            raise InvalidInput(f'{name}: expected units="score"; got {self.units!r}')

    def _linearize(self, function: ScoreFunction) -> Linearization:
        how = self._products
        return Linearization(
            function, self.x, (), how.backend, how.precision, how.memory_budget, self._copies
        )


def curvature_at(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    step: int = 0,
    timestep: float | None = None,
    x: Tensor | None = None,
    seeds: int | Sequence[int] = 1,
    latents: Tensor | None = None,
    units: str = "score",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    backend: str = "auto",
    precision: str = "float32",
    memory_budget: int | None = None,
) -> Curvature:
    """The curvature of a Stable Diffusion pipeline's score at one step.

    `curvature_at(pipe, prompts, step=25).hessian` is the Hessian of log p_t(x | prompt) at the states that
    the guided trajectories of the prompts reach at step 25: a sample for each seed of each prompt.

    Args:
        pipe: SD 1.x, 2.x or XL; it is not changed.
        prompts: one or several.
        step: index into the timesteps of the pipeline's scheduler at `num_inference_steps`.
        timestep: the timestep itself, instead of `step`; needs `x`.
        x: the states [B, C, H, W] to take instead of a trajectory's, as the network sees them (after
            `scheduler.scale_model_input`): one for each prompt, or any number for a single prompt.
        seeds: a number n (seeds 42, ..., 42 + n - 1) or a list: a trajectory begins at
            `torch.randn((1, C, H, W), generator=torch.Generator("cpu").manual_seed(seed))`.
        latents: the noise [B, C, H, W] that the trajectories begin at instead, as it is given to the
            pipeline; one for each prompt, or any number for a single prompt.
        units: "score" (the gradient of log p) or "eps" (the predicted noise and its Jacobian).
        guidance_scale: of the trajectory; the curvature is that of one branch alone.
        latent_size: height and width of the latent; by default those that the UNet was trained with.
        backend, precision, memory_budget: as in `sharpcore.linearize`.

    Raises InvalidInput for bad arguments, UnsupportedModel for a pipeline whose scores are not defined,
    NonFiniteError where the network is not finite.
    """
    if x is None:
        if timestep is not None:
            raise InvalidInput("timestep: expected the states x with it; for a trajectory give its step")
        found = curvature_along(
            pipe,
            prompts,
            steps=(step,),
            seeds=seeds,
            latents=latents,
            units=units,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latent_size=latent_size,
            backend=backend,
            precision=precision,
            memory_budget=memory_budget,
        )
        return next(found)
    if latents is not None:
        raise InvalidInput("latents: expected either x (the states) or latents (the first noise), not both")
    how = Products(units, backend, precision, memory_budget)
    walk = Trajectories(pipe, num_inference_steps, guidance_scale, how)
    scheduler = trajectory_scheduler(pipe, num_inference_steps)
    several, x = _given("x", pipe, prompts, x)
    if timestep is None:
        (index,) = check_steps([step], len(scheduler.timesteps))
        return walk.at(scheduler, index, scheduler.timesteps[index], x, several)
    return walk.at(scheduler, None, torch.as_tensor(timestep), x, several)


def curvature_along(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    steps: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 1,
    latents: Tensor | None = None,
    units: str = "score",
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    backend: str = "auto",
    precision: str = "float32",
    memory_budget: int | None = None,
) -> Iterator[Curvature]:
    """The curvature at each of `steps` (default: all) of the guided trajectories, in ascending order.

    Arguments and errors as in `curvature_at`. The trajectory is run once; a step that is passed over costs
    one forward pass of both branches, and nothing is linearized before it is asked for.
    """
    how = Products(units, backend, precision, memory_budget)
    walk = Trajectories(pipe, num_inference_steps, guidance_scale, how)
    count = len(walk.timesteps)
    wanted = check_steps(range(count) if steps is None else steps, count)
    if latents is None:
        several = [prompts] if isinstance(prompts, str) else prompts
        check_prompts(several, "raise")
        numbers = check_seeds(seeds)
        samples = [prompt for prompt in several for _ in numbers]
        return walk.from_seeds(samples, numbers * len(several), wanted, latent_shape(pipe, latent_size))
    if latent_size is not None:
        raise InvalidInput("latent_size: expected none with latents, whose size is taken")
    samples, noise = _given("latents", pipe, prompts, latents)
    return walk.from_noise(samples, noise, wanted)


def latent_shape(pipe: Any, latent_size: tuple[int, int] | None) -> tuple[int, int, int]:
    """The latent's [C, H, W], of the size that the UNet was trained with or of the given one."""
    channels, height, width = text.latent_shape(pipe)
    height, width = (height, width) if latent_size is None else check_latent_size(latent_size)
    return channels, height, width


class Trajectories:
    """Guided trajectories of a pipeline, and the curvature at their states.

    Raises as `curvature_at` does.
    """

    def __init__(self, pipe: Any, num_inference_steps: int, guidance_scale: float, how: Products) -> None:
        text.check_pipeline(pipe)
        how.check(pipe)
        self.pipe, self.num_inference_steps, self.how = pipe, num_inference_steps, how
        self.guidance_scale = check_guidance(guidance_scale)
        self.timesteps: list[float] = (
            trajectory_scheduler(pipe, num_inference_steps).timesteps.double().tolist()
        )

    def from_seeds(
        self, prompts: Sequence[str], seeds: Sequence[int], steps: Sequence[int], shape: tuple[int, int, int]
    ) -> Iterator[Curvature]:
        """The curvature along the trajectories of B prompts, each from its seed."""
        scheduler = trajectory_scheduler(self.pipe, self.num_inference_steps)
        generators = seeded_generators(seeds)
        latents = initial_latents(self.pipe, generators, scheduler, shape)
        yield from self._along(scheduler, latents, generators, prompts, tuple(seeds), steps)

    def from_noise(self, prompts: Sequence[str], noise: Tensor, steps: Sequence[int]) -> Iterator[Curvature]:
        """The curvature along the trajectories of B prompts, each from its noise of [B, C, H, W]."""
        scheduler = trajectory_scheduler(self.pipe, self.num_inference_steps)
        # A stochastic scheduler draws its own noise from these.
        generators = seeded_generators(range(FIRST_SEED, FIRST_SEED + len(prompts)))
        latents = scaled_noise(self.pipe, noise, scheduler)
        yield from self._along(scheduler, latents, generators, prompts, None, steps)

    def at(self, scheduler: Any, step: int | None, t: Tensor, x: Tensor, prompts: Sequence[str]) -> Curvature:
        """The curvature at the states x [B, C, H, W] with B prompts at the scheduler's timestep t []."""
        place = next(self.pipe.unet.parameters())
        x = x.to(place.device, place.dtype)
        both = _conditionings(self.pipe, prompts, x.shape)
        return self._curvature(scheduler, step, t, x, prompts, None, both, {})

    def _along(
        self,
        scheduler: Any,
        latents: Tensor,
        generators: list[torch.Generator],
        prompts: Sequence[str],
        seeds: tuple[int, ...] | None,
        steps: Sequence[int],
    ) -> Iterator[Curvature]:
        both, copies = _conditionings(self.pipe, prompts, latents.shape), WeightCopies()
        states = guided_states(self.pipe, latents, generators, scheduler, *both, self.guidance_scale, steps)
        for step, t, x in states:
            yield self._curvature(scheduler, step, t, x, prompts, seeds, both, copies)

    def _curvature(
        self,
        scheduler: Any,
        step: int | None,
        t: Tensor,
        x: Tensor,
        prompts: Sequence[str],
        seeds: tuple[int, ...] | None,
        conditionings: tuple[text.Conditioning, text.Conditioning],
        copies: WeightCopies,
    ) -> Curvature:
        conditional, unconditional = (
            ScoreFunction.from_scheduler(self.pipe.unet, scheduler, t, conditioning, self.how.units)
            for conditioning in conditionings
        )
        return Curvature(
            x=x,
            step=step,
            timestep=float(t),
            alpha=float(conditional.alpha),
            sigma=float(conditional.sigma),
            prompts=tuple(prompts),
            seeds=seeds,
            units=self.how.units,
            _functions=(conditional, unconditional),
            _products=self.how,
            _copies=copies,
        )


def _conditionings(
    pipe: Any, prompts: Sequence[str], shape: Sequence[int]
) -> tuple[text.Conditioning, text.Conditioning]:
    """Of B prompts, each different one encoded once, and of none."""
    channels, height, width = shape[-3:]
    size = pixels(pipe, (channels, height, width))
    different = list(dict.fromkeys(prompts))
    conditional = text.encode_prompts(pipe, different, **size)
    rows = [different.index(prompt) for prompt in prompts]
    unconditional = text.encode_unconditional(pipe, **size)
    return text.select_conditioning(conditional, rows), text.repeat_conditioning(unconditional, len(prompts))


def _given(name: str, pipe: Any, prompts: str | Sequence[str], tensor: Any) -> tuple[list[str], Tensor]:
    """One prompt for each sample of a tensor that the caller gave."""
    several = [prompts] if isinstance(prompts, str) else prompts
    check_prompts(several, "raise")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InvalidInput(f"{name}: expected a tensor of a floating dtype; got {found}")
    channels = text.latent_shape(pipe)[0]
    if tensor.dim() != 4 or tensor.shape[1] != channels or tensor.numel() == 0:
        raise InvalidInput(f"{name}: expected shape [B, {channels}, height, width]; got {list(tensor.shape)}")
    if len(several) not in (1, len(tensor)):
        raise InvalidInput(f"{name}: expected {len(several)} samples, one for each prompt; got {len(tensor)}")
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{name}: expected finite numbers; got NaN or infinity")
    return list(several) * (len(tensor) // len(several)), tensor.detach()
