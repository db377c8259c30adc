"""What the toy experiments share: training, sampling, dense Hessians, identities, tables and figures."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from sharpcore import Hessian, ScoreFunction, ScoreJacobian, linearize
from sharpcore.krylov import dense, trace, trace_power

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#c0392b", "#2c6fa6")
Conditioning = Mapping[str, Tensor]
Draw = Callable[[int, torch.Generator], tuple[Tensor, Conditioning]]


def new_scheduler(num_inference_steps: int, prediction: str = "epsilon") -> DDIMScheduler:
    """DDIM with the noise schedule of Stable Diffusion 1, set to so many sampling steps.

    The network predicts the noise ("epsilon") or the clean sample ("sample").
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


@contextmanager
def initialised_from(seed: int) -> Iterator[None]:
    """First weights of modules made inside come from `seed`; torch's global generator stays untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def add_noise(clean: Tensor, timestep: Tensor, scheduler: DDIMScheduler, noise: Tensor) -> Tensor:
    """alpha x0 + sigma e, all of shape [B, ...], at timesteps [B] or []."""
    abar = scheduler.alphas_cumprod[timestep].reshape(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    return abar.sqrt() * clean + (1 - abar).sqrt() * noise


def train(
    network: nn.Module,
    draw: Draw,
    scheduler: DDIMScheduler,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    timesteps: Tensor | None = None,
    cache: Path | None = None,
    settings: str = "",
) -> list[float]:
    """Train a network on the squared error of what it predicts; returns the loss of each step.

    Errors of clean samples are weighted with the signal-to-noise ratio, at most 5 (Hang et al., arXiv
    2303.09556): without it hardly anything would be learned of low noise.
    Timesteps are drawn from those given (repetitions make one more frequent), by default from all alike.
    ``draw(batch, generator)`` gives clean samples [batch, ...] and what else the network is called with. All
    randomness comes from a generator with ``seed``. With ``cache`` a finished network is kept there, and
    loaded instead of trained when ``settings`` are the same.
    """
    if cache is not None and cache.exists():
        saved = torch.load(cache, weights_only=True)
        if saved["settings"] == settings:
            network.load_state_dict(saved["weights"])
            network.eval()
            return saved["losses"]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    # The rate falls to zero, which averages the last weights as a moving average would.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / (0.05 * steps + 1), (steps - done) / (0.95 * steps))
    )
    if timesteps is None:
        timesteps = torch.arange(scheduler.config.num_train_timesteps)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    losses: list[float] = []
    network.train()
    began = time.perf_counter()
    for step in range(steps):
        clean, conditioning = draw(batch, generator)
        timestep = timesteps[torch.randint(len(timesteps), (batch,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = add_noise(clean, timestep, scheduler, noise)
        prediction = predict(network, noisy, timestep, conditioning)
        if scheduler.config.prediction_type == "sample":
            weight = snr[timestep].clamp(max=5).sqrt().reshape(-1, *[1] * (clean.ndim - 1))
            loss = (weight * (prediction - clean)).square().mean()
        else:
            loss = (prediction - noise).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            recent = sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])
            say(f"  step {step + 1}/{steps}, loss {recent:.4f}, {time.perf_counter() - began:.0f} s")
    network.eval()
    if cache is not None:
        torch.save({"settings": settings, "weights": network.state_dict(), "losses": losses}, cache)
    return losses


def predict(network: nn.Module, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's prediction [B, ...], of a module of diffusers or of one that returns a tensor."""
    output = network(x, timestep, **conditioning)
    return output if isinstance(output, Tensor) else output.sample


@torch.no_grad()
def trajectory(
    network: nn.Module,
    scheduler: DDIMScheduler,
    noise: Tensor,
    *,
    conditioning: Conditioning | None = None,
    unconditional: Conditioning | None = None,
    guidance: float = 1.0,
) -> list[Tensor]:
    """Deterministic DDIM from noise [B, ...]: the latents that each step sees, then the samples.

    Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) when ``unconditional`` is given.
    """
    latents = [noise]
    for timestep in scheduler.timesteps:
        x = latents[-1]
        prediction = predict(network, x, timestep, conditioning or {})
        if unconditional is not None:
            base = predict(network, x, timestep, unconditional)
            prediction = base + guidance * (prediction - base)
        latents.append(scheduler.step(prediction, timestep, x).prev_sample)
    return latents


