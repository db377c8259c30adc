"""The acceptance of the GPU backend: its dry run on a CPU, steps that fail, verdicts, a rival's interface."""

# ruff: noqa: E402 (the imports follow a check of what this distribution holds)

from __future__ import annotations

import csv
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from interpreted import needs_triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of the source distribution", allow_module_level=True)
sys.path.append(str(ROOT / "benchmarks"))

import baselines
import configs
import gpu_acceptance
from gpu_acceptance import How, Step, together
from gpu_report import FAILED, OK, SKIPPED, Acceptance, Finding, Rate, Report


def succeed(state: Acceptance, name: str = "fine") -> None:
    state.send(Rate("copy", 3.0))
    state.check(name, True, "as it should be")


def fail(state: Acceptance) -> None:
    state.check("before it failed", True, "yes")
    raise ValueError("something is wrong")


def crash(state: Acceptance) -> None:
    state.check("before it crashed", True, "yes")
    os._exit(7)


def hang(state: Acceptance) -> None:
    state.check("before it hung", True, "yes")
    time.sleep(60)


def reached(state: Acceptance) -> None:
    state.target("the copy rate", state.rates.get("copy"), 2.0, at_most=False)


def run(steps: list[Step], jobs: int = 1, limit: float = 60) -> Report:
    report = Report(limit)
    how = How("cpu", dry=False, small=False, jobs=jobs)
    together(multiprocessing.get_context("fork"), report, how, steps, jobs)
    return report


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_step_that_fails_is_named_and_the_others_go_on(jobs: int) -> None:
    report = run(
        [
            Step("raises", fail),
            Step("crashes", crash),
            Step("hangs", hang, 0.5),
            Step("succeeds", succeed),
        ],
        jobs,
    )
    found = {finding.what: finding for finding in report.findings}
    assert {what for what, finding in found.items() if finding.verdict == FAILED} == {
        "raises",
        "crashes",
        "hangs",
    }
    assert found["raises"].found == "failed: ValueError: something is wrong"
    assert found["crashes"].found == "ended with 7"
    assert "cut after 0" in found["hangs"].found or "cut after 1" in found["hangs"].found
    # What they had found until then is kept, and the step after them ran.
    for what in ("before it failed", "before it crashed", "before it hung", "fine"):
        assert found[what].verdict == OK
    assert not report.passed


def test_findings_in_this_process() -> None:
    report = run([Step("raises", fail), Step("succeeds", succeed)], jobs=0)
    assert [(f.what, f.verdict) for f in report.findings] == [
        ("before it failed", OK),
        ("raises", FAILED),
        ("fine", OK),
    ]


def test_later_steps_know_the_rates_of_earlier_ones() -> None:
    report = run([Step("first", succeed), Step("second", reached)])
    assert report.rates == {"copy": 3.0}
    assert report.findings[-1] == Finding("the copy rate (>= 2)", "met", "3", 3.0)
    assert report.passed


def test_what_there_is_no_time_for_is_skipped() -> None:
    report = run([Step("late", succeed)], limit=0)
    assert report.findings == [Finding("late", SKIPPED, "no time was left")]
    assert report.passed


def test_all_steps_end_in_time() -> None:
    """The steps on a GPU have limits, and what is cut leaves time for the summary."""
    steps = [*gpu_acceptance.checks(False), *gpu_acceptance.measurements()]
    assert all(step.seconds is not None for step in steps)
    report = Report(gpu_acceptance.LIMIT)
    assert report.left < gpu_acceptance.LIMIT <= 480


def test_verdicts(tmp_path: Path) -> None:
    report = Report(60)
    state = Acceptance("cuda", False, False, {}, report.take)
    state.check("a", True, "1")
    state.skip("b", "no tool")
    state.target("c", 1.0, 1.4)
    state.target("d", 7.0, 8.0, at_most=False)
    state.target("e", None, 1.2, why="the rival failed")
    Acceptance("cpu", True, True, {}, report.take).target("f", 9.0, 1.2)
    verdicts = [finding.verdict for finding in report.findings]
    assert verdicts == ["ok", "skipped", "met", "missed", "not measured", "not measured"]
    assert not report.passed
    summary = report.summary()
    assert "checks: 1 ok, 0 FAILED, 1 skipped" in summary
    assert "targets: 1 met, 1 missed, 2 not measured" in summary
    assert "missed       d (>= 8): 7" in summary
    assert "not measured f (<= 1.2): at toy sizes 9" in summary
    path = report.save("NVIDIA H100 80GB HBM3", {"card": "x"}, tmp_path / "new")
    assert path.name == "gpu_nvidia_h100_80gb_hbm3.csv"
    assert path.with_suffix(".txt").read_text().startswith("checks: ")
    with path.open(newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert rows["c (<= 1.4)"]["table"] == "targets"
    assert rows["c (<= 1.4)"]["status"] == "met: 1"
    assert float(rows["c (<= 1.4)"]["ratio"]) == 1.0
    assert rows["b"]["status"] == "skipped: no tool"
    assert {row["card"] for row in rows.values()} == {"x"}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_acceptance.main([]) == 1
    assert "no GPU" in capsys.readouterr().out


# Of each kind of step one. All of them take some minutes: python benchmarks/gpu_acceptance.py --dry-run
STEPS = "rates|kernels in bfloat16|attention in float16|products in float32|alone|sanitizer"


@needs_triton
def test_the_dry_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "gpu_acceptance.py", "--dry-run"),
            *("--only", STEPS, "--output", tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "gpu_dry_run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    tables = {row["table"] for row in rows}
    assert tables >= {
        *("rates", "checks", "targets", "attention tangent"),
        *("GroupNorm and SiLU tangent", "Lanczos step"),
    }
    checks = {row["what"]: row["status"] for row in rows if row["table"] == "checks"}
    assert len(checks) > 20
    assert checks.pop("compute-sanitizer memcheck") == "skipped: needs a GPU"
    assert all(status.startswith("ok") for status in checks.values()), checks
    targets = [row["status"] for row in rows if row["table"] == "targets"]
    assert len(targets) == 6
    assert all(status.startswith("not measured: at toy sizes") for status in targets)
    assert "0 met, 0 missed, 6 not measured" in (tmp_path / "gpu_dry_run.txt").read_text()


class Attention:
    """The interface of jvp_flash_attention.jvp_attention.JVPAttn, by math attention; notes what it gets."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def fwd_dual(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        causal: bool = False,
        sm_scale: float | None = None,
        warp_specialize: bool = True,
        USE_TMA: bool = True,
        verify_attn_mask: bool = True,
    ) -> Tensor:
        assert q.shape == k.shape == v.shape
        assert q.shape[-1] in {16, 32, 64, 128, 256}
        assert q.shape[-2] % 2 == 0
        assert q.shape[-2] >= 32
        assert attn_mask is None
        assert sm_scale is not None
        self.shapes.append(tuple(q.shape))
        return torch.softmax(q @ k.mT * sm_scale, -1) @ v


def test_the_rival_jvp_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    played, package, module = Attention(), ModuleType("jvp_flash_attention"), ModuleType("jvp_attention")
    module.JVPAttn = played  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jvp_flash_attention", package)
    monkeypatch.setitem(sys.modules, "jvp_flash_attention.jvp_attention", module)
    usual = torch.nn.functional.scaled_dot_product_attention
    for pair, shapes in (
        (configs.micro(), {(2, 1, 64, 16)}),
        # Heads of four channels; 16 and fewer queries, and cross-attention, are not for it.
        (configs.small_sd(), {(2, 2, 64, 16)}),
    ):
        played.shapes.clear()
        tangents = torch.randn((2, *pair.x.shape), generator=torch.Generator().manual_seed(0))
        product = baselines.flash_forward_mode(pair.f, pair.x)(tangents)
        expected = baselines.forward_mode(pair.f, pair.x)(tangents)
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)
        assert set(played.shapes) == shapes
        assert torch.nn.functional.scaled_dot_product_attention is usual


@pytest.mark.skipif(importlib.util.find_spec("jvp_flash_attention") is None, reason="not installed")
def test_the_rival_has_that_interface() -> None:
    import inspect

    from jvp_flash_attention.jvp_attention import JVPAttn

    ours, theirs = (inspect.signature(made.fwd_dual).parameters for made in (Attention(), JVPAttn))
    assert list(ours) == list(theirs)


def test_dry_networks_have_the_blocks_of_the_real_ones() -> None:
    """The same instructions, fewer of them."""
    from sharpcore import linearize

    def kinds(unet: torch.nn.Module) -> set[str]:
        return {type(module).__name__ for module in unet.modules()}

    for small, real in (
        (configs.small_sd(), configs.SD14),
        (configs.small_sd(linear=True), configs.SD21),
        (configs.small_sdxl(), {**configs.SDXL, "transformer_layers_per_block": (1, 2, 10)}),
    ):
        assert kinds(small.unet) == kinds(configs._on_meta(real))
        assert linearize(small.f, small.x).value.shape == small.x.shape
