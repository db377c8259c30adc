"""generate(pipe, prompts, repair=...): guided generation with a repair, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import check_guidance, check_prompts, check_seeds, is_integer
from sharpcore.autoencoder import decode_latents
from sharpcore.backends import get_backend
from sharpcore.branches import advance, predict, scale_model_input
from sharpcore.curvature import latent_shape
from sharpcore.errors import InvalidInput, NonFiniteError, OutOfMemory, UnsupportedModel
from sharpcore.memory import is_out_of_memory
from sharpcore.repair.method import Repair
from sharpcore.repair.registry import make_repair, repairs
from sharpcore.repair.samples import Samples
from sharpcore.score import noise_level, prediction_type_of, schedule, score_factors
from sharpcore.trajectory import (
    pixels,
    scaled_noise,
    seeded_generators,
    trajectory_scheduler,
    warn_if_cut,
)

# Samples at once, unless asked otherwise: enough to fill the device.
_SAMPLES = {"cpu": 8, "cuda": 32}


@dataclass(frozen=True)
class RepairedLatents:
    """Initial latents before and after a repair; one sample for each seed of each prompt, in this order.

    Attributes
    ----------
    latents, initial
        The repaired and the drawn noise, [N, C, H, W] on the CPU, as it is given to `pipe(latents=...)`:
        `pipe([*result.prompts], latents=result.latents)`.
    prompts, seeds
        Of each sample.
    path
        For each sample the loss (what it is depends on the method) at the start and after each round.
    rounds, stopped
        For each sample how many rounds it took, and whether it came below the method's threshold; None where
        there is none.
    forwards, backwards, products, seconds
        For each sample what was run; see `sharpcore.repair.samples.Work`.
    repair
        The method, with its hyper-parameters.
    """

    latents: Tensor = field(repr=False)
    initial: Tensor = field(repr=False)
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    path: list[list[float]] = field(repr=False)
    rounds: list[int]
    stopped: list[bool | None]
    forwards: list[int]
    backwards: list[int]
    products: list[int]
    seconds: list[float]
    repair: Repair

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Generation(RepairedLatents):
    """Images and what led to them; one sample for each seed of each prompt, in this order.

    Beside the attributes of `RepairedLatents`, whose numbers include the generation here:

    Attributes
    ----------
    images
        [N, 3, H, W], float32 in [0, 1] on the CPU; None if not asked for.
    final
        The final latents [N, C, H, W] on the CPU, before the decoder.
    repair_seconds
        For each sample the part of `seconds` before the first step.
    """

    images: Tensor | None = field(repr=False, default=None)
    final: Tensor = field(repr=False, default_factory=lambda: torch.empty(0))
    repair_seconds: list[float] = field(default_factory=list)

    def to_pil(self) -> list[Any]:
        """The images as PIL images. Raises InvalidInput where they were not asked for."""
        from PIL import Image

        if self.images is None:
            raise InvalidInput("images: expected a generation with decode=True; this one has no images")
        pixels = (self.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(image) for image in pixels]


def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    repair: str | Repair = "sail",
    seeds: int | Sequence[int] = 1,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    decode: bool = True,
    batch_size: int | None = None,
    backend: str = "auto",
    **options: Any,
) -> Generation:
    """Generate images of prompts with classifier-free guidance and a repair against memorization.

    With repair="none" the latents and images are those of the pipeline's own call with the same latents.

    Args:
        pipe: a Stable Diffusion pipeline (1.x, 2.x, XL); it is not changed.
        prompts: one or several.
        repair: a name out of `sharpcore.repair.repairs()`, or an instance with hyper-parameters of its own.
        seeds: a number n (seeds 42, ..., 42 + n - 1) or a list. Seed s draws its latent alone:
            `torch.randn((1, C, H, W), generator=torch.Generator("cpu").manual_seed(s))`. What a sample
            becomes does not depend on the others, but for the rounding of sums in another order.
        num_inference_steps, guidance_scale: of the pipeline's own scheduler (a copy of it).
        latent_size: height and width of the latent; by default those that the UNet was trained with.
        decode: whether to make images of the final latents.
        batch_size: samples at once; by default 8 on a CPU, 32 on a GPU. Halved while memory runs out.
        backend: of exact products, for repairs that use them; see `sharpcore.linearize`.
        options: hyper-parameters of the repair that `repair` names.

    Raises InvalidInput for bad arguments, UnsupportedModel for a pipeline whose scores are not defined or
    which the repair does not know, NonFiniteError where the network is not finite, OutOfMemory where not even
    one sample fits.
    """
    run = _Run(
        pipe, prompts, make_repair(repair, options), seeds, num_inference_steps, guidance_scale, latent_size,
        decode, batch_size, backend,
    )  # fmt: skip
    return run.generation()


def repair_latents(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    method: str | Repair = "sail",
    seeds: int | Sequence[int] = 1,
    num_inference_steps: int = 50,
    latent_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    backend: str = "auto",
    **options: Any,
) -> RepairedLatents:
    """Initial latents repaired for prompts, for a call of your own: `pipe(prompt, latents=result.latents)`.

    Arguments and errors as in `generate`; `method` is a repair that changes nothing but the noise
    (InvalidInput otherwise), and `num_inference_steps` that of the call, whose first timestep counts.
    """
    chosen = make_repair(method, options)
    if chosen.changes != ("noise",):
        known = [name for name, kind in repairs().items() if kind.changes == ("noise",)]
        raise InvalidInput(
            f"method: expected a repair that changes the noise alone ({', '.join(known)}); {chosen.name} "
            f"changes: {', '.join(chosen.changes)}"
        )
    run = _Run(
        pipe, prompts, chosen, seeds, num_inference_steps, 1.0, latent_size, False, batch_size, backend
    )
    return run.latents()


class _Run:
    """One call, checked: batches of samples, a sample being a prompt with a seed."""

    def __init__(
        self,
        pipe: Any,
        prompts: str | Sequence[str],
        repair: Repair,
        seeds: Any,
        num_inference_steps: int,
        guidance_scale: Any,
        latent_size: Any,
        decode: bool,
        batch_size: Any,
        backend: str,
    ) -> None:
        text.check_pipeline(pipe)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        check_prompts(self.prompts, "raise")
        self.pipe, self.repair, self.seeds = pipe, repair, check_seeds(seeds)
        schedule(pipe.scheduler, num_inference_steps)
        self.steps, self.guidance_scale = num_inference_steps, check_guidance(guidance_scale)
        self.shape = latent_shape(pipe, latent_size)
        if batch_size is not None and not (is_integer(batch_size) and batch_size >= 1):
            raise InvalidInput(f"batch_size: expected an integer of at least 1; got {batch_size!r}")
        self.device = next(pipe.unet.parameters()).device
        self.batch = batch_size or _SAMPLES.get(self.device.type, _SAMPLES["cpu"])
        get_backend(backend, device="cpu", dtype=torch.float32)
        self.backend = backend
        if decode and getattr(pipe, "vae", None) is None:
            raise UnsupportedModel(
                f"pipeline {type(pipe).__name__}: it has no decoder (`pipe.vae`); decode=False gives latents"
            )
        self.decode = decode

    def latents(self) -> RepairedLatents:
        """The repaired noise of all samples."""
        found = list(self._batches(self._repaired))
        return RepairedLatents(**_joined([part for part, *_ in found]), repair=self.repair)

    def generation(self) -> Generation:
        """All samples, generated."""
        found = list(self._batches(self._generated))
        images = torch.cat([part[2] for part in found]) if self.decode else None
        return Generation(
            **_joined([part[0] for part in found]),
            repair=self.repair,
            images=images,
            final=torch.cat([part[1] for part in found]),
            repair_seconds=[seconds for part in found for seconds in part[3]],
        )

    def _batches(self, work: Any) -> Iterator[Any]:
        samples = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for index, prompt in enumerate(self.prompts):
            warn_if_cut(self.pipe, index, prompt)
        start = 0
        while start < len(samples):
            batch = samples[start : start + self.batch]
            try:
                with torch.inference_mode(False), torch.no_grad():
                    found = work(batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemory(
                        f"one sample with a latent of {self.shape} does not fit into memory ({error}); a "
                        "smaller latent_size or a 16-bit dtype would need less"
                    ) from error
                self.batch = len(batch) // 2
            else:
                yield found
                start += len(batch)
                continue
            # Not in the handler: there the traceback still holds the tensors of the failed attempt.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _samples(self, batch: Sequence[tuple[str, int]]) -> tuple[Samples, list[torch.Generator]]:
        prompts, seeds = zip(*batch, strict=True)
        generators = seeded_generators(seeds)
        dtype = torch.float64 if next(self.pipe.unet.parameters()).dtype == torch.float64 else torch.float32
        # Drawn the same whatever the process's default dtype and device are.
        noise = [
            torch.randn((1, *self.shape), generator=generator, dtype=torch.float32, device="cpu")
            for generator in generators
        ]
        size = pixels(self.pipe, self.shape)
        different = list(dict.fromkeys(prompts))
        conditional = text.encode_prompts(self.pipe, different, **size)
        samples = Samples(
            self.pipe,
            prompts,
            seeds,
            torch.cat(noise).to(self.device, dtype),
            text.select_conditioning(conditional, [different.index(prompt) for prompt in prompts]),
            text.repeat_conditioning(text.encode_unconditional(self.pipe, **size), len(prompts)),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            backend=self.backend,
        )
        return samples, generators

    def _repaired(self, batch: Sequence[tuple[str, int]]) -> tuple[dict[str, Any]]:
        samples, _ = self._samples(batch)
        initial = samples.noise
        self.repair.prepare(samples)
        return (_numbers(samples, initial),)

    def _generated(
        self, batch: Sequence[tuple[str, int]]
    ) -> tuple[dict[str, Any], Tensor, Tensor | None, list[float]]:
        samples, generators = self._samples(batch)
        initial = samples.noise
        self.repair.prepare(samples)
        seconds = list(samples.work.seconds)
        with samples.work.timed(range(len(samples))):
            with self.repair.running(samples):
                final = self._walk(samples, generators)
            images = decode_latents(self.pipe, final) if self.decode else None
        return _numbers(samples, initial), final.cpu(), images, seconds

    def _walk(self, samples: Samples, generators: list[torch.Generator]) -> Tensor:
        """The final latents of the samples, [B, C, H, W]."""
        scheduler = trajectory_scheduler(self.pipe, self.steps)
        latents = scaled_noise(self.pipe, samples.noise, scheduler)
        both = text.concat_conditioning([samples.unconditional, samples.conditional])
        prediction_type, guide = prediction_type_of(scheduler), self.repair.guide(samples)
        rows = range(len(samples))
        for step, t in enumerate(scheduler.timesteps):
            x = scale_model_input(scheduler, latents, t)
            pair = predict(self.pipe.unet, torch.cat([x, x]), t.to(x.device).expand(2 * len(samples)), both)
            samples.work.add(rows, forwards=2)
            without, with_prompt = pair.chunk(2)
            factor = score_factors(x, *noise_level(scheduler, t), prediction_type, "eps")[0]
            scale = guide(step, (with_prompt - without) * factor)
            if isinstance(scale, Tensor):
                scale = scale.to(without).reshape(-1, *[1] * (without.dim() - 1))
            guided = without + scale * (with_prompt - without)
            latents = advance(scheduler, guided, t, latents, generators)
        if not bool(torch.isfinite(latents).all()):
            raise NonFiniteError("the final latents hold NaN or infinity; the network is not finite here")
        return latents


def _numbers(samples: Samples, initial: Tensor) -> dict[str, Any]:
    work = samples.work
    return {
        "latents": samples.noise.cpu(),
        "initial": initial.cpu(),
        "prompts": samples.prompts,
        "seeds": samples.seeds,
        "path": samples.path,
        "rounds": samples.rounds,
        "stopped": samples.stopped,
        "forwards": work.forwards,
        "backwards": work.backwards,
        "products": work.products,
        "seconds": work.seconds,
    }


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of all batches, one after the other."""
    joined: dict[str, Any] = {}
    for name, value in parts[0].items():
        values = [part[name] for part in parts]
        if isinstance(value, Tensor):
            joined[name] = torch.cat(values)
        else:
            joined[name] = type(value)(entry for entries in values for entry in entries)
    return joined