@dataclass(frozen=True)
class Curvature:
    """At B points: scores [B, d], Hessians [B, d, d] and their eigenvalues [B, d] ascending, all float64.

    `asymmetry` [B] is ||J - J^T||_F / ||J||_F of the score's Jacobian J, whose symmetric part the Hessian is.
    """

    score: Tensor
    hessian: Tensor
    eigenvalues: Tensor
    asymmetry: Tensor


def curvature(
    network: nn.Module,
    scheduler: DDIMScheduler,
    x: Tensor,
    timestep: int,
    conditioning: Conditioning | None = None,
    *,
    at_once: int = 8,
) -> Curvature:
    """Score and whole Hessian of log p_t at x [B, ...], for `at_once` samples at a time."""
    parts = []
    for start in range(0, len(x), at_once):
        rows = slice(start, start + at_once)
        chosen = {name: value[rows] for name, value in (conditioning or {}).items()}
        score = ScoreFunction.from_scheduler(network, scheduler, timestep, chosen)
        linearization = linearize(score, x[rows].contiguous())
        jacobian = dense(ScoreJacobian(linearization))
        hessian = (jacobian + jacobian.mT) / 2
        asymmetry = torch.linalg.matrix_norm(jacobian - jacobian.mT) / torch.linalg.matrix_norm(jacobian)
        value = linearization.value.double().flatten(1)
        parts.append((value, hessian, torch.linalg.eigvalsh(hessian), asymmetry))
    return Curvature(*(torch.cat(part) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class SpectrumRow:
    """A group's eigenvalues at one step: means over its samples, in score units.

    ``bound`` is -1/sigma^2, which no eigenvalue of a true Hessian is below; ``negative`` the share of
    eigenvalues below zero, ``all_negative`` that of samples with no other; ``error`` the median of
    ||H - H_exact||_F / ||H_exact||_F where the density is known.
    """

    group: str
    step: int
    timestep: int
    samples: int
    bound: float
    smallest: float
    median: float
    largest: float
    negative: float
    all_negative: float
    asymmetry: float
    error: float | None = None


def spectrum_row(
    group: str, step: int, scheduler: DDIMScheduler, found: Curvature, exact: Tensor | None = None
) -> SpectrumRow:
    """Summarize the eigenvalues at one step; `exact` are the true Hessians [B, d, d] where they are known."""
    timestep = int(scheduler.timesteps[step])
    values = found.eigenvalues
    error = None
    if exact is not None:
        distance = torch.linalg.matrix_norm(found.hessian - exact) / torch.linalg.matrix_norm(exact)
        error = float(distance.median())
    return SpectrumRow(
        group=group,
        step=step,
        timestep=timestep,
        samples=len(values),
        bound=_bound(scheduler, timestep),
        smallest=float(values[:, 0].mean()),
        median=float(values.median(1).values.mean()),
        largest=float(values[:, -1].mean()),
        negative=float((values < 0).double().mean()),
        all_negative=float((values < 0).all(1).double().mean()),
        asymmetry=float(found.asymmetry.mean()),
        error=error,
    )


def _bound(scheduler: DDIMScheduler, timestep: int) -> float:
    return -1 / (1 - float(scheduler.alphas_cumprod[timestep]))


@dataclass(frozen=True)
class IdentityRow:
    """Both sides of E||s||^2 = -E tr H and of E||Hs||^2 = -E tr H^3, with standard errors."""

    group: str
    timestep: int
    samples: int
    squared_score: float
    squared_score_se: float
    minus_trace: float
    minus_trace_se: float
    squared_product: float
    squared_product_se: float
    minus_cubic_trace: float
    minus_cubic_trace_se: float


Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def dense_sides(score: Tensor, hessian: Tensor) -> Sides:
    """||s||^2, -tr H, ||Hs||^2 and -tr H^3, each [B], from scores [B, d] and Hessians [B, d, d]."""
    product = (hessian @ score[..., None])[..., 0]
    values = torch.linalg.eigvalsh(hessian)
    return score.square().sum(1), -values.sum(1), product.square().sum(1), -values.pow(3).sum(1)


def sides(
    network: nn.Module,
    scheduler: DDIMScheduler,
    x: Tensor,
    timestep: int,
    conditioning: Conditioning | None = None,
    *,
    products: int = 8,
    seed: int = 0,
) -> Sides:
    """As `dense_sides` of a network at x [B, ...], the traces estimated with ``products`` products a sample.

    What a sample's traces lack in accuracy is small beside their spread over the samples, so many samples
    with few products tell more of a mean than few samples with whole Hessians. Exact where d products do it.
    """
    score = ScoreFunction.from_scheduler(network, scheduler, timestep, conditioning)
    linearization = linearize(score, x)
    hessian, value = Hessian(linearization), linearization.value
    # Most of a Hessian near pure noise, and all of a memorized point's, is this multiple of the identity.
    options: dict[str, Any] = {"shift": _bound(scheduler, timestep), "products": products, "seed": seed}
    first = trace(hessian, "hutchinson", **options).value
    cubic = trace_power(hessian, 3, **options).value
    squares = (part.double().flatten(1).square().sum(1) for part in (value, hessian @ value))
    return next(squares), -first, next(squares), -cubic


def identity_row(group: str, timestep: int, found: Sides) -> IdentityRow:
    """The four means over samples of p_t.

    The first identity holds for every density, the second for Gaussian ones (Jeon, Kim and No, arXiv
    2412.04140).
    """
    numbers = [
        number for side in found for number in (float(side.mean()), float(side.std() / len(side) ** 0.5))
    ]
    return IdentityRow(group, timestep, len(found[0]), *numbers)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_table(rows: Sequence[Any]) -> None:
    """Rows of one dataclass as an aligned table; columns that are None in every row are left out."""
    names = [f.name for f in fields(rows[0]) if any(getattr(row, f.name) is not None for row in rows)]
    cells = [[_cell(getattr(row, name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(names)]
    for line in (names, *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Rows of one dataclass as a CSV file with six significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(rows[0])])
        for row in rows:
            writer.writerow([_cell(value, 6) for value in asdict(row).values()])


def _cell(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def plot_identities(rows: Sequence[IdentityRow], path: Path) -> None:
    """Both identities over timesteps: circles (with two standard errors) left sides, lines right ones."""
    figure, panels = new_figure(1, 2)
    sides = (("squared_score", "minus_trace"), ("squared_product", "minus_cubic_trace"))
    words = (("E‖s‖²", "−E tr H"), ("E‖Hs‖²", "−E tr H³"))
    groups = list(dict.fromkeys(row.group for row in rows))
    for axes, (left, right), (left_word, right_word) in zip(panels[0], sides, words, strict=True):
        for group, color, line in zip(groups, COLORS, ("-", (0, (4, 3))), strict=True):
            own = [row for row in rows if row.group == group]
            times = [row.timestep for row in own]
            axes.errorbar(
                times,
                [getattr(row, left) for row in own],
                [2 * getattr(row, f"{left}_se") for row in own],
                fmt="o",
                color=color,
                markersize=5,
                markerfacecolor="none",
                label=f"{left_word}, {group}",
            )
            axes.plot(
                times,
                [getattr(row, right) for row in own],
                color=color,
                linestyle=line,
                label=f"{right_word}, {group}",
            )
        axes.set(yscale="log", xlabel="timestep (sampling goes from right to left)")
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
    panels[0][0].set_title("exact for any density")
    panels[0][1].set_title("exact for Gaussian densities")
    figure.savefig(path, dpi=90)


def new_figure(rows: int, columns: int, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    return figure, grid
