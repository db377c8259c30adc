"""The command `sharpcore spectrum`: a real run with pictures, labels, bad rows, interruption and resuming."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from diffusers import DDIMScheduler
from typer.testing import CliRunner

from sharpcore import cli, cli_spectrum
from sharpcore.spectra import SpectrumTable, spectrum


def run(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin)


@pytest.fixture(scope="module")
def model(sd2_pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sd2_pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def fake(monkeypatch):
    """Rows whose numbers depend on prompt, seed and step alone; stops at the prompt `fail_at`."""
    state = SimpleNamespace(fail_at="", failure=KeyboardInterrupt())

    def iterate(pipe, prompts, *, steps, seeds, eigenvalues, on_error, **options):
        assert on_error == "record"
        settings = {"steps": steps, "seeds": seeds, "eigenvalues": eigenvalues}
        for prompt in prompts:
            if prompt == state.fail_at:
                raise state.failure
            rows = SpectrumTable.empty_rows(settings, [981.0 - 20 * step for step in steps])
            for row in rows:
                number = (sum(prompt.encode()) + row["seed"] + row["step"]) / 7
                row |= {"trace": number, "largest": [number, number / 2], "products": 3, "method": "dense"}
            yield [{"prompt": prompt} | row | {"error": None} for row in rows]

    pipe = SimpleNamespace(
        unet=SimpleNamespace(
            config=SimpleNamespace(sample_size=16, in_channels=4, out_channels=4), dtype="float32"
        ),
        vae_scale_factor=2,
        scheduler=DDIMScheduler(steps_offset=1),
        tokenizer=object(),
        text_encoder=object(),
        encode_prompt=print,
    )
    monkeypatch.setattr("sharpcore.spectra.iterate_spectra", iterate)
    monkeypatch.setattr(cli_spectrum, "load_pipeline", lambda folder, options: pipe)
    return state


def prompts_file(folder, *prompts):
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    return path


def test_a_real_run_with_labels_and_pictures(model, sd2_pipe, tmp_path):
    (tmp_path / "mem.txt").write_text("a bold one\n", encoding="utf-8")
    (tmp_path / "other.txt").write_text("a thin two\n\na thin nine\n", encoding="utf-8")
    out, pictures = tmp_path / "spectra.parquet", tmp_path / "deep" / "pictures"
    options = ["--model", model, "--steps", "0,3", "--num-inference-steps", 5, "--seeds", 1, "-k", 4]
    sources = ["--memorized", tmp_path / "mem.txt", "--others", tmp_path / "other.txt"]
    result = run("spectrum", *sources, "-o", out, "--plot", pictures, *options)
    assert result.exit_code == 0, result.output
    assert f"4 prompts written to {out}, 1 of them with an error" in result.stderr
    assert sorted(os.listdir(pictures)) == ["density.png", "groups.png", "steps.png"]
    table = SpectrumTable.read(out)
    places = [(row["memorized"], row["step"]) for row in table]
    assert places == [(kind, step) for kind in (True, False, False, False) for step in (0, 3)]
    prompts = ["a bold one", "a thin two", "a thin nine"]
    expected = spectrum(sd2_pipe, prompts, steps=(0, 3), k=4, num_inference_steps=5)
    good = [row for row in table if row["error"] is None]
    for row, other in zip(good, expected, strict=True):
        assert {name: row[name] for name in ("prompt", "seed", "step", "products")} == {
            name: other[name] for name in ("prompt", "seed", "step", "products")
        }
        assert row["largest"] == pytest.approx(other["largest"], abs=1e-5)
    assert table.rows[4]["error"] == f"{tmp_path / 'other.txt'}, line 2: the prompt is blank"
    assert table.rows[4]["seed"] == 42
    again = run("spectrum", *sources, "-o", out, *options)
    assert again.exit_code == 2
    assert "--overwrite starts anew" in again.stderr


def test_columns_are_carried_and_a_label_column_is_used(fake, tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("id,text,kind\n1,a,yes\n2,,no\n3,b,no\n", encoding="utf-8")
    out = tmp_path / "out.csv"
    result = run("spectrum", path, "-o", out, "--column", "text", "--steps", "0,10", "--seeds", "42,44")
    assert result.exit_code == 0, result.output
    table = SpectrumTable.read(out)
    assert [row["id"] for row in table] == [n for n in "123" for _ in range(4)]
    assert [(row["seed"], row["step"]) for row in table] == [(42, 0), (42, 10), (44, 0), (44, 10)] * 3
    assert table.rows[0]["largest"] == [(97 + 42) / 7, (97 + 42) / 14]
    assert [row["error"] for row in table][::4] == [None, "row 2 (line 3): the prompt is blank", None]
    assert table.rows[4]["timestep"] == 981.0


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_an_interrupted_run_is_resumed_to_the_same_file(fake, tmp_path, extension):
    path = prompts_file(tmp_path, "a", "", "b", "a", "stop", "c")
    out, whole = tmp_path / f"out.{extension}", tmp_path / f"whole.{extension}"
    assert run("spectrum", path, "-o", whole).exit_code == 0
    fake.fail_at = "stop"
    result = run("spectrum", path, "-o", out)
    assert result.exit_code == 130
    assert f"4 of 6 prompts are finished and kept in {out}; --resume" in result.stderr
    assert len(SpectrumTable.read(out)) == 4 * 3
    fake.fail_at = ""
    other = run("spectrum", path, "-o", out, "--resume", "-k", 3, "--condition", "none")
    assert other.exit_code == 2
    assert "k (there 10, now 3); condition (there 'prompt', now 'none')" in other.stderr
    assert run("spectrum", path, "-o", out, "--resume").exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "60"], "steps: expected different indices from 0 to 49"),
        (["--seeds", "0"], "--seeds: expected a number of seeds"),
        (["--memorized", "a.txt"], "--memorized and --others belong together"),
        (["--memorized", "a.txt", "--others", "b.txt"], "expected one source"),
        (["--plot", "FILE"], "expected a folder, this is a file"),
        (["--height", "3"], "height: expected a positive multiple of 2 pixels, got 3"),
        (["-k", "0"], "-k"),
    ],
)
def test_bad_options(fake, tmp_path, options, message):
    path = prompts_file(tmp_path, "a")
    options = [str(path) if option == "FILE" else option for option in options]
    result = run("spectrum", path, "-o", tmp_path / "out.csv", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == ["prompts.txt"]


def test_bad_arguments_of_the_solver_leave_no_file(model, tmp_path):
    path = prompts_file(tmp_path, "a")
    for options, message in (
        (["--method", "exact"], "method: expected one of auto, dense, lanczos"),
        (["--condition", "both"], "condition: expected one of"),
        (["-k", "300"], "k: expected at most the 256 entries"),
        (["--method", "lanczos", "--max-products", "3"], "max_products: expected at least those of one"),
    ):
        result = run("spectrum", path, "-o", tmp_path / "o.csv", "--model", model, *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert os.listdir(tmp_path) == ["prompts.txt"]


def test_no_spectrum_no_pictures(fake, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": ""}\n', encoding="utf-8")
    result = run("spectrum", path, "-o", tmp_path / "o.csv", "--plot", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    assert "no pictures: no row" in result.stderr
    assert not (tmp_path / "pictures").exists()
