"""GroupNorm + SiLU with statistics: the reference against PyTorch, the C++ kernel against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from group_norm_cases import (
    SHAPES,
    Shape,
    each_by_sample,
    each_silu,
    identify,
    make_arguments,
)
from kernel_checks import available_isas, each_layout, needs_extension, poisoned_memory, to_channels_last
from torch import Tensor

from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput

each_shape = pytest.mark.parametrize("shape", SHAPES, ids=identify)
EPS = 1e-5


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def inputs(
    shape: Shape, *, channels_last: bool = False, by_sample: bool = False, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, weight, bias; float32 parameters beside bfloat16."""
    _, x, _, _, weight, bias = make_arguments(
        shape, 1, channels_last=channels_last, by_sample=by_sample, dtype=dtype
    )
    return [x, weight, bias]


def pytorch(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operators of PyTorch; the affine part apart, as theirs takes one for all samples."""
    batch, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    y, mean, rstd = torch.native_group_norm(
        x.contiguous(), None, None, batch, channels, positions, groups, EPS
    )
    spread = (-1, channels, *(1,) * (x.ndim - 2))
    y = y * weight.view(spread) + bias.view(spread)
    return F.silu(y) if silu else y, mean, rstd


@each_shape
@each_silu
@each_by_sample
@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_layout
@pytest.mark.usefixtures("poisoned")
def test_float64_equals_pytorch(
    backend: object, shape: Shape, silu: bool, by_sample: bool, channels_last: bool
) -> None:
    x, weight, bias = inputs(shape, channels_last=channels_last, by_sample=by_sample)
    expected = pytorch(x, weight, bias, shape.groups, silu)
    results = backend.KERNELS["group_norm_silu_forward"](x, weight, bias, shape.groups, EPS, silu)
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        torch.testing.assert_close(result, wanted, rtol=1e-11, atol=1e-11)
    if channels_last and backend is cpu and 1 not in (*shape.spatial, shape.channels):
        assert results[0].stride() == x.stride()


@needs_extension
@each_silu
@each_layout
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.group_size > 2], ids=identify)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_float32_is_as_exact_as_pytorch(shape: Shape, silu: bool, channels_last: bool, offset: float) -> None:
    """Also where the mean is 200 deviations: variances come from a sweep of their own."""
    x, weight, bias = inputs(shape, channels_last=channels_last, dtype=torch.float32)
    x = x + offset
    exact = pytorch(x.double(), weight.double(), bias.double(), shape.groups, silu)
    plain = pytorch(x, weight, bias, shape.groups, silu)
    results = cpu.group_norm_silu_forward(x, weight, bias, shape.groups, EPS, silu)
    for result, other, wanted in zip(results, plain, exact, strict=True):
        assert result.dtype == torch.float32
        # Worst measured on AVX-512, AVX2 and portable: 1.5 times PyTorch's own error, or half a unit.
        bound = max(2 * float((other - wanted).norm()), 1e-7 * float(wanted.norm()))
        assert (result - wanted).norm() <= bound


@needs_extension
@each_silu
@each_layout
@each_by_sample
@each_shape
def test_bfloat16_is_rounded_once(shape: Shape, silu: bool, channels_last: bool, by_sample: bool) -> None:
    x, weight, bias = inputs(shape, channels_last=channels_last, by_sample=by_sample, dtype=torch.bfloat16)
    exact = reference.group_norm_silu_forward(
        x.double(), weight.double(), bias.double(), shape.groups, EPS, silu
    )
    y, mean, rstd = cpu.group_norm_silu_forward(x, weight, bias, shape.groups, EPS, silu)
    assert (y.dtype, mean.dtype, rstd.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    size = 1 + float(weight.abs().max()) * shape.group_size**0.5 + float(bias.abs().max())
    assert ((y - exact[0]).abs() <= exact[0].abs() * 2**-8 + 2e-6 * size).all()
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), exact[2], rtol=1e-5, atol=0)
    rounded = cpu.group_norm_silu_forward(x, weight.bfloat16(), bias.bfloat16(), shape.groups, EPS, silu)
    wanted = reference.group_norm_silu_forward(x, weight.bfloat16(), bias.bfloat16(), shape.groups, EPS, silu)
    torch.testing.assert_close(rounded[0], wanted[0], rtol=2**-7, atol=1e-5 * size)


@needs_extension
@each_layout
@pytest.mark.parametrize("affine", [False, True])
def test_parameters_may_be_missing(channels_last: bool, affine: bool) -> None:
    x, weight, bias = inputs(Shape(2, 12, 3, (4, 6)), channels_last=channels_last)
    for given in ((None, None), (weight, None), (None, bias)):
        expected = reference.group_norm_silu_forward(x, *given, 3, EPS, affine)
        results = cpu.group_norm_silu_forward(x, *given, 3, EPS, affine)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


@needs_extension
@each_layout
def test_out_and_threads(channels_last: bool) -> None:
    shape = Shape(2, 320, 32, (8, 8))
    x, weight, bias = inputs(shape, channels_last=channels_last, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.group_norm_silu_forward(x, weight, bias, 32, EPS, True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    size = x.shape
    for out in (
        torch.empty(size),
        to_channels_last(torch.empty(size), 1),
        torch.empty(2 * size[0], *size[1:])[::2],
        torch.empty(*size[:-1], 16)[..., ::2],
    ):
        out.fill_(float("nan"))
        assert cpu.group_norm_silu_forward(x, weight, bias, 32, EPS, True, out=out)[0] is out
        assert torch.equal(out, results[0][0])
        assert reference.group_norm_silu_forward(x, weight, bias, 32, EPS, True, out=out)[0] is out
    for backend in (reference, cpu):
        with pytest.raises(InvalidInput, match="out"):
            backend.KERNELS["group_norm_silu_forward"](x, weight, bias, 32, EPS, True, out=torch.empty(3))


@needs_extension
@each_layout
def test_nan_and_far_out(channels_last: bool) -> None:
    shape = Shape(2, 40, 4, (5, 7))
    x, weight, bias = inputs(shape, channels_last=channels_last, dtype=torch.float32)
    x[1, 3, 2, 2] = float("nan")
    y, mean, rstd = cpu.group_norm_silu_forward(x, weight, bias, 4, EPS, True)
    assert y[1, :10].isnan().all()
    assert y.isnan().sum() == 10 * 35
    assert mean.isnan().sum() == rstd.isnan().sum() == 1
    x, weight, bias = inputs(shape, channels_last=channels_last, dtype=torch.float32)
    bias[:6] = torch.tensor([-1e30, -1000.0, -104.0, 88.0, 1000.0, 1e30])
    y = cpu.group_norm_silu_forward(x, weight, bias, 4, EPS, True)[0]
    exact = reference.group_norm_silu_forward(x.double(), weight.double(), bias.double(), 4, EPS, True)[0]
    # Measured: 2e-7.
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-6)


@needs_extension
@pytest.mark.parametrize(
    ("position", "wrong", "named"), [(0, (8,), "x"), (1, (7,), "weight"), (2, (3, 8), "bias")]
)
def test_wrong_shapes_are_refused(position: int, wrong: tuple[int, ...], named: str) -> None:
    arguments = inputs(Shape(2, 8, 4, (5,)))
    arguments[position] = torch.ones(wrong, dtype=torch.float64)
    with pytest.raises(InvalidInput, match=named):
        cpu.group_norm_silu_forward(*arguments, 4, EPS, True)
    with pytest.raises(InvalidInput, match="groups"):
        cpu.group_norm_silu_forward(*inputs(Shape(2, 8, 4, (5,))), 3, EPS, True)


@needs_extension
def test_no_samples() -> None:
    for backend in (reference, cpu):
        y, mean, rstd = backend.KERNELS["group_norm_silu_forward"](
            torch.ones(0, 8, 3), None, None, 4, EPS, True
        )
        assert (y.shape, mean.shape, rstd.shape) == ((0, 8, 3), (0, 4), (0, 4))


ISA = """
import sys, torch
from sharpcore.backends import cpu, reference
assert cpu.extension().isa() == sys.argv[1]
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 5e-7), (torch.float64, 5e-15), (torch.bfloat16, 3e-3)):
    for size in ((2, 320, 8, 8), (1, 32, 5, 7), (1, 64, 41, 25)):
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(size[:2], generator=generator, dtype=torch.float64)
        if dtype != torch.float64:
            weight = weight.float()
        for given in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
            parameters = (weight.double(), weight.double())
            exact = reference.group_norm_silu_forward(given.double(), *parameters, 4, 1e-5, True)
            result = cpu.group_norm_silu_forward(given, weight, weight, 4, 1e-5, True)
            error = (result[0] - exact[0]).norm() / exact[0].norm()
            assert error < bound, (dtype, size, float(error))
"""


@needs_extension
@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set(isa: str) -> None:
    """Worst measured on each: 1.2e-7 in float32, 1.1e-15 in float64, 1.7e-3 in bfloat16."""
    subprocess.run(
        [sys.executable, "-c", ISA, isa],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )
