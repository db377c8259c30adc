"""Score functions: from what a network predicts to the gradient of log p_t, with explicit units."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInput, UnsupportedModel

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
UNITS = ("score", "eps")

Level = float | Tensor


def score_from_prediction(
    prediction: Tensor, x: Tensor, alpha: Level, sigma: Level, prediction_type: str, units: str = "score"
) -> Tensor:
    """Turn a network's prediction at ``x = alpha x0 + sigma e`` into the score, exactly and affinely.

    ``prediction`` and ``x`` have shape [B, ...] and a floating dtype, ``alpha`` and ``sigma`` are numbers or
    tensors of shape [] or [B]. The result has the shape and dtype of ``x``. Its units are those asked for:
    ``"score"`` is grad_x log p_t(x), ``"eps"`` is the noise, eps = -sigma * score.

    - ``"epsilon"``: the network predicts e.
    - ``"v_prediction"``: v = alpha e - sigma x0 with alpha^2 + sigma^2 = 1 (Salimans and Ho, arXiv
      2202.00512).
    - ``"sample"``: the network predicts x0.
    - ``"flow"``: u = e - x0 with alpha = 1 - sigma (Lipman et al., arXiv 2210.02747).

    The coefficients are formed in the precision of ``alpha`` and ``sigma`` (float64 when they come from
    `noise_level`) and rounded to the dtype of ``x`` last. Raises InvalidInput for an unknown prediction type
    or unit.
    """
    _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    _check_choice("units", units, UNITS)
    on_prediction: Level
    on_x: Level | None
    if prediction_type == "epsilon":
        on_prediction, on_x = 1.0, None
    elif prediction_type == "v_prediction":
        on_prediction, on_x = alpha, sigma
    elif prediction_type == "sample":
        on_prediction, on_x = -alpha / sigma, 1.0 / sigma
    else:
        on_prediction, on_x = alpha, 1.0
    if units == "score":
        on_prediction = -on_prediction / sigma
        on_x = None if on_x is None else -on_x / sigma
    score = prediction.to(x.dtype) * _over_batch(on_prediction, x)
    return score if on_x is None else score + x * _over_batch(on_x, x)


def score_factors(
    x: Tensor, alpha: Level, sigma: Level, prediction_type: str, units: str
) -> tuple[Tensor, Tensor]:
    """The factors of prediction and x in the score, each [B, 1, ...] of x's dtype and device.

    score = first * prediction + second * x. In the difference of two scores at one x the second cancels, so
    the first alone turns differences of predictions, and of their Jacobians, into those of scores. Raises as
    `score_from_prediction`.
    """
    one = torch.ones((x.shape[0], *(1,) * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    zero = torch.zeros_like(one)
    return (
        score_from_prediction(one, zero, alpha, sigma, prediction_type, units),
        score_from_prediction(zero, one, alpha, sigma, prediction_type, units),
    )


def _over_batch(coefficient: Level, x: Tensor) -> Level:
    """Shape and cast a coefficient ([] or [B]) so that it multiplies ``x`` sample by sample."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient.reshape(-1, *[1] * (x.ndim - 1)) if coefficient.ndim else coefficient


def noise_level(scheduler: Any, timestep: Any) -> tuple[Tensor, Tensor]:
    """The (alpha, sigma) of the latent ``alpha x0 + sigma e`` that a network sees at a timestep.

    ``timestep`` is a number, a sequence or a tensor of shape [] or [B]; both results are float64 CPU tensors
    of the same shape. Schedulers with ``alphas_cumprod`` give the variance-preserving level
    alpha^2 + sigma^2 = 1: what the network sees after ``scheduler.scale_model_input``. An integer timestep is
    a row of the training table; a fractional one (Euler, LMS, Karras spacing) must be one of the scheduler's
    present timesteps and takes the scheduler's own sigma there. Flow-matching schedulers give
    alpha = 1 - sigma.

    Raises UnsupportedModel for a scheduler without a known noise schedule, InvalidInput for a timestep
    outside the schedule or without noise (sigma = 0).
    """
    steps = _numbers("timestep", timestep).to("cpu", torch.float64)
    flow = prediction_type_of(scheduler) == "flow"
    if not flow and getattr(scheduler, "alphas_cumprod", None) is None:
        raise UnsupportedModel(
            f"scheduler {type(scheduler).__name__}: it has neither `alphas_cumprod` nor a flow-matching "
            "schedule, so the noise level of a timestep is unknown"
        )
    level = _flow_level if flow else _variance_preserving_level
    pairs = torch.tensor([level(scheduler, t) for t in steps.reshape(-1).tolist()], dtype=torch.float64)
    alpha, sigma = pairs.unbind(1)
    _check_levels(alpha, sigma)
    return alpha.reshape(steps.shape), sigma.reshape(steps.shape)


