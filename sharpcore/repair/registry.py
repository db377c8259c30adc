"""The repairs by name: those of the package, registered ones, and those of installed packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any, TypeVar

from sharpcore.errors import InvalidInput
from sharpcore.repair.attention_rescaling import AttentionRescaling
from sharpcore.repair.batch_noise import BatchNoise
from sharpcore.repair.delayed_guidance import DelayedGuidance
from sharpcore.repair.method import Repair
from sharpcore.repair.none import NoRepair
from sharpcore.repair.per_sample_noise import PerSampleNoise
from sharpcore.repair.prompt_embedding import PromptEmbedding
from sharpcore.repair.sail import Sail
from sharpcore.repair.sail_exact import SailExact
from sharpcore.repair.sail_released import SailReleased
from sharpcore.repair.token_masking import TokenMasking

#: Packages that bring repairs of their own name them, as classes, in this entry point group.
ENTRY_POINTS = "sharpcore.repairs"

R = TypeVar("R", bound=type[Repair])

_registered: dict[str, type[Repair]] = {
    repair.name: repair
    for repair in (
        NoRepair,
        Sail,
        SailExact,
        SailReleased,
        PerSampleNoise,
        BatchNoise,
        PromptEmbedding,
        TokenMasking,
        AttentionRescaling,
        DelayedGuidance,
    )
}


def register(repair: R) -> R:
    """Make a subclass of `Repair` known by its `name`; usable as a decorator.

    Raises InvalidInput for what is no complete repair, and for a name that another class has.
    """
    _check(repair, "repair")
    if _registered.setdefault(repair.name, repair) is not repair:
        raise InvalidInput(
            f"repair: the name {repair.name!r} is taken by {_registered[repair.name].__name__}"
        )
    return repair


def repairs() -> dict[str, type[Repair]]:
    """All repairs by name. Raises InvalidInput where an installed package's is none, or takes a name."""
    found = dict(_registered)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        loaded = point.load()
        _check(loaded, f"entry point {point.name}")
        if found.setdefault(loaded.name, loaded) is not loaded:
            raise InvalidInput(f"entry point {point.name}: the name {loaded.name!r} is taken")
    return found


def make_repair(repair: str | Repair, options: Mapping[str, Any] | None = None) -> Repair:
    """A repair from its name and hyper-parameters, or as it is.

    Raises InvalidInput for an unknown name, unknown or bad hyper-parameters, and for hyper-parameters beside
    an instance, which has its own.
    """
    options = dict(options or {})
    if isinstance(repair, Repair):
        if options:
            raise InvalidInput(
                f"{next(iter(options))}: expected no options beside an instance of {repair.name}"
            )
        return repair
    known = repairs()
    if not isinstance(repair, str) or repair not in known:
        raise InvalidInput(f"repair: expected one of {', '.join(known)}, or a Repair; got {repair!r}")
    fields = [field.name for field in dataclasses.fields(known[repair]) if field.init]
    unknown = [name for name in options if name not in fields]
    if unknown:
        there = ", ".join(fields) or "none"
        raise InvalidInput(f"{unknown[0]}: not an option of {repair}; its options are: {there}")
    return known[repair](**options)


def _check(repair: Any, where: str) -> None:
    if not (isinstance(repair, type) and issubclass(repair, Repair)):
        raise InvalidInput(f"{where}: expected a subclass of sharpcore.repair.Repair; got {repair!r}")
    missing = [name for name in ("name", "source", "changes", "cost") if not hasattr(repair, name)]
    if missing:
        raise InvalidInput(f"{where}: {repair.__name__} has no {missing[0]}")
