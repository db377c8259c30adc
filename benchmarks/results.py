"""Rows on disk: one CSV a section, in which a table that is measured again replaces its older rows."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
Record = dict[str, Any]


def save(section: str, records: list[Record], folder: Path = FOLDER) -> Path:
    """Write the records of one table to `<section>.csv`, beside those of the section's other tables."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{section}.csv"
    tables = {record["table"] for record in records}
    rows = [row for row in load(path) if row["table"] not in tables] + records
    columns = dict.fromkeys(key for row in rows for key in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    return path


def load(path: Path) -> list[Record]:
    """The rows of a file as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class Missing(LookupError):
    """No row, or one that says why it has no number."""


class Results:
    """Numbers of all saved tables by table and row."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self.rows = {
            (record["table"], record["what"]): dict(record) for record in records if "axis" not in record
        }

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Results:
        """Every CSV of the folder but the scaling curves, whose rows repeat names."""
        paths = sorted(folder.glob("*.csv"))
        return cls(row for path in paths if path.stem != "scaling" for row in load(path))

    def number(self, table: str, what: str, column: str = "ratio") -> float:
        """One number; raises `Missing` with the reason where there is none."""
        row = self.rows.get((table, what))
        if row is None:
            raise Missing("not measured")
        value = row.get(column)
        if value in (None, ""):
            status = row.get("status", "")
            raise Missing(status if status and not status.startswith("ok") else "not measured")
        return float(value)

    def tables(self, prefix: str) -> list[str]:
        """Names of tables that begin so."""
        return sorted({table for table, _ in self.rows if table.startswith(prefix)})
