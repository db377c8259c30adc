"""SharpnessScorer: scores of the prompts of a diffusers pipeline, batched over prompts and seeds, nothing computed twice."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.branches import Branch, predict, prediction_factor
from sharpcore.detect import Evidence, Metric, make_metrics
from sharpcore.errors import InvalidInput, OutOfMemory
from sharpcore.fingerprint import fingerprint
from sharpcore.linearization import Linearization
from sharpcore.memory import available_bytes, is_out_of_memory
from sharpcore.score import UNITS, noise_level, prediction_type_of, schedule
from sharpcore.table import ScoreTable

_FIRST_SEED = 42
# Samples in one linearization: enough to fill the device. More costs memory without being faster.
_SAMPLES = {"cpu": 4, "cuda": 32}
# Prompts that share the recomputed unconditional branch when memory does not hold all seeds at once.
_PROMPTS_PER_BLOCK = 16
# Bytes that a pass needs beside the residuals (activations, tangents), as a multiple of them; measured on SD 1.4 and the tiny model.
_WORKSPACE = 1.5


@dataclass(frozen=True)
class _Plan:
    """What one call asks for, checked."""

    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    units: str
    shape: tuple[int, int, int]


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
    memory_budget
        Bytes that residuals and workspace may take; by default half of what is free on the device.

    The linearization of the unconditional branch at the first step is kept between calls, per set of seeds: it is the same for
    every prompt. It is made anew when the UNet has changed. Calls from several threads wait for each other.
    Raises UnsupportedModel for a pipeline whose scores are not defined.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        backend: str = "auto",
        memory_budget: int | None = None,
    ) -> None:
        text.check_pipeline(pipe)
        if not isinstance(guidance_scale, (int, float)) or not guidance_scale >= 0:
            raise InvalidInput(f"guidance_scale: expected a number of at least 0; got {guidance_scale!r}")
        if memory_budget is not None and (isinstance(memory_budget, bool) or not memory_budget > 0):
            raise InvalidInput(f"memory_budget: expected a positive number of bytes; got {memory_budget!r}")
        self.pipe = pipe
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = float(guidance_scale)
        self.backend = backend
        self.memory_budget = memory_budget
        self.timesteps: Tensor = schedule(pipe.scheduler, num_inference_steps).timesteps
        self._lock = threading.Lock()
        self._capacity: int | None = None  # samples that fit into memory together; None: not known yet
        self._shared = _SharedBranch(self)
        self._conditional = Branch(pipe.unet, backend)
        self._pair = Branch(pipe.unet, backend)
        self._fingerprint: Any = None

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        steps: Sequence[int] = (0,),
        seeds: int | Sequence[int] = 4,
        metrics: Sequence[str] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
        on_error: str = "raise",
        latent_size: tuple[int, int] | None = None,
    ) -> ScoreTable:
        """Score every prompt at every step: one row each, with mean, standard error and values over the seeds.

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
            Names out of `sharpcore.detect.METRICS`.
        units
            "score" (the gradient of log p) or "eps" (the predicted noise and its Jacobian).
        squared
            Whether `hessian_score_difference` is ||H_D s_D||^2 as in the paper, or without the square as in its released code.
        on_error
            "raise", or "record": a prompt that cannot be scored gives a row with its `error`, and the others are scored.
        latent_size
            Height and width of the latent; by default those that the UNet was trained with.

        Raises InvalidInput for bad arguments or prompts (with on_error="raise"), NonFiniteError when the network gives NaN or
        infinity, OutOfMemory when not even one sample fits.
        """
        options = dict(steps=steps, seeds=seeds, metrics=metrics, units=units, squared=squared)
        blocks = self.iterate(prompts, on_error=on_error, latent_size=latent_size, **options)  # type: ignore[arg-type]
        return ScoreTable([row for block in blocks for row in block])

    def iterate(
        self,
        prompts: Sequence[str],
        *,
        steps: Sequence[int] = (0,),
        seeds: int | Sequence[int] = 4,
        metrics: Sequence[str] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
        on_error: str = "raise",
        latent_size: tuple[int, int] | None = None,
    ) -> Iterator[list[dict[str, Any]]]:
        """As a call, but yields the rows of a few prompts at a time, in order, as soon as they are computed."""
        plan = self._plan(steps, seeds, metrics, units, squared, latent_size)
        if on_error not in ("raise", "record"):
            raise InvalidInput(f"on_error: expected 'raise' or 'record'; got {on_error!r}")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InvalidInput(f"prompts: expected a list of strings; got {type(prompts).__name__}")
        if not prompts:
            raise InvalidInput("prompts: expected at least one prompt; got an empty list")
        errors = [_prompt_error(i, prompt) for i, prompt in enumerate(prompts)]
        if on_error == "raise":
            for error in errors:
                if error is not None:
                    raise InvalidInput(error)
        return self._blocks(list(prompts), errors, plan)

    def reset(self) -> None:
        """Forget linearizations and their memory."""
        with self._lock:
            self._forget()

    # -- one call -------------------------------------------------------------------------------------------------------------

    def _plan(
        self, steps: Any, seeds: Any, metrics: Any, units: str, squared: bool, latent_size: Any
    ) -> _Plan:
        steps = [steps] if isinstance(steps, int) else list(steps)
        count = len(self.timesteps)
        if not steps or len(set(steps)) != len(steps):
            raise InvalidInput(f"steps: expected different indices from 0 to {count - 1}; got {steps}")
        for step in steps:
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < count:
                raise InvalidInput(f"steps: expected indices from 0 to {count - 1}; got {step!r}")
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            if seeds < 1:
                raise InvalidInput(f"seeds: expected at least 1; got {seeds}")
            seeds = range(_FIRST_SEED, _FIRST_SEED + seeds)
        seeds = list(seeds) if isinstance(seeds, Sequence) and not isinstance(seeds, str) else [seeds]
        if not seeds or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in seeds):
            raise InvalidInput(f"seeds: expected a number or a list of non-negative integers; got {seeds}")
        if len(set(seeds)) != len(seeds):
            raise InvalidInput(f"seeds: expected different seeds; got {seeds}")
        if units not in UNITS:
            raise InvalidInput(f"units: expected one of {', '.join(UNITS)}; got {units!r}")
        channels, height, width = text.latent_shape(self.pipe)
        if latent_size is not None:
            try:
                height, width = (int(n) for n in latent_size)
            except (TypeError, ValueError):
                raise InvalidInput(f"latent_size: expected (height, width); got {latent_size!r}") from None
            if min(height, width) < 1:
                raise InvalidInput(f"latent_size: expected positive sizes; got {latent_size!r}")
        made = tuple(make_metrics(metrics, squared=squared))
        return _Plan(tuple(steps), tuple(seeds), made, units, (channels, height, width))

    def _blocks(
        self, prompts: list[str], errors: list[str | None], plan: _Plan
    ) -> Iterator[list[dict[str, Any]]]:
        start = 0
        while start < len(prompts):
            with self._lock:
                self._check_network()
                stop = min(len(prompts), start + self._prompts_per_block(plan))
                good = [i for i in range(start, stop) if errors[i] is None]
                rows: dict[int, list[dict[str, Any]]] = {
                    i: [_row(prompts[i], step, float(self.timesteps[step]), plan, None, errors[i]) for step in plan.steps]
                    for i in range(start, stop)
                    if errors[i] is not None
                }
                for i in good:
                    self._warn_if_cut(i, prompts[i])
                if good:
                    values = self._score_block([prompts[i] for i in good], plan)
                    for place, i in enumerate(good):
                        rows[i] = [
                            _row(prompts[i], step, float(self.timesteps[step]), plan, values[step][:, place], None)
                            for step in plan.steps
                        ]
            yield [row for i in range(start, stop) for row in rows[i]]
            start = stop

    def _prompts_per_block(self, plan: _Plan) -> int:
        if self._capacity is not None and self._capacity < len(plan.seeds):
            return _PROMPTS_PER_BLOCK
        return self._prompts_per_batch(len(plan.seeds))

    def _prompts_per_batch(self, seeds: int) -> int:
        samples = _SAMPLES.get(self._device.type, _SAMPLES["cpu"])
        if self._capacity is not None:
            samples = min(samples, self._capacity)
        return max(1, samples // seeds)

    def _score_block(self, prompts: list[str], plan: _Plan) -> dict[int, Tensor]:
        """Per step the metrics [metric, prompt, seed], float64; halves the batch while memory runs out."""
        while True:
            try:
                return self._score_all(prompts, plan)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                samples = self._capacity or max(len(plan.seeds), self._prompts_per_batch(len(plan.seeds)))
                self._forget()
                if samples == 1:
                    raise OutOfMemory(self._what_would_fit(plan, error)) from error
                self._capacity = samples // 2
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def _score_all(self, prompts: list[str], plan: _Plan) -> dict[int, Tensor]:
        conditioning = text.encode_prompts(self.pipe, prompts, **self._pixels(plan))
        result = {step: torch.empty(len(plan.metrics), len(prompts), len(plan.seeds)).double() for step in plan.steps}
        self._shared.prepare(plan)
        group = len(plan.seeds) if self._capacity is None else min(len(plan.seeds), self._capacity)
        for first in range(0, len(plan.seeds), group):
            seeds = plan.seeds[first : first + group]
            batch = self._prompts_per_batch(len(seeds))
            for start in range(0, len(prompts), batch):
                rows = slice(start, min(start + batch, len(prompts)))
                part = text.select_conditioning(conditioning, rows)
                for step, values in self._score_batch(part, seeds, plan).items():
                    result[step][:, rows, first : first + group] = values
        return result

    # -- one batch: some prompts, some seeds, all steps ---------------------------------------------------------------------------

    @torch.no_grad()
    def _score_batch(
        self, conditional: text.Conditioning, seeds: tuple[int, ...], plan: _Plan
    ) -> dict[int, Tensor]:
        prompts = next(iter(conditional.values())).shape[0]
        count = prompts * len(seeds)
        scheduler = self._trajectory_scheduler()
        # One generator a sample, as if each were generated alone; stochastic schedulers go on drawing from it.
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in range(prompts) for seed in seeds]
        latents = self._initial_latents(generators, scheduler, plan)
        repeated = [i for i in range(prompts) for _ in seeds]
        conditional = text.select_conditioning(conditional, repeated)
        unconditional = text.repeat_conditioning(self._shared.conditioning(plan), count)
        values: dict[int, Tensor] = {}
        last = max(plan.steps)
        for step, t in enumerate(self.timesteps[: last + 1]):
            x = scale_model_input(scheduler, latents, t)
            timestep = t.to(self._device).expand(count)
            if step == 0:
                without, with_prompt, evidence = self._first_step(x, timestep, conditional, seeds, plan)
            else:
                without, with_prompt, evidence = self._later_step(step, x, timestep, conditional, unconditional, plan)
            if evidence is not None:
                computed = [metric.compute(evidence) for metric in plan.metrics]
                values[step] = torch.stack(computed).reshape(len(computed), prompts, len(seeds)).cpu()
            del evidence
            if step < last:
                guided = without + self.guidance_scale * (with_prompt - without)
                latents = advance(scheduler, guided, t, latents, generators)
        return values

    def _first_step(
        self, x: Tensor, timestep: Tensor, conditional: text.Conditioning, seeds: tuple[int, ...], plan: _Plan
    ) -> tuple[Tensor, Tensor, Evidence | None]:
        prompts = x.shape[0] // len(seeds)
        if 0 not in plan.steps:
            without = self._shared.prediction(seeds, plan)
            return (
                without.repeat(prompts, 1, 1, 1),
                predict(self.pipe.unet, x, timestep, conditional),
                None,
            )
        if not any(metric.needs_product for metric in plan.metrics):
            without = self._shared.prediction(seeds, plan).repeat(prompts, 1, 1, 1)
            with_prompt = predict(self.pipe.unet, x, timestep, conditional)
            return without, with_prompt, self._evidence(with_prompt - without, _no_product, timestep, plan)
        parts = self._shared.linearizations(seeds, plan)
        without = torch.cat([lin.value for lin in parts]).repeat(prompts, 1, 1, 1)
        lin = self._conditional.at(x, timestep, conditional)

        def product(vectors: Tensor) -> Tensor:
            pushed = lin.jvp(vectors.unsqueeze(0)).squeeze(0)
            # Every prompt is a tangent of the same unconditional linearization.
            by_seed = vectors.unflatten(0, (prompts, len(seeds)))
            sizes = [part.x.shape[0] for part in parts]
            pieces = [part.jvp(piece) for part, piece in zip(parts, by_seed.split(sizes, 1), strict=True)]
            return pushed - torch.cat(pieces, 1).flatten(0, 1)

        return without, lin.value, self._evidence(lin.value - without, product, timestep, plan)

    def _later_step(
        self,
        step: int,
        x: Tensor,
        timestep: Tensor,
        conditional: text.Conditioning,
        unconditional: text.Conditioning,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Evidence | None]:
        both = text.concat_conditioning([unconditional, conditional])
        pair, times = torch.cat([x, x]), torch.cat([timestep, timestep])
        if step not in plan.steps or not any(metric.needs_product for metric in plan.metrics):
            without, with_prompt = predict(self.pipe.unet, pair, times, both).chunk(2)
            evidence = self._evidence(with_prompt - without, _no_product, timestep, plan) if step in plan.steps else None
            return without, with_prompt, evidence
        lin = self._pair.at(pair, times, both)
        without, with_prompt = lin.value.chunk(2)
        return without, with_prompt, self._evidence(with_prompt - without, pair_product(lin), timestep, plan)

    def _evidence(self, difference: Tensor, product: Any, timestep: Tensor, plan: _Plan) -> Evidence:
        return make_evidence(
            difference, product, timestep, schedule(self.pipe.scheduler, self.num_inference_steps), plan.units
        )

    # -- small parts --------------------------------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.pipe.unet.parameters()).device

    def _initial_latents(self, generators: list[torch.Generator], scheduler: Any, plan: _Plan) -> Tensor:
        latents = torch.cat([torch.randn((1, *plan.shape), generator=generator) for generator in generators])
        latents = latents.to(self._device, next(self.pipe.unet.parameters()).dtype)
        return latents * getattr(scheduler, "init_noise_sigma", 1.0)

    def _trajectory_scheduler(self) -> Any:
        """A scheduler of its own (multistep ones keep a history), in the network's precision where that is float64."""
        scheduler = schedule(self.pipe.scheduler, self.num_inference_steps)
        if next(self.pipe.unet.parameters()).dtype is torch.float64:
            # Schedulers hold float32 tables; their square roots would limit a float64 trajectory to single precision.
            for name, table in vars(scheduler).items():
                if isinstance(table, Tensor) and table.dtype is torch.float32 and name != "timesteps":
                    setattr(scheduler, name, table.double())
        return scheduler

    def _pixels(self, plan: _Plan) -> dict[str, int]:
        factor = self.pipe.vae_scale_factor
        return {"height": plan.shape[1] * factor, "width": plan.shape[2] * factor}

    def _check_network(self) -> None:
        """Forget what was computed with another state of the network."""
        now = fingerprint(self.pipe.unet)
        if now != self._fingerprint:
            self._forget()
            self._fingerprint = now

    def _forget(self) -> None:
        self._shared = _SharedBranch(self)
        self._conditional = Branch(self.pipe.unet, self.backend)
        self._pair = Branch(self.pipe.unet, self.backend)

    def _learn_capacity(self, lin: Linearization) -> None:
        """How many samples fit into the budget, from the residuals of the first linearization (of one sample)."""
        budget = self.memory_budget
        if budget is None:
            free = available_bytes(self._device)
            if free is None:
                return
            budget = free // 2
        weights = {p.untyped_storage()._cdata for p in self.pipe.unet.parameters()}
        sample = max(1, lin.residual_bytes(besides=weights)) / lin.x.shape[0]
        # The unconditional residuals stay beside those of the conditional batch.
        fitting = max(1, int(budget / (sample * (2 + _WORKSPACE))))
        self._capacity = fitting if self._capacity is None else min(self._capacity, fitting)

    def _warn_if_cut(self, index: int, prompt: str) -> None:
        dropped = text.dropped_tokens(self.pipe, prompt)
        if dropped:
            warnings.warn(
                f"prompts[{index}] is longer than the tokenizer's window: its last {dropped} tokens are ignored, "
                "as the pipeline itself does",
                UserWarning,
                stacklevel=2,
            )

    def _what_would_fit(self, plan: _Plan, error: BaseException) -> str:
        free = available_bytes(self._device)
        have = "" if free is None else f"; {free / 2**30:.1f} GiB are free on {self._device}"
        return (
            f"one sample with a latent of {plan.shape} does not fit into memory ({error}){have}. "
            "A smaller latent_size, a 16-bit dtype (half the memory), or metrics=['score_difference'] "
            "(a plain forward pass) would need less"
        )


