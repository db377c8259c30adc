"""SharpnessScorer: scores of a diffusers pipeline's prompts, in batches, nothing computed twice."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import (
    check_guidance,
    check_latent_size,
    check_prompts,
    check_seeds,
    check_steps,
    is_number,
)
from sharpcore.backends import get_backend
from sharpcore.branches import Branch, advance, scale_model_input
from sharpcore.detect import (
    Cost,
    Detector,
    Evidence,
    State,
    check_units,
    compute_detectors,
    cost_of,
    make_detectors,
)
from sharpcore.errors import InvalidInput, NonFiniteError, OutOfMemory
from sharpcore.fingerprint import fingerprint
from sharpcore.linearization import Linearization
from sharpcore.lowering import WeightCopies, check_precision
from sharpcore.memory import available_bytes, is_out_of_memory
from sharpcore.score import UNITS, schedule
from sharpcore.shared_branch import SharedBranch
from sharpcore.states import Linearized, Predicted, SharedSide, Side
from sharpcore.table import ScoreTable
from sharpcore.trajectory import (
    initial_latents,
    pixels,
    seeded_generators,
    trajectory_scheduler,
    warn_if_cut,
)

# Samples in one linearization: enough to fill the device. More costs memory without being faster.
_SAMPLES = {"cpu": 4, "cuda": 32}
# Prompts that share the recomputed unconditional branch when memory does not hold all seeds at once.
_PROMPTS_PER_BLOCK = 16
# Bytes allowed for what a pass needs beside the residuals (activations, tangents), as a multiple of them: an
# assumption, not a measurement. An allocation that fails all the same halves the batch.
_WORKSPACE = 1.5


@dataclass(frozen=True)
class _Plan:
    """What one call asks for, checked."""

    asked: tuple[int, ...]
    count: int
    seeds: tuple[int, ...]
    detectors: tuple[Detector, ...]
    units: str
    shape: tuple[int, int, int]

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that have a row: those asked for, then those where a detector is computed whatever is
        asked for."""
        used = {step for detector in self.detectors for step in detector.steps(self.asked, self.count)}
        return (*(step for step in self.asked if step in used), *sorted(used - set(self.asked)))

    def at(self, step: int) -> list[Detector]:
        """The detectors that are computed at a step."""
        return [d for d in self.detectors if step in d.steps(self.asked, self.count)]

    @cached_property
    def products_at(self) -> tuple[int, ...]:
        """The steps at which a detector multiplies with a Jacobian."""
        return tuple(step for step in self.steps if any(d.needs_product for d in self.at(step)))

    @property
    def linearizes(self) -> bool:
        """Whether a network is linearized, in its latent or in its embedding."""
        return bool(self.products_at) or any(detector.needs_embedding for detector in self.detectors)

    @property
    def dimension(self) -> int:
        """Entries of a latent."""
        return math.prod(self.shape)