def _variance_preserving_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    table = torch.as_tensor(scheduler.alphas_cumprod, device="cpu").double()
    config = scheduler.config
    # Stable Video Diffusion's Euler schedule numbers its steps by log(sigma) / 4, not by rows of the table.
    continuous = (
        getattr(config, "timestep_type", None) == "continuous" and config.prediction_type == "v_prediction"
    )
    if not continuous:
        if not 0 <= timestep <= len(table) - 1:
            raise InvalidInput(f"timestep: expected 0 to {len(table) - 1}, got {timestep}")
        if timestep == int(timestep):
            abar = table[int(timestep)]
            return abar.sqrt().item(), (1 - abar).sqrt().item()
    ratio = _own_sigma(scheduler, timestep)
    if not continuous:
        low, high = ((1 - table) / table).sqrt()[[int(timestep), int(timestep) + 1]].tolist()
        # Second-order schedulers keep the sigmas of their midpoints elsewhere; a number from the wrong list
        # would not lie between its neighbours of the training table.
        if not low * (1 - 1e-6) <= ratio <= high * (1 + 1e-6):
            raise UnsupportedModel(
                f"scheduler {type(scheduler).__name__}: its sigma {ratio:g} at timestep {timestep} is not "
                f"between those of the neighbouring training timesteps, {low:g} and {high:g}"
            )
    alpha = (1 + ratio**2) ** -0.5
    return alpha, ratio * alpha


def _flow_level(scheduler: Any, timestep: float) -> tuple[float, float]:
    if getattr(scheduler.config, "invert_sigmas", False):
        raise UnsupportedModel(
            f"scheduler {type(scheduler).__name__}: `invert_sigmas` is set, its sigma is not the noise level"
        )
    if _is_flow_matching(scheduler):
        length = scheduler.config.num_train_timesteps
        own = torch.as_tensor(scheduler.timesteps, device="cpu").double() / length
        sigmas = torch.as_tensor(scheduler.sigmas, device="cpu").double()[: len(own)]
        # Without timesteps of the user's own a flow timestep is the noise level itself, times `length`.
        if torch.allclose(own, sigmas, rtol=1e-6, atol=0):
            if not 0 <= timestep <= length:
                raise InvalidInput(f"timestep: expected more than 0 and at most {length}, got {timestep}")
            return 1 - timestep / length, timestep / length
    elif scheduler.num_inference_steps is None:
        raise InvalidInput(
            "scheduler: its flow sigmas exist only after `set_timesteps`, which was not called"
        )
    sigma = _own_sigma(scheduler, timestep)
    return 1 - sigma, sigma


def _own_sigma(scheduler: Any, timestep: float) -> float:
    """The scheduler's sigma at one of its present timesteps, matched to float32 rounding."""
    own = getattr(scheduler, "timesteps", None)
    sigmas = getattr(scheduler, "sigmas", None)
    if own is None or sigmas is None:
        raise InvalidInput(
            f"timestep: {timestep} is fractional, and {type(scheduler).__name__} has no `sigmas` to place it"
        )
    distance, index = (torch.as_tensor(own, device="cpu").double() - timestep).abs().min(0)
    if not distance <= 1e-6 * max(1.0, abs(timestep)):
        raise InvalidInput(
            f"timestep: {timestep} is not among the present timesteps of {type(scheduler).__name__}; "
            "expected an integer timestep, or one of `scheduler.timesteps` after `set_timesteps`"
        )
    return float(sigmas[int(index)])


def _is_flow_matching(scheduler: Any) -> bool:
    return any(base.__name__.startswith("FlowMatch") for base in type(scheduler).__mro__)


def prediction_type_of(scheduler: Any) -> str:
    """What the network of this scheduler predicts: "epsilon", "v_prediction", "sample" or "flow".

    Raises UnsupportedModel for any other prediction type, and for one that contradicts the noise schedule.
    """
    if _is_flow_matching(scheduler):
        return "flow"
    config = getattr(scheduler, "config", None)
    found = getattr(config, "prediction_type", None)
    name = type(scheduler).__name__
    if found not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        raise UnsupportedModel(
            f"scheduler {name}: prediction type {found!r}; expected 'epsilon', 'v_prediction', 'sample', "
            "'flow_prediction' or a flow-matching scheduler"
        )
    if bool(getattr(config, "use_flow_sigmas", False)) != (found == "flow_prediction"):
        raise UnsupportedModel(
            f"scheduler {name}: prediction type {found!r} with use_flow_sigmas="
            f"{bool(getattr(config, 'use_flow_sigmas', False))}; flow predictions and flow sigmas go together"
        )
    return "flow" if found == "flow_prediction" else found


