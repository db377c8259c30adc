"""Tests of `sharpcore calibrate` and of `sharpcore score --calibration`: decisions, refusals, resuming."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_cli import HDS, fake, prompts_file, run  # noqa: F401

from sharpcore import cli
from sharpcore.calibration import Calibration
from sharpcore.table import ScoreTable, parquet_metadata, write_rows

DATA = Path(__file__).parent / "data" / "tiny-sd-eps"
NEGATIVES = [f"negative {chr(97 + k)}{chr(97 + 3 * k % 26)}" for k in range(20)]


@pytest.fixture
def calibrated(fake, tmp_path):  # noqa: F811
    """A calibration file of the fake scorer: every negative's score is used."""
    folder = tmp_path / "calibration"
    folder.mkdir()
    path = prompts_file(folder, *NEGATIVES)
    result = run("calibrate", path, "-o", folder / "c.json", "--steps", "0,1", "--validation-share", 0)
    assert result.exit_code == 0, result.output
    return folder / "c.json"


def test_calibrate_a_file_then_decide(fake, calibrated, tmp_path):  # noqa: F811
    loaded = Calibration.load(calibrated)
    assert list(loaded.negatives) == [(name, step) for name in ("score_difference", HDS) for step in (0, 1)]
    table = ScoreTable.read(calibrated.with_name("c.scores.parquet"))
    expected = sorted(row[HDS] for row in table if row["step"] == 1)
    assert loaded.at(HDS, 1).scores.tolist() == expected
    assert loaded.settings["seeds"] == [42, 43, 44, 45]
    assert loaded.settings["model"].startswith("tiny-sd-eps ")

    path = prompts_file(tmp_path, "z" * 60, "", "a", NEGATIVES[3])
    out = tmp_path / "out.parquet"
    result = run("score", path, "-o", out, "--steps", "1", "--calibration", calibrated, "--fpr", 0.1)
    assert result.exit_code == 0, result.output
    rows = ScoreTable.read(out).rows
    assert [row[f"{HDS}_flagged"] for row in rows] == [True, None, False, False]
    assert rows[0][f"{HDS}_p"] == 1 / 21
    for row in rows:
        if row[HDS] is not None:
            assert row[f"{HDS}_p"] == loaded.p_value(row[HDS], HDS, 1)
            assert row["score_difference_flagged"] == (row["score_difference_p"] <= 0.1)
    assert list(rows[0])[-1] == "error"
    assert parquet_metadata(out)["settings"]["calibration"] == {"checksum": loaded.checksum, "fpr": 0.1}


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_interrupted_decisions_resume_to_the_same_bytes(fake, calibrated, tmp_path, extension):  # noqa: F811
    path = prompts_file(tmp_path, "", "b", "a" * 70, "c", "stop", "d")
    out, whole = tmp_path / f"out.{extension}", tmp_path / f"whole.{extension}"
    options = ["--steps", "0,1", "--calibration", calibrated, "--fpr", 0.2]
    assert run("score", path, "-o", whole, *options).exit_code == 0
    fake.fail_at = "stop"
    assert run("score", path, "-o", out, *options).exit_code == 130
    fake.fail_at = ""
    other = run("score", path, "-o", out, *options[:-1], 0.3, "--resume")
    assert other.exit_code == 2
    assert "calibration (there {'checksum'" in other.stderr
    assert run("score", path, "-o", out, *options, "--resume").exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    again = run("score", path, "-o", out, *options, "--resume")
    assert again.exit_code == 0
    assert "nothing left to do" in again.stderr


def test_only_rows_with_an_error_keep_their_types(fake, calibrated, tmp_path):  # noqa: F811
    import pyarrow.parquet

    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": 1}\n', encoding="utf-8")
    result = run("score", path, "-o", tmp_path / "o.parquet", "--calibration", calibrated, "--steps", "0")
    assert result.exit_code == 0, result.output
    schema = pyarrow.parquet.read_schema(tmp_path / "o.parquet")
    assert [str(schema.field(f"{HDS}{end}").type) for end in ("_p", "_flagged")] == ["double", "bool"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "2"], "another setting: seeds (there [42, 43, 44, 45], now [42, 43])"),
        (["--units", "eps"], "units (there 'score', now 'eps')"),
        (["--norm"], "squared (there True, now False)"),
        (["--guidance", "3"], "guidance (there 7.5, now 3.0)"),
        (["--num-inference-steps", "20"], "num_inference_steps (there 50, now 20)"),
        (["--precision", "bfloat16"], "precision (there 'float32', now 'bfloat16')"),
        (["--height", "16", "--width", "16"], "latent_size (there [16, 16], now [8, 8])"),
        (["--steps", "0,7"], "steps (there [0, 1], now [0, 7])"),
        (["--fpr", "1.5"], "--fpr: expected a number between 0 and 1, both excluded; got 1.5"),
        (["--fpr", "nan"], "--fpr: expected a number between 0 and 1"),
    ],
)
def test_a_file_for_another_setting_is_refused(fake, calibrated, tmp_path, options, message):  # noqa: F811
    path = prompts_file(tmp_path, "a")
    given = ["--steps", "0", *options] if "--steps" not in options else options
    result = run("score", path, "-o", tmp_path / "o.csv", "--calibration", calibrated, *given)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "o.csv").exists()