class SharpnessScorer:
    """Scores prompts of a Stable Diffusion pipeline for memorization.

    Parameters
    ----------
    pipe
        A diffusers pipeline with a UNet and a text encoder (SD 1.x, 2.x, XL). It is not changed.
    num_inference_steps
        Steps of the pipeline's own scheduler; `steps=` of a call are indices into its timesteps.
    guidance_scale
        Classifier-free guidance of the trajectory that leads to steps after the first.
    backend
        Executor of the linear program; see `sharpcore.backends`.
    precision
        Of the products with a float32 UNet: "float32" or "bfloat16"; see `sharpcore.linearize`. Predictions,
        and with them the score difference, are the network's own either way.
    memory_budget
        Bytes that residuals and workspace may take; by default half of what is free on the device.

    The linearization of the unconditional branch at the first step is kept between calls, per set of seeds:
    it is the same for every prompt. It is made anew when the UNet, a text encoder or the scheduler has
    changed. Calls from several threads wait for each other. Raises UnsupportedModel for a pipeline whose
    scores are not defined, InvalidInput for bad arguments.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        backend: str = "auto",
        precision: str = "float32",
        memory_budget: int | None = None,
    ) -> None:
        text.check_pipeline(pipe)
        guidance_scale = check_guidance(guidance_scale)
        if memory_budget is not None and not (is_number(memory_budget) and memory_budget > 0):
            raise InvalidInput(f"memory_budget: expected a positive number of bytes; got {memory_budget!r}")
        get_backend(backend, device="cpu", dtype=torch.float32)
        check_precision(precision, pipe.unet.dtype, pipe.unet.device)
        schedule(pipe.scheduler, num_inference_steps)
        self.pipe = pipe
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.backend = backend
        self.precision = precision
        self.memory_budget = memory_budget
        self._lock = threading.Lock()
        self._most_samples: int | None = None  # in one batch, once memory ran out with more
        self._state: Any = None
        self._forget()

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the pipeline's scheduler, [N]; `steps=` are indices into them."""
        return schedule(self.pipe.scheduler, self.num_inference_steps).timesteps

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: Sequence[int] = (0,),
        seeds: int | Sequence[int] = 4,
        metrics: Sequence[str | Detector] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
        on_error: str = "raise",
        latent_size: tuple[int, int] | None = None,
    ) -> ScoreTable:
        """Score every prompt at every step: one row each, with mean, standard error and values of the seeds.

        Parameters
        ----------
        prompts
            Strings, at least one.
        steps
            Indices into the scheduler's timesteps; after the first along the guided trajectory.
        seeds
            A number n (seeds 42, 43, ..., 42 + n - 1) or a list. Seed k draws its latent alone:
            `torch.randn((1, C, H, W), generator=torch.Generator("cpu").manual_seed(k))`.
        metrics
            Detectors: names such as `sharpcore.detect.detectors()` lists, with options as in
            "p_laplace:p=2", or objects. One that belongs to a step of its own (the first, or the last) is
            computed there whatever `steps` says; a row has None for what is not computed at its step.
        units
            "score" (the gradient of log p) or "eps" (the predicted noise and its Jacobian).
        squared
            Whether `hessian_score_difference` is ||H_D s_D||^2 as in the paper, or without the square as in
            its released code.
        on_error
            "raise", or "record": a prompt that cannot be scored (blank, or one for which the network is not
            finite) gives a row with its `error`, and the others are scored.
        latent_size
            Height and width of the latent; by default those that the UNet was trained with.

        Raises InvalidInput for bad arguments or prompts (with on_error="raise"), NonFiniteError when a weight
        or a score is NaN or infinite, OutOfMemory when not even one sample fits.
        """
        blocks = self.iterate(
            prompts,
            steps=steps,
            seeds=seeds,
            metrics=metrics,
            units=units,
            squared=squared,
            on_error=on_error,
            latent_size=latent_size,
        )
        return ScoreTable([row for block in blocks for row in block])

    def iterate(
        self,
        prompts: Sequence[str],
        *,
        steps: Sequence[int] = (0,),
        seeds: int | Sequence[int] = 4,
        metrics: Sequence[str | Detector] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
        on_error: str = "raise",
        latent_size: tuple[int, int] | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """As a call, but yields the rows of a few prompts at a time, in order, once they are computed."""
        plan = self._plan(steps, seeds, metrics, units, squared, latent_size)
        errors = check_prompts(prompts, on_error)
        return self._blocks(list(prompts), errors, plan, record=on_error == "record")

    def row_steps(self, steps: Sequence[int], metrics: Sequence[str | Detector]) -> tuple[int, ...]:
        """The steps that a table of these metrics has rows of. Raises as a call."""
        return self._plan(steps, 1, metrics, "score", True, None).steps

    def cost(
        self,
        metrics: Sequence[str | Detector],
        *,
        steps: Sequence[int] = (0,),
        latent_size: tuple[int, int] | None = None,
    ) -> Cost:
        """What it costs to compute these metrics together for one prompt and seed. Raises as a call."""
        plan = self._plan(steps, 1, metrics, "score", True, latent_size)
        return cost_of(plan.detectors, dimension=plan.dimension, steps=plan.asked, count=plan.count)

    def reset(self) -> None:
        """Forget linearizations and their memory."""
        with self._lock:
            self._forget()

    # -- one call --------------------------------------------------------------------------------------------

    def _plan(
        self, steps: Any, seeds: Any, metrics: Any, units: str, squared: bool, latent_size: Any
    ) -> _Plan:
        steps, seeds = check_steps(steps, len(self.timesteps)), check_seeds(seeds)
        if units not in UNITS:
            raise InvalidInput(f"units: expected one of {', '.join(UNITS)}; got {units!r}")
        channels, height, width = text.latent_shape(self.pipe)
        if latent_size is not None:
            height, width = check_latent_size(latent_size)
        made = tuple(make_detectors(metrics, squared=squared))
        check_units(made, units)
        count = len(self.timesteps)
        return _Plan(steps, count, seeds, made, units, (channels, height, width))

    def _blocks(
        self, prompts: list[str], errors: list[str | None], plan: _Plan, record: bool
    ) -> Iterator[list[dict[str, Any]]]:
        start = 0
        while start < len(prompts):
            with self._lock:
                timesteps = self.timesteps.double().tolist()
                if not all(errors[start:]):
                    self._prepare(plan)
                stop = min(len(prompts), start + self._prompts_per_block(plan))
                good = [i for i in range(start, stop) if errors[i] is None]
                for i in good:
                    warn_if_cut(self.pipe, i, prompts[i])
                found = self._score_each([prompts[i] for i in good], plan, record) if good else []
                scored = dict(zip(good, found, strict=True))
                rows = [
                    _row(prompts[i], step, timesteps[step], plan, scored.get(i, errors[i]))
                    for i in range(start, stop)
                    for step in plan.steps
                ]
            yield rows
            start = stop

    def _score_each(self, prompts: list[str], plan: _Plan, record: bool) -> list[dict[int, Tensor] | str]:
        """For each prompt its metrics [detector, seed] by step or, with `record`, why there are none."""
        try:
            values = self._score_block(prompts, plan)
        except NonFiniteError as error:
            if not record:
                raise
            if len(prompts) == 1:
                return [str(error)]
            return [part for prompt in prompts for part in self._score_each([prompt], plan, record)]
        return [{step: values[step][:, i] for step in plan.steps} for i in range(len(prompts))]

    def _score_block(self, prompts: list[str], plan: _Plan) -> dict[int, Tensor]:
        """Per step the metrics [detector, prompt, seed], float64; halves the batch while memory runs out."""
        while True:
            try:
                return self._score_all(prompts, plan)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                samples = min(len(plan.seeds), self._capacity(plan)) * self._prompts_per_batch(plan)
                if samples == 1:
                    self._forget()
                    raise OutOfMemory(self._what_would_fit(plan, error)) from error
                self._most_samples = samples // 2
            # Not in the handler: there the traceback still holds the tensors of the failed attempt.
            self._forget()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _score_all(self, prompts: list[str], plan: _Plan) -> dict[int, Tensor]:
        conditioning = text.encode_prompts(self.pipe, prompts, **pixels(self.pipe, plan.shape))
        result = {
            step: torch.empty(len(plan.detectors), len(prompts), len(plan.seeds)).double()
            for step in plan.steps
        }
        group, batch = min(len(plan.seeds), self._capacity(plan)), self._prompts_per_batch(plan)
        for first in range(0, len(plan.seeds), group):
            seeds = plan.seeds[first : first + group]
            for start in range(0, len(prompts), batch):
                rows = slice(start, min(start + batch, len(prompts)))
                part = text.select_conditioning(conditioning, rows)
                for step, values in self._score_batch(prompts[rows], part, seeds, plan).items():
                    result[step][:, rows, first : first + len(seeds)] = values
        return result

    # -- memory ----------------------------------------------------------------------------------------------

    def _prepare(self, plan: _Plan) -> None:
        """Forget what another state of the pipeline gave, and learn how much memory one sample takes."""
        scheduler = self.pipe.scheduler
        encoders = [getattr(self.pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
        networks = [network for network in (self.pipe.unet, *encoders) if network is not None]
        state = (
            plan.shape,
            (type(scheduler), repr(sorted(scheduler.config.items())), self.num_inference_steps),
            [fingerprint(network) for network in networks],
        )
        if state != self._state:
            self._forget()
            self._state = state
        self._shared.keep_only(plan.seeds)
        if not plan.linearizes or self._memory is not None:
            return
        try:
            # One sample alone, before a whole batch is tried; its prediction is kept.
            self._shared.linearizations(plan.seeds[:1], plan.shape)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._forget()
            raise OutOfMemory(self._what_would_fit(plan, error)) from error
        if 0 not in plan.products_at:
            self._shared.drop_linearizations()

    def _forget(self) -> None:
        self._memory: tuple[float, float] | None = (
            None  # the budget and what a sample's residuals take, bytes
        )
        self._copies: WeightCopies = {}
        self._shared = SharedBranch(self)
        self._conditional = self._branch()
        self._unconditional = self._branch()
        self._embedding = self._branch(of_embedding=True)

    def _branch(self, *, of_embedding: bool = False) -> Branch:
        return Branch(self.pipe.unet, self.backend, self.precision, self._copies, of_embedding=of_embedding)

    def _learn_memory(self, lin: Linearization) -> None:
        budget: float | None = self.memory_budget
        if budget is None:
            free = available_bytes(self._device)
            budget = math.inf if free is None else free / 2
        # Copies of weights are shared by all linearizations.
        self._memory = (budget - lin.weight_bytes, max(1, lin.residual_bytes) / lin.x.shape[0])

    def _capacity(self, plan: _Plan) -> int:
        """How many samples one batch may have."""
        most = self._most_samples or max(len(plan.seeds), _SAMPLES.get(self._device.type, _SAMPLES["cpu"]))
        if self._memory is None or not plan.linearizes:
            return most
        budget, sample = self._memory
        # Residuals with the prompt; without it those of the first step (of this call or of one before it) and
        # those of later steps; those of the embedding.
        kept = bool(plan.products_at) + any(step > 0 for step in plan.products_at)
        kept += 0 in plan.products_at or self._shared.linearized
        kept += any(detector.needs_embedding for detector in plan.detectors)
        return max(1, int(min(most, budget / (sample * (kept + _WORKSPACE)))))

    def _prompts_per_batch(self, plan: _Plan) -> int:
        return max(1, self._capacity(plan) // len(plan.seeds))

    def _prompts_per_block(self, plan: _Plan) -> int:
        return (
            self._prompts_per_batch(plan) if self._capacity(plan) >= len(plan.seeds) else _PROMPTS_PER_BLOCK
        )

    # -- one batch: some prompts, some seeds, all steps ------------------------------------------------------

    @torch.no_grad()
    def _score_batch(
        self, prompts: Sequence[str], conditional: text.Conditioning, seeds: tuple[int, ...], plan: _Plan
    ) -> dict[int, Tensor]:
        count = len(prompts) * len(seeds)
        scheduler = trajectory_scheduler(self.pipe, self.num_inference_steps)
        generators = seeded_generators(seeds * len(prompts))
        latents = initial_latents(self.pipe, generators, scheduler, plan.shape)
        repeated = [i for i in range(len(prompts)) for _ in seeds]
        conditional = text.select_conditioning(conditional, repeated)
        unconditional = text.repeat_conditioning(self._shared.conditioning(plan.shape), count)
        end_tokens = None
        if any(detector.needs_tokens for detector in plan.detectors):
            ends = [text.end_token(self.pipe, prompt) for prompt in prompts]
            end_tokens = [ends[i] for i in repeated]
        values: dict[int, Tensor] = {}
        last = max(plan.steps)
        for step, t in enumerate(scheduler.timesteps[: last + 1]):
            here = plan.at(step)
            state = State(
                network=self.pipe.unet,
                scheduler=scheduler,
                step=step,
                x=scale_model_input(scheduler, latents, t),
                timestep=t.to(self._device).expand(count),
                seeds=seeds * len(prompts),
                conditional=conditional,
                unconditional=unconditional,
                units=plan.units,
                end_tokens=end_tokens,
                reads_attention=any(detector.needs_attention for detector in here),
                embedding_branch=self._embedding,
                known=self._shared.known if step == 0 else None,
            )
            self._give_sides(state, seeds, plan)
            evidence = Evidence(state)
            both = step < last or any("prediction without" in d.parts(plan.dimension) for d in here)
            if both and step > 0 and step not in plan.products_at:
                evidence.predict_together()
            if here:
                found = compute_detectors(here, evidence).unflatten(1, (len(prompts), len(seeds)))
                values[step] = torch.full((len(plan.detectors), *found.shape[1:]), math.nan).double()
                values[step][[plan.detectors.index(detector) for detector in here]] = found
            if step < last:
                without, with_prompt = evidence.without.value, evidence.with_prompt.value
                guided = without + self.guidance_scale * (with_prompt - without)
                latents = advance(scheduler, guided, t, latents, generators)
        return values

    def _give_sides(self, state: State, seeds: tuple[int, ...], plan: _Plan) -> None:
        """Say how the two sides of a state are made: linearized if a detector multiplies with them, and the
        one without a prompt shared by all prompts at the first step."""
        x, timestep = state.x, state.timestep
        conditional, unconditional = state.conditional, state.unconditional
        prompts = x.shape[0] // len(seeds)

        def shared() -> Side:
            parts = self._shared.linearizations(seeds, plan.shape)
            return SharedSide(parts, prompts, self._shared.products)

        def known() -> Side:
            return Predicted(self._shared.prediction(seeds, plan.shape).repeat(prompts, 1, 1, 1))

        if state.step in plan.products_at:
            state.with_prompt = lambda: Linearized(self._conditional.at(x, timestep, conditional))
            state.without = lambda: Linearized(self._unconditional.at(x, timestep, unconditional))
            if state.step == 0:
                state.without = shared
        elif state.step == 0:
            state.without = known

    # -- small parts -----------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.pipe.unet.parameters()).device

    def _what_would_fit(self, plan: _Plan, error: BaseException) -> str:
        free = available_bytes(self._device)
        have = "" if free is None else f"; {free / 2**30:.1f} GiB are free on {self._device}"
        return (
            f"one sample with a latent of {plan.shape} does not fit into memory ({error}){have}. "
            "A smaller latent_size, a 16-bit dtype (half the memory), or metrics=['score_difference'] "
            "(a plain forward pass) would need less"
        )


def _row(
    prompt: str, step: int, timestep: float, plan: _Plan, found: dict[int, Tensor] | str | None
) -> dict[str, Any]:
    """A table row; `found` has the metrics [detector, seed] of each step, float64, or is the error."""
    row: dict[str, Any] = {"prompt": prompt, "step": step, "timestep": timestep}
    here = plan.at(step)
    for i, detector in enumerate(plan.detectors):
        per_seed = found[step][i] if isinstance(found, dict) and detector in here else None
        name = detector.name
        row[name] = None if per_seed is None else float(per_seed.mean())
        several = per_seed is not None and len(per_seed) > 1
        row[f"{name}_se"] = float(per_seed.std() / len(per_seed) ** 0.5) if several else None  # type: ignore[union-attr,arg-type]
        row[f"{name}_seeds"] = None if per_seed is None else per_seed.tolist()
    row["error"] = None if isinstance(found, dict) else found
    return row
