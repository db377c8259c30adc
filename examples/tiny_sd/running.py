"""Runs a training step by step: progress with the time left, and checkpoints from which a run goes on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .settings import Settings
from .training import Training

STEPS_BETWEEN_CHECKPOINTS = 200
SECONDS_BETWEEN_LINES = 15.0


class Stopped(Exception):
    """The number of steps that --stop-after allows has been done."""


class Checkpoint:
    """The file that holds the settings of an unfinished run and the state of each of its trainings."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = asdict(settings)
        self.states: dict[str, Any] = {}

    def read(self) -> None:
        """Load the file; an error if it was written by a run with other settings."""
        content = torch.load(self.path, weights_only=True)
        for name, value in self.settings.items():
            if content["settings"][name] != value:
                option = "--" + name.replace("_", "-")
                raise SystemExit(
                    f"{option}: the run to resume had {content['settings'][name]!r}, not {value!r}"
                )
        self.states = content["states"]

    def write(self) -> None:
        """Replace the file at once, so that an interruption leaves the previous one whole."""
        unfinished = self.path.with_suffix(".part")
        torch.save({"settings": self.settings, "states": self.states}, unfinished)
        os.replace(unfinished, self.path)


class Allowance:
    """The number of steps this call may still do, over all trainings; None is no limit."""

    def __init__(self, steps: int | None) -> None:
        self.left = steps

    def take(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def run(training: Training, checkpoint: Checkpoint, allowance: Allowance, seconds_after: float) -> None:
    """Continue `training` from its checkpoint to its last step.

    `seconds_after` is what the rest of the run will take by estimate, part of the time left that is shown.
    Raises Stopped when the allowance is used up, FloatingPointError when a loss is not finite.
    """
    if training.name in checkpoint.states:
        training.load_state_dict(checkpoint.states[training.name])

    def save() -> None:
        # A copy: the steps after this training change its networks, and later writes store this state again.
        checkpoint.states[training.name] = deepcopy(training.state_dict())
        checkpoint.write()

    started = shown = time.monotonic()
    samples_at_start, recent = training.samples_left(), []
    while (done := len(training.losses)) < training.steps:
        if not allowance.take():
            save()
            raise Stopped
        loss = training.step()
        done += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"{training.name}: the loss of step {done} is {loss}")
        recent.append(loss)
        if done % STEPS_BETWEEN_CHECKPOINTS == 0 or done == training.steps:
            save()
        now = time.monotonic()
        if now - shown > SECONDS_BETWEEN_LINES or done == training.steps:
            left = training.samples_left()
            seconds = (now - started) / (samples_at_start - left) * left + seconds_after
            mean = sum(recent) / len(recent)
            say(f"{training.name}: step {done}/{training.steps}, loss {mean:.4f}, {duration(seconds)} left")
            shown, recent = now, []


def seconds_per_sample(make: Callable[[], Training]) -> float:
    """Time of a step per sample of its batch, measured with a training that is thrown away."""
    training = make()
    training.step()
    before, started = training.samples_left(), time.monotonic()
    training.step()
    return (time.monotonic() - started) / (before - training.samples_left())


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def say(line: str) -> None:
    print(line, flush=True)
