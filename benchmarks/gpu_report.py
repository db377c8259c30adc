"""What the steps of gpu_acceptance.py share: the device, the clock, and the findings that they report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 10  # seconds kept for the summary

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
BAD = (FAILED, MISSED)


@dataclass(frozen=True)
class Finding:
    """A check or a target: what was asked, the verdict, what came, and that as a number where it is one."""

    what: str
    verdict: str
    found: str = ""
    number: float | None = None

    def __str__(self) -> str:
        return f"{self.verdict:12s} {self.what}{': ' if self.found else ''}{self.found}"

    @property
    def is_target(self) -> bool:
        """Whether it is a number that is to be reached, rather than something that must hold."""
        return self.verdict in (MET, MISSED, NOT_MEASURED)

    def record(self) -> dict[str, Any]:
        """A row of the CSV."""
        table = "targets" if self.is_target else "checks"
        return {"table": table, "what": self.what, "status": f"{self.verdict}: {self.found}".rstrip(": ")} | (
            {} if self.number is None else {"ratio": self.number}
        )


@dataclass(frozen=True)
class Rate:
    """What the card was seen to do: bytes or operations a second."""

    name: str
    value: float


Item = Finding | Rate | list  # of records


@dataclass
class Acceptance:
    """Where a step reports: each finding goes to `send` at once, so that a step that is cut loses none."""

    device: str
    dry: bool  # no GPU: kernels are interpreted, and times mean nothing
    small: bool  # toy sizes
    rates: dict[str, float]
    send: Callable[[Item], None]

    @property
    def backend(self) -> str:
        """The name under which the cuda backend is asked for."""
        return "cuda" if self.dry else "auto"

    def check(self, what: str, ok: bool, found: str, number: float | None = None) -> None:
        """Something that must hold."""
        self.send(Finding(what, OK if ok else FAILED, found, number))

    def skip(self, what: str, why: str) -> None:
        """Something that cannot be checked here."""
        self.send(Finding(what, SKIPPED, why))

    def target(
        self, what: str, value: float | None, bound: float, *, at_most: bool = True, why: str = ""
    ) -> None:
        """A number that is to be reached; at toy sizes nothing is judged. `why` there is none, if so."""
        what = f"{what} ({'<=' if at_most else '>='} {bound:g})"
        if value is None:
            self.send(Finding(what, NOT_MEASURED, why))
        elif self.small:
            self.send(Finding(what, NOT_MEASURED, f"at toy sizes {value:.3g}"))
        else:
            reached = value <= bound if at_most else value >= bound
            self.send(Finding(what, MET if reached else MISSED, f"{value:.3g}", value))

    def keep(self, table: Any) -> None:
        """The rows of a `measure.Table`."""
        print(f"{table.name}\n{table}", flush=True)
        self.send(table.records())


@dataclass
class Report:
    """All findings, and the clock."""

    limit: float
    began: float = field(default_factory=time.perf_counter)
    findings: list[Finding] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - RESERVE - (time.perf_counter() - self.began)

    def take(self, item: Item) -> None:
        """What a step has sent."""
        if isinstance(item, Finding):
            self.findings.append(item)
            print(f"  {item}", flush=True)
        elif isinstance(item, Rate):
            self.rates[item.name] = item.value
        else:
            self.records += item

    @property
    def passed(self) -> bool:
        """Whether no check failed and no target was missed."""
        return not any(finding.verdict in BAD for finding in self.findings)

    def summary(self) -> str:
        """What went wrong or was not done, all targets, and how many there are of each verdict."""
        checks = [finding for finding in self.findings if not finding.is_target]
        targets = [finding for finding in self.findings if finding.is_target]
        lines = [f"checks: {_count(checks, (OK, FAILED, SKIPPED))}"]
        lines += [f"  {finding}" for finding in checks if finding.verdict != OK]
        lines += [f"targets: {_count(targets, (MET, MISSED, NOT_MEASURED))}"]
        lines += [f"  {finding}" for finding in targets]
        lines += [f"{time.perf_counter() - self.began:.0f} s"]
        return "\n".join(lines)

    def save(self, card: str, about: dict[str, Any], folder: Path) -> Path:
        """Write the rows to gpu_<card>.csv and the summary beside it; returns the path of the rows."""
        from results import save

        stem = f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower()).strip('_')}"
        records = [*self.records, *(finding.record() for finding in self.findings)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.txt").write_text(f"{self.summary()}\n")
        return save(stem, [record | about for record in records], folder)


def _count(findings: list[Finding], verdicts: tuple[str, ...]) -> str:
    numbers = [sum(finding.verdict == verdict for finding in findings) for verdict in verdicts]
    return ", ".join(f"{number} {verdict}" for number, verdict in zip(numbers, verdicts, strict=True))
