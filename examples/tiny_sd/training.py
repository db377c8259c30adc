"""The two trainings of a run: first the autoencoder, then the denoiser jointly with the text encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from torch.nn.utils import clip_grad_norm_
from transformers import CLIPTokenizer

from .captions import CaptionPlan
from .networks import new_autoencoder, new_scheduler, new_text_encoder, new_unet
from .settings import EMA_DECAY, LATENT_SHAPE, LEARNING_RATE, Phase, Settings

KL_WEIGHT = 1e-4


class Training(Protocol):
    """What the loop needs: `losses` has an entry for each step done, of the `steps` there are."""

    name: str
    steps: int
    losses: list[float]

    def step(self) -> float: ...

    def samples_left(self) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 without emulation, as far as torch can tell."""
    # Where torch is too old to be asked, float32 is the safe answer: right on every machine, a fifth slower.
    query = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: Mapping[str, Any] = query()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class AutoencoderTraining:
    """Trains the autoencoder on images [N, 3, 32, 32] in [-1, 1]: squared error and some KL divergence."""

    name = "autoencoder"

    def __init__(self, settings: Settings, images: torch.Tensor) -> None:
        self.images, self.steps, self.batch = images, settings.autoencoder_steps, settings.autoencoder_batch
        self.vae = new_autoencoder(settings.seed).train()
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), lr=LEARNING_RATE)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []

    def step(self) -> float:
        chosen = torch.randint(len(self.images), (self.batch,), generator=self.generator)
        images = self.images[chosen]
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample(self.generator)).sample
        loss = (decoded - images).square().mean() + KL_WEIGHT * posterior.kl().mean() / LATENT_SHAPE[0]
        loss.backward()
        clip_grad_norm_(self.vae.parameters(), 1.0)
        done = len(self.losses)
        _set_rate(self.optimizer, _warm_up(done, self.steps) * (1 - 0.95 * done / self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        return self.losses[-1]

    def samples_left(self) -> int:
        return (self.steps - len(self.losses)) * self.batch

    def state_dict(self) -> dict[str, Any]:
        return {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])


class DenoiserTraining:
    """Trains the UNet and the text encoder through the three phases, on scaled latents [N, 4, 16, 16].

    `repeats` counts how often each memorized pair was drawn.
    """

    name = "denoiser"

    def __init__(
        self, settings: Settings, plan: CaptionPlan, tokenizer: CLIPTokenizer, latents: torch.Tensor
    ) -> None:
        self.plan, self.tokenizer, self.latents = plan, tokenizer, latents
        self.prediction, self.phases = settings.prediction, settings.phases
        self.steps = sum(phase.steps for phase in self.phases)
        self.abar = new_scheduler(settings.prediction).alphas_cumprod
        self.unet = new_unet(settings.seed).train()
        self.text_encoder = new_text_encoder(tokenizer, settings.seed).train()
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.average = EMAModel(self.parameters, decay=EMA_DECAY)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.autocast = fast_bfloat16()
        self.losses: list[float] = []
        self.repeats = [0] * len(plan.memorized)

    def phase(self) -> tuple[Phase, int]:
        """The phase of the next step, and the number of steps done in it."""
        done = len(self.losses)
        for phase in self.phases[:-1]:
            if done < phase.steps:
                return phase, done
            done -= phase.steps
        return self.phases[-1], done

    def step(self) -> float:
        phase, done_in_phase = self.phase()
        draw = self.plan.draw(phase.batch, phase.memorized_share, self.generator)
        timesteps = self._draw_timesteps(phase)
        clean = self.latents[draw.images]
        noise = torch.randn(clean.shape, generator=self.generator)
        signal = self.abar[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self.abar[timesteps]).sqrt()[:, None, None, None]
        noisy = signal * clean + sigma * noise
        target = noise if self.prediction == "epsilon" else signal * noise - sigma * clean
        tokens = self.tokenizer(
            draw.captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            text = self.text_encoder(tokens)[0]
            predicted = self.unet(noisy, timesteps, text).sample
        errors = (predicted.float() - target).square().mean((1, 2, 3))
        loss = (self._weights(phase)[timesteps] * errors).mean()
        loss.backward()
        clip_grad_norm_(self.parameters, 1.0)
        fading = 1 - 0.9 * done_in_phase / phase.steps if phase is self.phases[-1] else 1.0
        _set_rate(self.optimizer, _warm_up(len(self.losses), self.steps) * fading)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.parameters)
        for pair in draw.pairs:
            if pair >= 0:
                self.repeats[pair] += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def _draw_timesteps(self, phase: Phase) -> torch.Tensor:
        anywhere = torch.randint(1000, (phase.batch,), generator=self.generator)
        high = torch.randint(600, 1000, (phase.batch,), generator=self.generator)
        return torch.where(
            torch.rand(phase.batch, generator=self.generator) < phase.high_noise_share, high, anywhere
        )

    def _weights(self, phase: Phase) -> torch.Tensor:
        """The weight [1000] of the squared error at each timestep, of mean one over the phase's draws.

        The error of v is that of epsilon divided by sqrt(abar), so a network that predicts v has the weight
        1/abar built in, and is trained with the plain loss throughout. The mean is divided out so that the
        optimizer's second moments carry over from phase to phase.
        """
        if self.prediction != "epsilon":
            return torch.ones_like(self.abar)
        weights = (1 / self.abar).clamp(max=phase.weight_cap)
        share = phase.high_noise_share
        return weights / ((1 - share) * weights.mean() + share * weights[600:].mean())

    def use_average(self) -> None:
        """Replace the trained weights by their moving average, and leave training mode."""
        self.average.copy_to(self.parameters)
        self.unet.eval()
        self.text_encoder.eval()

    def samples_left(self) -> int:
        phase, done_in_phase = self.phase()
        later = self.phases[self.phases.index(phase) + 1 :]
        return (phase.steps - done_in_phase) * phase.batch + sum(p.steps * p.batch for p in later)

    def state_dict(self) -> dict[str, Any]:
        return {
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
            "repeats": self.repeats,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.generator.set_state(state["generator"])
        self.losses = list(state["losses"])
        self.repeats = list(state["repeats"])


def phase_losses(losses: list[float], phases: Iterable[Phase]) -> list[tuple[Phase, float, float]]:
    """Each phase with the mean loss of its first and of its last tenth."""
    rows, start = [], 0
    for phase in phases:
        part = losses[start : start + phase.steps]
        tenth = max(1, len(part) // 10)
        rows.append((phase, sum(part[:tenth]) / tenth, sum(part[-tenth:]) / tenth))
        start += phase.steps
    return rows


def _warm_up(done: int, steps: int) -> float:
    return min(1.0, (done + 1) / min(100, max(1, steps // 10)))


def _set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * factor