class _SharedBranch:
    """The unconditional branch at the first step: the same for every prompt, computed once for each seed."""

    def __init__(self, scorer: SharpnessScorer) -> None:
        self._scorer = scorer
        self._key: Any = None
        self._conditioning: text.Conditioning | None = None
        self._parts: list[tuple[tuple[int, ...], Linearization]] = []
        self._predictions: dict[int, Tensor] = {}

    def prepare(self, plan: _Plan) -> None:
        """Keep what belongs to this latent shape, drop what does not."""
        if self._key != plan.shape:
            self._key = plan.shape
            self._conditioning = None
            self._parts, self._predictions = [], {}

    def conditioning(self, plan: _Plan) -> text.Conditioning:
        if self._conditioning is None:
            self._conditioning = text.encode_unconditional(self._scorer.pipe, **self._scorer._pixels(plan))
        return self._conditioning

    def _inputs(self, seeds: Sequence[int], plan: _Plan) -> tuple[Tensor, Tensor, text.Conditioning]:
        scorer = self._scorer
        scheduler = schedule(scorer.pipe.scheduler, scorer.num_inference_steps)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        t = scorer.timesteps[0]
        x = scale_model_input(scheduler, scorer._initial_latents(generators, scheduler, plan), t)
        conditioning = text.repeat_conditioning(self.conditioning(plan), len(seeds))
        return x, t.to(scorer._device).expand(len(seeds)), conditioning

    def linearizations(self, seeds: tuple[int, ...], plan: _Plan) -> list[Linearization]:
        """Linearizations that together cover the seeds, in their order."""
        if tuple(k for part, _ in self._parts for k in part) == seeds:
            return [lin for _, lin in self._parts]
        self._parts = []
        scorer = self._scorer
        # The first sample alone tells how much memory a sample takes, before a whole batch is tried.
        sizes = [len(seeds)] if scorer._capacity is not None else [1, len(seeds) - 1]
        start = 0
        for size in filter(None, sizes):
            part = seeds[start : start + size]
            lin = Branch(scorer.pipe.unet, scorer.backend).at(*self._inputs(part, plan))
            if scorer._capacity is None:
                scorer._learn_capacity(lin)
                if scorer._capacity is not None and scorer._capacity < len(seeds):
                    raise torch.OutOfMemoryError("the memory budget holds fewer samples than there are seeds")
            self._parts.append((part, lin))
            self._predictions.update(zip(part, lin.value, strict=True))
            start += size
        return [lin for _, lin in self._parts]

    def prediction(self, seeds: tuple[int, ...], plan: _Plan) -> Tensor:
        """The unconditional predictions alone, [S, C, H, W], without a linearization."""
        missing = tuple(seed for seed in seeds if seed not in self._predictions)
        if missing:
            with torch.no_grad():
                x, timestep, conditioning = self._inputs(missing, plan)
                values = predict(self._scorer.pipe.unet, x, timestep, conditioning)
            self._predictions.update(zip(missing, values, strict=True))
        return torch.stack([self._predictions[seed] for seed in seeds])


