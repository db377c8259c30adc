"""Checkpoints of long solver runs: written whole or not at all, and refused by another run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sharpcore.errors import InvalidInput


def write_checkpoint(path: Path, identity: dict[str, Any], state: dict[str, Any]) -> None:
    """Save `state` under `path`; a process that dies meanwhile leaves the older file as it was."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save({"identity": identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved under `path`, or None where there is no such file.

    Raises InvalidInput where the file is no checkpoint, or is that of a run with other arguments.
    """
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, state = dict(saved["identity"]), saved["state"]
    except Exception as error:
        message = f"checkpoint: expected a file that this solver wrote; got {path} ({error})"
        raise InvalidInput(message) from error
    if found != identity:
        names = sorted(name for name in identity if found.get(name) != identity[name])
        raise InvalidInput(f"checkpoint: {path} is of a run with other arguments ({', '.join(names)})")
    return state
