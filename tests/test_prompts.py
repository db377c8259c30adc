"""Tests of reading prompts: every format, bad rows, bad files."""

from __future__ import annotations

import io
import json
import sys
from datetime import date

import pytest

from sharpcore.errors import InvalidInput
from sharpcore.prompts import read_prompts


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def summary(rows):
    return [(row.row, row.line, row.prompt, row.error) for row in rows]


def test_text_keeps_every_line_and_marks_blank_ones(tmp_path):
    path = write(tmp_path / "p.txt", "one\r\n  \nzwölf\u2028x, y \n\n \n")
    assert summary(read_prompts(path)) == [
        (1, 1, "one", None),
        (2, 2, "  ", "line 2: the prompt is blank"),
        (3, 3, "zwölf\u2028x, y ", None),
    ]


def test_byte_order_mark_is_dropped(tmp_path):
    rows = read_prompts(write(tmp_path / "p.csv", b"\xef\xbb\xbfprompt\na\n"))
    assert rows[0].prompt == "a"


def test_standard_input(monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b'{"prompt": "a", "id": 7}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    (row,) = read_prompts("-", format="jsonl")
    assert (row.prompt, row.columns) == ("a", {"id": 7})


def test_csv_rows_and_carried_columns(tmp_path):
    path = write(
        tmp_path / "p.csv",
        'id,prompt,label\n1,"two\nlines",yes\n2,,no\n3\n4,a,yes,extra\n5,"x"y,no\n6,last,yes\n',
    )
    rows = read_prompts(path)
    assert summary(rows) == [
        (1, 2, "two\nlines", None),
        (2, 4, "", "row 2 (line 4): the prompt is blank"),
        (3, 5, None, "row 3 (line 5): the prompt is missing"),
        (4, 6, "a", "row 4 (line 6): has 4 fields, the header has 3"),
        (5, 7, None, "row 5 (line 7): not valid CSV: ',' expected after '\"'"),
        (6, 8, "last", None),
    ]
    assert rows[0].columns == {"id": "1", "label": "yes"}
    assert rows[2].columns == {"id": "3", "label": None}
    assert rows[4].columns == {"id": None, "label": None}


def test_jsonl_bad_lines_are_rows_with_an_error(tmp_path):
    lines = [
        '{"text": "a", "id": 1}',
        "{broken",
        "",
        "[1]",
        '{"id": 2}',
        '{"text": 5}',
        '{"text": "b", "x": NaN}',
    ]
    rows = read_prompts(write(tmp_path / "p.jsonl", "\n".join([*lines, '{"text": "c"}', ""])), column="text")
    errors = [row.error for row in rows]
    assert [row.prompt for row in rows] == ["a", None, None, None, None, None, None, "c"]
    assert errors[0] is None
    assert errors[7] is None
    assert errors[1].startswith("line 2: not valid JSON")
    assert errors[2] == "line 3: the line is blank"
    assert errors[3] == "line 4: expected a JSON object, got list"
    assert errors[4] == "line 5: the prompt is missing"
    assert errors[5] == "line 6: the prompt is not a string but int 5"
    assert errors[6] == "line 7: not valid JSON: NaN is no JSON number"
    assert all(set(row.columns) == {"id"} for row in rows)


def test_jsonl_lone_surrogate_is_an_error_that_can_be_written(tmp_path):
    (row,) = read_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a\\ud800b", "tag": "\\udfff"}'))
    assert "surrogate" in row.error
    json.dumps([row.prompt, row.columns], ensure_ascii=False).encode()


def test_parquet_values(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pa.table(
        {
            "prompt": ["a", None, " "],
            "score": [1.5, float("nan"), float("inf")],
            "day": [date(2024, 1, 2)] * 3,
            "tags": [["x"], [], None],
        }
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    rows = read_prompts(tmp_path / "p.parquet")
    assert summary(rows) == [
        (1, None, "a", None),
        (2, None, None, "row 2: the prompt is missing"),
        (3, None, " ", "row 3: the prompt is blank"),
    ]
    assert [row.columns["score"] for row in rows] == [1.5, None, "inf"]
    assert rows[0].columns["day"] == "2024-01-02"
    assert [row.columns["tags"] for row in rows] == [["x"], [], None]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"good\nb\xe4d\n", r"byte 0xe4 at offset 6 \(line 2\)"),
        ("p.txt", b"\xef\xbb\xbfa\n\xff\n", r"byte 0xff at offset 5 \(line 2\)"),
        ("p.txt", "hello".encode("utf-16"), "looks like UTF-16"),
        ("p.txt", b"", "no prompts"),
        ("p.txt", b"\n \n", "no prompts"),
        ("p.csv", b"prompt,id\n", "it has no rows"),
        ("p.csv", b"text,id\na,1\n", "no column 'prompt'; the columns are: text, id"),
        ("p.csv", b"prompt,prompt\na,b\n", "'prompt' more than once"),
        ("p.csv", b'prompt\na\n"never closed\nb\nc\n', "line 3 is never closed"),
        ("p.csv", b'"pro"mpt\na\n', "header cannot be read"),
        ("p.jsonl", b'{"text": "a"}\n', "no column 'prompt'; the columns are: text"),
        ("p.parquet", b"PAR1 nonsense", "not a Parquet file"),
        ("p.xlsx", b"x", "say --format"),
        ("p", b"x", "say --format"),
    ],
)
def test_errors_of_the_whole_file(tmp_path, name, content, message):
    with pytest.raises(InvalidInput, match=message):
        read_prompts(write(tmp_path / name, content))


def test_missing_file_folder_and_format(tmp_path):
    with pytest.raises(InvalidInput, match="no such file"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(InvalidInput, match="this is a folder"):
        read_prompts(tmp_path, format="text")
    with pytest.raises(InvalidInput, match="format: expected text"):
        read_prompts(write(tmp_path / "p.txt", "a"), format="xml")
    (row,) = read_prompts(write(tmp_path / "p.dat", "a"), format="text")
    assert row.prompt == "a"
