"""spectrum(pipe, prompts): what the Hessian of log p_t tells at the states of prompts, as a table."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sharpcore.arguments import check_prompts, check_seeds, check_steps, is_integer, is_number
from sharpcore.curvature import CONDITIONS, Curvature, Products, Trajectories, latent_shape
from sharpcore.eigenvalues import DENSE_VECTORS, METHODS, Numbers, compute
from sharpcore.errors import InvalidInput, NonFiniteError, OutOfMemory
from sharpcore.fingerprint import fingerprint
from sharpcore.krylov.run import default_basis
from sharpcore.memory import available_bytes, is_out_of_memory
from sharpcore.table import Row, ScoreTable
from sharpcore.trajectory import warn_if_cut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Samples in one linearization, as the scorer has them.
_SAMPLES = {"cpu": 4, "cuda": 32}
# Bytes that a product may need for each vector beside the residuals, as a multiple of those: 0.2 was measured
# on small networks. An allocation that fails all the same halves the batch.
_WORKSPACE = 0.5

_PLACE = {"prompt": "text", "seed": "int", "step": "int"}
_PLACE |= dict.fromkeys(("timestep", "alpha", "sigma"), "float")
_ESTIMATES = (
    "nonnegative", "nonnegative_fraction", "nonnegative_mass", "trace", "frobenius", "asymmetry", "flipd",
    "lhsd",
)  # fmt: skip
_NUMBERS = {
    "condition": "text",
    "method": "text",
    "result": "text",
    "products": "int",
    "dimension": "int",
    "smallest_eigenvalue": "float",
    "largest_eigenvalue": "float",
    "smallest": "list",
    "smallest_residuals": "list",
    "largest": "list",
    "largest_residuals": "list",
    **{f"{name}{end}": "float" for name in _ESTIMATES for end in ("", "_se")},
    "score_norm": "float",
    "density_grid": "list",
    "density": "list",
    "density_se": "list",
}


class SpectrumTable(ScoreTable):
    """Spectra of prompts, one row (a dict) per prompt, seed and step.

    Columns, all in score units: `prompt`, `seed`, `step`, `timestep`, `alpha`, `sigma` (noise level);
    `condition`, `method` ("dense" or "lanczos"), `result` ("exact", or how the solver ended), `products`
    (with the Jacobian or its transpose), `dimension` d; `smallest_eigenvalue`, `largest_eigenvalue`, and the
    lists `smallest`, `largest` of k each, the outermost first, with `smallest_residuals`,
    `largest_residuals` ||H v - l v||; `nonnegative` (how many eigenvalues), `nonnegative_fraction` (of d),
    `nonnegative_mass` (their sum), `trace`, `frobenius` (norm of the Jacobian), `asymmetry` (of it:
    ||J - J^T|| / ||J||), `flipd` and `lhsd` (local intrinsic dimension), each with its standard error `_se`,
    0 where exact; `score_norm`; `density_grid`, `density`, `density_se` (fraction of the eigenvalues per
    unit, smoothed); `eigenvalues`, if asked for; `error` (None or a sentence; the numbers are None then).
    """

    standard: ClassVar[Mapping[str, str]] = {**_PLACE, **_NUMBERS, "eigenvalues": "list", "error": "text"}

    @classmethod
    def empty_rows(cls, settings: Mapping[str, Any], timesteps: Sequence[float]) -> list[Row]:
        """The rows of one prompt without their numbers, for a run with these settings."""
        names = [*_NUMBERS, *(["eigenvalues"] if settings["eigenvalues"] else [])]
        return [
            {"seed": seed, "step": step, "timestep": timestep, "alpha": None, "sigma": None}
            | dict.fromkeys(names)
            for seed in settings["seeds"]
            for step, timestep in zip(settings["steps"], timesteps, strict=True)
        ]

    def plot(self, path: str | Path | None = None, *, label_column: str | None = None) -> Figure:
        """The extremal eigenvalues over steps; `sharpcore.report.spectra` has the other pictures.

        `label_column` (default: `memorized` or `label`, if there is one) colours the prompts.
        """
        from sharpcore.report.spectra import plot_steps

        return plot_steps(self, path=path, label_column=label_column)

    def _shown(self) -> list[str]:
        return [
            "prompt", "seed", "step", "smallest_eigenvalue", "largest_eigenvalue", "nonnegative", "trace",
            "flipd", "error",
        ]  # fmt: skip


def spectrum(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] = (0, 25, 49),
    seeds: int | Sequence[int] = 1,
    k: int = 10,
    condition: str = "prompt",
    method: str = "auto",
    block: int = 4,
    tolerance: float | None = None,
    max_products: int | None = None,
    probes: int = 8,
    depth: int = 32,
    eigenvalues: bool = False,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    backend: str = "auto",
    precision: str = "float32",
    memory_budget: int | None = None,
    on_error: str = "raise",
    time_limit: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpectrumTable:
    """The spectrum of the Hessian of log p_t at the states of guided trajectories.

    One row for each prompt, seed and step, in this order; see `SpectrumTable` for the columns. Scores and
    Hessians are in score units.

    Args:
        pipe: a Stable Diffusion pipeline (1.x, 2.x, XL); it is not changed.
        prompts: strings, at least one.
        steps: indices into the timesteps of the pipeline's scheduler at `num_inference_steps`.
        seeds: a number n (seeds 42, ..., 42 + n - 1) or a list; seed s draws its latent alone, as in
            `SharpnessScorer`.
        k: eigenvalues at each end; where there are fewer than 2k, or fewer are found, half of them at each.
        condition: "prompt" for H(x, prompt), "none" for H(x, no prompt) at the same states, "difference" for
            H(x, prompt) - H(x, no prompt).
        method: "dense" multiplies with all d unit vectors (d <= 4096) and is exact; "lanczos" finds the ends
            by block Lanczos and estimates the rest from random probes, with standard errors; "auto" is dense
            up to d = 1024.
        block, tolerance, max_products: of block Lanczos; see `sharpcore.krylov.block_lanczos`.
        probes, depth: random vectors for each estimate, and the Lanczos steps that each of them takes for the
            density and the counts.
        eigenvalues: whether to keep all d of them where the method is dense.
        guidance_scale: of the trajectory.
        latent_size: height and width of the latent; by default those that the UNet was trained with.
        backend, precision: as in `sharpcore.linearize`.
        memory_budget: bytes for a batch; by default half of what is free on the device.
        on_error: "raise", or "record": a prompt that cannot be encoded, or whose network is not finite, gives
            rows with its `error`, and the others are computed.
        time_limit: seconds; the rows that are not begun or not finished by then say so in their `error`.
        progress: called with the numbers of finished rows and of all rows.

    Raises InvalidInput for bad arguments or prompts, NonFiniteError where the network is not finite,
    OutOfMemory where not even one sample fits.
    """
    blocks = iterate_spectra(
        pipe,
        prompts,
        steps=steps,
        seeds=seeds,
        k=k,
        condition=condition,
        method=method,
        block=block,
        tolerance=tolerance,
        max_products=max_products,
        probes=probes,
        depth=depth,
        eigenvalues=eigenvalues,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        latent_size=latent_size,
        backend=backend,
        precision=precision,
        memory_budget=memory_budget,
        on_error=on_error,
        time_limit=time_limit,
    )
    rows: list[Row] = []
    for finished in blocks:
        rows += finished
        if progress is not None:
            progress(len(rows), len(prompts) * len(finished))
    return SpectrumTable(rows)


def iterate_spectra(
    pipe: Any,
    prompts: Sequence[str],
    *,
    steps: Sequence[int] = (0, 25, 49),
    seeds: int | Sequence[int] = 1,
    k: int = 10,
    condition: str = "prompt",
    method: str = "auto",
    block: int = 4,
    tolerance: float | None = None,
    max_products: int | None = None,
    probes: int = 8,
    depth: int = 32,
    eigenvalues: bool = False,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    latent_size: tuple[int, int] | None = None,
    backend: str = "auto",
    precision: str = "float32",
    memory_budget: int | None = None,
    on_error: str = "raise",
    time_limit: float | None = None,
) -> Iterator[list[Row]]:
    """As `spectrum`, but yields the rows of one prompt at a time, in order, once they are computed."""
    walk = Trajectories(
        pipe, num_inference_steps, guidance_scale, Products(backend=backend, precision=precision)
    )
    _check_choice("condition", condition, CONDITIONS)
    _check_choice("method", method, METHODS)
    for name, value, least in (("k", k, 1), ("block", block, 1), ("probes", probes, 2), ("depth", depth, 1)):
        if not is_integer(value) or value < least:
            raise InvalidInput(f"{name}: expected an integer of at least {least}; got {value!r}")
    if max_products is not None and not (is_integer(max_products) and max_products > 0):
        raise InvalidInput(f"max_products: expected a positive integer; got {max_products!r}")
    for name, limit in (
        ("tolerance", tolerance),
        ("memory_budget", memory_budget),
        ("time_limit", time_limit),
    ):
        if limit is not None and not (is_number(limit) and 0 < limit < math.inf):
            raise InvalidInput(f"{name}: expected a positive number; got {limit!r}")
    how = Numbers(k, method, condition, block, tolerance, max_products, probes, depth, bool(eigenvalues))
    shape = latent_shape(pipe, latent_size)
    dimension = math.prod(shape)
    chosen = how.method_for(dimension)
    least = min(block, dimension)
    if chosen == "lanczos" and max_products is not None and max_products < least:
        raise InvalidInput(f"max_products: expected at least those of one block, {least}; got {max_products}")
    settings = {
        "steps": check_steps(steps, len(walk.timesteps)),
        "seeds": check_seeds(seeds),
        "eigenvalues": how.keep_eigenvalues and chosen == "dense",
    }
    errors = check_prompts(prompts, on_error)
    for network in (pipe.unet, getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)):
        if network is not None:
            fingerprint(network)  # names a weight that is not finite
    run = _Run(walk, how, settings, shape, memory_budget, time_limit, on_error == "record")
    return run.blocks(list(prompts), errors)


class _TimeUp(Exception):
    """The time limit has passed."""


class _Run:
    """One call of `spectrum`: batches of samples, a sample being a prompt with a seed."""

    def __init__(
        self,
        walk: Trajectories,
        how: Numbers,
        settings: Mapping[str, Any],
        shape: tuple[int, int, int],
        memory_budget: float | None,
        time_limit: float | None,
        record: bool,
    ) -> None:
        self.walk, self.how, self.shape, self.record = walk, how, shape, record
        self.steps, self.seeds = settings["steps"], settings["seeds"]
        self.empty = SpectrumTable.empty_rows(settings, [walk.timesteps[step] for step in self.steps])
        self.memory_budget, self.time_limit = memory_budget, time_limit
        self.deadline = math.inf if time_limit is None else time.monotonic() + time_limit
        self.most, self.learned = 1, False  # samples in a batch: one until it is known what one takes

    def blocks(self, prompts: list[str], errors: list[str | None]) -> Iterator[list[Row]]:
        waiting = [(i, seed) for i, error in enumerate(errors) if error is None for seed in self.seeds]
        done: dict[tuple[int, int], list[Row]] = {}
        for i, prompt in enumerate(prompts):
            if errors[i] is not None:
                yield [{"prompt": prompt} | row | {"error": errors[i]} for row in self.empty]
                continue
            warn_if_cut(self.walk.pipe, i, prompt)
            while (i, self.seeds[-1]) not in done:
                batch = waiting[: self.most]
                found = self._batch([(prompts[j], seed) for j, seed in batch])
                done.update(zip(batch[: len(found)], found, strict=True))
                del waiting[: len(found)]
            yield [row for seed in self.seeds for row in done.pop((i, seed))]

    def _batch(self, samples: list[tuple[str, int]]) -> list[list[Row]]:
        """The rows of some samples, or of the first ones where memory does not hold all."""
        while True:
            try:
                return self._attempt(samples)
            except NonFiniteError:
                if not self.record or len(samples) == 1:
                    raise
                return [row for sample in samples for row in self._attempt([sample])]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(samples) == 1:
                    raise OutOfMemory(
                        f"one sample with a latent of {self.shape} does not fit into memory ({error}). A "
                        "smaller latent_size, a smaller block, or a 16-bit dtype would need less"
                    ) from error
            # Not in the handler: there the traceback still holds the tensors of the failed attempt.
            self.most = max(1, len(samples) // 2)
            samples = samples[: self.most]

    def _attempt(self, samples: list[tuple[str, int]]) -> list[list[Row]]:
        prompts, seeds = zip(*samples, strict=True)
        rows: list[dict[int, Row]] = [{} for _ in samples]
        reason = None
        try:
            self._check_time()
            curvatures = self.walk.from_seeds(prompts, seeds, self.steps, self.shape)
            for step, curvature in zip(sorted(self.steps), curvatures, strict=True):
                level = {"alpha": curvature.alpha, "sigma": curvature.sigma, "condition": self.how.condition}
                if not self.learned:
                    self._learn(curvature)
                for sample, numbers in zip(rows, compute(curvature, self.how, self._check_time), strict=True):
                    sample[step] = level | numbers
                del curvature  # its linearizations are freed before the next ones are made
        except _TimeUp:
            reason = f"not computed: the time limit of {self.time_limit:g} s had passed"
        except NonFiniteError as error:
            if not self.record or len(samples) > 1:
                raise
            reason = str(error)
        return [
            [
                {"prompt": prompt}
                | row
                | sample.get(row["step"], {})
                | {"error": None if row["step"] in sample else reason}
                for row in self.empty
                if row["seed"] == seed
            ]
            for (prompt, seed), sample in zip(samples, rows, strict=True)
        ]

    def _learn(self, curvature: Curvature) -> None:
        """How many samples a batch may have, from what the first one takes."""
        self.learned = True
        linearization = curvature.unconditional if self.how.condition == "none" else curvature.conditional
        device = curvature.x.device
        budget: float | None = self.memory_budget
        if budget is None:
            free = available_bytes(device)
            budget = math.inf if free is None else free / 2
        branches = 2 if self.how.condition == "difference" else 1
        sample, room = max(1, linearization.residual_bytes), budget - linearization.weight_bytes
        dimension = curvature.x[0].numel()
        if self.how.method_for(dimension) == "dense":
            capacity = (room / sample - _WORKSPACE * DENSE_VECTORS) / branches
        else:
            rows = default_basis(dimension, min(2 * self.how.k, dimension), self.how.block)
            basis = torch.float64.itemsize * dimension * rows
            capacity = room / (sample * (branches + _WORKSPACE * self.how.block) + basis)
        self.most = max(1, int(min(_SAMPLES.get(device.type, _SAMPLES["cpu"]), capacity)))

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TimeUp


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidInput(f"{name}: expected one of {', '.join(choices)}; got {value!r}")
