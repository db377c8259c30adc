"""Two Gaussians in the plane, one of 5 % and almost a point: eigenvalues of the Hessian while sampling.

    python examples/gaussian_mixture/run.py --out mixture-output

trains a small network on the mixture, follows samples that end in the memorized mode and samples that do
not, and compares the spectra of the Hessian of log p_t at the first, middle and last step with the closed
form. After the toy experiment of Jeon, Kim and No (ICML 2025, arXiv 2412.04140).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import (
    COLORS,
    Conditioning,
    Curvature,
    IdentityRow,
    SpectrumRow,
    add_noise,
    curvature,
    dense_sides,
    identity_row,
    initialised_from,
    new_figure,
    new_scheduler,
    plot_identities,
    print_table,
    say,
    sides,
    spectrum_row,
    train,
    trajectory,
    write_csv,
)

from sharpcore.testing import GaussianMixtureScoreNetwork

WEIGHTS = torch.tensor([0.05, 0.95], dtype=torch.float64)
MEANS = torch.tensor([[5.0, 5.0], [-1.0, -1.0]], dtype=torch.float64)
COVARIANCES = torch.tensor([[[1e-4, 0.0], [0.0, 1e-4]], [[1.0, 0.5], [0.5, 1.0]]], dtype=torch.float64)
MEMORIZED, OTHER = range(2)
# A sample this close to the memorized point has ended in it: 25 of its standard deviations, or 6 of the noise
# that is left at the last step.
NEAR = 0.25
GROUPS = {"memorized": MEMORIZED, "other": OTHER}


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are those of docs/experiments.md."""

    width: int = 128
    training_steps: int = 10000
    batch: int = 512
    rate: float = 2e-3
    sampling_steps: int = 50
    samples: int = 2048
    identity_samples: int = 8192
    identity_steps: int = 8
    seed: int = 0

    @property
    def of_training(self) -> str:
        """What the trained network depends on."""
        return str((self.width, self.training_steps, self.batch, self.rate, self.seed))


@dataclass(frozen=True)
class Results:
    """What `run` found: rows of the tables; per (group, step) the curvature and the true Hessians."""

    spectra: list[SpectrumRow]
    identities: list[IdentityRow]
    exact_identities: list[IdentityRow]
    curvatures: dict[tuple[str, int], Curvature]
    exact: dict[tuple[str, int], Tensor]


