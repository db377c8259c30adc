"""SharpnessCallback: scores the latents of a user's own pipeline call while it generates, and can stop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpcore import conditioning as text
from sharpcore.backends import get_backend
from sharpcore.branches import Branch, make_evidence, no_product, pair_product, predict, scale_model_input
from sharpcore.detect import compute_metrics, make_metrics
from sharpcore.errors import InvalidInput, UnsupportedModel
from sharpcore.lowering import check_precision
from sharpcore.score import UNITS
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
        As in `SharpnessScorer`.
    threshold
        Stop the generation as soon as `threshold_metric` (by default the first of `metrics`) of any sample is
        above it: the pipeline then ends at this step, with the latents as they are. `stopped_at` tells the
        step.

    Each scored step costs one linearization and one product of the pair of branches beside the pipeline's own
    work (without a metric that multiplies with the Hessian, one forward pass of the pair). Raises
    InvalidInput for bad arguments, UnsupportedModel for a pipeline whose scores are not defined; when called,
    also NonFiniteError where a score is NaN or infinite.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        steps: Sequence[int] = (1,),
        latents: Tensor | None = None,
        metrics: Sequence[str] = ("score_difference", "hessian_score_difference"),
        units: str = "score",
        squared: bool = True,
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
        self.metrics = make_metrics(metrics, squared=squared)
        self.threshold = threshold
        self.threshold_metric = threshold_metric or self.metrics[0].name
        if self.threshold_metric not in [metric.name for metric in self.metrics]:
            raise InvalidInput(f"threshold_metric: expected one of metrics; got {threshold_metric!r}")
        self.stopped_at: int | None = None
        self.rows: list[dict[str, Any]] = []
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
            if self._first is not None and 0 in self.steps:
                self._score(0, self._first * getattr(pipe.scheduler, "init_noise_sigma", 1.0), tensors)
        entering = step + 1
        if entering in self.steps and entering < len(pipe.scheduler.timesteps) and self.stopped_at is None:
            self._score(entering, tensors["latents"], tensors)
        if self.stopped_at is not None:
            pipe._interrupt = True
        return tensors

    def table(self) -> ScoreTable:
        """One row for each sample and scored step: `sample`, `step`, `timestep` and the metrics."""
        return ScoreTable(self.rows)

    def _start(self, latents: Tensor) -> None:
        """A new generation: its own rows, and nothing kept of networks that may have changed."""
        self.rows, self.stopped_at = [], None
        self._forget()
        count = len(self.pipe.scheduler.timesteps)
        if max(self.steps) >= count:
            raise InvalidInput(f"steps: this generation has steps 0 to {count - 1}; got {max(self.steps)}")
        if self._first is not None and self._first.shape != latents.shape:
            raise InvalidInput(
                f"latents: expected those given to the pipeline, {tuple(latents.shape)}; "
                f"got {tuple(self._first.shape)}"
            )

    def _forget(self) -> None:
        self._branch = Branch(self.pipe.unet, self._backend, self._precision, {})
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
        both = text.concat_conditioning([unconditional, conditional])
        pair, times = torch.cat([x, x]), torch.cat([timestep, timestep])
        if any(metric.needs_product for metric in self.metrics):
            lin = self._branch.at(pair, times, both)
            value, product = lin.value, pair_product(lin)
        else:
            value, product = predict(unet, pair, times, both), no_product
        without, with_prompt = value.chunk(2)
        evidence = make_evidence(with_prompt - without, product, timestep, scheduler, self.units)
        names = [metric.name for metric in self.metrics]
        computed = dict(zip(names, compute_metrics(self.metrics, evidence).tolist(), strict=True))
        for sample in range(x.shape[0]):
            row: dict[str, Any] = {"sample": sample, "step": step, "timestep": float(t)}
            row.update((name, values[sample]) for name, values in computed.items())
            self.rows.append(row)
        if self.threshold is not None and max(computed[self.threshold_metric]) > self.threshold:
            self.stopped_at = step

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
