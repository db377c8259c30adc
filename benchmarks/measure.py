"""The protocol: candidates take turns in one process, each right after the unit; failures are rows."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from sharpcore.memory import available_bytes

Run = Callable[[], Any]
OK = "ok"
HEADING = 45  # characters
KERNEL_TURN_SECONDS = 0.02  # of a turn in the tables of single kernels
SHOWN = ("axis", "point", "products")  # labels that are printed


@dataclass
class Row:
    """One measured thing: seconds of each turn and of the unit just before it, work a turn, error, memory."""

    what: str
    table: str
    per: int = 1
    labels: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    peak_mib: float | None = None
    status: str = OK
    derived: float | None = None  # a ratio that follows from other rows, of a row without times of its own
    seconds: list[float] = field(default_factory=list)
    units: list[float] = field(default_factory=list)

    def ratios(self) -> list[float]:
        """Each turn in units of its neighbour: both ran side by side, so passing load cancels."""
        return [second / self.per / unit for second, unit in zip(self.seconds, self.units, strict=False)]

    def record(self) -> dict[str, Any]:
        """The row as it is printed and saved; empty where nothing was measured."""
        low, median, high = quartiles([second / self.per for second in self.seconds])
        ratio_low, ratio, ratio_high = quartiles(self.ratios())
        if self.derived is not None:
            ratio = self.derived
        return {
            "table": self.table,
            "what": self.what,
            "status": self.status,
            "turns": len(self.seconds),
            "median_s": median,
            "lower_quartile_s": low,
            "upper_quartile_s": high,
            "ratio": ratio,
            "ratio_lower_quartile": ratio_low,
            "ratio_upper_quartile": ratio_high,
            "relative_error": self.error,
            "peak_mib": self.peak_mib,
            **self.labels,
        }


def quartiles(values: list[float]) -> tuple[float | None, float | None, float | None]:
    """Lower quartile, median, upper quartile."""
    if not values:
        return None, None, None
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def why(error: BaseException) -> str:
    """The type and the first line of an exception, with the second where the first is a mere heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and len(lines[0]) < HEADING else lines[:1])
    return f"failed: {type(error).__name__}: {text[:300]}" if text else f"failed: {type(error).__name__}"


def timed(run: Run) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    start = perf_counter()
    result = run()
    return perf_counter() - start, result


def repeated(run: Run, calls: int) -> float:
    """Seconds of so many calls."""
    start = perf_counter()
    for _ in range(calls):
        run()
    return perf_counter() - start


def calls_in(run: Run, seconds: float) -> int:
    """How many calls take so long, at least."""
    calls = 1
    while (taken := repeated(run, calls)) < seconds:
        calls = math.ceil(calls * min(10.0, max(2.0, 1.1 * seconds / max(taken, 1e-9))))
    return calls


@dataclass
class _Candidate:
    row: Row
    prepare: Callable[[], Run]
    error: Callable[[Any], float] | None = None
    turns: int = 1
    needs: float = 0.0
    setup: Row | None = None
    unit: _Candidate | None = None
    run: Run | None = None
    calls: int = 1  # in a turn

    def time(self) -> float:
        """One turn; returns the seconds per unit of work."""
        assert self.run is not None
        if self.calls > 1:
            # Threads of whoever ran before, OpenMP's above all, spin for some milliseconds before they sleep.
            repeated(self.run, self.calls)
        seconds = repeated(self.run, self.calls) / self.calls
        self.row.seconds.append(seconds)
        if self.unit is None:
            self.row.units.append(seconds / self.row.per)
        return seconds / self.row.per


