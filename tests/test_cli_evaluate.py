"""Tests of what `sharpcore evaluate` says beside the AUC: comparisons, groups, clusters, text, costs."""

from __future__ import annotations

import csv
import json
import os
import sys

import numpy as np
import pytest
from test_cli import HDS, fake, run  # noqa: F401

from sharpcore.table import ScoreTable, column_types, write_rows


def make_scores(path, costs=None, steps=(0, 10)):
    """A table of two metrics whose negatives are lower, and where a text feature separates as well."""
    generator = np.random.default_rng(0)
    rows = []
    for k in range(40):
        memorized = k < 16
        words = [f"word{letter}" for letter in generator.permutation(list("abcdefghijklmnop"))[:6]]
        prompt = " ".join(word.title() if memorized else word for word in words)
        for step in steps:
            row = {
                "prompt": prompt,
                "memorized": memorized,
                "tier": k % 2 if memorized else None,
                "step": step,
            }
            for name, shift in (("cheap", 1.0), ("dear", 1.6)):
                seeds = (generator.normal(size=3) + shift * memorized).tolist()
                row |= {name: float(np.mean(seeds)), f"{name}_seeds": seeds}
            rows.append(row | {"timestep": 1.0, "error": None})
    settings = {"seeds": [1, 2, 3]} | ({"costs": costs} if costs else {})
    write_rows(path, rows, column_types(rows), metadata={"settings": settings})
    return path


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_in_the_report(tmp_path):
    costs = {"cheap": {"forwards": 2, "products": 0}, "dear": {"forwards": 2, "products": 1}}
    scores, out = make_scores(tmp_path / "s.parquet", costs), tmp_path / "out"
    result = run("evaluate", "--from-scores", scores, "-o", out, "--group-column", "tier", "--bootstrap", 50)
    assert result.exit_code == 0, result.output
    tables = ["auc_over_seeds.csv", "comparisons.csv", "evaluation.csv", "evaluation.json"]
    pictures = ["auc_over_seeds.png", "auc_over_steps.png", "histogram.png", "report.html", "roc.png"]
    assert sorted(os.listdir(out)) == sorted(tables + pictures)
    report = json.loads((out / "evaluation.json").read_bytes())
    assert [(e["metric"], e["step"], e["group"]) for e in report["evaluations"]] == [
        (metric, step, group)
        for metric in ("cheap", "dear")
        for step in (0, 10)
        for group in (None, "0", "1")
    ]
    assert report["evaluations"][-1]["cost"] == {"forwards": 2, "products": 1}
    assert report["evaluations"][0]["clusters"]["n_positive"] == 16
    assert [(c["first"], c["second"]) for c in report["comparisons"]] == [
        ("dear@0", "cheap@0"),
        ("dear@10", "cheap@10"),
    ]
    assert len(report["auc_over_seeds"]) == 2 * 2 * 3
    capitals = next(f for f in report["confounds"]["features"] if f["feature"] == "capitalized_words")
    assert (capitals["auc"], capitals["direction"]) == (1.0, "higher")
    assert report["duplicates"]["memorized"]["prompts"] == 16
    assert any("capitalized words alone separates the lists" in text for text in report["warnings"])
    rows = {row["metric"]: row for row in read_csv(out / "evaluation.csv")}
    assert rows["dear"]["cost_products"] == "1"
    assert rows["text: capitalized_words"]["auc"] == "1.0"
    assert "sharpcore: warning: the share of capitalized words alone" in result.stderr
    for shown in ("forwards", "DeLong", "by clusters", "text: capitalized_words", "dear@10", "p (Holm)"):
        assert shown in result.stdout


