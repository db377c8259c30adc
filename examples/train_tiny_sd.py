"""Trains a tiny Stable Diffusion pipeline on MNIST digits that memorizes some of its prompts.

    python examples/train_tiny_sd.py --out tiny-sd-eps

makes a model like the default model of sharpcore: 32x32 images, a 4x16x16 latent, a UNet of 2.4 million
parameters, memorized prompts in three tiers of repetition, and the measured ground truth of what is copied.
It needs the packages diffusers, transformers, Pillow and mlxtend, no network and no GPU. `--smoke` goes
through all of it in seconds.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_sd.captions import CaptionPlan
from tiny_sd.digits import load_digits
from tiny_sd.settings import LATENT_SHAPE, Settings
from tiny_sd.tokenizer import build_tokenizer


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, new or empty unless resuming"
    )
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--seed", type=int, default=0, help="decides on names, split, weights and noise")
    parser.add_argument("--threads", type=int, help="threads for torch (default: torch's own choice)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="fraction of the full number of steps")
    parser.add_argument(
        "--smoke", action="store_true", help="few images, four steps a phase: a run of seconds"
    )
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in --out")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop after so many training steps")
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {options.seed}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    if options.stop_after is not None and options.stop_after < 0:
        parser.error(f"--stop-after: expected 0 or more, got {options.stop_after}")
    if not (math.isfinite(options.steps_scale) and options.steps_scale > 0):
        parser.error(f"--steps-scale: expected a positive number, got {options.steps_scale}")
    if (
        not options.resume
        and options.out.exists()
        and (not options.out.is_dir() or any(options.out.iterdir()))
    ):
        parser.error(f"--out: {options.out} is not an empty folder; add --resume to continue a run in it")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or continue a model; returns the exit status (130 after Ctrl-C)."""
    options = parse_arguments(arguments)
    settings = Settings(options.prediction, options.seed, options.steps_scale, options.smoke)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = shlex.join(["train_tiny_sd.py", *(sys.argv[1:] if arguments is None else arguments)])
    # Imported only now because diffusers takes seconds, and wrong arguments should be refused at once.
    from tiny_sd.running import Stopped

    try:
        make_model(options.out, settings, options.resume, options.stop_after, command)
    except Stopped:
        print(f"stopped after {options.stop_after} steps; --resume continues")
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def make_model(out: Path, settings: Settings, resume: bool, stop_after: int | None, command: str) -> None:
    """Train, generate, and write the folder `out`; raises Stopped after `stop_after` training steps."""
    from diffusers import StableDiffusionPipeline
    from tiny_sd.evaluation import write_results
    from tiny_sd.networks import equalise_latents, new_scheduler
    from tiny_sd.running import Allowance, Checkpoint, duration, run, say, seconds_per_sample
    from tiny_sd.training import AutoencoderTraining, DenoiserTraining

    checkpoint = Checkpoint(out / "checkpoint.pt", settings)
    if resume:
        if not checkpoint.path.exists():
            if (out / "MODEL_CARD.md").exists():
                say(f"{out} is finished; there is nothing to resume")
                return
            raise SystemExit(f"--resume: {checkpoint.path} does not exist")
        checkpoint.read()
    out.mkdir(parents=True, exist_ok=True)

    digits = load_digits(settings.images_per_digit)
    plan = CaptionPlan(digits, settings.seed)
    tokenizer = build_tokenizer(plan.word_counts(), out / "tokenizer")
    images = torch.from_numpy(np.repeat(2 * digits.images[:, None] - 1, 3, axis=1))

    no_latents = torch.zeros(len(images), *LATENT_SHAPE)
    denoising = seconds_per_sample(lambda: DenoiserTraining(settings, plan, tokenizer, no_latents))
    encoding = seconds_per_sample(lambda: AutoencoderTraining(settings, images))
    autoencoder = AutoencoderTraining(settings, images)
    denoiser = DenoiserTraining(settings, plan, tokenizer, no_latents)
    # A generated sample takes two evaluations a step, each about a third of a training step on one sample.
    evaluations = 4 * settings.evaluated_prompts * len(settings.generation_seeds) * settings.generation_steps
    generating = denoising / 3 * evaluations
    after_autoencoder = denoising * denoiser.samples_left() + generating
    total = encoding * autoencoder.samples_left() + after_autoencoder
    say(
        f"{settings.prediction}: {autoencoder.steps} autoencoder steps, {denoiser.steps} denoiser steps, "
        f"about {duration(total)} for a whole run with {torch.get_num_threads()} thread(s)"
    )

    allowance = Allowance(stop_after)
    run(autoencoder, checkpoint, allowance, after_autoencoder)
    vae = autoencoder.vae.eval()
    denoiser.latents = equalise_latents(vae, images)
    run(denoiser, checkpoint, allowance, generating)
    denoiser.use_average()

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=new_scheduler(settings.prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    name_text_weights(out / "text_encoder" / "model.safetensors")
    write_results(out, pipeline, plan, settings, denoiser, command)
    checkpoint.path.unlink()
    say(f"wrote {out}")


def name_text_weights(path: Path) -> None:
    """Name the text encoder's weights as every version of transformers reads them.

    Versions since 5 write them without the prefix `text_model.`, and older ones then silently start from
    random weights.
    """
    prefix = "text_model."
    weights = load_file(path)
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in weights.items()}
    save_file(named, path, metadata={"format": "pt"})


if __name__ == "__main__":
    raise SystemExit(main())
