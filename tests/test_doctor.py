"""Tests of the examination of an installation."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from typer.testing import CliRunner

from sharpcore import backends, doctor
from sharpcore.cli import app, default_model


def test_report_of_a_sound_installation():
    report = json.loads(json.dumps(doctor.examine(default_model()), allow_nan=False))
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["model"]["complete"]
    assert {row["backend"] for row in report["backends"]} == {row.backend for row in backends.support_table()}
    assert len(report["self_test"]) == 3
    assert all(test["passed"] for test in report["self_test"]), report["self_test"]
    text = doctor.render(report)
    assert "FAILED" not in text
    assert all(test["name"] in text for test in report["self_test"])


def test_missing_package_and_model(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_PACKAGES", ("a-package-that-nobody-has",))
    report = doctor.examine(tmp_path)
    assert report["versions"]["a-package-that-nobody-has"] == "not installed"
    assert "incomplete, without model_index.json, unet" in doctor.render(report)


def test_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(backends.cpu.native, "_extension", None)
    monkeypatch.setattr(backends.cpu.native, "_import_error", "no such module")
    report = doctor.examine(default_model())
    assert report["cpu"]["isa"].startswith("none: ")
    assert all(test["passed"] for test in report["self_test"])


def test_command_line():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"versions", "cpu", "devices", "backends", "model", "self_test"}
    assert CliRunner().invoke(app, ["doctor"]).stdout.startswith("versions")


@pytest.mark.parametrize("failure", [1e-3, RuntimeError("broken")])
def test_a_failed_self_test_is_reported_and_gives_exit_code_1(monkeypatch, failure):
    def test():
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(doctor, "_TESTS", {"a test": test})
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAILED  a test: " in result.stdout


def test_a_wrong_kernel_is_found(monkeypatch):
    wrong = dict(backends.get_backend("reference", device="cpu", dtype=torch.float64).kernels)
    right = wrong["group_norm_silu_tangent"]
    wrong["group_norm_silu_tangent"] = lambda *arguments: right(*arguments) * 1.001
    monkeypatch.setattr(backends, "_CPU", backends.Backend("cpu", wrong))
    if backends.cpu.extension() is None:
        pytest.skip("the compiled kernels are not built here")
    failed = [test["name"] for test in doctor.examine(default_model())["self_test"] if not test["passed"]]
    assert "kernels of the chosen backend against the reference" in failed
