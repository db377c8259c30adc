"""The Triton kernels of GEGLU, residual sums and upsampling: interpreted against the reference, and compiled
ahead of time."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

pytest.importorskip("triton")

import aot
import torch
from interpreted import DEVICE
from kernel_checks import embed, poisoned_memory, to_channels_last
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.cuda.geglu_tangent import geglu_adjoint, geglu_forward, geglu_tangent
from sharpcore.backends.cuda.residual_add import residual_add
from sharpcore.backends.cuda.upsample_nearest_tangent import (
    upsample_nearest_adjoint,
    upsample_nearest_tangent,
)
from sharpcore.errors import InvalidInput
from sharpcore.kernels import geglu_tangent as geglu_kernels
from sharpcore.kernels import residual_add as residual_kernels
from sharpcore.kernels import upsample_nearest_tangent as upsample_kernels
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

NAN = float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_gelu = pytest.mark.parametrize("approximate", ["none", "tanh"])
each_layout = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def untouched_around(out: Tensor) -> bool:
    """Whether all that `out` leaves of its memory is still NaN."""
    return int(out._base.isnan().sum()) == out._base.numel() - out.numel()


def nan_like(tensor: Tensor, dim: int) -> Tensor:
    """Memory of a tensor's shape between NaN, NaN itself."""
    return embed(torch.full_like(tensor, NAN, memory_format=torch.contiguous_format), dim)


# Leading axes, and half the width.
GEGLU_SHAPES = (((), 1), ((7,), 33), ((2, 33), 77), ((2, 3, 5), 20), ((1,), 2300))
FLOOR = {torch.float32: 2**-22, torch.bfloat16: 2**-9, torch.float16: 2**-12}


@pytest.mark.parametrize("kernel", [geglu_tangent, geglu_adjoint])
@pytest.mark.parametrize("shape", GEGLU_SHAPES, ids=str)
@each_dtype
def test_geglu_equals_reference(kernel: Any, shape: tuple[tuple[int, ...], int], dtype: torch.dtype) -> None:
    leading, columns = shape
    count = (1, 2, 3, 8)[GEGLU_SHAPES.index(shape) % 4]
    factors = draw(*leading, 2 * columns, dtype=dtype)
    vectors = draw(count, *leading, (2 if kernel is geglu_tangent else 1) * columns, dtype=dtype)
    named = reference.KERNELS[kernel.__name__]
    exact = named(vectors.double(), factors.double())
    # Every operation of PyTorch rounds to the dtype.
    h, g = factors.chunk(2, -1)
    if kernel is geglu_tangent:
        plain = vectors[..., :columns] * h + vectors[..., columns:] * g
    else:
        plain = torch.cat([vectors * h, vectors * g], -1)
    for dim in range(vectors.ndim):
        given = embed(vectors, dim), embed(factors, max(dim - 1, 0))
        with poisoned_memory():
            result = kernel(*given)
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert_error_at_most(relative_error(result, exact), relative_error(plain, exact), floor=FLOOR[dtype])
        out = nan_like(result, dim)
        assert kernel(*given, out=out) is out
        assert torch.equal(out, result)
        assert untouched_around(out)


@each_dtype
@each_gelu
def test_geglu_forward(dtype: torch.dtype, approximate: str) -> None:
    for leading, columns in GEGLU_SHAPES:
        projection = 2 * draw(*leading, 2 * columns, dtype=dtype)
        exact = reference.geglu_forward(projection.double(), approximate)
        plain = reference.geglu_forward(projection, approximate)
        for dim in range(projection.ndim):
            with poisoned_memory():
                results = geglu_forward(embed(projection, dim), approximate)
            for result, other, wanted in zip(results, plain, exact, strict=True):
                assert result.dtype == dtype
                error = relative_error(other, wanted)
                assert_error_at_most(relative_error(result, wanted), error, floor=FLOOR[dtype])
            out = nan_like(results[0], min(dim, len(leading))), nan_like(results[1], dim)
            assert geglu_forward(projection, approximate, out=out)[1] is out[1]
            assert all(torch.equal(*pair) for pair in zip(out, results, strict=True))
            assert all(map(untouched_around, out))
        over = projection.clone()  # the factors may replace the projection
        value, factors = geglu_forward(over, approximate, out=(torch.empty_like(results[0]), over))
        assert factors is over
        assert torch.equal(value, results[0])
        assert torch.equal(factors, results[1])


