"""Interleaved timing, the printed table, and its rows on disk (--save-results)."""

from __future__ import annotations

import csv
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sharpcore benchmarks")
    group.addoption("--save-results", action="store_true", help="write the table to benchmarks/results/")
    group.addoption("--turns", type=int, default=5, help="how often each candidate runs (default: 5)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "sd14: Stable Diffusion 1.4's size, minutes and 12 GiB; runs only with -m sd14"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "sd14" not in config.getoption("markexpr"):
        for item in items:
            if "sd14" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs only with -m sd14"))


@dataclass
class Row:
    """One measured thing: seconds of each turn and of the unit just before it, work a turn, error."""

    what: str
    per: int = 1
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    def ratio(self) -> float | None:
        """Median over the turns of the ratio to the unit; both ran side by side, so passing load cancels."""
        if not self.units:
            return None
        pairs = zip(self.seconds, self.units, strict=True)
        return statistics.median(second / self.per / unit for second, unit in pairs)

    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the seconds per unit of work."""
        times = [second / self.per for second in self.seconds]
        if len(times) < 2:
            return times[0], times[0], times[0]
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, median, high


class Table:
    """Candidates that take turns in one process; the first is the unit and runs before each of the others."""

    def __init__(self, name: str, turns: int) -> None:
        self.name, self.turns = name, turns
        self.rows: list[Row] = []
        self._candidates: list[tuple[Row, Callable[[], Any], Callable[[Any], float] | None, int]] = []

    def add(
        self,
        what: str,
        run: Callable[[], Any],
        *,
        per: int = 1,
        error: Callable[[Any], float] | None = None,
        turns: int | None = None,
    ) -> None:
        """A candidate that does `per` units of work a call; slow ones take fewer turns."""
        row = Row(what, per)
        self.rows.append(row)
        self._candidates.append((row, run, error, self.turns if turns is None else min(turns, self.turns)))

    def add_once(self, what: str, seconds: float) -> None:
        """A row for something that happened, and was timed, once."""
        self.rows.append(Row(what, seconds=[seconds]))

    def measure(self) -> None:
        """One untimed call of each, which gives its error; then all in turn, garbage collected in between."""
        for row, run, error, _ in self._candidates:
            result = run()
            row.error = None if error is None else error(result)
        unit, run_unit, *_ = self._candidates[0]
        gc.disable()
        try:
            for turn in range(self.turns):
                gc.collect()
                for row, run, _, turns in self._candidates[1:]:
                    if turn < turns:
                        unit.seconds.append(_seconds(run_unit))
                        unit.units.append(unit.seconds[-1] / unit.per)
                        row.units.append(unit.units[-1])
                        row.seconds.append(_seconds(run))
        finally:
            gc.enable()

    def records(self) -> list[dict[str, Any]]:
        """The rows as they are printed and saved."""
        records = []
        for row in self.rows:
            low, median, high = row.quartiles()
            records.append(
                {
                    **machine(),
                    "table": self.name,
                    "what": row.what,
                    "turns": len(row.seconds),
                    "median_s": median,
                    "lower_quartile_s": low,
                    "upper_quartile_s": high,
                    "ratio": row.ratio(),
                    "relative_error": row.error,
                }
            )
        return records

    def __str__(self) -> str:
        host = machine()
        lines = [
            f"{self.name}: {host['cpu']} ({host['cpu_capability']}), {host['threads']} threads, "
            f"torch {host['torch']}",
            f"{'':44s} {'median s':>10s} {'quartiles':>19s} {'ratio':>8s} {'error':>9s}",
        ]
        for row in self.records():
            error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            quartiles = f"{row['lower_quartile_s']:.4f} {row['upper_quartile_s']:.4f}"
            lines.append(
                f"{row['what']:44s} {row['median_s']:10.4f} {quartiles:>19s} {ratio:>8s} {error:>9s}"
            )
        return "\n".join(lines)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What a timing depends on: processor, instruction set, threads, versions, commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    names = [line.split(":")[1] for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0].strip() if names else platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """A table named after the test; printed at its end and saved when asked for."""
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    result = Table(name, request.config.getoption("--turns"))
    yield result
    if not any(row.seconds for row in result.rows):
        return
    print(f"\n{result}")
    if request.config.getoption("--save-results"):
        folder = HERE / "results"
        folder.mkdir(exist_ok=True)
        records = result.records()
        (folder / f"{result.name}.json").write_text(json.dumps(records, indent=1) + "\n")
        with open(folder / f"{result.name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, records[0].keys())
            writer.writeheader()
            writer.writerows(records)
