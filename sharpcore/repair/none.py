"""none: plain generation, what the repairs are compared with."""

from __future__ import annotations

from dataclasses import dataclass

from sharpcore.repair.method import Repair


@dataclass(frozen=True)
class NoRepair(Repair):
    """Classifier-free guidance from the first step on; nothing is changed."""

    name = "none"
    source = "Ho and Salimans, arXiv 2207.12598"
    changes = ("nothing",)
    cost = "none"
