"""Nearest-neighbour upsampling: reference and kernel against interpolate and its backward, and in a trace."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    NoAllocation,
    bits_equal,
    each_isa,
    each_layout,
    embed,
    for_threads,
    needs_extension,
    poisoned_memory,
    run_with_isa,
    to_channels_last,
)
from oracles import oracle_jvp, oracle_vjp
from torch import Tensor

from sharpcore import linearize
from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

KERNELS = ("upsample_nearest_tangent", "upsample_nearest_adjoint")
# [K, B, C, H, W] of the small image.
SHAPES = (
    (1, 1, 1, 1, 1),
    (1, 2, 7, 3, 5),
    (2, 1, 8, 4, 33),
    (3, 2, 40, 12, 12),
    (8, 1, 59, 2, 16),
    (17, 1, 3, 7, 8),
    (1, 1, 80, 5, 77),
    (1, 1, 2, 2, 1025),
    (2, 3, 111, 4, 4),
    (1, 2, 160, 1, 9),
)
FACTORS = ((2, 2), (1, 1), (1, 2), (3, 1), (2, 3), (4, 4))
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_dtype = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
each_backend = pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)

Shape = tuple[int, ...]


def lay(tensor: Tensor, channels_last: bool) -> Tensor:
    return to_channels_last(tensor, 2) if channels_last else tensor.contiguous()


def make_vectors(
    kernel: str, shape: Shape, factors: tuple[int, int], dtype: torch.dtype = torch.float64
) -> Tensor:
    *leading, height, width = shape
    if kernel == "upsample_nearest_adjoint":
        height, width = factors[0] * height, factors[1] * width
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*leading, height, width, generator=generator, dtype=torch.float64).to(dtype)


@each_backend
@each_shape
@each_layout
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_equals_interpolate_and_its_backward(
    backend: ModuleType, shape: Shape, channels_last: bool, factors: tuple[int, int]
) -> None:
    small, large = (lay(make_vectors(kernel, shape, factors), channels_last) for kernel in KERNELS)
    point = small.flatten(0, 1).contiguous().requires_grad_()
    expected = F.interpolate(point, size=large.shape[3:])
    (pulled,) = torch.autograd.grad(expected, point, large.flatten(0, 1).contiguous())
    with poisoned_memory():
        pushed, summed = (
            backend.upsample_nearest_tangent(small, factors),
            backend.upsample_nearest_adjoint(large, factors),
        )
    assert torch.equal(pushed.flatten(0, 1), expected)
    assert summed.shape == small.shape
    # Worst measured: 2e-16; the order of summation differs.
    assert relative_error(summed.flatten(0, 1), pulled) <= 1e-15


@needs_extension
@each_dtype
@each_layout
def test_result_lies_in_memory_as_the_vectors_do(dtype: torch.dtype, channels_last: bool) -> None:
    for kernel in KERNELS:
        vectors = lay(make_vectors(kernel, (2, 2, 3, 4, 5), (2, 2), dtype), channels_last)
        result = cpu.KERNELS[kernel](vectors, (2, 2))
        assert result.dtype == dtype
        assert result.stride() == lay(result, channels_last).stride()


@needs_extension
@each_shape
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(
    shape: Shape, channels_last: bool, dtype: torch.dtype
) -> None:
    large = make_vectors("upsample_nearest_adjoint", shape, (2, 2), dtype)
    exact = reference.upsample_nearest_adjoint(large.double(), (2, 2))
    plain = (large[..., ::2, ::2] + large[..., ::2, 1::2]) + (large[..., 1::2, ::2] + large[..., 1::2, 1::2])
    error = relative_error(cpu.upsample_nearest_adjoint(lay(large, channels_last), (2, 2)), exact)
    # Worst measured on AVX-512, AVX2 and portable: 1.1 times; the floor is for shapes of a few numbers.
    assert_error_at_most(error, relative_error(plain, exact), floor=torch.finfo(dtype).eps)


@needs_extension
@each_dtype
@each_layout
def test_extremes(dtype: torch.dtype, channels_last: bool) -> None:
    """Infinities, NaN, denormals and ties go where they belong."""
    tiny, huge = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    values = [0.0, -0.0, tiny, -3 * tiny, huge, -huge, float("inf"), float("-inf"), float("nan"), 1.0]
    values = torch.tensor(values, dtype=dtype).repeat(4)[:38]
    small = lay(values.view(1, 1, 1, 2, 19).expand(1, 1, 17, 2, 19), channels_last)
    pushed = cpu.upsample_nearest_tangent(small, (2, 2))
    assert bits_equal(pushed, reference.upsample_nearest_tangent(small, (2, 2)))
    assert torch.equal(pushed.signbit(), reference.upsample_nearest_tangent(small.signbit(), (2, 2)))
    large = lay(values.view(1, 1, 1, 2, 19).expand(1, 1, 17, 2, 19).repeat_interleave(2, 3), channels_last)
    for factors in ((2, 1), (2, 19)):
        assert bits_equal(
            cpu.upsample_nearest_adjoint(large, factors).isfinite(),
            reference.upsample_nearest_adjoint(large, factors).isfinite(),
        )
    assert bits_equal(
        cpu.upsample_nearest_adjoint(large, (2, 1)), reference.upsample_nearest_adjoint(large, (2, 1))
    )


@needs_extension
def test_bfloat16_sums_are_rounded_once_to_the_nearest_even() -> None:
    ulp = 2.0**-7
    blocks = torch.tensor([[1, ulp / 4, ulp / 4, 0], [1 + ulp, ulp / 2, 0, 0], [1, ulp / 2, 0, 2.0**-20]])
    for width in (1, 17):
        image = blocks.view(1, 1, 3, 2, 2).repeat(1, 1, 1, 1, width).bfloat16()
        for channels_last in (False, True):
            summed = cpu.upsample_nearest_adjoint(lay(image, channels_last), (2, 2))
            assert (summed == torch.tensor([1, 1 + 2 * ulp, 1 + ulp]).view(3, 1, 1)).all()


@needs_extension
@each_kernel
@each_layout
def test_number_of_threads_changes_no_bit(kernel: str, channels_last: bool) -> None:
    vectors = lay(make_vectors(kernel, (3, 2, 70, 13, 33), (2, 2), torch.float32), channels_last)
    one, *others = for_threads(lambda: cpu.KERNELS[kernel](vectors, (2, 2)))
    assert all(torch.equal(one, other) for other in others)


@needs_extension
@each_kernel
@each_dtype
def test_strides_and_out(kernel: str, dtype: torch.dtype) -> None:
    """Any strides are read and written right, those that the kernel knows without an allocation."""
    given = make_vectors(kernel, (3, 2, 20, 5, 7), (2, 2), dtype)
    expected = cpu.KERNELS[kernel](given, (2, 2))
    nan = torch.full_like(expected, float("nan"))
    for dim in range(5):
        out = embed(nan, dim)
        assert torch.equal(cpu.KERNELS[kernel](embed(given, dim), (2, 2)), expected), dim
        for backend in (cpu, reference):
            assert backend.KERNELS[kernel](given, (2, 2), out=out) is out
            assert torch.equal(out, backend.KERNELS[kernel](given, (2, 2))), dim
    assert torch.equal(
        cpu.KERNELS[kernel](given[:1].expand_as(given), (2, 2)), expected[:1].expand_as(expected)
    )
    for channels_last, spread in product((False, True), (None, 0, 1)):
        vectors = lay(given, channels_last)
        if spread is None:
            out = lay(nan, channels_last).clone()
        elif channels_last:
            out = embed(nan.movedim(2, -1).contiguous(), spread).movedim(-1, 2)
        else:
            out = embed(nan, spread)
        with NoAllocation():
            returned = cpu.KERNELS[kernel](vectors, (2, 2), out=out)
        assert returned is out
        assert torch.equal(out, cpu.KERNELS[kernel](vectors, (2, 2)))
        other = lay(nan, not channels_last).clone()
        assert torch.equal(cpu.KERNELS[kernel](vectors, (2, 2), out=other), out)


@needs_extension
def test_wrong_arguments_are_refused() -> None:
    for kernel in KERNELS:
        vectors = make_vectors(kernel, (2, 2, 3, 4, 5), (2, 2))
        for factors in ((0, 2), (2, -1)):
            with pytest.raises(InvalidInput, match="factors: expected"):
                cpu.KERNELS[kernel](vectors, factors)
        with pytest.raises(InvalidInput, match="tangent: expected"):
            cpu.KERNELS[kernel](vectors[0], (2, 2))
        good = cpu.KERNELS[kernel](vectors, (2, 2))
        for backend, out in product((cpu, reference), (good[:1], good.float())):
            with pytest.raises(InvalidInput, match="out: expected"):
                backend.KERNELS[kernel](vectors, (2, 2), out=out)
    with pytest.raises(InvalidInput, match="cotangent: expected multiples"):
        cpu.upsample_nearest_adjoint(vectors, (3, 2))


@needs_extension
@each_kernel
def test_what_the_kernel_cannot_do_is_left_to_the_reference(kernel: str) -> None:
    half = make_vectors(kernel, (2, 2, 3, 4, 5), (2, 2), torch.float16)
    assert torch.equal(cpu.KERNELS[kernel](half, (2, 2)), reference.KERNELS[kernel](half, (2, 2)))
    assert cpu.KERNELS[kernel](half.float().requires_grad_(), (2, 2)).requires_grad
    for backend in (cpu, reference):
        assert backend.KERNELS[kernel](torch.empty(2, 0, 3, 4, 4), (2, 2)).shape[:3] == (2, 0, 3)


ISA = """
import torch
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 2e-7), (torch.float64, 4e-16), (torch.bfloat16, 4e-3)):
    for channels, height, width in ((40, 3, 33), (3, 5, 16), (1, 1, 1)):
        for factors in ((2, 2), (1, 3)):
            for channels_last in (False, True):
                small = torch.randn(2, 2, channels, height, width, generator=generator).to(dtype)
                sizes = height * factors[0], width * factors[1]
                large = torch.randn(2, 2, channels, *sizes, generator=generator).to(dtype)
                if channels_last:
                    small, large = (t.movedim(2, -1).contiguous().movedim(-1, 2) for t in (small, large))
                expected = reference.upsample_nearest_tangent(small, factors)
                assert torch.equal(cpu.upsample_nearest_tangent(small, factors), expected)
                expected = reference.upsample_nearest_adjoint(large.double(), factors)
                error = (cpu.upsample_nearest_adjoint(large, factors) - expected).norm()
                assert error <= bound * expected.norm(), (dtype, channels, factors, channels_last, error)
