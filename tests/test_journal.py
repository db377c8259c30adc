"""Tests of the journal: resuming, refusing, torn lines, a full disk, exact numbers."""

from __future__ import annotations

import errno
import json
import os

import pytest

from sharpcore import journal as journal_module
from sharpcore.errors import InvalidInput
from sharpcore.journal import Journal
from sharpcore.prompts import PromptRow
from sharpcore.table import ScoreTable, parquet_metadata

SETTINGS = {"model": "m 1", "steps": [0, 10], "seeds": [42], "metrics": ["sharpness"], "columns": ["id"]}
TIMESTEPS = [981.0, 781.0]
# The scores of the good prompts are made of these numbers.
TEXTS = {0.1: "a", 1.1: "a", 2.1: "b", 3.1: "ü"}
# The same prompt twice, and one that cannot be scored: rows are keyed by their place.
PROMPTS = [
    PromptRow(1, 1, "a", None, {"id": 1}),
    PromptRow(2, 2, " ", "line 2: the prompt is blank", {"id": 2}),
    PromptRow(3, 3, "a", None, {"id": 3}),
    PromptRow(4, 4, "b", None, {"id": 4}),
    PromptRow(5, 5, "ü", None, {"id": 5}),
]


def block(*values):
    return [
        {
            "prompt": TEXTS.get(value),
            "step": step,
            "timestep": TIMESTEPS[k],
            "sharpness": value / 3 + k,
            "sharpness_se": None,
            "sharpness_seeds": [value / 3 + k],
            "error": None,
        }
        for value in values
        for k, step in enumerate(SETTINGS["steps"])
    ]


def complete(output, **options):
    with Journal(output, SETTINGS, PROMPTS, **options) as journal:
        if journal.complete:
            return
        good = list(TEXTS)[sum(row.error is None for row in PROMPTS[: journal.finished]) :]
        list(journal.record([block(value) for value in good], TIMESTEPS))
        assert journal.failed() == 1
        journal.finish()


def interrupted(output, groups=((0.1,), (1.1, 2.1))):
    with Journal(output, SETTINGS, PROMPTS) as journal:
        steps = journal.record([block(*group) for group in groups], TIMESTEPS)
        return [next(steps) for _ in groups]


@pytest.fixture(params=["parquet", "csv", "jsonl"])
def output(request, tmp_path):
    return tmp_path / f"scores.{request.param}"


def test_rows_are_complete_and_in_order(output):
    complete(output)
    table = ScoreTable.read(output)
    assert [row["prompt"] for row in table] == ["a", "a", " ", " ", "a", "a", "b", "b", "ü", "ü"]
    assert [int(row["id"]) for row in table] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [row["step"] for row in table] == [0, 10] * 5
    assert [row["timestep"] for row in table] == TIMESTEPS * 5
    assert [row["error"] for row in table][2:4] == ["line 2: the prompt is blank"] * 2
    assert table.rows[2]["sharpness"] is None
    assert table.rows[2]["sharpness_seeds"] is None
    # Floats come back bit for bit.
    assert [row["sharpness"] for row in table if row["prompt"] == "ü"] == [3.1 / 3, 3.1 / 3 + 1]
    assert os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("assembled", [False, True])
def test_resumed_file_is_byte_identical(output, tmp_path, assembled):
    whole = tmp_path / "whole" / output.name
    whole.parent.mkdir()
    complete(whole)
    assert interrupted(output) == [1, 4]
    if assembled:
        with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
            assert "4 of 5 prompts are finished and kept in" in journal.keep()
        assert len(ScoreTable.read(output)) == 8
    complete(output, resume=True)
    assert output.read_bytes() == whole.read_bytes()
    assert not journal_module._journal_path(output).exists()


def test_resume_without_anything_to_resume_starts(output):
    complete(output, resume=True)
    assert len(ScoreTable.read(output)) == 10