def test_named_comparisons_and_no_clusters(tmp_path):
    scores, out = make_scores(tmp_path / "s.parquet"), tmp_path / "out"
    options = [
        "--compare",
        "cheap@0,cheap@10",
        "--compare",
        "cheap,dear",
        "--clusters",
        "none",
        "--bootstrap",
        20,
    ]
    result = run("evaluate", "--from-scores", scores, "-o", out, *options)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "evaluation.json").read_bytes())
    assert [(c["first"], c["second"]) for c in report["comparisons"]] == [
        ("cheap@0", "cheap@10"),
        ("cheap@0", "dear@0"),
        ("cheap@10", "dear@10"),
    ]
    assert all(c["p_adjusted"] >= c["p_value"] for c in report["comparisons"])
    assert report["evaluations"][0]["clusters"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "cheap"], '--compare: expected two different metrics like "a,b", got'),
        (["--compare", "cheap,cheap"], "--compare: expected two different"),
        (["--compare", "cheap,other"], "got 'other'"),
        (["--group-column", "kind"], "group_column: expected a column out of prompt, memorized, tier"),
        (["--clusters", "kind"], "clusters: expected near or beginning, or a column"),
        (["--tokenizer", "/no/such"], "--tokenizer /no/such: it cannot be loaded"),
    ],
)
def test_bad_options(tmp_path, options, message):
    if "--tokenizer" in options:
        pytest.importorskip("transformers")
    scores = make_scores(tmp_path / "s.parquet")
    result = run("evaluate", "--from-scores", scores, "-o", tmp_path / "out", "--bootstrap", 2, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_bad_columns_are_found_before_scoring(fake, tmp_path):  # noqa: F811
    path = tmp_path / "in.csv"
    path.write_text("prompt,memorized\na,1\nb,0\n", encoding="utf-8")
    for options in (["--group-column", "tier"], ["--clusters", "tier"]):
        result = run("evaluate", path, "-o", tmp_path / "out", *options)
        assert result.exit_code == 2
        assert options[0] in result.stderr
        assert not (tmp_path / "out").exists()


def test_scores_that_are_not_finite(tmp_path):
    scores = make_scores(tmp_path / "s.parquet", steps=(0,))
    rows = ScoreTable.read(scores).rows
    rows[3]["cheap"] = float("nan")
    write_rows(scores, rows, column_types(rows))
    result = run("evaluate", "--from-scores", scores, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "expected finite numbers, got nan at index 3" in result.stderr


def test_without_scikit_learn_the_rest_is_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    scores, out = make_scores(tmp_path / "s.parquet", steps=(0,)), tmp_path / "out"
    result = run("evaluate", "--from-scores", scores, "-o", out, "--bootstrap", 2)
    assert result.exit_code == 0, result.output
    assert 'scikit-learn: pip install "sharpcore[report]"' in result.stderr
    assert "auc_over_steps.png" not in os.listdir(out)


def test_tokens_of_the_model(fake, tmp_path):  # noqa: F811
    pytest.importorskip("transformers")
    path = tmp_path / "in.csv"
    lines = ["prompt,memorized", "zz,1", "zy x,1", "a,0", "b c,0"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    result = run("evaluate", path, "-o", tmp_path / "out", "--bootstrap", 2)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_bytes())
    names = [feature["feature"] for feature in report["confounds"]["features"]]
    assert names[-3:] == ["tokens", "token_id_mean", "token_id_max"]
    assert [(c["first"], c["second"]) for c in report["comparisons"]] == [(f"{HDS}@0", "score_difference@0")]


def test_a_table_without_prompts(tmp_path):
    scores = make_scores(tmp_path / "s.parquet", steps=(0,))
    rows = [{**row, "prompt": None} for row in ScoreTable.read(scores)]
    write_rows(scores, rows, column_types(rows))
    result = run("evaluate", "--from-scores", scores, "-o", tmp_path / "out", "--bootstrap", 2)
    assert result.exit_code == 0, result.output
    assert "the table has no prompts: their text was not checked" in result.stderr
    report = json.loads((tmp_path / "out" / "evaluation.json").read_bytes())
    assert report["confounds"] is None
    assert report["evaluations"][0]["clusters"]["n_positive"] == 16
