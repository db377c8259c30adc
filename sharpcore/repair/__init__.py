"""Repairs: generation from memorized prompts that does not reproduce their training images.

One file a method, one interface (`Repair`), and a registry: `repairs()` has the methods of the package, those
that were registered with `register`, and those of installed packages (entry point group `sharpcore.repairs`).
"""

from __future__ import annotations

from sharpcore.repair.attention_rescaling import AttentionRescaling as AttentionRescaling
from sharpcore.repair.batch_noise import BatchNoise as BatchNoise
from sharpcore.repair.delayed_guidance import DelayedGuidance as DelayedGuidance
from sharpcore.repair.generation import Generation as Generation
from sharpcore.repair.generation import RepairedLatents as RepairedLatents
from sharpcore.repair.generation import generate as generate
from sharpcore.repair.generation import repair_latents as repair_latents
from sharpcore.repair.method import Guide as Guide
from sharpcore.repair.method import Repair as Repair
from sharpcore.repair.none import NoRepair as NoRepair
from sharpcore.repair.per_sample_noise import PerSampleNoise as PerSampleNoise
from sharpcore.repair.prompt_embedding import PromptEmbedding as PromptEmbedding
from sharpcore.repair.registry import make_repair as make_repair
from sharpcore.repair.registry import register as register
from sharpcore.repair.registry import repairs as repairs
from sharpcore.repair.sail import Sail as Sail
from sharpcore.repair.sail_exact import SailExact as SailExact
from sharpcore.repair.sail_released import SailReleased as SailReleased
from sharpcore.repair.samples import Samples as Samples
from sharpcore.repair.token_masking import TokenMasking as TokenMasking