def test_resume_of_a_finished_output(output):
    complete(output)
    first = output.read_bytes()
    with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
        assert journal.complete
        assert journal.finished == len(PROMPTS)
    assert output.read_bytes() == first
    assert os.listdir(output.parent) == [output.name]
    for name, value, message in [
        ("steps", [0, 20], r"steps \(there \[0, 10\], now \[0, 20\]\)"),
        ("metrics", ["other"], r"metrics \(there \['sharpness'\], now \['other'\]\)"),
        ("seeds", [42, 43], "seeds"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            Journal(output, SETTINGS | {name: value}, PROMPTS, resume=True)
    with pytest.raises(InvalidInput, match="has id"):
        Journal(output, SETTINGS, [*PROMPTS[:4], PromptRow(5, 5, "ü", None, {"id": 6})], resume=True)
    assert output.read_bytes() == first


def test_resume_of_an_output_without_journal(tmp_path):
    output = tmp_path / "scores.parquet"
    interrupted(output)
    with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
        journal.keep()
    journal_module._journal_path(output).unlink()
    with pytest.raises(InvalidInput, match=r"seeds \(there \[42\], now \[43\]\)"):
        Journal(output, SETTINGS | {"seeds": [43]}, PROMPTS, resume=True)
    complete(output, resume=True)
    assert len(ScoreTable.read(output)) == 10
    assert parquet_metadata(output)["settings"] == SETTINGS


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_a_part_without_settings_is_not_resumed(tmp_path, extension):
    output = tmp_path / f"scores.{extension}"
    interrupted(output)
    with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
        journal.keep()
    journal_module._journal_path(output).unlink()
    with pytest.raises(InvalidInput, match="nothing to resume"):
        Journal(output, SETTINGS, PROMPTS, resume=True)


@pytest.mark.parametrize("junk", [b'{"first": 4, "cou', b"\0\0\0", b'{"first": 4}'])
def test_torn_last_line_is_dropped(output, junk):
    interrupted(output)
    with open(journal_module._journal_path(output), "ab") as file:
        file.write(junk)
    complete(output, resume=True)
    assert len(ScoreTable.read(output)) == 10


def test_a_line_that_was_cut_anywhere_loses_only_itself(tmp_path):
    output = tmp_path / "scores.jsonl"
    interrupted(output)
    path = journal_module._journal_path(output)
    whole = path.read_bytes()
    ends = [k + 1 for k, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(0, len(whole), 41):
        path.write_bytes(whole[:size])
        lines = sum(end <= size for end in ends)
        with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
            assert journal.finished == [0, 0, 1, 4][lines]
    path.write_bytes(whole)


def test_damage_in_the_middle_is_refused(output):
    interrupted(output)
    path = journal_module._journal_path(output)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"{", *lines[2:]]))
    with pytest.raises(InvalidInput, match="line 2 is damaged"):
        Journal(output, SETTINGS, PROMPTS, resume=True)
    path.write_bytes(b"\n".join([lines[0], *lines[2:]]))
    with pytest.raises(InvalidInput, match="prompt 0 is missing"):
        Journal(output, SETTINGS, PROMPTS, resume=True)
    assert path.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "m 2"), ("steps", [0, 20]), ("metrics", ["other"]), ("units", "eps"), ("columns", [])],
)
def test_other_settings_are_refused_by_name(output, name, value):
    interrupted(output)
    before = journal_module._journal_path(output).read_bytes()
    with pytest.raises(InvalidInput, match=rf"other settings: {name} \("):
        Journal(output, SETTINGS | {name: value}, PROMPTS, resume=True)
    assert journal_module._journal_path(output).read_bytes() == before


def test_another_input_is_refused(output):
    interrupted(output)
    changed = [*PROMPTS[:2], PromptRow(3, 3, "A", None, {"id": 3}), *PROMPTS[3:]]
    with pytest.raises(InvalidInput, match="row 3 has prompt 'A', there it is 'a'"):
        Journal(output, SETTINGS, changed, resume=True)
    with pytest.raises(InvalidInput, match="more prompts than the input, which has 2"):
        Journal(output, SETTINGS, PROMPTS[:2], resume=True)


