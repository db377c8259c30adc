"""What the steps of gpu_acceptance.py share: the device, the clock, and the verdicts that they add to."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 10  # seconds kept for the summary


@dataclass
class Verdict:
    """A check or a target: what was asked, what came, and whether that will do (None: it was not judged)."""

    what: str
    found: str
    ok: bool | None


@dataclass
class Acceptance:
    """What the steps share: the device, the clock, and where they report."""

    device: str
    dry: bool  # no GPU: kernels are interpreted, and times mean nothing
    small: bool  # toy sizes
    limit: float
    began: float = field(default_factory=time.perf_counter)
    verdicts: list[Verdict] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    measured: dict[str, float] = field(
        default_factory=dict
    )  # rates of this card: bytes or operations a second

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - RESERVE - (time.perf_counter() - self.began)

    def check(self, what: str, ok: bool, found: str) -> None:
        """Something that must hold."""
        self.verdicts.append(Verdict(what, found, bool(ok)))
        print(f"  {'ok    ' if ok else 'FAILED'} {what}: {found}", flush=True)

    def target(self, what: str, value: float | None, bound: float, *, at_most: bool = True) -> None:
        """A number that is to be reached; at toy sizes nothing is judged."""
        sign = "<=" if at_most else ">="
        if value is None:
            self.verdicts.append(Verdict(f"{what} ({sign} {bound:g})", "not measured", None))
            return
        ok = value <= bound if at_most else value >= bound
        self.verdicts.append(
            Verdict(f"{what} ({sign} {bound:g})", f"{value:.3g}", None if self.small else ok)
        )
        print(f"  {'ok    ' if ok else 'missed'} {what}: {value:.3g} ({sign} {bound:g})", flush=True)

    def keep(self, table: Any) -> None:
        """Add the rows of a `measure.Table`."""
        print(table, flush=True)
        self.records += table.records()
