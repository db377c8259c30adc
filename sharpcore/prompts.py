"""Reads prompts, and the columns beside them, from text, CSV, JSON lines and Parquet files."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any

from sharpcore.errors import InvalidInput, MissingDependency

_EXTENSIONS = {
    ".txt": "text",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@dataclass(frozen=True)
class PromptRow:
    """One row of a list of prompts.

    `row` counts the rows from 1, `line` is the line of the file the row starts on (None in Parquet),
    `columns` are the other columns of the row. Exactly one of `prompt` and `error` (a sentence that names the
    place) is usable: where `error` is set the row has no prompt to score, and `prompt` is its text if it has
    one, else None.
    """

    row: int
    line: int | None
    prompt: str | None
    error: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def read_prompts(source: str | Path, *, column: str = "prompt", format: str | None = None) -> list[PromptRow]:
    """All prompts of a UTF-8 text file (one per line), CSV, JSON lines or Parquet file, in order.

    `source` is a path, or "-" for standard input; `column` holds the prompts (not used for text); `format` is
    "text", "csv", "jsonl" or "parquet" and defaults to that of the extension (text for standard input). A bad
    row (blank or missing prompt, not a string, broken JSON) comes back with its `error` set. Raises
    InvalidInput for what concerns the whole file: missing, not UTF-8, no such column, no prompts, unknown
    extension.
    """
    name = "standard input" if str(source) == "-" else str(source)
    format = _format(str(source), format)
    data = _read_bytes(source)
    if format == "parquet":
        rows = _parquet_rows(data, name, column)
    else:
        text = _decode(data, name)
        if not text.strip():
            raise InvalidInput(f"{name}: there are no prompts in it, the file is empty")
        readers: dict[str, Callable[[str, str, str], list[PromptRow]]] = {
            "text": _text_rows,
            "csv": _csv_rows,
            "jsonl": _jsonl_rows,
        }
        rows = readers[format](text, name, column)
    if not rows:
        raise InvalidInput(f"{name}: there are no prompts in it, it has no rows")
    return rows


def _format(source: str, format: str | None) -> str:
    if format is not None:
        if format not in _EXTENSIONS.values():
            raise InvalidInput(f"format: expected text, csv, jsonl or parquet, got {format!r}")
        return format
    if source == "-":
        return "text"
    suffix = Path(source).suffix.lower()
    if suffix not in _EXTENSIONS:
        raise InvalidInput(
            f"{source}: cannot tell the format from the extension {suffix or '(none)'}; "
            f"expected {', '.join(_EXTENSIONS)}, or say --format text, csv, jsonl or parquet"
        )
    return _EXTENSIONS[suffix]


def _read_bytes(source: str | Path) -> bytes:
    if str(source) == "-":
        return sys.stdin.buffer.read()
    path = Path(source)
    if not path.exists():
        raise InvalidInput(f"{path}: there is no such file")
    if path.is_dir():
        raise InvalidInput(f"{path}: expected a file, this is a folder")
    return path.read_bytes()


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "; it looks like UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise InvalidInput(
            f"{name}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}){hint}; "
            "save it as UTF-8"
        ) from None


def _text_rows(text: str, name: str, column: str) -> list[PromptRow]:
    lines = _lines(text)
    return [_row(number, number, line, {}, f"line {number}") for number, line in enumerate(lines, 1)]


def _lines(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _csv_rows(text: str, name: str, column: str) -> list[PromptRow]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = _csv_records(reader, name)
    _, header, broken = next(records)
    if broken or header is None:
        raise InvalidInput(f"{name}: the header cannot be read: {broken}")
    if len(set(header)) < len(header):
        twice = sorted({key for key in header if header.count(key) > 1})
        raise InvalidInput(f"{name}: the header has the column {twice[0]!r} more than once")
    _require_column(name, column, header)
    rows = []
    for number, (line, cells, broken) in enumerate(records, 1):
        place = f"row {number} (line {line})"
        if cells is None:
            rows.append(
                PromptRow(number, line, None, f"{place}: not valid CSV: {broken}", _others(header, column))
            )
            continue
        values = dict(zip(header, cells, strict=False))
        columns = _others(header, column) | {key: cell for key, cell in values.items() if key != column}
        if len(cells) > len(header):
            error = f"{place}: has {len(cells)} fields, the header has {len(header)}"
            rows.append(PromptRow(number, line, values[column], error, columns))
        else:
            rows.append(_row(number, line, values.get(column), columns, place))
    return rows


def _csv_records(reader: Any, name: str) -> Iterator[tuple[int, list[str] | None, str]]:
    """Yield (first line, cells or None, what is wrong) of every record that is not an empty line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise InvalidInput(
                    f"{name}: the quote opened in the record at line {line} is never closed"
                ) from None
            yield line, None, str(error)
            continue
        if cells:
            yield line, cells, ""


def _others(names: list[str], column: str) -> dict[str, Any]:
    return {key: None for key in names if key != column}


def _jsonl_rows(text: str, name: str, column: str) -> list[PromptRow]:
    parsed: list[tuple[dict[str, Any] | None, str]] = []
    for line in _lines(text):
        try:
            value = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            parsed.append((None, "the line is blank" if not line.strip() else f"not valid JSON: {error}"))
            continue
        kind = type(value).__name__
        parsed.append(
            (value, "") if isinstance(value, dict) else (None, f"expected a JSON object, got {kind}")
        )
    names = list(dict.fromkeys(key for value, _ in parsed if value for key in value))
    if any(value is not None for value, _ in parsed):
        _require_column(name, column, names)
    rows = []
    for number, (value, broken) in enumerate(parsed, 1):
        place = f"line {number}"
        columns = _others(names, column)
        if value is None:
            rows.append(PromptRow(number, number, None, f"{place}: {broken}", columns))
        else:
            columns |= {key: _plain(other) for key, other in value.items() if key != column}
            rows.append(_row(number, number, value.get(column), columns, place))
    return rows


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _parquet_rows(data: bytes, name: str, column: str) -> list[PromptRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependency("reading Parquet files needs pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidInput(f"{name}: not a Parquet file: {error}") from None
    _require_column(name, column, table.column_names)
    rows = []
    for number, values in enumerate(table.to_pylist(), 1):
        columns = {key: _plain(value) for key, value in values.items() if key != column}
        rows.append(_row(number, None, values[column], columns, f"row {number}"))
    return rows


def _require_column(name: str, column: str, names: list[str]) -> None:
    if column not in names:
        there = ", ".join(names) or "none"
        raise InvalidInput(
            f"{name}: there is no column {column!r}; the columns are: {there} (choose with --column)"
        )


def _row(row: int, line: int | None, value: Any, columns: dict[str, Any], place: str) -> PromptRow:
    columns = {_encodable(key): item for key, item in columns.items()}
    if value is None:
        return PromptRow(row, line, None, f"{place}: the prompt is missing", columns)
    if not isinstance(value, str):
        kind = type(value).__name__
        return PromptRow(
            row, line, None, f"{place}: the prompt is not a string but {kind} {value!r}", columns
        )
    if not value.strip():
        return PromptRow(row, line, value, f"{place}: the prompt is blank", columns)
    if _encodable(value) != value:
        return PromptRow(row, line, _encodable(value), f"{place}: the prompt has a lone surrogate", columns)
    return PromptRow(row, line, value, None, columns)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    """A value that JSON can hold: NaN becomes None as in pandas, dates ISO text, unknown types their text."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_encodable(str(key)): _plain(item) for key, item in value.items()}
    return str(value)
