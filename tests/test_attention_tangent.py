"""Attention: the reference against torch.func.jvp, and the backends' kernels against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from attention_cases import (
    ACTIVE,
    COUNTS,
    LENGTHS,
    WIDTHS,
    Case,
    banded_mask,
    check,
    check_forward,
    normal,
    plain_attention,
)
from kernel_checks import available_isas, needs_extension

from sharpcore.backends import get_backend
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Makes PyTorch fill uninitialized tensors with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def set_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_the_derivative_of_attention(active: tuple[bool, bool, bool], masked: bool) -> None:
    case = Case(7, 33, 8, 5, active=active, mask=banded_mask(7, 33, 2) if masked else None)
    zero = [torch.zeros(case.count, *t.shape, dtype=t.dtype) for t in case.qkv]
    tangents = [
        z if t is None else t
        for z, t in zip(zero, (case.tensors[n] for n in ("dq", "dk", "dv")), strict=True)
    ]
    expected = torch.stack(
        [
            torch.func.jvp(
                lambda *qkv: plain_attention(*qkv, case.mask, case.scale),
                case.qkv,
                tuple(tangent[i] for tangent in tangents),
            )[1]
            for i in range(case.count)
        ]
    )
    assert relative_error(case.tangent("reference"), expected) < 1e-13  # measured 8e-16


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_over_lengths_and_widths(length: int, width: int, dtype: torch.dtype) -> None:
    keys = LENGTHS[(LENGTHS.index(length) + width) % 5]
    check_forward(Case(length, keys, width, 24, dtype=dtype, batch=1, count=0))
    check_forward(Case(keys, length, width, dtype=dtype, batch=1, count=0, gain=5.0))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_over_lengths_widths_and_counts(length: int, width: int, dtype: torch.dtype) -> None:
    """Every pair of a length of rows or keys, a head size and a number of tangents."""
    i, j = LENGTHS.index(length), WIDTHS.index(width)
    count, active = COUNTS[(j - i) % len(COUNTS)], ACTIVE[(i + j) % len(ACTIVE)]
    other = LENGTHS[(i + 1) % len(LENGTHS)]
    for rows, keys in ((length, other), (other, length)):
        check(Case(rows, keys, width, count=count, dtype=dtype, batch=1, heads=1, active=active))
    if length < 1025:
        check(Case(length, length, width, dtype=dtype, batch=1, active=active))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("width", [8, 40, 160])
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_on_many_keys(width: int, dtype: torch.dtype) -> None:
    check(Case(1025, 1025, width, dtype=dtype, batch=1, heads=1, count=1))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_over_counts(count: int, active: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    check(Case(33, 77, 24, 11, count=count, active=active, dtype=dtype))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_on_many_heads(active: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    """Enough heads for the transpose to give all its results in one pass; several blocks of rows, of keys."""
    check(Case(77, 144, 16, 24, count=3, heads=5, active=active, dtype=dtype))
    check(Case(144, 77, 16, 24, count=1, heads=5, active=active, dtype=dtype, mask=banded_mask(144, 77, 5)))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_splits_tangents_where_scratch_memory_is_short(dtype: torch.dtype) -> None:
    check(Case(33, 20, 160, count=17, batch=1, dtype=dtype))
    check(Case(7, 40, 160, count=17, batch=1, heads=8, dtype=dtype))


@needs_extension
@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_on_huge_logits_and_denormals(dtype: torch.dtype, heads: int) -> None:
    # Nearly all of dS cancels: in float64 reference and kernel are both 2.3e-8 from an extended-precision dS.
    # float32 without fused multiply-add, as on the portable instruction set: 1.2e-4.
    floor = 2.5e-4 if dtype is torch.float32 else 2e-7
    check(Case(33, 40, 16, heads=heads, dtype=dtype, gain=30.0), floor=floor)
    # Scores that are denormal.
    check(Case(33, 40, 16, heads=heads, dtype=dtype, gain=1e-22 if dtype is torch.float32 else 1e-160))


@needs_extension
@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernel_on_denormal_vectors(dtype: torch.dtype, heads: int) -> None:
    """Tangents and cotangents that are denormal, with six bits less than normal numbers have."""
    case = Case(33, 40, 16, heads=heads, dtype=dtype)
    cotangent = case.cotangent()
    exact = case.as_float64()
    expected = [exact.tangent("reference"), *exact.adjoint("reference", cotangent.double())]
    scale = torch.finfo(dtype).smallest_normal / 64
    for name in ("dq", "dk", "dv"):
        case.tensors[name] = case.tensors[name] * scale
    step = 64 * torch.finfo(dtype).eps  # between two denormals, in units of the scale
    for got, truth in zip(
        (case.tangent("cpu"), *case.adjoint("cpu", cotangent * scale)), expected, strict=True
    ):
        assert got is not None
        assert truth is not None
        assert float((got.double() / scale - truth).abs().max()) < 100 * step


@needs_extension
@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse", "dq", "dk", "dv"])
def test_nan_goes_on(name: str, heads: int) -> None:
    """NaN in one batch entry and head of an operand comes out there and nowhere else."""
    case = Case(9, 20, 8, heads=heads)
    case.tensors[name][..., 1, 0, 3, 2 if name != "lse" else ...] = float("nan")
    results = [case.tangent("cpu")]
    if name not in ("dq", "dk", "dv"):
        results += [grad for grad in case.adjoint("cpu", case.cotangent()) if grad is not None]
    assert any(bool(result.isnan().any()) for result in results)
    assert bool(results[0].isnan().any())
    for result in results:
        bad = result.isnan()
        bad[:, 1, 0] = False
        assert not bool(bad.any())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("active", ACTIVE)
def test_adjoint_is_the_transpose(backend: str, active: tuple[bool, bool, bool]) -> None:
    case = Case(19, 35, 12, 9, active=active)
    cotangent = case.cotangent()
    pushed = case.tangent(backend)
    pulled = case.adjoint(backend, cotangent)
    tangents = [case.tensors[name] for name in ("dq", "dk", "dv")]
    for i in range(case.count):
        left = float((cotangent[i] * pushed[i]).sum())
        right = sum(
            float((grad[i] * tangent[i]).sum())
            for grad, tangent in zip(pulled, tangents, strict=True)
            if grad is not None and tangent is not None
        )
        assert abs(left - right) < 1e-11 * (1 + abs(left))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("active", [(True, True, True), (True, False, False)])
@pytest.mark.usefixtures("set_threads")
def test_number_of_threads_does_not_change_a_bit(
    active: tuple[bool, bool, bool], heads: int, dtype: torch.dtype
) -> None:
    case = Case(77, 144, 40, dtype=dtype, count=3, heads=heads, active=active)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        grads = case.adjoint("cpu", case.cotangent())
        results.append(
            [*case.forward("cpu"), case.tangent("cpu"), *(grad for grad in grads if grad is not None)]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_layout_of_operands_does_not_matter() -> None:
    case = Case(33, 20, 16, count=3)
    expected = case.tangent("cpu")
    for name in ("q", "k", "v", "dq", "dk", "dv", "out", "lse"):
        case.tensors[name] = case.tensors[name].contiguous()
    assert relative_error(case.tangent("cpu"), expected) < 1e-15
    strided = case.tensors["dq"].mT.contiguous().mT
    assert strided.stride(-1) != 1
    case.tensors["dq"] = strided
    assert relative_error(case.tangent("cpu"), expected) < 1e-15
    case.tensors["dq"] = strided[:1].expand(3, -1, -1, -1, -1)
    assert torch.equal(case.tangent("cpu")[0], expected[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 2)])
def test_other_leading_axes(backend: str, leading: tuple[int, ...]) -> None:
    q, k, v = (normal(*leading, n, 8, seed=i) for i, n in enumerate((9, 20, 20)))
    dq, dk, dv = (normal(2, *t.shape, seed=10 + i) for i, t in enumerate((q, k, v)))
    kernels = get_backend(backend, device="cpu", dtype=torch.float64)
    out, lse = kernels.attention_forward(q, k, v, mask=None, scale=0.3)
    ours = kernels.attention_tangent(q, k, v, out, lse, dq, dk, dv, mask=None, scale=0.3)
    for i in range(2):
        expected = torch.func.jvp(
            lambda *qkv: plain_attention(*qkv, None, 0.3), (q, k, v), (dq[i], dk[i], dv[i])
        )[1]
        assert relative_error(ours[i], expected) < 1e-13


@needs_extension
def test_results_lie_in_memory_with_heads_interleaved() -> None:
    case = Case(9, 20, 8, 6, count=3, heads=4)
    for result in (case.forward("cpu")[0], case.tangent("cpu"), *case.adjoint("cpu", case.cotangent())):
        assert result is not None
        assert result.transpose(-2, -3).is_contiguous()


@needs_extension
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("batch", "keys"), [(1, 20), (4, 20), (1, 0), (4, 0), (0, 20)])
@pytest.mark.parametrize(("count", "length"), [(0, 9), (2, 0), (2, 9)])
def test_empty(count: int, length: int, keys: int, batch: int, backend: str) -> None:
    case = Case(9, 20, 8, count=count, batch=batch)
    shortened = {"q": length, "dq": length, "out": length, "k": keys, "dk": keys, "v": keys, "dv": keys}
    for name, size in shortened.items():
        case.tensors[name] = case.tensors[name][..., :size, :]
    case.tensors["lse"] = case.tensors["lse"][..., :length]
    assert case.tangent(backend).shape == (count, *case.tensors["out"].shape)
    out, lse = case.forward(backend)
    assert (out.shape, lse.shape) == (case.tensors["out"].shape, case.tensors["lse"].shape)
    if keys == 0:
        assert bool((out == 0).all())
        assert bool((lse == float("-inf")).all())
    grads = case.adjoint(backend, case.cotangent())
    for primal, grad in zip(case.qkv, grads, strict=True):
        assert grad is not None
        assert grad.shape == (count, *primal.shape)
        if 0 in (length, keys):
            assert bool((grad == 0).all())


@needs_extension
def test_what_the_kernel_cannot_do_is_left_to_the_reference() -> None:
    half = Case(9, 20, 8, dtype=torch.float16)
    assert half.tangent("cpu").dtype == torch.float16
    assert half.forward("cpu")[0].dtype == torch.float16
    case = Case(9, 20, 8)
    case.tensors["dq"].requires_grad_()
    assert case.tangent("cpu").requires_grad


@needs_extension
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("k", (2, 2, 20, 7)),
        ("v", (2, 2, 19, 8)),
        ("o", (2, 2, 9, 7)),
        ("lse", (2, 2, 8)),
        ("dq", (2, 2, 2, 8, 8)),
        ("dk", (3, 2, 2, 20, 8)),
        ("dv", (2, 2, 20, 8)),
    ],
)
def test_wrong_shapes_are_refused(name: str, wrong: tuple[int, ...]) -> None:
    case = Case(9, 20, 8)
    case.tensors["out" if name == "o" else name] = torch.ones(wrong, dtype=torch.float64)
    with pytest.raises(InvalidInput, match=f"^{name}: "):
        case.tangent("cpu")
    if name not in ("dq", "dk", "dv"):
        with pytest.raises(InvalidInput, match=f"^{name}: "):
            case.adjoint("cpu", case.cotangent())


@needs_extension
def test_wrong_masks_cotangents_and_missing_tangents_are_refused() -> None:
    case = Case(9, 20, 8)
    with pytest.raises(InvalidInput, match="cotangent"):
        case.adjoint("cpu", case.cotangent()[..., :7])
    case.mask = torch.zeros(9, 19)
    with pytest.raises(InvalidInput, match="mask"):
        case.tangent("cpu")
    case.mask = None
    case.tensors.update(dq=None, dk=None, dv=None)
    with pytest.raises(InvalidInput, match="dq, dk, dv"):
        case.tangent("cpu")


@needs_extension
@pytest.mark.usefixtures("set_threads")
def test_two_threads_at_once() -> None:
    torch.set_num_threads(2)
    cases = [Case(33, 40, 16, count=count, heads=5, dtype=torch.float32) for count in (1, 3)]
    cotangents = [case.cotangent() for case in cases]

    def results(which: int) -> list[bytes]:
        # numpy compares without PyTorch's own thread pool.
        case = cases[which]
        tensors = (*case.forward("cpu"), case.tangent("cpu"), *case.adjoint("cpu", cotangents[which]))
        return [tensor.numpy().tobytes() for tensor in tensors if tensor is not None]

    expected = [results(which) for which in range(2)]
    equal: list[bool] = []

    def work(which: int) -> None:
        for _ in range(50):
            equal.append(results(which) == expected[which])

    threads = [threading.Thread(target=work, args=(which % 2,), daemon=True) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(equal) == 200
    assert all(equal)


ISA = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from attention_cases import ACTIVE, Case, banded_mask, check, check_forward
from sharpcore.backends import cpu
assert cpu.extension().isa() == sys.argv[1]
for dtype in (torch.float32, torch.float64):
    for active in ACTIVE:
        check(Case(33, 77, 24, 11, count=3, heads=5, active=active, dtype=dtype))
    for length, keys, width in ((1, 7, 5), (77, 33, 40), (144, 1, 59), (7, 144, 160)):
        check(Case(length, keys, width, dtype=dtype))
        check_forward(Case(length, keys, width, dtype=dtype))
    for mask in (banded_mask(33, 77), banded_mask(33, 77) > -1):
        check_forward(Case(33, 77, 16, dtype=dtype, mask=mask))
        check(Case(33, 77, 16, dtype=dtype, mask=mask))
"""


@needs_extension
@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set(isa: str) -> None:
    subprocess.run(
        [sys.executable, "-c", ISA, isa, os.path.dirname(__file__)],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )
