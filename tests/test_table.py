"""Tests of the table of scores: exact round trips, types of columns, views and the picture."""

from __future__ import annotations

import json
import math

import pytest

from sharpcore.errors import InvalidInput
from sharpcore.table import ScoreTable, column_types, write_rows

METRIC = "score_difference"


def row(prompt, step=0, score=0.1, **columns):
    seeds = None if score is None else [score, score * 3]
    return {
        "prompt": prompt,
        **columns,
        "step": step,
        "timestep": 981.0 - 20 * step,
        METRIC: score,
        f"{METRIC}_se": None if score is None else 1e-17 + score / 3,
        f"{METRIC}_seeds": seeds,
        "error": "it failed" if score is None else None,
    }


@pytest.fixture
def table():
    awkward = ['a "quoted", comma', "two\nlines", "ünïcødé 🙂", " spaces "]
    rows = [row(text, step, 0.1 + k / 7, label="yes") for k, text in enumerate(awkward) for step in (0, 10)]
    return ScoreTable([*rows, row("bad", 0, None, label="no")])


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_round_trip_is_exact(table, tmp_path, extension):
    path = tmp_path / f"scores.{extension}"
    getattr(table, f"to_{extension}")(path)
    back = ScoreTable.read(path)
    assert back.columns == table.columns
    assert back.rows == table.rows


def test_parquet_has_real_lists_and_row_groups(table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table.to_parquet(tmp_path / "one.parquet")
    table.to_parquet(tmp_path / "many.parquet", row_group=4)
    schema = parquet.read_schema(tmp_path / "one.parquet")
    assert [
        str(schema.field(name).type) for name in ("prompt", "step", f"{METRIC}_seeds", f"{METRIC}_se")
    ] == [
        "string",
        "int64",
        "list<element: double>",
        "double",
    ]
    assert parquet.ParquetFile(tmp_path / "one.parquet").num_row_groups == 1
    assert parquet.ParquetFile(tmp_path / "many.parquet").num_row_groups == 3
    assert ScoreTable.read(tmp_path / "many.parquet").rows == table.rows


def test_csv_writes_lists_as_json(tmp_path):
    ScoreTable([row("a", score=0.5)]).to_csv(tmp_path / "t.csv")
    assert '"[0.5, 1.5]"' in (tmp_path / "t.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None, 2], "int"),
        ([True, False], "bool"),
        ([1, 2.5], "float"),
        ([2**53 + 1, 0.5], "json"),  # a float64 would change the integer
        ([2**70], "json"),
        (["a", 1], "json"),
        ([{"a": 1}, None], "json"),
        ([None], "text"),
        ([True, 1], "json"),
    ],
)
def test_carried_columns_keep_values_and_types(values, expected, tmp_path):
    rows = [row("p", extra=value) for value in values]
    assert column_types(rows)["extra"] == expected
    for extension in ("parquet", "jsonl"):
        getattr(ScoreTable(rows), f"to_{extension}")(tmp_path / f"t.{extension}")
        back = [line["extra"] for line in ScoreTable.read(tmp_path / f"t.{extension}")]
        assert back == values
        if expected != "float":
            assert [type(value) for value in back] == [type(value) for value in values]


def test_rows_without_any_score_keep_the_column_types():
    types = column_types([row("bad", score=None)])
    assert types[f"{METRIC}_seeds"] == "list"
    assert types[METRIC] == types[f"{METRIC}_se"] == "float"


def test_nan_is_not_written_as_json(tmp_path):
    with pytest.raises(InvalidInput, match="not finite"):
        ScoreTable([row("a", score=math.nan)]).to_jsonl(tmp_path / "t.jsonl")


@pytest.mark.parametrize("name", ["t.txt", "t"])
def test_unknown_extension(tmp_path, name):
    (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"extension \.parquet"):
        ScoreTable.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv", "step,prompt\nx,a\n"), ("t.jsonl", "[1]\n"), ("t.jsonl", "{\n"), ("t.parquet", "no")],
)
def test_files_that_are_no_tables(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput, match="not a"):
        ScoreTable.read(tmp_path / name)
    with pytest.raises(InvalidInput, match="no such file"):
        ScoreTable.read(tmp_path / f"missing-{name}")


def test_views(table):
    assert len(table) == 9
    assert table.metrics == (METRIC,)
    assert table.steps == (0, 10)
    assert "9 rows, steps [0, 10], 1 with an error" in repr(table)
    assert "<td>ünïcødé 🙂</td>" in table._repr_html_()
    assert "<b>" not in ScoreTable([row("<b>")])._repr_html_()
    assert repr(ScoreTable([])).startswith("ScoreTable: 0 rows")
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert frame[f"{METRIC}_seeds"][0] == table.rows[0][f"{METRIC}_seeds"]


def test_plot_splits_by_label_and_saves(table, tmp_path):
    figure = table.plot(tmp_path / "plot.png", label_column="label")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["label: yes (4)"]
    assert [axes.get_title() for axes in figure.axes] == ["step 0", "step 10"]


def test_plot_refuses_what_it_cannot_draw(table):
    with pytest.raises(InvalidInput, match="expected one of prompt"):
        table.plot(label_column="nothing")
    with pytest.raises(InvalidInput, match="no score to plot"):
        ScoreTable([]).plot()
    with pytest.raises(InvalidInput, match="at most 6"):
        ScoreTable([row("a", tag=k) for k in range(7)]).plot(label_column="tag")


def test_metadata_and_format_argument(tmp_path):
    pytest.importorskip("pyarrow")
    from sharpcore.table import parquet_metadata

    rows = [row("a")]
    path = tmp_path / "odd.tmp"
    write_rows(path, rows, column_types(rows), format="parquet", metadata={"settings": {"a": 1}})
    assert parquet_metadata(path)["settings"] == {"a": 1}
    write_rows(path, rows, column_types(rows), format="jsonl")
    assert json.loads(path.read_text(encoding="utf-8")) == rows[0]