def pair_product(lin: Linearization) -> Any:
    """The product of (J with prompt) - (J without) for a linearization of both branches in one batch, those without first."""

    def product(vectors: Tensor) -> Tensor:
        without, with_prompt = lin.jvp(torch.cat([vectors, vectors]).unsqueeze(0)).squeeze(0).chunk(2)
        return with_prompt - without

    return product


def make_evidence(difference: Tensor, product: Any, timestep: Tensor, scheduler: Any, units: str) -> Evidence:
    """Evidence from a difference of predictions [B, ...] and the product with the difference of their Jacobians."""
    alpha, sigma = noise_level(scheduler, timestep)
    factor = prediction_factor(difference, alpha, sigma, prediction_type_of(scheduler), units)
    return Evidence(difference * factor, lambda vectors: product(vectors) * factor)


def scale_model_input(scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
    """The latent as the network sees it."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, t)


def advance(
    scheduler: Any, prediction: Tensor, t: Tensor, latents: Tensor, generators: list[torch.Generator]
) -> Tensor:
    """One step of the scheduler, with a generator for each sample where it draws noise."""
    import inspect

    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if draws else {}
    return scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]


def _no_product(vectors: Tensor) -> Tensor:
    raise InvalidInput("this metric uses the Hessian's product but does not declare needs_product")


def _prompt_error(index: int, prompt: Any) -> str | None:
    if not isinstance(prompt, str):
        return f"prompts[{index}]: expected a string; got {type(prompt).__name__}"
    if not prompt.strip():
        return f"prompts[{index}]: expected words; got an empty or blank prompt"
    return None


def _row(
    prompt: str, step: int, timestep: float, plan: _Plan, values: Tensor | None, error: str | None
) -> dict[str, Any]:
    """A table row; `values` is [metric, seed], float64."""
    row: dict[str, Any] = {"prompt": prompt, "step": step, "timestep": timestep}
    for i, metric in enumerate(plan.metrics):
        per_seed = None if values is None else values[i]
        row[metric.name] = None if per_seed is None else float(per_seed.mean())
        several = per_seed is not None and len(per_seed) > 1
        row[f"{metric.name}_se"] = float(per_seed.std() / len(per_seed) ** 0.5) if several else None  # type: ignore[union-attr,arg-type]
        row[f"{metric.name}_seeds"] = None if per_seed is None else per_seed.tolist()
    row["error"] = error
    return row