@each_gelu
def test_geglu_far_out_on_both_sides(approximate: str) -> None:
    """Where exp would overflow gelu is 0 or g, and its slope 0 or 1."""
    gate = torch.tensor([1e-30, 15.0, 50.0, 1e4, 1e13, 1e30])
    gate = torch.cat([-gate, gate]).to(DEVICE)
    value, slope = geglu_forward(torch.cat([torch.ones_like(gate), gate]), approximate)[1].chunk(2)
    expected = torch.where(gate.abs() < 1, gate / 2, gate.clamp(min=0))
    assert torch.allclose(value, expected, rtol=1e-6, atol=1e-44)
    expected = torch.where(gate.abs() < 1, 0.5, (gate > 0).float())
    assert torch.allclose(slope, expected, rtol=1e-6, atol=1e-30)


def test_geglu_adjoint_is_the_transpose() -> None:
    factors, tangents, cotangents = draw(2, 7, 66), draw(3, 2, 7, 66), draw(3, 2, 7, 33)
    pushed, pulled = geglu_tangent(tangents, factors), geglu_adjoint(cotangents, factors)
    left, right = (cotangents * pushed).double().sum(), (pulled * tangents).double().sum()
    # Measured: 3e-9.
    assert abs(left - right) <= 1e-7 * cotangents.norm() * pushed.norm()


def test_geglu_refuses_and_leaves() -> None:
    factors, vectors = draw(5, 6), draw(2, 5, 6)
    for kernel, wrong in ((geglu_tangent, vectors[..., :3]), (geglu_adjoint, vectors)):
        with pytest.raises(InvalidInput, match="tangent: expected"):
            kernel(wrong, factors)
    with pytest.raises(InvalidInput, match="factors: expected"):
        geglu_tangent(vectors[..., :5], factors[..., :5])
    with pytest.raises(InvalidInput, match="approximate: expected"):
        geglu_forward(factors, "fast")
    with pytest.raises(InvalidInput, match="out: expected"):
        geglu_tangent(vectors, factors, out=vectors)
    exact = geglu_tangent(vectors.double(), factors.double())
    assert torch.equal(exact, reference.geglu_tangent(vectors.double(), factors.double()))
    assert geglu_tangent(vectors.requires_grad_(), factors).requires_grad


RESIDUAL_SHAPES = ((1, 1, 1, 1), (1, 2, 7, 33), (3, 2, 40, 7, 11), (2, 1, 3, 2, 3, 4), (2, 1, 59, 130))


def lay(tensor: Tensor, last: bool) -> Tensor:
    """The same values, channels-last or channels-first in memory that nothing else has."""
    return to_channels_last(tensor, 2).clone() if last else tensor.contiguous().clone()


