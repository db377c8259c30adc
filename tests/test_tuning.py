"""Which configuration of a Triton kernel runs: the safe one, or the fastest, compiled together and measured
once."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.runtime import _async_compile

from sharpcore.kernels import tuning

ROOT = Path(__file__).resolve().parents[1]
CHOICES = [triton.Config({"BLOCK": block}, num_warps=4) for block in (16, 32, 64)]


class Kernel:
    """A kernel that notes what it is compiled and launched with."""

    def __init__(self) -> None:
        self.compiled: list[int] = []
        self.launched: list[int] = []

    def warmup(self, *, grid: Any, BLOCK: int, **_: Any) -> None:
        assert _async_compile.active_mode.get() is not None, "one after the other"
        self.compiled.append(BLOCK)

    def __getitem__(self, grid: Any) -> Any:
        return lambda BLOCK, **_: self.launched.append(BLOCK)


class Tuner:
    """Takes the largest block."""

    def __init__(self, configs: list[Any]) -> None:
        self.best_config, self.calls = configs[-1], 0

    def __getitem__(self, grid: Any) -> Any:
        def call(**_: Any) -> None:
            self.calls += 1

        return call


@pytest.fixture
def tuners(monkeypatch: pytest.MonkeyPatch) -> list[Tuner]:
    made: list[Tuner] = []

    def autotune(configs: list[Any], key: list[str], **options: Any) -> Any:
        assert options["cache_results"]
        assert options["do_bench"] is tuning._measure
        made.append(Tuner(configs))
        return lambda kernel: made[-1]

    monkeypatch.setattr(triton, "autotune", autotune)
    monkeypatch.setattr(tuning, "enabled", lambda: True)
    monkeypatch.setattr(tuning, "_tuners", {})
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def launch(kernel: Kernel, size: int, dtype: torch.dtype = torch.float32) -> None:
    tuning.run(kernel, lambda _: (1,), {"x": torch.ones(3, dtype=dtype), "size": size}, CHOICES, ["size"])


def test_the_fastest_is_looked_for_once_for_each_shape(tuners: list[Tuner]) -> None:
    kernel = Kernel()
    for size in (3, 3, 4, 3, 4):
        launch(kernel, size)
    assert kernel.compiled == 2 * [16, 32, 64]
    assert kernel.launched == 5 * [64]
    assert [tuner.calls for tuner in tuners] == [2]
    launch(kernel, 3, torch.bfloat16)
    assert tuners[0].calls == 3


def test_nothing_is_tuned_while_a_graph_is_recorded(
    tuners: list[Tuner], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    launch(kernel, 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launch(kernel, 3)
    launch(kernel, 4)
    assert kernel.launched == [64, 64, 16]
    assert tuners[0].calls == 1


def test_the_safe_one_runs_where_nothing_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(tuning, "enabled", lambda: False)
    launch(kernel, 3)
    assert (kernel.compiled, kernel.launched) == ([], [16])


def test_tuning_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv("SHARPCORE_AUTOTUNE", "0")
    assert not tuning.enabled()
    monkeypatch.delenv("SHARPCORE_AUTOTUNE")
    assert tuning.enabled()


def test_configurations_are_compiled_beside_each_other(tmp_path: Path) -> None:
    """Triton's own compiler in threads, for a GPU that is played by a driver that knows its name only."""
    code = """
        import torch, triton
        from triton.backends.compiler import GPUTarget
        from sharpcore.kernels import geglu_tangent, tuning

        class Driver:
            def get_current_device(self): return 0
            def get_current_stream(self, device): return 0
            def get_current_target(self): return GPUTarget("cuda", 80, 32)

        triton.runtime.driver.set_active(Driver())
        compiled = []
        def run(kernel, grid, arguments, configurations, key=()):
            tuning.compile_all(kernel, grid, arguments, configurations)
            compiled.append((len(configurations), len(kernel.device_caches[0][0])))
        geglu_tangent.run = run
        vectors, factors, out = (torch.empty(shape, dtype=torch.bfloat16, device="meta")
                                 for shape in ((8, 64, 512), (64, 512), (8, 64, 256)))
        geglu_tangent.geglu_apply(out, vectors, factors, adjoint=False)
        (asked, made), = compiled
        assert asked == made > 1, compiled
    """
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        check=True,
    )