class ScoreFunction:
    """The score of a diffusion network at fixed timesteps and conditioning, as a function of x alone.

    ``network`` is called as ``network(x, timestep, **conditioning)`` and returns a tensor of x's shape, a
    tuple that begins with it, or an object that has it as ``.sample``. Shapes: x [B, ...]; ``alpha``,
    ``sigma`` and ``timestep`` are numbers or tensors of shape [] or [B] (samples may have different
    timesteps); tensors in ``conditioning`` (nested mappings allowed) have B rows. ``x`` is the latent
    that the network sees (see `noise_level`). The result has x's shape and dtype, in ``units`` "score"
    (grad_x log p_t) or "eps".

    Raises InvalidInput for arguments that do not fit together, UnsupportedModel when the network's output is
    not a prediction of x's shape.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        *,
        prediction_type: str,
        alpha: Any,
        sigma: Any,
        timestep: Any,
        conditioning: Mapping[str, Any] | None = None,
        units: str = "score",
    ) -> None:
        if not callable(network):
            raise InvalidInput(f"network: expected a callable, got {type(network).__name__}")
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("units", units, UNITS)
        self.network = network
        self.prediction_type = prediction_type
        self.alpha = _numbers("alpha", alpha).double()
        self.sigma = _numbers("sigma", sigma).double()
        self.timestep = _numbers("timestep", timestep)
        self.conditioning: dict[str, Any] = dict(conditioning or {})
        self.units = units
        self._per_sample = {
            name: len(value)
            for name, value in (("alpha", self.alpha), ("sigma", self.sigma), ("timestep", self.timestep))
            if value.ndim
        }
        if len(set(self._per_sample.values())) > 1:
            raise InvalidInput(f"alpha, sigma, timestep: expected one batch size, got {self._per_sample}")
        _check_levels(self.alpha, self.sigma)
        self._extra: dict[str, Any] = {"return_dict": False} if _accepts_return_dict(network) else {}

    @classmethod
    def from_scheduler(
        cls,
        network: Callable[..., Any],
        scheduler: Any,
        timestep: Any,
        conditioning: Mapping[str, Any] | None = None,
        units: str = "score",
    ) -> ScoreFunction:
        """The score of ``network`` with the prediction type and the noise level of a diffusers scheduler.

        ``timestep`` is a number, or a list or tensor of B numbers, one a sample. Raises as `noise_level` and
        `prediction_type_of` do.
        """
        alpha, sigma = noise_level(scheduler, timestep)
        return cls(
            network,
            prediction_type=prediction_type_of(scheduler),
            alpha=alpha,
            sigma=sigma,
            timestep=timestep,
            conditioning=conditioning,
            units=units,
        )

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompts: str | Sequence[str],
        *,
        step: int | Sequence[int] = 0,
        timestep: Any = None,
        num_inference_steps: int = 50,
        unconditional: bool = False,
        units: str = "score",
    ) -> ScoreFunction:
        """The score of a text-to-image pipeline for B prompts (or for B times the empty prompt).

        The timestep is number ``step`` of the ``num_inference_steps`` of the pipeline's own scheduler, unless
        ``timestep`` gives it directly; either may be a list of B. The pipeline and its scheduler are left as
        they are. Raises UnsupportedModel for a pipeline whose score is unknown, InvalidInput for a
        step outside the schedule or bad prompts.
        """
        from . import conditioning as text

        text.check_pipeline(pipe)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if unconditional:
            if not prompts:
                raise InvalidInput("prompts: expected at least one prompt, got an empty list")
            condition = text.repeat_conditioning(text.encode_unconditional(pipe), len(prompts))
        else:
            condition = text.encode_prompts(pipe, prompts)
        scheduler = schedule(pipe.scheduler, num_inference_steps)
        if timestep is None:
            timestep = _timestep_of_step(scheduler, step)
        return cls.from_scheduler(pipe.unet, scheduler, timestep, condition, units)

    def __call__(self, x: Tensor) -> Tensor:
        """The score at x: [B, ...] to [B, ...], in the units of this object."""
        return self._score(x, self.units)

    def epsilon(self, x: Tensor) -> Tensor:
        """The predicted noise at x, whatever the network predicts: [B, ...] to [B, ...], eps units."""
        return self._score(x, "eps")

    def with_units(self, units: str) -> ScoreFunction:
        """The same score function in other units ("score" or "eps")."""
        _check_choice("units", units, UNITS)
        other = copy.copy(self)
        other.units = units
        return other

    def predict(self, x: Tensor) -> Tensor:
        """The network's own output at x, in its own parameterization: [B, ...] to [B, ...]."""
        self._check(x)
        timestep = self.timestep.to(x.device)
        if timestep.ndim == 0:
            timestep = timestep.expand(x.shape[0])
        output = self.network(x, timestep, **{**self._extra, **self.conditioning})
        prediction = _first_tensor(output)
        if prediction.shape != x.shape:
            raise UnsupportedModel(
                f"network {type(self.network).__name__}: for x of shape {tuple(x.shape)} it returned shape "
                f"{tuple(prediction.shape)}; a score needs a prediction of x's own shape"
            )
        return prediction

    def _score(self, x: Tensor, units: str) -> Tensor:
        prediction = self.predict(x)
        return score_from_prediction(prediction, x, self.alpha, self.sigma, self.prediction_type, units)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise InvalidInput(f"x: expected a tensor of a floating dtype, got {found}")
        if x.ndim < 2:
            raise InvalidInput(f"x: expected shape [B, ...] with at least 2 dimensions, got {tuple(x.shape)}")
        for name, rows in (*self._per_sample.items(), *_conditioning_rows(self.conditioning)):
            if rows != x.shape[0]:
                raise InvalidInput(f"{name}: expected {x.shape[0]} rows, as x has samples, got {rows}")