"""


@needs_extension
@each_isa
def test_every_instruction_set(isa: str) -> None:
    """Worst measured on each: 6.4e-8 in float32, 0 in float64, 2.1e-3 in bfloat16."""
    run_with_isa(isa, ISA)


# -- in a trace: functions of x [2, 3, 6, 5] ----------------------------------------------------------


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def to_a_size(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(18, 5))


def two_scales(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=(1.0, 7.0))


def scale_not_whole_but_sizes_a_multiple(x: Tensor) -> Tensor:
    return F.interpolate(x[..., :4, :4], scale_factor=3.2, recompute_scale_factor=False)


def one_and_a_half(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=1.5)


def smaller(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(3, 2))


BY_BLOCKS = {
    twice: True,
    to_a_size: True,
    two_scales: True,
    scale_not_whole_but_sizes_a_multiple: False,
    one_and_a_half: False,
    smaller: False,
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("f", "blocks"), BY_BLOCKS.items(), ids=[f.__name__ for f in BY_BLOCKS])
def test_rule(f: Callable[[Tensor], Tensor], blocks: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    tangents = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(3, *f(x).shape, generator=generator, dtype=torch.float64)
    for point in (x, x.contiguous(memory_format=torch.channels_last)):
        linearization = linearize(f, point, backend=backend)
        names = [type(instruction).__name__ for instruction in linearization._residuals]
        assert ("UpsampleNearest" in names) == blocks
        # Worst measured: 2e-16.
        assert relative_error(linearization.jvp(tangents), oracle_jvp(f, point, tangents)) <= 1e-14
        assert relative_error(linearization.vjp(cotangents), oracle_vjp(f, point, cotangents)) <= 1e-14