@pytest.mark.parametrize("shape", RESIDUAL_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@each_dtype
def test_residual_add_in_every_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit: one addition, rounded once."""
    first, second = draw(2, *shape, dtype=dtype)
    expected = first + second
    for a, b in product((False, True), repeat=2):
        operands = lay(first, a), lay(second, b)
        with poisoned_memory():
            result = residual_add(*operands)
        assert torch.equal(result, expected)
        assert result.stride() == operands[0].stride()
        for c in (False, True):
            out = lay(torch.full_like(expected, NAN), c)
            assert residual_add(*operands, out=out) is out
            assert torch.equal(out, expected), (a, b, c)
        for operand in operands:
            kept = [t.clone() for t in operands]
            assert residual_add(*operands, out=operand) is operand
            assert torch.equal(operand, expected), (a, b)
            operands[0].copy_(kept[0])
            operands[1].copy_(kept[1])


@each_dtype
def test_residual_add_of_any_strides(dtype: torch.dtype) -> None:
    first, second = draw(2, 3, 2, 20, 5, 7, dtype=dtype)
    expected = first + second
    turned = lay(first, True)
    for dim in range(5):
        out = nan_like(expected, dim)
        assert torch.equal(residual_add(turned, embed(second, dim)), expected), dim
        assert torch.equal(residual_add(embed(second, dim), turned), expected), dim
        assert residual_add(turned, second, out=out) is out
        assert torch.equal(out, expected), dim
        assert untouched_around(out)
    shared = second[:1].expand_as(second)
    assert torch.equal(residual_add(turned, shared), first + shared)
    swapped = [t.transpose(2, 4) for t in (first, second, expected)]
    assert torch.equal(residual_add(swapped[0], swapped[1].contiguous()), swapped[2])
    # More axes than the kernel has.
    many = draw(2, 3, 2, 3, 2, 3)
    assert torch.equal(
        residual_add(many, many.permute(5, 3, 1, 2, 4, 0).contiguous().permute(5, 2, 3, 1, 4, 0)), 2 * many
    )


@each_dtype
@pytest.mark.parametrize("scale", [-1, 0.3])
def test_residual_add_with_a_scale(dtype: torch.dtype, scale: float) -> None:
    first, second = draw(2, 2, 2, 40, 9, 9, dtype=dtype)
    exact = first.double() + scale * second.double()
    plain = first + scale * second
    error = relative_error(residual_add(lay(first, False), lay(second, True), scale), exact)
    assert_error_at_most(error, relative_error(plain, exact), floor=torch.finfo(dtype).eps / 2)


def test_residual_add_refuses_and_leaves() -> None:
    first, second = draw(2, 2, 2, 8, 5, 5)
    turned = lay(first, True)
    for wrong in (second[:1], second[..., :1], second.double(), second.flatten(3)):
        with pytest.raises(InvalidInput, match="second: expected"):
            residual_add(turned, wrong)
    for out in (torch.empty(3, device=DEVICE), turned.double(), second[:1]):
        with pytest.raises(InvalidInput, match="out: expected"):
            residual_add(turned, second, out=out)
    assert torch.equal(residual_add(turned.double(), second.double()), first.double() + second.double())
    empty = torch.empty(2, 0, 3, 4, 4, device=DEVICE)
    assert residual_add(empty.mT, empty.mT).shape == empty.shape


UPSAMPLE = (
    ((1, 1, 1, 1, 1), (2, 2)),
    ((2, 1, 7, 3, 5), (2, 2)),
    ((2, 1, 20, 2, 33), (1, 3)),
    ((1, 1, 300, 2, 7), (3, 1)),
)


@pytest.mark.parametrize(("shape", "factors"), UPSAMPLE, ids=str)
@each_dtype
@each_layout
def test_upsample_nearest(
    shape: tuple[int, ...], factors: tuple[int, int], dtype: torch.dtype, last: bool
) -> None:
    large = (*shape[:3], shape[3] * factors[0], shape[4] * factors[1])
    for kernel, size in ((upsample_nearest_tangent, shape), (upsample_nearest_adjoint, large)):
        vectors = draw(*size, dtype=dtype)
        expected = reference.KERNELS[kernel.__name__](vectors, factors)
        exact = reference.KERNELS[kernel.__name__](vectors.double(), factors)
        with poisoned_memory():
            result = kernel(lay(vectors, last), factors)
        assert result.dtype == dtype
        if kernel is upsample_nearest_tangent:
            assert torch.equal(result, expected)
        else:
            error = relative_error(expected, exact)
            assert_error_at_most(relative_error(result, exact), error, floor=torch.finfo(dtype).eps / 4)
        if 1 not in size:
            assert (result.stride(2) == 1) == last
        for dim in range(5) if dtype == torch.float32 and not last else ():
            out = nan_like(expected, dim)
            assert kernel(embed(vectors, dim), factors, out=out) is out
            assert torch.equal(out, result)
            assert untouched_around(out)


def test_upsample_adjoint_is_the_transpose() -> None:
    tangents, cotangents = draw(2, 2, 5, 3, 7), draw(2, 2, 5, 6, 21)
    pushed = upsample_nearest_tangent(tangents, (2, 3))
    pulled = upsample_nearest_adjoint(cotangents, (2, 3))
    left, right = (cotangents * pushed).double().sum(), (pulled * tangents).double().sum()
    # Measured: 1e-9.
    assert abs(left - right) <= 1e-7 * cotangents.norm() * pushed.norm()


def test_upsample_refuses_and_leaves() -> None:
    vectors = draw(2, 2, 3, 4, 5)
    with pytest.raises(InvalidInput, match="factors: expected"):
        upsample_nearest_tangent(vectors, (0, 2))
    with pytest.raises(InvalidInput, match="tangent: expected"):
        upsample_nearest_tangent(vectors[0], (2, 2))
    with pytest.raises(InvalidInput, match="cotangent: expected multiples"):
        upsample_nearest_adjoint(vectors, (3, 2))
    with pytest.raises(InvalidInput, match="out: expected"):
        upsample_nearest_tangent(vectors, (2, 2), out=vectors)
    expected = reference.upsample_nearest_tangent(vectors.double(), (2, 2))
    assert torch.equal(upsample_nearest_tangent(vectors.double(), (2, 2)), expected)


def meta(*shape: int, dtype: torch.dtype, last: bool = False) -> Tensor:
    """[K, B, C, ...] without values."""
    made = torch.empty(shape, dtype=dtype, device="meta")
    return to_channels_last(made, 2) if last else made


def geglu_requests(dtype: torch.dtype, architecture: int, configuration: int) -> list[aot.Request]:
    """Of a layer of Stable Diffusion 1.x."""
    wide, narrow = meta(8, 4096, 2560, dtype=dtype), meta(8, 4096, 1280, dtype=dtype)

    def launch() -> None:
        geglu_kernels.geglu_forward(narrow[0], wide[0], wide[0], tanh=configuration == 1)
        geglu_kernels.geglu_apply(narrow, wide, wide[0], adjoint=False)
        geglu_kernels.geglu_apply(wide, narrow, wide[0], adjoint=True)

    return aot.recorded(geglu_kernels, launch, architecture, configuration=configuration)


def residual_requests(dtype: torch.dtype, architecture: int) -> list[aot.Request]:
    first, last = meta(8, 2, 320, 4096, dtype=dtype), meta(8, 2, 320, 4096, dtype=dtype, last=True)

    def launch() -> None:
        walked = residual_kernels.walk([first, last, first])
        assert walked is not None
        residual_kernels.residual_add(*walked, 1)

    return aot.recorded(residual_kernels, launch, architecture)


def upsample_requests(
    dtype: torch.dtype, last: bool, architecture: int, configuration: int
) -> list[aot.Request]:
    small = meta(8, 2, 640, 32, 32, dtype=dtype, last=last)
    large = meta(8, 2, 640, 64, 64, dtype=dtype, last=last)

    def launch() -> None:
        upsample_kernels.upsample_nearest(large, small, (2, 2), adjoint=False)
        upsample_kernels.upsample_nearest(small, large, (2, 2), adjoint=True)

    return aot.recorded(upsample_kernels, launch, architecture, configuration=configuration)


def test_compiled_ahead_of_time() -> None:
    """Layers of Stable Diffusion 1.x on data-centre cards: no spills, shared memory that every card has."""
    half, single = torch.bfloat16, torch.float32
    requests = [
        *geglu_requests(half, 80, 0),
        *geglu_requests(single, 90, 0),
        *residual_requests(half, 90),
        *residual_requests(single, 80),
        *upsample_requests(half, True, 80, 0),
        *upsample_requests(single, False, 90, 0),
    ]
    for request, compiled in zip(requests, aot.compile_all(requests), strict=True):
        compiled.assert_fits(request.architecture)
        assert compiled.shared <= aot.SHARED_LIMITS[86], request
