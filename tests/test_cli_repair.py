"""The command `sharpcore repair`: files of a real run, training images, resuming, bad options."""

from __future__ import annotations

import csv
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import sharpcore
from sharpcore import cli, cli_repair
from sharpcore.repair import evaluation
from sharpcore.repair.evaluation import RepairTable

PROMPT = "a bold slanted handwritten zero by hounard"
QUICK = ["--num-inference-steps", 2, "--seeds", "3,4", "--option", "sail.rounds=1"]


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin)


def prompts_file(folder, *prompts):
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def pipe(tiny_pipe, monkeypatch):
    monkeypatch.setattr(cli_repair, "load_pipeline", lambda folder, options: tiny_pipe)
    return tiny_pipe


@pytest.fixture
def stops(monkeypatch):
    """The comparison stops at a prompt, as often as asked."""
    state = SimpleNamespace(at="")
    original = evaluation.generate

    def generate(pipe, prompt, **options):
        if prompt == state.at:
            raise KeyboardInterrupt
        return original(pipe, prompt, **options)

    monkeypatch.setattr(evaluation, "generate", generate)
    return state


def without_times(path):
    with path.open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name not in ("seconds", "time_ratio")}
            for row in csv.DictReader(file)
        ]


def test_a_real_run(pipe, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "noise.png")
    Image.fromarray(255 - noise).save(images / "inverse.png")
    source = tmp_path / "in.csv"
    source.write_text(
        f"prompt,training_image,kind\n{PROMPT},noise.png,a\n,,b\na thin one by nobody,,c\n", encoding="utf-8"
    )
    out = tmp_path / "deep" / "out"
    result = run(
        "repair", source, "-o", out, *QUICK, "--method", "sail,delayed_guidance", "--training-images", images,
        "--copy-distance", 0.9,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"3 prompts written to {out / 'repair.csv'}, 1 of them with an error" in result.stderr
    assert sorted(os.listdir(out)) == ["grid.png", "images", "latents", "repair.csv", "summary.csv"]
    table = RepairTable.read(out / "repair.csv")
    assert [(row["method"], row["seed"]) for row in table] == [
        (method, seed) for method in ("none", "sail", "delayed_guidance") for seed in (3, 4)
    ] * 3
    assert [row["kind"] for row in table][::6] == ["a", "b", "c"]
    assert table.rows[0]["compared_with"] == "noise.png"
    assert {row["compared_with"] for row in table.rows[12:]} <= {"noise.png", "inverse.png"}
    assert table.rows[6]["error"].startswith("row 2")
    made = sharpcore.generate(pipe, PROMPT, repair="sail", rounds=1, seeds=[3, 4], num_inference_steps=2)
    saved = load_file(out / "latents" / "00000-sail.safetensors")
    assert torch.equal(saved["latents"], made.latents)
    assert torch.equal(saved["initial"], made.initial)
    assert torch.equal(saved["final"], made.final)
    with Image.open(out / "images" / "00000-sail-4.png") as image:
        assert np.array_equal(np.array(image), np.array(made.to_pil()[1]))
    with (out / "summary.csv").open(newline="") as file:
        summary = list(csv.DictReader(file))
    assert [row["method"] for row in summary] == ["none", "sail", "delayed_guidance"]
    assert float(summary[0]["copies"]) == 1
    assert "time_ratio" in result.stdout
    again = run("repair", source, "-o", out, *QUICK)
    assert again.exit_code == 2
    assert "--overwrite starts anew" in again.stderr


def test_an_interrupted_run_is_resumed(pipe, stops, tmp_path):
    path = prompts_file(tmp_path, "a", "", "b", "stop", "c")
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = [*QUICK, "--latents", "npz", "--grid-rows", 0]
    assert run("repair", path, "-o", whole, *options).exit_code == 0
    stops.at = "stop"
    result = run("repair", path, "-o", out, *options)
    assert result.exit_code == 130
    assert f"3 of 5 prompts are finished and kept in {out / 'repair.csv'}; --resume" in result.stderr
    stops.at = ""
    other = run("repair", path, "-o", out, *options, "--resume", "--guidance", 3)
    assert other.exit_code == 2
    assert "guidance (there 7.5, now 3.0)" in other.stderr
    assert run("repair", path, "-o", out, *options, "--resume").exit_code == 0
    assert without_times(out / "repair.csv") == without_times(whole / "repair.csv")
    for part in ("images", "latents"):
        assert sorted(os.listdir(out / part)) == sorted(os.listdir(whole / part))
    with (
        np.load(out / "latents" / "00003-sail.npz") as found,
        np.load(whole / "latents" / "00003-sail.npz") as expected,
    ):
        assert np.array_equal(found["latents"], expected["latents"])
    assert "nothing left to do" in run("repair", path, "-o", out, *options, "--resume").stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "sale"], "repair: expected one of none, sail"),
        (["--method", "sail,sail"], "--method: expected different names"),
        (["--method", ","], "--method: expected different names"),
        (["--option", "sail.rounds"], "--option: expected METHOD.NAME=VALUE"),
        (
            ["--option", "prompt_embedding.lr=1"],
            "--option: expected METHOD.NAME=VALUE with one of none, sail",
        ),
        (["--option", "sail.speed=1"], "speed: not an option of sail"),
        (["--option", "sail.lr=fast"], "lr: expected a positive number"),
        (["--seeds", "0"], "--seeds: expected a number of seeds"),
        (["--latents", "pt"], "--latents: expected safetensors or npz"),
        (["--steps", "3"], "--steps: `sharpcore repair` has no such option"),
        (["--sscd", "sscd.pt"], "--training-images, which is not given"),
        (["--training-images", "nowhere"], "nowhere: there is no such folder"),
        (["--height", "3"], "height: expected a positive multiple of 2 pixels, got 3"),
        (["--out", "FILE"], "expected a folder, this is a file"),
    ],
)
def test_bad_options(pipe, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    path = prompts_file(tmp_path, "a")
    options = [str(path) if option == "FILE" else option for option in options]
    where = [] if "--out" in options else ["-o", tmp_path / "out"]
    result = run("repair", path, *where, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["prompts.txt"]
