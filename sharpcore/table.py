"""The table of scores: one row per prompt and step, written to and read from Parquet, CSV and JSON lines."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from sharpcore.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from typing_extensions import Self

Row = dict[str, Any]

FORMATS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_METADATA_KEY = b"sharpcore"
_STANDARD = {"prompt": "text", "step": "int", "timestep": "float", "error": "text"}
_INT64 = 2**63
_MOST_GROUPS = 6
_EXACT_IN_FLOAT64 = 2**53


def table_format(path: str | Path) -> str:
    """The file format ("parquet", "csv" or "jsonl") that the extension of `path` stands for.

    Raises InvalidInput for any other extension.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InvalidInput(f"{path}: expected the extension {', '.join(FORMATS)}, got {suffix or 'none'}")
    return FORMATS[suffix]


def metric_names(columns: Iterable[str]) -> tuple[str, ...]:
    """The metrics among the column names: `m` is one where `m_seeds` is a column too."""
    names = list(columns)
    return tuple(name for name in names if f"{name}_seeds" in names)


def column_types(
    rows: Iterable[Mapping[str, Any]], standard: Mapping[str, str] = _STANDARD
) -> dict[str, str]:
    """Type of each column, in order of first appearance: "text", "int", "float", "bool", "list" (of float64)
    or "json".

    The columns that a scorer makes have fixed types, those of `standard` and of the metrics; the others get
    the narrowest one that holds all their values.
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                kinds.add(_kind(value))
    types = {name: _join(kinds) for name, kinds in found.items()}
    for name in metric_names(types):
        types |= {name: "float", f"{name}_seeds": "list"}
        if f"{name}_se" in types:
            types[f"{name}_se"] = "float"
    return types | {name: kind for name, kind in standard.items() if name in types}


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT_IN_FLOAT64 else "bigint" if abs(value) < _INT64 else "json"
    return {float: "float", str: "text"}.get(type(value), "json")


def _join(kinds: set[str]) -> str:
    if not kinds:
        return "text"
    if kinds <= {"int", "bigint"}:
        return "int"
    if kinds <= {"int", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 else "json"


def write_rows(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    types: Mapping[str, str],
    *,
    format: str | None = None,
    row_group: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write rows to a Parquet, CSV or JSON lines file, holding at most `row_group` of them in memory.

    `types` are the columns as `column_types` gives them; `format` defaults to that of the extension;
    `metadata` is a JSON object kept in the schema of a Parquet file. Raises InvalidInput for a number that
    JSON cannot hold (NaN).
    """
    chosen = format or table_format(path)
    if chosen == "parquet":
        _write_parquet(path, rows, types, row_group, metadata)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        if chosen == "csv":
            _write_csv(file, rows, types)
        else:
            for row in rows:
                file.write(_json({name: row.get(name) for name in types}) + "\n")


