"""Selection of backends, the support table, and what happens without the compiled module."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from interpreted import needs_triton

from sharpcore import backends
from sharpcore.backends import cpu, get_backend, reference, support_table, supports
from sharpcore.errors import InvalidInput

needs_extension = pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@needs_extension
def test_auto_takes_the_compiled_kernels_where_they_apply():
    assert get_backend("auto", device="cpu", dtype=torch.float32).name == "cpu"
    assert get_backend("auto", device=torch.device("cpu"), dtype=torch.float64).name == "cpu"
    assert get_backend("auto", device="cpu", dtype=torch.bfloat16).name == "cpu"
    assert get_backend("auto", device="cpu", dtype=torch.float16).name == "reference"
    assert get_backend("cpu", device="cpu", dtype=torch.bfloat16).name == "cpu"
    assert get_backend("reference", device="cpu", dtype=torch.float32).name == "reference"


@pytest.mark.parametrize("name", ["triton", "gpu", "", "CPU"])
def test_unknown_backend_names_the_known_ones(name):
    with pytest.raises(InvalidInput, match="auto, reference, cpu, cuda") as caught:
        get_backend(name, device="cpu", dtype=torch.float32)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_kernel_is_an_attribute(name):
    backend = backends.Backend(name, {**reference.KERNELS, **(cpu.KERNELS if name == "cpu" else {})})
    for kernel in reference.KERNELS:
        assert callable(getattr(backend, kernel))
    with pytest.raises(AttributeError, match="no kernel 'no_such_kernel'"):
        _ = backend.no_such_kernel


def test_a_cpu_kernel_has_a_reference_of_the_same_name():
    assert set(cpu.KERNELS) <= set(reference.KERNELS)


def test_support_table_agrees_with_supports():
    rows = support_table()
    assert {(row.backend, row.kernel) for row in rows} == {
        (backend, kernel) for backend in ("reference", "cpu", "cuda") for kernel in reference.KERNELS
    }
    for row in rows:
        device = "cuda" if row.backend == "cuda" else "cpu"
        dtype = getattr(torch, row.dtypes[0]) if row.dtypes else torch.float32
        assert row.available == bool(supports(row.backend, row.kernel, device=device, dtype=dtype))
        assert bool(row.reason) != row.available
        assert not row.available or (row.dtypes and row.devices)


class Gpu:
    """What PyTorch would say of a GPU that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
        for name, value in {
            "is_available": True,
            "device_count": 1,
            "get_device_capability": capability,
            "get_device_name": "a card",
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@needs_triton
def test_the_cuda_backend_is_picked_for_a_gpu_that_it_supports(monkeypatch):
    assert get_backend("auto", device="cuda:0", dtype=torch.float32).name == "reference"
    Gpu(monkeypatch, (9, 0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert get_backend("auto", device="cuda:0", dtype=dtype).name == "cuda"
    assert get_backend("auto", device="cpu", dtype=torch.float32).name != "cuda"
    assert supports("cuda", "attention_tangent", device="cuda:0", dtype=torch.bfloat16)
    double = supports("cuda", "attention_tangent", device="cuda:0", dtype=torch.float64)
    assert "float32 and bfloat16 and float16, not in float64" in double.reason
    (row,) = (row for row in support_table() if (row.backend, row.kernel) == ("cuda", "geglu_tangent"))
    assert row.devices == ("cuda:0 (9.0)",)
    assert row.available


@needs_triton
def test_the_cuda_backend_says_why_it_cannot_run(monkeypatch):
    def reason(device: str) -> str:
        return supports("cuda", "attention_tangent", device=device, dtype=torch.float32).reason

    assert reason("cuda") == "the cuda backend needs a GPU, and PyTorch finds none"
    assert "not on meta" in reason("meta")
    Gpu(monkeypatch, (7, 5))
    assert reason("cuda") == "the cuda backend needs compute capability 8.0 or more; a card has 7.5"
    monkeypatch.setattr(backends, "_already_warned", set())
    with pytest.warns(RuntimeWarning, match=r"a card has 7\.5; the reference backend is used instead"):
        assert get_backend("cuda", device="cuda", dtype=torch.float32).name == "reference"
    assert get_backend("auto", device="cuda", dtype=torch.float32).name == "reference"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "sharpcore.backends.cuda", None)
    assert "needs Triton, which cannot be imported" in reason("cuda")


@needs_triton
def test_tf32_is_a_matter_of_the_backend_not_of_the_process():
    plain, rounded = (
        get_backend("cuda", device="cpu", dtype=torch.float32, tf32=tf32) for tf32 in (False, True)
    )
    assert (plain.name, plain.tf32, rounded.name, rounded.tf32) == ("cuda", False, "cuda", True)
    assert rounded.attention_tangent.keywords == {"tf32": True}
    assert rounded.geglu_tangent is plain.geglu_tangent


@needs_extension
def test_support_says_why_not():
    kernel = "group_norm_silu_tangent"
    assert supports("cpu", kernel, device="cpu", dtype=torch.float64)
    assert supports("cpu", kernel, device="cpu", dtype=torch.bfloat16)
    half = supports("cpu", kernel, device="cpu", dtype=torch.float16)
    assert not half
    assert "float32 and float64 and bfloat16" in half.reason
    assert "float16" in half.reason
    assert "cuda" in supports("cpu", kernel, device="cuda", dtype=torch.float32).reason
    assert "int64" in supports("reference", kernel, device="cpu", dtype=torch.int64).reason
    with pytest.raises(InvalidInput, match="kernel: expected one of"):
        supports("cpu", "no_such_kernel", device="cpu", dtype=torch.float32)
    with pytest.raises(InvalidInput, match="backend: expected"):
        supports("auto", kernel, device="cpu", dtype=torch.float32)


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["sharpcore._C"] = None
import torch
from sharpcore.backends import get_backend, support_table, supports
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert get_backend("auto", device="cpu", dtype=torch.float32).name == "reference"
    assert not caught
    for _ in range(3):
        backend = get_backend("cpu", device="cpu", dtype=torch.float32)
    assert backend.name == "reference"
assert len(caught) == 1, caught
print(caught[0].message)
assert all(row.available == (row.backend == "reference") for row in support_table() if row.backend != "cuda")
print(supports("cpu", "group_norm_silu_tangent", device="cpu", dtype=torch.float32).reason)
x = torch.randn(1, 4, 3)
one = torch.ones(1, 2)
from sharpcore.backends import cpu
assert cpu.group_norm_silu_tangent(x[None], x, one, one, None, None, 2, True).shape == (1, 1, 4, 3)
"""


def test_missing_extension_is_said_once_and_the_reference_used():
    done = run_python(WITHOUT_EXTENSION)
    assert done.returncode == 0, done.stderr
    warning, reason = done.stdout.splitlines()
    for sentence in (warning, reason):
        assert "sharpcore._C" in sentence
        assert "C++17 compiler" in sentence
    assert warning.endswith("the reference backend is used instead")


def test_extension_is_imported_at_first_use():
    done = run_python("import sys, sharpcore, sharpcore.backends; print('sharpcore._C' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


@needs_extension
def test_wrong_instruction_set_is_named():
    code = (
        "from sharpcore.backends import cpu\n"
        "from sharpcore.errors import InvalidInput\n"
        "try:\n    cpu.extension()\nexcept InvalidInput as error:\n    print(error)"
    )
    done = run_python(code, SHARPCORE_CPU_ISA="sse9")
    expected = "SHARPCORE_CPU_ISA: expected portable, avx2, avx512 or avx512bf16, got sse9"
    assert expected in done.stdout, done.stderr


@needs_extension
def test_features_of_the_cpu():
    native = cpu.extension()
    assert native.isa() in ("portable", "avx2", "avx512", "avx512bf16")
    features = native.cpu_features()
    assert all(isinstance(present, bool) for present in features.values())
    if native.isa().startswith("avx512"):
        assert features["avx512"]
    if native.isa() == "avx512bf16":
        assert features["avx512_bf16"]
    if features.get("avx512_bf16") and "SHARPCORE_CPU_ISA" not in os.environ:
        assert native.isa() == "avx512bf16"