def test_a_damaged_file_and_fpr_alone(fake, calibrated, tmp_path):  # noqa: F811
    path = prompts_file(tmp_path, "a")
    result = run("score", path, "-o", tmp_path / "o.csv", "--fpr", "0.1")
    assert (result.exit_code, "--fpr belongs to --calibration" in result.stderr) == (2, True)
    calibrated.write_text(calibrated.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    result = run("score", path, "-o", tmp_path / "o.csv", "--calibration", calibrated)
    assert result.exit_code == 2
    assert "damaged" in result.stderr
    result = run("score", path, "-o", tmp_path / "o.csv", "--calibration", tmp_path / "missing.json")
    assert "there is no such file" in result.stderr


def test_a_model_with_other_weights_is_refused(fake, calibrated, tmp_path, monkeypatch):  # noqa: F811
    from sharpcore import cli_score

    monkeypatch.setattr(cli_score, "files_fingerprint", lambda folder: "0" * 16)
    path = prompts_file(tmp_path, "a")
    result = run("score", path, "-o", tmp_path / "o.csv", "--calibration", calibrated, "--steps", "0")
    assert result.exit_code == 2
    assert "another setting: model (there 'tiny-sd-eps " in result.stderr


def test_too_few_negatives_are_said(fake, calibrated, tmp_path):  # noqa: F811
    path = prompts_file(tmp_path, "a")
    result = run("score", path, "-o", tmp_path / "o.csv", "--calibration", calibrated, "--steps", "0")
    assert result.exit_code == 0
    said = "nothing will be flagged, a false positive rate of 0.01 takes 99 negatives, the calibration has 20"
    assert said in result.stderr


def test_a_score_that_no_negatives_are_there_for_is_refused(fake, calibrated, tmp_path):  # noqa: F811
    loaded = Calibration.load(calibrated)
    fewer = {place: found for place, found in loaded.negatives.items() if place != (HDS, 1)}
    replace(loaded, negatives=fewer).save(calibrated)
    path = prompts_file(tmp_path, "a")
    options = ["--calibration", calibrated, "--steps", "0,1", "--fpr", 0.1]
    result = run("score", path, "-o", tmp_path / "o.csv", *options)
    # The fake scorer has a number there, which cannot be decided.
    assert result.exit_code == 2
    assert f"got '{HDS}' and 1" in result.stderr


def test_calibrate_from_the_scores_of_an_evaluation(fake, tmp_path):  # noqa: F811
    memorized, others = tmp_path / "m.txt", tmp_path / "o.txt"
    memorized.write_text("zz\nzy\nzx\n", encoding="utf-8")
    others.write_text("\n".join([*NEGATIVES, "", NEGATIVES[0].upper()]) + "\n", encoding="utf-8")
    out = tmp_path / "report"
    result = run("evaluate", "--memorized", memorized, "--others", others, "--out", out, "--bootstrap", 20)
    assert result.exit_code == 0, result.output
    scores, path = out / "scores.parquet", tmp_path / "c.json"
    result = run(
        "calibrate", "--from-scores", scores, "-o", path, "--validation-share", 0.25, "--fpr", "0.1,0.2"
    )
    assert result.exit_code == 0, result.output
    assert "calibration with 20 different negatives written to" in result.stderr
    loaded = Calibration.load(path).at(HDS, 0)
    assert (len(loaded.scores), len(loaded.held_out)) == (15, 5)
    flagged = loaded.validation(0.1).flagged
    low, high = loaded.validation(0.1).interval
    assert f"{flagged} of 5 ({low:.3f} to {high:.3f})" in result.stdout
    assert f"{loaded.threshold(0.1):.6g}" in result.stdout
    again = run("calibrate", "--from-scores", scores, "-o", path)
    assert (again.exit_code, "--overwrite replaces it" in again.stderr) == (2, True)
    first = path.read_bytes()
    options = ["--validation-share", 0.25, "--overwrite"]
    assert run("calibrate", "--from-scores", scores, "-o", path, *options).exit_code == 0
    assert path.read_bytes() == first
    few = run("calibrate", "--from-scores", scores, "-o", path, "--fpr", 0.05, *options)
    assert "takes 19 negatives, there are 15 (5 more are held out: --validation-share)" in few.stderr


def test_labelled_prompts_are_left_out_before_scoring(fake, tmp_path):  # noqa: F811
    path = tmp_path / "in.csv"
    lines = ["prompt,memorized", "zz,1", *(f"{prompt},0" for prompt in NEGATIVES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fake.fail_at = "zz"
    result = run("calibrate", path, "-o", tmp_path / "c.json", "--scores", tmp_path / "s.parquet")
    assert result.exit_code == 0, result.output
    assert len(ScoreTable.read(tmp_path / "s.parquet")) == 20
    result = run("calibrate", path, "-o", tmp_path / "d.json", "--label-column", "kind")
    assert "there is no column 'kind' (--label-column); the other columns are: memorized" in result.stderr
    path.write_text("prompt,memorized\nzz,1\n", encoding="utf-8")
    result = run("calibrate", path, "-o", tmp_path / "d.json")
    assert (result.exit_code, "there is none to calibrate with" in result.stderr) == (2, True)


def test_mixed_settings_are_named(fake, tmp_path):  # noqa: F811
    path = prompts_file(tmp_path, *NEGATIVES)
    for name, seeds in (("a", 2), ("b", 3)):
        assert run("score", path, "-o", tmp_path / f"{name}.parquet", "--seeds", seeds).exit_code == 0
    tables = ["--from-scores", tmp_path / "a.parquet", "--from-scores", tmp_path / "b.parquet"]
    result = run("calibrate", *tables, "-o", tmp_path / "c.json")
    assert result.exit_code == 2
    assert "mixed settings, it differs from" in result.stderr
    assert "seeds ([42, 43], [42, 43, 44])" in result.stderr
    assert run("calibrate", *tables[:2], *tables[:2], "-o", tmp_path / "c.json").exit_code == 0
    assert len(Calibration.load(tmp_path / "c.json").at(HDS, 0).scores) == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one source: INPUT, or --from-scores"),
        (["p.txt", "--from-scores", "s.parquet"], "expected one source"),
        (["p.txt", "--fpr", "0"], '--fpr: expected numbers between 0 and 1 like "0.01,0.03"'),
        (["p.txt", "--fpr", "a"], "--fpr: expected numbers"),
        (["p.txt", "--validation-share", "1"], "--validation-share: expected a number in [0, 1), got 1.0"),
        (["p.txt", "--scores", "s.csv"], "s.csv: expected a Parquet table"),
        (["--from-scores", "s.csv"], "s.csv: expected a Parquet table"),
        (["--from-scores", "missing.parquet"], "missing.parquet: there is no such file"),
        (["missing.txt"], "there is no such file"),
    ],
)
def test_bad_options(fake, tmp_path, monkeypatch, arguments, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a\n", encoding="utf-8")
    result = run("calibrate", *arguments, "-o", tmp_path / "c.json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["p.txt"]
    for out in (tmp_path / "no" / "c.json", tmp_path):
        assert run("calibrate", "p.txt", "-o", out).exit_code == 2


def test_tables_that_cannot_calibrate(tmp_path):
    row = {"prompt": "a", "step": 0, "timestep": 1.0, "m": 1.0, "m_seeds": [1.0], "error": None}
    types = {
        "prompt": "text",
        "step": "int",
        "timestep": "float",
        "m": "float",
        "m_seeds": "list",
        "error": "text",
    }

    def calibrate(metadata, **changes):
        write_rows(tmp_path / "s.parquet", [row | changes], types, metadata=metadata)
        return run("calibrate", "--from-scores", tmp_path / "s.parquet", "-o", tmp_path / "c.json").stderr

    assert "it does not say with which settings it was made" in calibrate({})
    assert "no score of a negative to calibrate with" in calibrate({"settings": {}}, m=None, error="failed")
    assert "m at step 0: expected finite numbers, got nan" in calibrate({"settings": {}}, m=float("nan"))


def test_the_real_model(tmp_path):
    pytest.importorskip("diffusers")
    recorded = {
        row["prompt"]: row for row in json.loads((DATA / "reference_scores.json").read_bytes())["prompts"]
    }
    lines = (cli.default_model() / "prompts_nonmem.txt").read_text(encoding="utf-8").splitlines()[:4]
    memorized = (cli.default_model() / "prompts_mem.txt").read_text(encoding="utf-8").splitlines()[-2:]
    options = ["--seeds", 1, "--norm", "-q"]
    path = prompts_file(tmp_path, *lines)
    result = run("calibrate", path, "-o", tmp_path / "c.json", "--validation-share", 0, *options)
    assert result.exit_code == 0, result.output
    expected = sorted(recorded[line]["step0"]["wen"][0] for line in lines)
    # Measured 1e-6; the reference is float32 too.
    np.testing.assert_allclose(
        Calibration.load(tmp_path / "c.json").at("score_difference").scores, expected, rtol=1e-4
    )
    path = prompts_file(tmp_path, *memorized)
    decided = ["--calibration", tmp_path / "c.json", "--fpr", 0.2]
    result = run("score", path, "-o", tmp_path / "o.csv", *decided, *options)
    assert result.exit_code == 0, result.output
    rows = ScoreTable.read(tmp_path / "o.csv").rows
    for row in rows:
        reached = sum(value >= recorded[row["prompt"]]["step0"]["wen"][0] for value in expected)
        assert float(row["score_difference_p"]) == (1 + reached) / 5
        assert row["score_difference_flagged"] == str(reached == 0)
