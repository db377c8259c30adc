"""SharpnessCallback: scores the latents of a user's own pipeline call while it generates, and can stop it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.arguments import check_prompts
from sharpcore.autoencoder import decode_latents
from sharpcore.backends import get_backend
from sharpcore.branches import Branch, scale_model_input
from sharpcore.detect import Detector, Evidence, State, check_units, compute_detectors, make_detectors
from sharpcore.errors import InvalidInput, UnsupportedModel
from sharpcore.localization import HeatMap, check_maps, heat_maps
from sharpcore.lowering import WeightCopies, check_precision
from sharpcore.score import UNITS
from sharpcore.states import Linearized
from sharpcore.table import ScoreTable


class SharpnessCallback:
    """A `callback_on_step_end` for diffusers pipelines that records scores, and stops above a threshold.

    Use: `callback = SharpnessCallback(pipe, steps=(1, 10))`, then `pipe(prompt,
    callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs)` and
    `callback.table()`.

    Parameters
    ----------
    pipe
        The pipeline that will be called (SD 1.x, 2.x, XL).
    steps
        Indices of the steps whose incoming latent is scored. diffusers calls back at the end of a step, so
        the latent entering step i is seen at the end of step i - 1; for step 0 the initial latent has to be
        given.
    latents
        The initial latents [B, C, H, W] that are passed to the pipeline, needed for step 0 only.
    metrics, units, squared, backend, precision
        As in `SharpnessScorer`. A detector that belongs to a step of its own is computed there; rows have
        None for what is not computed at their step.
    prompts
        The prompts of the samples, one or one for each image; needed by detectors that look at the end token.
    maps
        Names out of `metrics` whose heat maps are kept, in `heat_maps`, wherever they are computed.
    threshold
        Stop the generation as soon as `threshold_metric` (by default the first of `metrics`) of any sample is
        above it: the pipeline then ends at this step, with the latents as they are. `stopped_at` tells the
        step.

    Each scored step costs what the metrics do (`sharpcore detectors`), beside the pipeline's own work; the
    defaults one linearization and one product of both branches. Raises
    InvalidInput for bad arguments, UnsupportedModel for a pipeline whose scores are not defined; when called,
    also NonFiniteError where a score is NaN or infinite.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        steps: Sequence[int] = (1,),
        latents: Tensor | None = None,
        metrics: Sequence[str | Detector] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
        prompts: str | Sequence[str] | None = None,
        maps: Sequence[str] = (),
        threshold: float | None = None,
        threshold_metric: str | None = None,
        backend: str = "auto",
        precision: str = "float32",
    ) -> None:
        text.check_pipeline(pipe)
        given = [steps] if isinstance(steps, int) else steps
        if (
            not isinstance(given, Sequence)
            or not given
            or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given)
        ):
            raise InvalidInput(f"steps: expected non-negative indices; got {steps!r}")
        steps = list(given)
        if latents is not None and not (isinstance(latents, Tensor) and latents.is_floating_point()):
            found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise InvalidInput(f"latents: expected a tensor of a floating dtype; got {found}")
        if 0 in steps and latents is None:
            raise InvalidInput(
                "steps: step 0 is over before the first callback; give the initial latents as latents="
            )
        if units not in UNITS:
            raise InvalidInput(f"units: expected one of {', '.join(UNITS)}; got {units!r}")
        if threshold is not None and not (isinstance(threshold, (int, float)) and threshold == threshold):
            raise InvalidInput(f"threshold: expected a number; got {threshold!r}")
        get_backend(backend, device="cpu", dtype=torch.float32)
        check_precision(precision, pipe.unet.dtype, pipe.unet.device)
        self.pipe = pipe
        self.steps = frozenset(steps)
        self.units = units
        self.metrics = make_detectors(metrics, squared=squared)
        check_units(self.metrics, units)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        if self.prompts is not None:
            check_prompts(self.prompts, "raise")
        if self.prompts is None:
            for detector in self.metrics:
                if detector.needs_tokens:
                    raise InvalidInput(f"prompts: {detector.name} needs them, to know their end tokens")
        self.mapped = check_maps(maps, self.metrics)
        self.threshold = threshold
        self.threshold_metric = threshold_metric or self.metrics[0].name
        if self.threshold_metric not in [metric.name for metric in self.metrics]:
            raise InvalidInput(f"threshold_metric: expected one of metrics; got {threshold_metric!r}")
        self.stopped_at: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.heat_maps: list[HeatMap] = []
        self._backend = backend
        self._precision = precision
        self._first = latents
        self._forget()
        #: What to pass as callback_on_step_end_tensor_inputs.
        self.tensor_inputs: list[str] = ["latents", "prompt_embeds"]
        if getattr(pipe.unet.config, "addition_embed_type", None) == "text_time":
            self.tensor_inputs += ["add_text_embeds", "add_time_ids"]

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline at the end of step `step`."""
        missing = [name for name in self.tensor_inputs if name not in tensors]
        if missing:
            raise InvalidInput(
                "callback_on_step_end_tensor_inputs: expected callback.tensor_inputs; missing "
                + ", ".join(missing)
            )
        if pipe is not self.pipe:
            raise InvalidInput("pipe: expected the pipeline that this callback was made for; got another one")
        if float(timestep) != float(pipe.scheduler.timesteps[step]):
            raise UnsupportedModel(
                f"pipeline {type(pipe).__name__}: it does not run its scheduler from the first timestep on "
                "(image to image), so the steps of a callback are not those of the scheduler"
            )
        if step == 0:
            self._start(tensors["latents"])
            if self._first is not None and self._at(0):
                self._score(0, self._first * getattr(pipe.scheduler, "init_noise_sigma", 1.0), tensors)
        entering = step + 1
        if entering < len(pipe.scheduler.timesteps) and self.stopped_at is None and self._at(entering):
            self._score(entering, tensors["latents"], tensors)
        if self.stopped_at is not None:
            pipe._interrupt = True
        return tensors

    def table(self) -> ScoreTable:
        """One row for each sample and scored step: `sample`, `step`, `timestep` and the metrics."""
        return ScoreTable(self.rows)

    def save_maps(self, folder: str | Path, latents: Tensor | None = None) -> list[Path]:
        """Write the heat maps to a folder, an .npz file and a picture each; returns the pictures' paths.

        With the finished latents [B, C, H, W] (those of the last callback, or of `output_type="latent"`) the
        maps lie over the decoded images. Raises InvalidInput where there are no maps.
        """
        if not self.heat_maps:
            raise InvalidInput("maps: there are none; name metrics in maps=, and generate")
        images = None if latents is None else decode_latents(self.pipe, latents)
        written = []
        Path(folder).mkdir(parents=True, exist_ok=True)
        for part in self.heat_maps:
            if images is not None:
                part = replace(part, image=images[part.sample])
            path = Path(folder) / f"{part.metric}_step{part.step}_sample{part.sample}.png"
            part.save(path.with_suffix(".npz"))
            part.plot(path)
            written.append(path)
        return written

    def _start(self, latents: Tensor) -> None:
        """A new generation: its own rows, and nothing kept of networks that may have changed."""
        self.rows, self.heat_maps, self.stopped_at = [], [], None
        self._forget()
        count = len(self.pipe.scheduler.timesteps)
        if max(self.steps) >= count:
            raise InvalidInput(f"steps: this generation has steps 0 to {count - 1}; got {max(self.steps)}")
        if self._first is not None and self._first.shape != latents.shape:
            raise InvalidInput(
                f"latents: expected those given to the pipeline, {tuple(latents.shape)}; "
                f"got {tuple(self._first.shape)}"
            )

        if self._first is None:
            for detector in self.metrics:
                if 0 in detector.steps(sorted(self.steps), count):
                    raise InvalidInput(
                        f"latents: {detector.name} is computed at step 0, which is over before the first "
                        "callback; give the initial latents"
                    )
        if self.prompts is not None and len(latents) % len(self.prompts):
            raise InvalidInput(
                f"prompts: expected one for each of {len(latents)} images; got {len(self.prompts)}"
            )

    def _at(self, step: int) -> list[Detector]:
        """The detectors that are computed at a step."""
        count = len(self.pipe.scheduler.timesteps)
        return [d for d in self.metrics if step in d.steps(sorted(self.steps), count)]

    def _forget(self) -> None:
        copies = WeightCopies()
        unet, how = self.pipe.unet, (self._backend, self._precision, copies)
        self._conditional, self._without = Branch(unet, *how), Branch(unet, *how)
        self._embedding = Branch(unet, *how, of_embedding=True)
        self._unconditional: text.Conditioning | None = None

    @torch.no_grad()
    def _score(self, step: int, latents: Tensor, tensors: dict[str, Any]) -> None:
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        place = next(unet.parameters())
        latents = latents.to(place.device, place.dtype)
        unconditional, conditional = self._conditionings(tensors, latents)
        t = scheduler.timesteps[step]
        x = _scaled(scheduler, latents, t, step)
        timestep = t.to(place.device).expand(x.shape[0])
        count = x.shape[0]
        here = self._at(step)
        state = State(
            network=unet,
            scheduler=scheduler,
            step=step,
            x=x,
            timestep=timestep,
            seeds=range(count),
            conditional=conditional,
            unconditional=unconditional,
            units=self.units,
            end_tokens=self._end_tokens(count) if any(d.needs_tokens for d in here) else None,
            reads_attention=any(detector.needs_attention for detector in here),
            embedding_branch=self._embedding,
        )
        if any(detector.needs_product for detector in here):
            state.with_prompt = lambda: Linearized(self._conditional.at(x, timestep, conditional))
            state.without = lambda: Linearized(self._without.at(x, timestep, unconditional))
        evidence = Evidence(state)
        found = compute_detectors(here, evidence).tolist()
        computed = {detector.name: values for detector, values in zip(here, found, strict=True)}
        for sample in range(count):
            row: dict[str, Any] = {"sample": sample, "step": step, "timestep": float(t)}
            row.update((d.name, computed[d.name][sample] if d in here else None) for d in self.metrics)
            self.rows.append(row)
        mapped = [detector for detector in here if detector.name in self.mapped]
        self.heat_maps += heat_maps(mapped, evidence, self.pipe, prompts=self._prompts_of(count))
        watched = computed.get(self.threshold_metric)
        if self.threshold is not None and watched is not None and max(watched) > self.threshold:
            self.stopped_at = step

    def _prompts_of(self, count: int) -> list[str] | None:
        """Of each sample, where they are known; all images of a prompt lie together."""
        if self.prompts is None:
            return None
        return [prompt for prompt in self.prompts for _ in range(count // len(self.prompts))]

    def _end_tokens(self, count: int) -> list[int]:
        """Of each sample's prompt."""
        return [text.end_token(self.pipe, prompt) for prompt in self._prompts_of(count) or ()]

    def _conditionings(
        self, tensors: dict[str, Any], latents: Tensor
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Without the prompt (the empty one, not a negative one), and with it (as the pipeline has it)."""
        count, factor = latents.shape[0], self.pipe.vae_scale_factor
        given: dict[str, Any] = {"encoder_hidden_states": tensors["prompt_embeds"]}
        if "add_text_embeds" in tensors:
            given["added_cond_kwargs"] = {
                "text_embeds": tensors["add_text_embeds"],
                "time_ids": tensors["add_time_ids"],
            }
        given = text.cast_conditioning(given, next(self.pipe.unet.parameters()))
        if tensors["prompt_embeds"].shape[0] == 2 * count:  # guidance: the negative branch comes first
            given = text.select_conditioning(given, slice(count, None))
        size = {"height": latents.shape[-2] * factor, "width": latents.shape[-1] * factor}
        if self._unconditional is None:
            self._unconditional = text.encode_unconditional(self.pipe, **size)
        return text.repeat_conditioning(self._unconditional, count), given


def _scaled(scheduler: Any, latents: Tensor, t: Tensor, step: int) -> Tensor:
    """`scale_model_input` without moving the running scheduler's own step counter."""
    before = getattr(scheduler, "_step_index", None)
    scaled_flag = getattr(scheduler, "is_scale_input_called", None)
    if before is not None:
        scheduler._step_index = step
    try:
        return scale_model_input(scheduler, latents, t)
    finally:
        if before is not None:
            scheduler._step_index = before
        if scaled_flag is not None:
            scheduler.is_scale_input_called = scaled_flag