class Table:
    """Candidates in the order in which they were added; the first is the unit of those that follow.

    In a turn a candidate is called once, or, where `turn_seconds` are given, as often as takes so long, after
    as many untimed calls.
    """

    def __init__(self, name: str, turns: int, turn_seconds: float = 0.0) -> None:
        self.name, self.turns, self.turn_seconds = name, turns, turn_seconds
        self.rows: list[Row] = []
        self._unit: _Candidate | None = None
        self._pending: list[_Candidate] = []

    def unit(self, what: str, run: Run, **options: Any) -> Row:
        """A candidate that is the unit of what is added after it, and runs before each of their turns."""
        self._unit = None
        return self.add(what, run, **options)

    def add(
        self,
        what: str,
        run: Run | None = None,
        *,
        prepare: Callable[[], Run] | None = None,
        per: int = 1,
        error: Callable[[Any], float] | None = None,
        turns: int | None = None,
        needs: float = 0.0,
        setup: str | None = None,
        **labels: Any,
    ) -> Row:
        """A candidate that does `per` units of work a call: `run`, or what `prepare` returns.

        Slow ones take fewer turns. One that needs more memory (GiB) than is free is a row that says so.
        `setup` names a row of its own for the time that `prepare` takes. `labels` are further columns.
        """
        if (run is None) == (prepare is None):
            raise ValueError("run, prepare: expected exactly one of them")
        row = self.add_row(what, per=per, **labels)
        candidate = _Candidate(row, prepare or (lambda: run), error)  # type: ignore[arg-type, return-value]
        candidate.turns = self.turns if turns is None else min(turns, self.turns)
        candidate.needs, candidate.unit = needs, self._unit
        if setup is not None:
            candidate.setup = self.add_row(setup, **labels)
        if self._unit is None:
            self._unit = candidate
        self._pending.append(candidate)
        return row

    def add_row(
        self, what: str, *, per: int = 1, status: str = OK, derived: float | None = None, **labels: Any
    ) -> Row:
        """A row that is filled by other means: derived from other rows, or measured in another process."""
        row = Row(what, self.name, per, labels, status=status, derived=derived)
        self.rows.append(row)
        return row

    def ratio(self, what: str) -> float | None:
        """The median ratio of a row of this table; None where there is none."""
        return next((row.record()["ratio"] for row in self.rows if row.what == what), None)

    def measure(self) -> None:
        """An untimed call of each candidate added since the last time, for its error; then all in turn."""
        pending, self._pending = self._pending, []
        for candidate in pending:
            _warm_up(candidate, self.turn_seconds)
        gc.collect()
        gc.disable()
        try:
            for turn in range(self.turns):
                gc.collect()
                for candidate in pending:
                    if turn < candidate.turns and candidate.run is not None:
                        _take_turn(candidate)
        finally:
            gc.enable()

    def records(self) -> list[dict[str, Any]]:
        """The rows as they are printed and saved."""
        return [row.record() for row in self.rows]

    def __str__(self) -> str:
        header = f"{'':46s} {'median s':>10s} {'quartiles':>19s} {'ratio':>8s} {'error':>9s} {'peak MiB':>9s}"
        lines = [header]
        for record in self.records():
            low, high = _text(record["lower_quartile_s"], ".3g"), _text(record["upper_quartile_s"], ".3g")
            labels = " ".join(f"{key}={record[key]}" for key in SHOWN if key in record)
            cells = (
                f"{record['what']} {labels}".strip().ljust(46),
                _text(record["median_s"], ".3g").rjust(10),
                f"{low} {high}".rjust(19),
                _text(record["ratio"], ".3g").rjust(8),
                _text(record["relative_error"], ".1e").rjust(9),
                _text(record["peak_mib"], ".0f").rjust(9),
                "" if record["status"] == OK else record["status"],
            )
            lines.append(" ".join(cells).rstrip())
        return "\n".join(lines)


def _warm_up(candidate: _Candidate, turn_seconds: float) -> None:
    row, unit = candidate.row, candidate.unit
    free = available_bytes(torch.device("cpu"))
    if free is not None and candidate.needs * 2**30 > free:
        row.status = f"skipped: needs {candidate.needs:.1f} GiB, {free / 2**30:.1f} free"
    elif unit is not None and unit.run is None:
        row.status = f"skipped: the unit {unit.row.what!r} did not run"
    else:
        try:
            if candidate.setup is not None and unit is not None:
                candidate.setup.units.append(unit.time())
            seconds, candidate.run = timed(candidate.prepare)
            if candidate.setup is not None:
                candidate.setup.seconds.append(seconds)
            result = candidate.run()
            row.error = None if candidate.error is None else candidate.error(result)
            if turn_seconds > 0:
                candidate.calls = calls_in(candidate.run, turn_seconds)
        # Whatever a candidate raises is its result.
        except Exception as error:
            row.status, candidate.run = why(error), None
    if candidate.setup is not None and not candidate.setup.seconds:
        candidate.setup.status = row.status


def _take_turn(candidate: _Candidate) -> None:
    try:
        unit = None if candidate.unit is None else candidate.unit.time()
        candidate.time()
        if unit is not None:
            candidate.row.units.append(unit)
    except Exception as error:
        candidate.row.status, candidate.run = why(error), None


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