def _write_csv(file: TextIO, rows: Iterable[Mapping[str, Any]], types: Mapping[str, str]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(types)
    for row in rows:
        cells = ((row.get(name), kind in ("list", "json")) for name, kind in types.items())
        writer.writerow(
            [_json(value) if as_json and value is not None else value for value, as_json in cells]
        )


def _write_parquet(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    types: Mapping[str, str],
    row_group: int | None,
    metadata: Mapping[str, Any] | None,
) -> None:
    pa, parquet = _pyarrow()
    arrow = {
        "text": pa.string(),
        "json": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "list": pa.list_(pa.float64()),
    }
    notes = dict(metadata or {}, json_columns=[name for name, kind in types.items() if kind == "json"])
    schema = pa.schema(
        [(name, arrow[kind]) for name, kind in types.items()], {_METADATA_KEY: _json(notes).encode()}
    )
    with parquet.ParquetWriter(path, schema) as writer:
        for group in _chunks(rows, row_group):
            columns = [
                pa.array([_cell(row.get(name), kind) for row in group], arrow[kind])
                for name, kind in types.items()
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(len(group), 1))


def _cell(value: Any, kind: str) -> Any:
    return _json(value) if kind == "json" and value is not None else value


def _chunks(rows: Iterable[Mapping[str, Any]], size: int | None) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InvalidInput(f"a number that is not finite cannot be written as JSON: {value!r}") from None


def parquet_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON object that `write_rows` kept in a Parquet file; empty where there is none."""
    _, parquet = _pyarrow()
    return json.loads((parquet.read_schema(path).metadata or {}).get(_METADATA_KEY, b"{}"))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependency("Parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


class ScoreTable:
    """Scores of prompts, one row (a dict) per prompt and step.

    Columns: `prompt`, `step`, `timestep`, per metric `<metric>` (mean over seeds), `<metric>_se` (standard
    error, None for one seed) and `<metric>_seeds` (list), in the units the scorer was asked for, `error`
    (None or a sentence; the numbers are None then), and whatever columns the caller added.
    """

    #: Columns that every table of this kind has, and their types.
    standard: ClassVar[Mapping[str, str]] = _STANDARD

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows: list[Row] = [dict(row) for row in rows]
        self._types = column_types(self.rows, self.standard)

    @classmethod
    def empty_rows(cls, settings: Mapping[str, Any], timesteps: Sequence[float]) -> list[Row]:
        """The rows of one prompt without their numbers, for a run with these settings."""
        numbers = [f"{name}{end}" for name in settings["metrics"] for end in ("", "_se", "_seeds")]
        places = zip(settings["steps"], timesteps, strict=True)
        return [{"step": step, "timestep": timestep} | dict.fromkeys(numbers) for step, timestep in places]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in order of first appearance."""
        return tuple(self._types)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return metric_names(self._types)

    @property
    def steps(self) -> tuple[int, ...]:
        """The distinct steps, ascending."""
        return tuple(sorted({row["step"] for row in self.rows if row.get("step") is not None}))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_pandas(self) -> pandas.DataFrame:
        """As a pandas DataFrame; list columns hold lists. Raises MissingDependency without pandas."""
        try:
            import pandas
        except ImportError:
            raise MissingDependency("to_pandas() needs pandas: pip install pandas") from None
        return pandas.DataFrame(
            [[row.get(name) for name in self.columns] for row in self.rows], columns=self.columns
        )

    def to_parquet(self, path: str | Path, *, row_group: int | None = None) -> None:
        """Write a Parquet file (`<metric>_seeds` as list<double>), by default in one row group."""
        write_rows(path, self.rows, self._types, format="parquet", row_group=row_group)

    def to_csv(self, path: str | Path) -> None:
        """Write a UTF-8 CSV file; lists are JSON, None is an empty field, floats keep every digit."""
        write_rows(path, self.rows, self._types, format="csv")

    def to_jsonl(self, path: str | Path) -> None:
        """Write UTF-8 JSON lines, one object per row; floats keep every digit."""
        write_rows(path, self.rows, self._types, format="jsonl")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table that was written as Parquet, CSV or JSON lines; numbers and lists come back exactly.

        In CSV, columns other than those of the scorer come back as text and an empty field as None. Raises
        InvalidInput for a missing file, an unknown extension or a file that is no such table.
        """
        format = table_format(path)
        if not Path(path).is_file():
            raise InvalidInput(f"{path}: there is no such file")
        try:
            if format == "csv":
                rows = _read_csv(path, cls.standard)
            else:
                rows = {"parquet": _read_parquet, "jsonl": _read_jsonl}[format](path)
        except (ValueError, csv.Error) as error:
            raise InvalidInput(f"{path}: not a {format} table of scores: {error}") from None
        return cls(rows)

    def plot(self, path: str | Path | None = None, *, label_column: str | None = None) -> Figure:
        """The distribution of every metric at every step, split by `label_column`, as a matplotlib figure.

        `label_column` defaults to `memorized` or `label` if there is such a column; with `path` the figure is
        also saved. Raises InvalidInput for an unknown column or a table without scores.
        """
        from sharpcore.report.evaluation import POSITIVE_LABELS
        from sharpcore.report.figures import plot_distributions

        if label_column is None:
            label_column = next((name for name in ("memorized", "label") if name in self.columns), None)
        elif label_column not in self.columns:
            there = ", ".join(self.columns)
            raise InvalidInput(f"label_column: expected one of {there}, got {label_column!r}")
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(str(row.get(label_column)) if label_column else "prompts", []).append(row)
        if len(groups) > _MOST_GROUPS:
            raise InvalidInput(
                f"label_column: expected at most {_MOST_GROUPS} distinct labels, "
                f"{label_column!r} has {len(groups)}"
            )
        panels = {
            (metric, step): {
                f"{label_column}: {label}" if label_column else label: [
                    row[metric] for row in rows if row.get("step") == step and row.get(metric) is not None
                ]
                for label, rows in sorted(
                    groups.items(), key=lambda group: (group[0].lower() not in POSITIVE_LABELS, group[0])
                )
            }
            for metric in self.metrics
            for step in self.steps
        }
        return plot_distributions(panels, path=path)

    def _shown(self) -> list[str]:
        """The columns of the summary."""
        return ["prompt", "step", *self.metrics, "error"]

    def _summary(self) -> tuple[str, list[str], list[list[str]]]:
        failed = sum(row.get("error") is not None for row in self.rows)
        title = f"{len(self)} rows, steps {list(self.steps)}" + (
            f", {failed} with an error" if failed else ""
        )
        header = self._shown()
        body = [[_brief(row.get(name)) for name in header] for row in self.rows[:10]]
        return title, header, body

    def __repr__(self) -> str:
        title, header, body = self._summary()
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in [header, *body]]
        return "\n".join(
            [f"{type(self).__name__}: {title}", *lines, *(["..."] if len(self) > len(body) else [])]
        )

    def _repr_html_(self) -> str:
        title, header, body = self._summary()
        lines = ["".join(f"<th>{html.escape(name)}</th>" for name in header)]
        lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in body]
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def _brief(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 48 else text[:47] + "…"


def _read_parquet(path: str | Path) -> list[Row]:
    _, parquet = _pyarrow()
    rows: list[Row] = parquet.read_table(path).to_pylist()
    as_json = parquet_metadata(path).get("json_columns", [])
    for row in rows:
        row.update({name: json.loads(row[name]) for name in as_json if row[name] is not None})
    return rows


def _read_csv(path: str | Path, standard: Mapping[str, str]) -> list[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        types = {"int": int, "float": float, "list": json.loads}
        parse: dict[str, Any] = {name: types[kind] for name, kind in standard.items() if kind in types}
        for name in metric_names(reader.fieldnames or ()):
            parse |= {name: float, f"{name}_se": float, f"{name}_seeds": json.loads}
        return [
            {name: parse.get(name, str)(text) if text else None for name, text in row.items()}
            for row in reader
        ]


def _read_jsonl(path: str | Path) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every line must be a JSON object")
    return rows
