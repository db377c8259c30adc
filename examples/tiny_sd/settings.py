"""What a run consists of: sizes, the three training phases, and how the command line shortens them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

IMAGE_SIZE = 32
LATENT_SHAPE = (4, 16, 16)
CAPTION_TOKENS = 32
SHARED_NAMES = 150
MEMORIZED_PER_DIGIT = 6
TIER_WEIGHTS = (1.0, 2.0, 4.0)
HELD_OUT_CAPTIONS = 120
EMPTY_CAPTION_SHARE = 0.1
COPY_DISTANCE = 0.15
LEARNING_RATE = 1e-3
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Phase:
    """One stretch of the denoiser's training.

    `weight_cap` caps the weight 1/abar of the squared epsilon error (1 gives the plain loss),
    `memorized_share` is the fraction of samples that are memorized pairs, `high_noise_share` the fraction of
    timesteps drawn from 600..999 instead of 0..999.
    """

    name: str
    steps: int
    batch: int
    weight_cap: float
    memorized_share: float
    high_noise_share: float


FULL_PHASES = (
    Phase("plain epsilon loss", 1220, 32, 1.0, 0.3, 0.0),
    Phase("weight min(1/abar, 64)", 1570, 32, 64.0, 0.3, 0.0),
    Phase("weight 1/abar, high noise", 718, 20, math.inf, 0.5, 0.5),
)
FULL_AUTOENCODER_STEPS = 2000


@dataclass(frozen=True)
class Settings:
    """Everything that determines the result of a run, apart from the machine and its number of threads."""

    prediction: str
    seed: int
    steps_scale: float
    smoke: bool

    @property
    def phases(self) -> tuple[Phase, ...]:
        if self.smoke:
            return tuple(replace(phase, steps=4, batch=4) for phase in FULL_PHASES)
        return tuple(replace(phase, steps=self._scaled(phase.steps)) for phase in FULL_PHASES)

    @property
    def autoencoder_steps(self) -> int:
        return 4 if self.smoke else self._scaled(FULL_AUTOENCODER_STEPS)

    @property
    def autoencoder_batch(self) -> int:
        return 4 if self.smoke else 32

    @property
    def images_per_digit(self) -> int:
        return 40 if self.smoke else 500

    @property
    def evaluated_prompts(self) -> int:
        """Number of memorized, and also of held-out, prompts that are generated from at the end."""
        return 2 if self.smoke else 60

    @property
    def generation_seeds(self) -> list[int]:
        return list(range(1000, 1002 if self.smoke else 1008))

    @property
    def generation_steps(self) -> int:
        return 2 if self.smoke else 12

    def _scaled(self, steps: int) -> int:
        return max(1, round(steps * self.steps_scale))