def schedule(scheduler: Any, num_inference_steps: int) -> Any:
    """A copy of a scheduler set to ``num_inference_steps``; the scheduler itself is left as it is.

    Raises InvalidInput when the scheduler cannot be set to that number of steps.
    """
    if (
        isinstance(num_inference_steps, bool)
        or not isinstance(num_inference_steps, int)
        or num_inference_steps < 1
    ):
        raise InvalidInput(
            f"num_inference_steps: expected an integer of at least 1, got {num_inference_steps!r}"
        )
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(num_inference_steps)
    except ValueError as error:
        raise InvalidInput(
            f"num_inference_steps: {type(scheduler).__name__} refuses {num_inference_steps}: {error}"
        ) from error
    return scheduler


def _timestep_of_step(scheduler: Any, step: int | Sequence[int]) -> Tensor:
    timesteps = torch.as_tensor(scheduler.timesteps)
    index = _numbers("step", step)
    if index.is_floating_point():
        raise InvalidInput(f"step: expected an integer or a list of integers, got {step!r}")
    if int(index.min()) < 0 or int(index.max()) >= len(timesteps):
        raise InvalidInput(f"step: expected 0 to {len(timesteps) - 1}, got {step!r}")
    return timesteps[index]


def _numbers(name: str, value: Any) -> Tensor:
    """A number, or at least one in a sequence or a tensor [B], as a tensor; Python floats become float64."""
    try:
        numbers = torch.as_tensor(value)
        if numbers.is_floating_point() and not isinstance(value, Tensor):
            numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name}: expected a number or a list of them, got {value!r}") from error
    if numbers.ndim > 1 or numbers.numel() == 0 or numbers.dtype == torch.bool or numbers.is_complex():
        raise InvalidInput(
            f"{name}: expected a number or a list of them, got shape {tuple(numbers.shape)} {numbers.dtype}"
        )
    return numbers


def _check_levels(alpha: Tensor, sigma: Tensor) -> None:
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"{name}: expected finite numbers, got {value.tolist()}")
    if bool((sigma <= 0).any()):
        raise InvalidInput(
            f"sigma: expected more than 0 (without noise there is no score), got {sigma.tolist()}"
        )
    if bool((alpha < 0).any()):
        raise InvalidInput(f"alpha: expected at least 0, got {alpha.tolist()}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _accepts_return_dict(network: Callable[..., Any]) -> bool:
    target = network.forward if isinstance(network, torch.nn.Module) else network
    try:
        return "return_dict" in inspect.signature(target).parameters
    except (TypeError, ValueError):  # callables written in C have no signature
        return False


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output[0] if isinstance(output, (tuple, list)) and output else getattr(output, "sample", None)
    if isinstance(found, Tensor):
        return found
    raise UnsupportedModel(
        f"network: expected a tensor, a tuple beginning with one, or an output with `.sample`, "
        f"got {type(output).__name__}"
    )


def _conditioning_rows(
    conditioning: Mapping[str, Any], prefix: str = "conditioning"
) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []
    for name, value in conditioning.items():
        label = f"{prefix}[{name!r}]"
        if isinstance(value, Tensor) and value.ndim:
            rows.append((label, len(value)))
        elif isinstance(value, Mapping):
            rows += _conditioning_rows(value, label)
    return rows