def test_existing_output_is_not_overwritten_unasked(output):
    complete(output)
    with pytest.raises(InvalidInput, match="exists already; --resume"):
        Journal(output, SETTINGS, PROMPTS)
    complete(output, overwrite=True)
    with pytest.raises(InvalidInput, match="exclude each other"):
        Journal(output, SETTINGS, PROMPTS, resume=True, overwrite=True)
    interrupted(output.with_name("other.csv"))
    with pytest.raises(InvalidInput, match=r"partial\.jsonl: an interrupted run left"):
        Journal(output.with_name("other.csv"), SETTINGS, PROMPTS)


def test_overwrite_keeps_what_is_there_until_there_is_a_new_row(output):
    interrupted(output)
    before = journal_module._journal_path(output).read_bytes()
    with Journal(output, SETTINGS, PROMPTS, overwrite=True):
        pass
    assert journal_module._journal_path(output).read_bytes() == before
    complete(output, overwrite=True)
    assert len(ScoreTable.read(output)) == 10


def test_a_journal_without_rows_is_removed(output):
    with Journal(output, SETTINGS, PROMPTS):
        pass
    assert os.listdir(output.parent) == []


def test_bad_outputs(tmp_path):
    for name, message in (
        ("t.txt", "extension"),
        ("no/t.csv", "there is no folder"),
        ("d.csv", "this is a folder"),
    ):
        (tmp_path / "d.csv").mkdir(exist_ok=True)
        with pytest.raises(InvalidInput, match=message):
            Journal(tmp_path / name, SETTINGS, PROMPTS)


def test_two_processes_cannot_write_the_same_output(output):
    pytest.importorskip("fcntl")
    with Journal(output, SETTINGS, PROMPTS) as journal:
        journal.append(0, block(0.1))
        with pytest.raises(InvalidInput, match="another process is writing it"):
            Journal(output, SETTINGS, PROMPTS, resume=True)
        assert journal.path.exists()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_full_disk_leaves_the_finished_rows(output, monkeypatch, call):
    real = getattr(os, call)

    def full(*arguments):
        if call == "write":
            real(arguments[0], bytes(arguments[1])[:7])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Journal(output, SETTINGS, PROMPTS) as journal:
        list(zip([1], journal.record([block(0.1)], TIMESTEPS), strict=False))
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                journal.append(1, block(9.9))
        assert journal.finished == 1
        assert len(list(journal.rows())) == 2
    complete(output, resume=True)
    assert ScoreTable.read(output).rows[0]["sharpness"] == 0.1 / 3


def test_full_disk_while_the_output_is_written(output, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    interrupted(output)
    with Journal(output, SETTINGS, PROMPTS, resume=True) as journal:
        monkeypatch.setattr(journal_module, "write_rows", full)
        text = journal.keep()
    assert "kept in" in text
    assert "partial.jsonl" in text
    assert "No space left" in text
    assert os.listdir(output.parent) == [journal_module._journal_path(output).name]


def test_nothing_but_json_numbers_is_written(output):
    with Journal(output, SETTINGS, PROMPTS) as journal:
        journal.append(0, block(0.1))
        with pytest.raises(ValueError, match="JSON"):
            journal.append(1, block(float("nan")))
        for line in journal.path.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=lambda name: pytest.fail(name))
        with pytest.raises(ValueError, match="does not continue"):
            journal.append(3, block(0.1))
        with pytest.raises(ValueError, match="does not continue"):
            journal.append(1, block(0.1)[:1])


def test_rows_of_another_prompt_are_refused(output):
    with (
        Journal(output, SETTINGS, PROMPTS) as journal,
        pytest.raises(ValueError, match="not those of row 3"),
    ):
        list(journal.record([block(0.1), block(2.1)], TIMESTEPS))


def test_parquet_row_groups_do_not_depend_on_the_blocks(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(journal_module, "ROW_GROUP", 4)
    output = tmp_path / "scores.parquet"
    complete(output)
    file = parquet.ParquetFile(output)
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [4, 4, 2]
