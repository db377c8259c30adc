"""Tests of the command line: scoring, bad input, interruption and resuming, evaluation."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import sharpcore
from sharpcore import cli, cli_run, cli_score, pipeline
from sharpcore.detect import cost_of
from sharpcore.table import ScoreTable

DATA = Path(__file__).parent / "data" / "tiny-sd-eps"
HDS = "hessian_score_difference"


class FakeScorer:
    """Gives numbers that depend on prompt, step and seed alone, in blocks of two prompts."""

    delay = 0.0
    fail_at = ""
    failure: BaseException = KeyboardInterrupt()

    def __init__(self, pipe, **options):
        self.options = options
        self.timesteps = [981.0 - 20 * k for k in range(options["num_inference_steps"])]

    def row_steps(self, steps, metrics):
        return tuple(steps)

    def cost(self, metrics, *, steps, latent_size):
        return cost_of(metrics, dimension=math.prod(latent_size), steps=steps)

    def iterate(self, prompts, *, steps, seeds, metrics, units, squared, on_error, latent_size):
        for start in range(0, len(prompts), 2):
            time.sleep(self.delay)
            rows = []
            for place, prompt in enumerate(prompts[start : start + 2], start):
                if prompt == self.fail_at:
                    raise self.failure
                if "long" in prompt:
                    warnings.warn(f"prompts[{place}] is longer than the window", UserWarning, stacklevel=2)
                for step in steps:
                    row = {"prompt": prompt, "step": step, "timestep": self.timesteps[step]}
                    for k, name in enumerate(detector.name for detector in metrics):
                        scores = [(sum(prompt.encode()) + step + seed) / (7 + k) for seed in seeds]
                        row |= {name: sum(scores) / len(scores), f"{name}_se": 0.1, f"{name}_seeds": scores}
                    rows.append(row | {"error": None})
            yield rows


def fake_pipe(folder, scoring):
    return SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=16, in_channels=4)), vae_scale_factor=2
    )


@pytest.fixture
def fake(monkeypatch):
    scorer = type("Scorer", (FakeScorer,), {})
    monkeypatch.setattr(pipeline, "SharpnessScorer", scorer)
    monkeypatch.setattr(cli_score, "load_pipeline", fake_pipe)
    return scorer


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin)


def prompts_file(folder, *prompts):
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_score_carries_columns_and_keeps_bad_rows_in_place(fake, tmp_path, extension):
    path = tmp_path / "in.csv"
    path.write_text("id,text,label\n1,a,yes\n2,,no\n3,b,yes\n4\n5,a,no\n", encoding="utf-8")
    out = tmp_path / f"out.{extension}"
    result = run("score", path, "-o", out, "--column", "text", "--steps", "0,10", "--seeds", "42,44")
    assert result.exit_code == 0, result.output
    assert f"5 prompts written to {out}, 2 of them with an error" in result.stderr
    table = ScoreTable.read(out)
    assert [row["id"] for row in table] == [n for n in "12345" for _ in range(2)]
    assert [row["prompt"] or "" for row in table][::2] == ["a", "", "b", "", "a"]
    assert [row["label"] for row in table][::2] == ["yes", "no", "yes", None, "no"]
    assert [row["timestep"] for row in table] == [981.0, 781.0] * 5
    errors = [row["error"] for row in table][::2]
    assert errors[1:4] == [
        "row 2 (line 3): the prompt is blank",
        None,
        "row 4 (line 5): the prompt is missing",
    ]
    assert [row[HDS] is None for row in table][::2] == [False, True, False, True, False]
    assert table.rows[0][f"{HDS}_seeds"] == [(97 + 42) / 8, (97 + 44) / 8]


def test_only_bad_rows(fake, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": 1}\n{"prompt": ""}\n', encoding="utf-8")
    result = run("score", path, "-o", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    assert [row["error"] is None for row in ScoreTable.read(tmp_path / "out.parquet")] == [False, False]


def test_standard_input_limit_and_quiet(fake, tmp_path):
    result = run("score", "-", "-o", tmp_path / "o.jsonl", "--limit", 2, "-q", stdin="a\nb\nc\n")
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in ScoreTable.read(tmp_path / "o.jsonl")] == ["a", "b"]
    assert result.stderr.count("\n") == 1


def test_warnings_name_the_row_of_the_file(fake, tmp_path):
    path = prompts_file(tmp_path, "a", "", "very long")
    result = run("score", path, "-o", tmp_path / "o.csv")
    assert "sharpcore: warning: row 3 (line 3) is longer than the window\n" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected a number of seeds from 1"),
        (["--seeds", "42,42"], "--seeds: expected different numbers"),
        (["--steps", "x"], "--steps: expected numbers"),
        (["--steps", "-1"], "--steps: expected numbers"),
        (["--metrics", "sharpness"], "got 'sharpness'"),
        (["--metrics", ""], "metrics: expected"),
        (["--memory-budget", "much"], '--memory-budget: expected a size like "8GiB"'),
        (["--height", "3"], "height: expected a positive multiple of 2 pixels, got 3"),
        (["--format", "xml"], "format: expected text, csv, jsonl or parquet"),
        (["--model", "no/such/folder"], "no/such/folder: there is no such folder"),
        (["--model", "."], "there is no model_index.json"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--output", "out.txt"], "expected the extension"),
        (["--limit", "0"], "--limit"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_options(fake, tmp_path, options, message):
    path = prompts_file(tmp_path, "a")
    result = run("score", path, "-o", tmp_path / "out.csv", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert os.listdir(tmp_path) == ["prompts.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"a\nb\xff\n", "not UTF-8: byte 0xff at offset 3 (line 2)"),
        ("p.csv", b"text\na\n", "no column 'prompt'; the columns are: text"),
        ("p.csv", b"prompt,step\na,1\n", "column 'step', which the scores need"),
        ("p.txt", b"\n", "there are no prompts"),
        ("p.bin", b"a\n", "--format"),
    ],
)
def test_bad_files(fake, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    result = run("score", tmp_path / name, "-o", tmp_path / "out.csv")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("sharpcore: error: ")


def test_model_without_unet(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text(
        '{"_class_name": "X", "vae": ["diffusers", "V"]}', encoding="utf-8"
    )
    result = run("score", prompts_file(tmp_path, "a"), "-o", tmp_path / "o.csv", "--model", model)
    assert result.exit_code == 2
    assert "has no UNet; its parts are: vae" in result.stderr


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = run("score", prompts_file(tmp_path, "a"), "-o", tmp_path / "o.csv")
    assert result.exit_code == 1
    assert 'pip install "sharpcore[diffusers]"' in result.stderr


@pytest.mark.parametrize("option", [["--device", "cuda:77"], ["--device", "abacus"], ["--dtype", "int8"]])
def test_bad_device_and_dtype(tmp_path, option):
    result = run("score", prompts_file(tmp_path, "a"), "-o", tmp_path / "o.csv", *option)
    assert result.exit_code == 2
    assert f"error: {option[0]}: expected" in result.stderr


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (sharpcore.OutOfMemory("one sample needs 9 GiB"), 1, "one sample needs 9 GiB"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "No space left on device"),
    ],
)
@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_interrupted_run_keeps_rows_and_resumes_to_the_same_file(
    fake, tmp_path, failure, code, message, extension
):
    # The duplicate is on both sides of the interruption.
    path = prompts_file(tmp_path, "a", "b", "", "c", "d", "a", "stop", "e")
    out, whole = tmp_path / f"out.{extension}", tmp_path / f"whole.{extension}"
    assert run("score", path, "-o", whole, "--steps", "0,1").exit_code == 0
    fake.fail_at, fake.failure = "stop", failure
    result = run("score", path, "-o", out, "--steps", "0,1")
    assert result.exit_code == code
    assert message in result.stderr
    assert f"5 of 8 prompts are finished and kept in {out}; --resume" in result.stderr
    assert [row["prompt"] or "" for row in ScoreTable.read(out)][::2] == ["a", "b", "", "c", "d"]
    fake.fail_at = ""
    assert run("score", path, "-o", out, "--steps", "0,1").exit_code == 2
    other = run("score", path, "-o", out, "--steps", "0,1", "--resume", "--units", "eps", "--seeds", "2")
    assert other.exit_code == 2
    assert "seeds (there [42, 43, 44, 45], now [42, 43]); units (there 'score', now 'eps')" in other.stderr
    assert run("score", path, "-o", out, "--steps", "0,1", "--resume").exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    fake.fail_at = "a"
    again = run("score", path, "-o", out, "--steps", "0,1", "--resume")
    assert again.exit_code == 0
    assert f"nothing left to do: {out} has all 8 prompts" in again.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(["prompts.txt", out.name, whole.name])


def test_disk_full_on_the_journal(fake, tmp_path, monkeypatch):
    path = prompts_file(tmp_path, "a", "b", "c", "d")
    real, count = os.fsync, 0

    def fsync(file):
        nonlocal count
        count += 1
        # The header, the first block, then no more.
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        result = run("score", path, "-o", tmp_path / "o.csv")
    assert result.exit_code == 1
    assert "error: No space left on device" in result.stderr
    assert [row["prompt"] for row in ScoreTable.read(tmp_path / "o.csv")] == ["a", "b"]
    assert run("score", path, "-o", tmp_path / "o.csv", "--resume").exit_code == 0
    assert [row["prompt"] for row in ScoreTable.read(tmp_path / "o.csv")] == ["a", "b", "c", "d"]


def start(code, *arguments):
    """Run a command line in a process of its own, with Ctrl-C as usual.

    A shell that starts the tests in the background lets them ignore it, and their children as well.
    """
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
    paths = [str(Path(sharpcore.__file__).parents[1]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process, path, count):
    """Wait until the journal has so many lines and the process still runs."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail("the process wrote nothing")


