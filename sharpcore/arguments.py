"""Checks of the arguments that every entry point takes: prompts, steps, seeds, guidance, latent size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sharpcore.errors import InvalidInput

FIRST_SEED = 42
MOST_SEEDS = 100_000
_LAST_SEED = 2**63 - 1


def check_steps(steps: Any, count: int) -> tuple[int, ...]:
    """Different indices of a trajectory of `count` steps: a list, or one number."""
    steps = [steps] if is_integer(steps) else steps
    if not _are_different_integers(steps) or not all(0 <= step < count for step in steps):
        raise InvalidInput(f"steps: expected different indices from 0 to {count - 1}; got {steps!r}")
    return tuple(steps)


def check_seeds(seeds: Any) -> tuple[int, ...]:
    """Seeds as a list, or their number n, which means 42, 43, ..., 42 + n - 1."""
    if is_integer(seeds):
        if not 1 <= seeds <= MOST_SEEDS:
            raise InvalidInput(f"seeds: expected a number from 1 to {MOST_SEEDS}, or a list; got {seeds}")
        seeds = range(FIRST_SEED, FIRST_SEED + seeds)
    if not _are_different_integers(seeds) or not all(0 <= seed <= _LAST_SEED for seed in seeds):
        raise InvalidInput(
            f"seeds: expected a number, or a list of different integers of at least 0; got {seeds!r}"
        )
    return tuple(seeds)


def check_latent_size(latent_size: Any) -> tuple[int, int]:
    """Height and width of a latent."""
    sizes = latent_size if isinstance(latent_size, Sequence) else ()
    if len(sizes) != 2 or not all(is_integer(n) and n > 0 for n in sizes):
        raise InvalidInput(
            f"latent_size: expected (height, width), two positive integers; got {latent_size!r}"
        )
    return sizes[0], sizes[1]


def check_guidance(guidance_scale: Any) -> float:
    """The scale of classifier-free guidance."""
    if not is_number(guidance_scale) or not 0 <= guidance_scale < math.inf:
        raise InvalidInput(f"guidance_scale: expected a number of at least 0; got {guidance_scale!r}")
    return float(guidance_scale)


def check_prompts(prompts: Any, on_error: str) -> list[str | None]:
    """For each of a list of prompts why it is none, or None; with on_error="raise" the first is raised."""
    if on_error not in ("raise", "record"):
        raise InvalidInput(f"on_error: expected 'raise' or 'record'; got {on_error!r}")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise InvalidInput(f"prompts: expected a list of strings; got {type(prompts).__name__}")
    if not prompts:
        raise InvalidInput("prompts: expected at least one prompt; got an empty list")
    errors = [_prompt_error(i, prompt) for i, prompt in enumerate(prompts)]
    if on_error == "raise":
        for error in errors:
            if error is not None:
                raise InvalidInput(error)
    return errors


def is_integer(value: Any) -> bool:
    """Whether this is an integer, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether this is an integer or a float, and no boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _prompt_error(index: int, prompt: Any) -> str | None:
    if not isinstance(prompt, str):
        return f"prompts[{index}]: expected a string; got {type(prompt).__name__}"
    if not prompt.strip():
        return f"prompts[{index}]: expected words; got an empty or blank prompt"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"prompts[{index}]: expected Unicode text; got a lone surrogate at character {error.start}"
    return None


def _are_different_integers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) > 0
        and all(map(is_integer, values))
        and len(set(values)) == len(values)
    )