class Denoiser(nn.Module):
    """A noise predictor of points [B, 2] at timesteps [B] or []: a residual network of four layers."""

    def __init__(self, width: int, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_buffer("sigma", (1 - scheduler.alphas_cumprod).sqrt(), persistent=False)
        self.register_buffer("frequencies", 1000 ** -torch.linspace(0, 1, 16), persistent=False)
        # Sines of the place make the network as steep as the point is; each is as much damped as the noise
        # blurs its wave, or they would roughen the score where it is smooth.
        self.register_buffer("waves", 2.0 ** torch.arange(5), persistent=False)
        self.enter = nn.Linear(22, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.times = nn.ModuleList(nn.Linear(32, width) for _ in range(4))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.to(x.dtype).expand(len(x))[:, None] * self.frequencies
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        phases = (x[:, :, None] * self.waves).flatten(1)
        sigma = self.sigma[timestep].expand(len(x))[:, None]
        clear = torch.exp(-0.5 * (sigma * self.waves.repeat(2)) ** 2)
        features = torch.cat([x, phases.sin() * clear, phases.cos() * clear], 1)
        hidden = nn.functional.silu(self.enter(features) + self.times[0](embedding))
        for layer, time in zip(self.layers, self.times[1:], strict=True):
            hidden = hidden + nn.functional.silu(layer(hidden) + time(embedding))
        return self.leave(hidden)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the network, figures and tables")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    results = run(options.out, Settings(seed=options.seed))
    for rows in (results.spectra, results.identities, results.exact_identities):
        print_table(rows)
        print()
    return 0


def run(out: Path, settings: Settings) -> Results:
    """Train (or load from `out`), analyse, and write figures and tables to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    scheduler = new_scheduler(settings.sampling_steps)
    with initialised_from(settings.seed):
        network = Denoiser(settings.width, scheduler)
    say(f"training: {settings.training_steps} steps")
    train(
        network,
        draw,
        scheduler,
        steps=settings.training_steps,
        batch=settings.batch,
        rate=settings.rate,
        seed=settings.seed,
        # Denser where there is little noise, where the memorized point is steepest.
        timesteps=torch.arange(1000) ** 2 // 1000,
        cache=out / "network.pt",
        settings=settings.of_training,
    )
    return analyse(network, scheduler, settings, out)


def exact_network(scheduler: DDIMScheduler) -> GaussianMixtureScoreNetwork:
    """The noise predictor of the mixture in closed form, float64, at the scheduler's timesteps."""
    abar = scheduler.alphas_cumprod.double()
    return GaussianMixtureScoreNetwork(
        WEIGHTS, MEANS, COVARIANCES, alpha=abar.sqrt(), sigma=(1 - abar).sqrt(), by_timestep=True
    )


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Conditioning]:
    """Points [batch, 2] of the mixture, float32; the network has no conditioning."""
    modes = (torch.rand(batch, generator=generator) >= WEIGHTS[MEMORIZED]).long()
    return draw_modes(modes, generator).float(), {}


def draw_modes(modes: Tensor, generator: torch.Generator) -> Tensor:
    """A point of each of the given modes, [B, 2] float64."""
    noise = torch.randn(len(modes), 2, generator=generator, dtype=torch.float64)
    factors = torch.linalg.cholesky(COVARIANCES)
    return MEANS[modes] + (factors[modes] @ noise[..., None])[..., 0]


def analyse(
    network: nn.Module,
    scheduler: DDIMScheduler,
    settings: Settings,
    out: Path,
    dtype: torch.dtype = torch.float32,
) -> Results:
    """Spectra along sampling trajectories of `network`, identities at noised data, beside the closed form."""
    truth = exact_network(scheduler)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.samples, 2, generator=generator).to(dtype)
    latents = trajectory(network, scheduler, noise)
    ends = torch.linalg.vector_norm(latents[-1].double() - MEANS[MEMORIZED], dim=1) < NEAR
    if not 0 < int(ends.sum()) < len(ends):
        raise SystemExit(
            f"{int(ends.sum())} of {len(ends)} samples end in the memorized mode: nothing to compare"
        )
    last = settings.sampling_steps - 1
    curvatures, exact, spectra = {}, {}, []
    for group, mode in GROUPS.items():
        chosen = ends if mode == MEMORIZED else ~ends
        for step in (0, (last + 1) // 2, last):
            x, timestep = latents[step][chosen], int(scheduler.timesteps[step])
            found = curvature(network, scheduler, x, timestep, at_once=128)
            exact[group, step] = truth.hessian(x.double(), timestep)
            curvatures[group, step] = found
            spectra.append(spectrum_row(group, step, scheduler, found, exact[group, step]))
    write_csv(out / "spectra.csv", spectra)
    plot_spectra(latents[-1], ends, curvatures, exact, spectra, out / "spectra.png")
    identities, exact_identities = [], []
    for step in torch.linspace(0, last, settings.identity_steps).round().int().tolist():
        timestep = int(scheduler.timesteps[step])
        modes = (torch.rand(settings.identity_samples, generator=generator) >= WEIGHTS[MEMORIZED]).long()
        clean = draw_modes(modes, generator)
        fresh = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        x = add_noise(clean, torch.tensor(timestep), scheduler, fresh)
        identities.append(identity_row("network", timestep, sides(network, scheduler, x.to(dtype), timestep)))
        exact_identities.append(
            identity_row(
                "closed form", timestep, dense_sides(truth.score(x, timestep), truth.hessian(x, timestep))
            )
        )
    write_csv(out / "identities.csv", identities + exact_identities)
    plot_identities(identities + exact_identities, out / "identities.png")
    return Results(spectra, identities, exact_identities, curvatures, exact)


def plot_spectra(
    samples: Tensor,
    ends: Tensor,
    curvatures: dict[tuple[str, int], Curvature],
    exact: dict[tuple[str, int], Tensor],
    rows: list[SpectrumRow],
    path: Path,
) -> None:
    """Both eigenvalues of each sample, a panel per step, the closed form behind; the samples on the left."""
    steps = list(dict.fromkeys(step for _, step in curvatures))
    figure, panels = new_figure(1, len(steps) + 1, width=3.6)
    for (group, mode), color in zip(GROUPS.items(), COLORS, strict=True):
        x = samples[ends if mode == MEMORIZED else ~ends][:400]
        panels[0][0].plot(x[:, 0], x[:, 1], ".", color=color, markersize=4, alpha=0.6, label=group)
    panels[0][0].set(title="samples", aspect="equal")
    panels[0][0].legend(fontsize=8, framealpha=0.85, edgecolor="none")
    for axes, step in zip(panels[0][1:], steps, strict=True):
        for group, color in zip(GROUPS, COLORS, strict=True):
            truth = torch.linalg.eigvalsh(exact[group, step][:100])
            found = curvatures[group, step].eigenvalues[:100]
            axes.plot(truth[:, 0], truth[:, 1], "x", color="0.45", markersize=5, linewidth=0.7)
            axes.plot(found[:, 0], found[:, 1], ".", color=color, markersize=5, alpha=0.7)
        row = next(row for row in rows if row.step == step)
        axes.plot(row.bound, row.bound, "*", color="0.2", markersize=9, label="−1/σ²")
        axes.plot([], [], "x", color="0.45", label="closed form")
        axes.axhline(0, color="0.3", linewidth=0.8)
        if row.bound < -50:
            axes.set(xscale="symlog", yscale="symlog", xticks=[-100, -10, -1, 0, 1])
            axes.margins(0.1)
        else:
            axes.locator_params(axis="x", nbins=4)
        axes.set(title=f"step {step}, timestep {row.timestep}", xlabel="smaller eigenvalue")
    panels[0][1].set_ylabel("larger eigenvalue")
    panels[0][1].legend(fontsize=8, framealpha=0.85, edgecolor="none")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    raise SystemExit(main())