FAKE_RUN = """
import test_cli as t
t.pipeline.SharpnessScorer, t.cli_score.load_pipeline = t.FakeScorer, t.fake_pipe
t.FakeScorer.delay = 0.05
t.cli.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_killed_process_is_resumed_without_loss_or_repetition(fake, tmp_path):
    prompts = [f"prompt {k % 50}" for k in range(400)]
    path, out = prompts_file(tmp_path, *prompts), tmp_path / "out.parquet"
    journal = tmp_path / "out.parquet.partial.jsonl"
    process = start(FAKE_RUN, "score", path, "-o", out)
    wait_for_lines(process, journal, 4)
    process.kill()
    process.communicate()
    assert not out.exists()
    blocks = journal.read_bytes().count(b"\n") - 1
    assert 3 <= blocks < 200
    # A kill in the middle of a write leaves a part of a line.
    with open(journal, "ab") as file:
        file.write(b'{"first": 6, "count": 2, "rows": [{"pro')
    result = run("score", path, "-o", out, "--resume")
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in ScoreTable.read(out)] == prompts
    assert run("score", path, "-o", tmp_path / "whole.parquet").exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_interrupt_signal_in_a_real_run_then_resume(tmp_path):
    pytest.importorskip("diffusers")
    prompts = (cli.default_model() / "prompts_nonmem.txt").read_text(encoding="utf-8").splitlines()
    prompts *= 20  # more than can be finished before the signal comes
    path, out = prompts_file(tmp_path, *prompts), tmp_path / "out.jsonl"
    options = ["--seeds", "1", "--norm"]
    process = start("from sharpcore.cli import main; main()", "score", path, "-o", out, *options)
    # Settings and two blocks: the signal may come before the last of them is counted.
    wait_for_lines(process, tmp_path / "out.jsonl.partial.jsonl", 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    finished = len(ScoreTable.read(out))
    assert 1 <= finished < len(prompts)
    assert f"{finished} of {len(prompts)} prompts are finished" in errors
    path.write_text("\n".join(prompts[: finished + 2]), encoding="utf-8")
    result = run("score", path, "-o", out, *options, "--resume")
    assert result.exit_code == 0, result.output
    recorded = {
        row["prompt"]: row for row in json.loads((DATA / "reference_scores.json").read_bytes())["prompts"]
    }
    table = ScoreTable.read(out)
    assert [row["prompt"] for row in table] == prompts[: finished + 2]
    for row in table:
        expected = recorded[row["prompt"]]["step0"]
        # Measured 1e-6; the reference is float32 too.
        assert row["score_difference"] == pytest.approx(expected["wen"][0], rel=1e-4)
        assert row[HDS] == pytest.approx(expected["hvp"][0], rel=1e-4)


def test_evaluate_from_scores_gives_the_recorded_values(tmp_path):
    reference = json.loads((DATA / "reference_scores.json").read_bytes())
    rows = []
    for row in reference["prompts"]:
        scores = row["step0"]["hvp"]
        mean = sum(scores) / len(scores)
        given = {HDS: mean, f"{HDS}_se": 0.0, f"{HDS}_seeds": scores, "error": None}
        rows.append(
            {"prompt": row["prompt"], "memorized": row["memorized"], "step": 0, "timestep": 981.0} | given
        )
    ScoreTable(rows).to_csv(tmp_path / "scores.csv")
    out = tmp_path / "deep" / "evaluation"
    result = run("evaluate", "--from-scores", tmp_path / "scores.csv", "--out", out)
    assert result.exit_code == 0, result.output
    (evaluation,) = json.loads((out / "evaluation.json").read_bytes())["evaluations"]
    expected = reference["table"]["step0 hvp n=4"]
    assert evaluation["auc"] == pytest.approx(expected["auc"], abs=1e-12)
    assert evaluation["operating_points"][0]["tpr"] == pytest.approx(expected["tpr1"], abs=1e-12)
    files = ["auc_over_seeds.csv", "auc_over_seeds.png", "evaluation.csv", "evaluation.json"]
    assert sorted(os.listdir(out)) == [*files, "histogram.png", "report.html", "roc.png"]
    assert "0.858 (0.801 to 0.909)" in result.stdout
    again = run("evaluate", "--from-scores", tmp_path / "scores.csv", "--out", out)
    assert again.exit_code == 2
    assert "--overwrite replaces it" in again.stderr


def test_evaluate_two_files_and_a_label_column(fake, tmp_path):
    for name, prompts in (("m.txt", ["zz", "zy", "zx"]), ("o.txt", ["aa", "", "ab", "zz"])):
        (tmp_path / name).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    two = tmp_path / "two"
    sources = ["--memorized", tmp_path / "m.txt", "--others", tmp_path / "o.txt"]
    result = run("evaluate", *sources, "--out", two, "--bootstrap", 50)
    assert result.exit_code == 0, result.output
    table = ScoreTable.read(two / "scores.parquet")
    assert [row["memorized"] for row in table] == [True] * 3 + [False] * 4
    assert f"{tmp_path / 'o.txt'}, line 2: the prompt is blank" in [row["error"] for row in table]
    report = json.loads((two / "evaluation.json").read_bytes())
    assert report["settings"]["seeds"] == [42, 43, 44, 45]
    assert [(e["metric"], e["n_errors"]) for e in report["evaluations"]] == [
        ("score_difference", 1),
        (HDS, 1),
    ]
    assert report["evaluations"][0]["auc"] == pytest.approx((9 - 2.5) / 9)

    labelled = tmp_path / "l.csv"
    lines = [f"{row['prompt']},{'copied' if row['memorized'] else 'new'}" for row in table if row["prompt"]]
    labelled.write_text("prompt,kind\n" + "\n".join(lines) + "\n", encoding="utf-8")
    one = ["evaluate", labelled, "--label-column", "kind", "--out", tmp_path / "one", "--bootstrap", 50]
    bad = run(*one)
    assert bad.exit_code == 2
    assert "got 'copied'; name the positive one (--positive)" in bad.stderr
    assert not (tmp_path / "one").exists()
    assert run(*one, "--positive", "copied").exit_code == 0
    same = json.loads((tmp_path / "one" / "evaluation.json").read_bytes())["evaluations"]
    assert [e["auc"] for e in same] == [e["auc"] for e in report["evaluations"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one source"),
        (["--memorized", "a.txt"], "belong together"),
        (["a.txt", "--from-scores", "b.csv"], "expected one source"),
        (["--from-scores", "missing.csv"], "there is no such file"),
    ],
)
def test_evaluate_needs_one_source(tmp_path, arguments, message):
    result = run("evaluate", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr


def test_evaluate_the_real_model(tmp_path):
    pytest.importorskip("diffusers")
    sources = []
    for option, name in (("--memorized", "prompts_mem.txt"), ("--others", "prompts_nonmem.txt")):
        lines = (cli.default_model() / name).read_text(encoding="utf-8").splitlines()[:3]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        sources += [option, tmp_path / name]
    result = run("evaluate", *sources, "--out", tmp_path / "out", "--norm", "--seeds", 1, "--bootstrap", 50)
    assert result.exit_code == 0, result.output
    recorded = {
        row["prompt"]: row for row in json.loads((DATA / "reference_scores.json").read_bytes())["prompts"]
    }
    table = ScoreTable.read(tmp_path / "out" / "scores.parquet")
    assert len(table) == 6
    for row in table:
        expected = recorded[row["prompt"]]
        assert row["memorized"] == expected["memorized"]
        assert row[HDS] == pytest.approx(expected["step0"]["hvp"][0], rel=1e-4)


def test_version_and_help():
    assert run("--version").stdout == f"{sharpcore.__version__}\n"
    assert run().exit_code == 2
    assert "--memory-budget" in run("score", "--help").output
    assert "--from-scores" in run("evaluate", "--help").output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 MB", 1_500_000),
        ("100", 100),
        ("2k", 2000),
        ("3 tib", 3 * 2**40),
        (None, None),
    ],
)
def test_memory_sizes(text, expected):
    assert cli_run.memory_bytes(text) == expected


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with cli_run.progress_shown(4, 1, False) as advance:
        advance(2)
        advance(4)
    shown = capsys.readouterr().err
    assert "4/4" in shown
    assert "prompts/s" in shown
