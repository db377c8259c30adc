"""Residual sums: every pair of memory layouts against PyTorch's sum, in place, and in a trace."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    NoAllocation,
    bits_equal,
    each_isa,
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

# [K, B, C, *spatial]; widths and positions on both sides of a vector, a tile and a block.
SHAPES = (
    (1, 1, 1, 1),
    (1, 2, 7, 33),
    (2, 1, 8, 5, 7),
    (3, 2, 40, 12, 12),
    (8, 1, 59, 7, 11),
    (17, 1, 64, 3, 3),
    (1, 1, 80, 1025),
    (2, 3, 111, 4, 4),
    (1, 2, 160, 77),
    (2, 1, 3, 2, 3, 4),
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_dtype = pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
FIRST, LAST = False, True
LAYOUTS = tuple(product((FIRST, LAST), repeat=3))


def lay(tensor: Tensor, last: bool) -> Tensor:
    """The same values, channels-last or channels-first in memory that nothing else has."""
    return to_channels_last(tensor, 2).clone() if last else tensor.contiguous().clone()


def make_operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    first, second = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return first, second


@needs_extension
@each_shape
@each_dtype
def test_every_layout_equals_the_plain_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To the bit: one addition, rounded once."""
    first, second = make_operands(shape, dtype)
    expected = first + second
    for a, b, c in LAYOUTS:
        out = lay(torch.full_like(expected, float("nan")), c)
        with poisoned_memory():
            assert torch.equal(cpu.residual_add(lay(first, a), lay(second, b)), expected)
        assert cpu.residual_add(lay(first, a), lay(second, b), out=out) is out
        assert torch.equal(out, expected), (a, b, c)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [-1, 0.3])
def test_error_with_a_scale(dtype: torch.dtype, scale: float) -> None:
    first, second = make_operands((2, 2, 40, 9, 9), dtype)
    exact = first.double() + scale * second.double()
    plain = first + scale * second
    for a, b in ((FIRST, LAST), (LAST, FIRST)):
        error = relative_error(cpu.residual_add(lay(first, a), lay(second, b), scale), exact)
        # Worst measured on AVX-512, AVX2 and portable: 1.0 times; the floor is for sums that are exact.
        assert_error_at_most(error, relative_error(plain, exact), floor=torch.finfo(dtype).eps / 2)


@needs_extension
def test_layout_of_the_result_is_that_of_the_first() -> None:
    first, second = make_operands((2, 2, 8, 5, 5), torch.float32)
    for a, b in product((FIRST, LAST), repeat=2):
        assert cpu.residual_add(lay(first, a), lay(second, b)).stride() == lay(first, a).stride()


@needs_extension
@each_dtype
def test_in_place_and_without_allocation(dtype: torch.dtype) -> None:
    first, second = make_operands((3, 2, 40, 7, 11), dtype)
    expected = first + second
    for a, b in product((FIRST, LAST), repeat=2):
        for into in (0, 1):
            operands = lay(first, a), lay(second, b)
            with NoAllocation():
                returned = cpu.residual_add(*operands, out=operands[into])
            assert returned is operands[into]
            assert torch.equal(returned, expected), (a, b, into)
    for a, b, c in LAYOUTS:
        operands = lay(first, a), lay(second, b)
        out = lay(torch.full_like(expected, float("nan")), c)
        with NoAllocation():
            cpu.residual_add(*operands, out=out)
        assert torch.equal(out, expected)


@needs_extension
@each_dtype
def test_strides(dtype: torch.dtype) -> None:
    """Gaps between samples, operands shared by all K, and layouts that are left to PyTorch."""
    first, second = make_operands((3, 2, 20, 5, 7), dtype)
    expected = first + second
    turned = lay(first, LAST)
    for dim in range(5):
        out = embed(torch.full_like(expected, float("nan")), dim)
        assert torch.equal(cpu.residual_add(turned, embed(second, dim)), expected), dim
        assert torch.equal(cpu.residual_add(embed(second, dim), turned), expected), dim
        assert torch.equal(cpu.residual_add(turned, second, out=out), expected), dim
    shared = second[:1].expand_as(second)
    assert torch.equal(cpu.residual_add(turned, shared), first + shared)
    assert torch.equal(
        cpu.residual_add(first.transpose(2, 4), second.transpose(2, 4)), expected.transpose(2, 4)
    )
    tokens = first.flatten(3)
    assert torch.equal(cpu.residual_add(tokens.mT, tokens.mT.contiguous()), 2 * tokens.mT)


@needs_extension
@each_dtype
def test_extremes(dtype: torch.dtype) -> None:
    """Infinities, NaN, denormals and ties come out as PyTorch has them."""
    tiny, huge = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    ulp = torch.finfo(dtype).eps
    values = [0.0, -0.0, tiny, -3 * tiny, huge, -huge, float("inf"), float("-inf"), float("nan")]
    values += [1.0, 1 + ulp, ulp / 2, 3 * ulp / 2, ulp / 4, 1 + 2 * ulp, -ulp / 2, 256.0]
    first = torch.tensor(values, dtype=dtype).repeat(17).view(1, 1, 17, 17)
    second = first.mT.contiguous()
    result = cpu.residual_add(lay(first, LAST), second)
    assert bits_equal(result, first + second)
    assert torch.equal(result.signbit()[result == 0], (first + second).signbit()[result == 0])


@needs_extension
def test_number_of_threads_changes_no_bit() -> None:
    first, second = make_operands((3, 2, 70, 13, 11), torch.float32)
    one, *others = for_threads(lambda: cpu.residual_add(lay(first, LAST), second, 0.3))
    assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("backend", [reference, pytest.param(cpu, marks=needs_extension)])
def test_wrong_arguments_are_refused(backend) -> None:
    first, second = make_operands((2, 2, 8, 5, 5))
    turned = lay(first, LAST)
    for wrong in (second[:1], second[..., :1], second.float(), second.flatten(3)):
        with pytest.raises(InvalidInput, match="second: expected"):
            backend.residual_add(turned, wrong)
    for out in (torch.empty(3), turned.float(), second[:1]):
        with pytest.raises(InvalidInput, match="out: expected"):
            backend.residual_add(turned, second, out=out)


@needs_extension
def test_what_the_kernel_cannot_do_is_left_to_pytorch() -> None:
    for dtype in (torch.float16, torch.int64):
        first, second = (10 * t for t in make_operands((2, 2, 8, 5, 5)))
        first, second = lay(first.to(dtype), LAST), second.to(dtype)
        assert torch.equal(cpu.residual_add(first, second), first + second)
    first, second = make_operands((2, 2, 8, 5, 5))
    assert cpu.residual_add(lay(first, LAST).requires_grad_(), second).requires_grad
    empty = torch.empty(2, 0, 3, 4, 4)
    assert cpu.residual_add(lay(empty, LAST), empty).shape == empty.shape


ISA = """
import torch
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for channels, positions in ((1, 5), (40, 77), (64, 64), (130, 3)):
        a, b = torch.randn(2, 2, 2, channels, positions, generator=generator).to(dtype)
        turned = b.mT.contiguous().mT
        expected = a + b
        for result in (cpu.residual_add(a, turned), cpu.residual_add(turned, a)):
            assert torch.equal(result, expected), (dtype, channels, positions)
        out = torch.empty_like(turned)
        assert torch.equal(cpu.residual_add(a, b, out=out), expected)
"""


@needs_extension
@each_isa
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(isa, ISA)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("subtract", [False, True])
def test_transformer_residual_in_a_trace(subtract: bool, backend: str) -> None:
    """An image becomes tokens, these an image again, and what it was is added."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)

    def block(x: Tensor) -> Tensor:
        tokens = F.linear(x.permute(0, 2, 3, 1).reshape(2, 20, 6), weight)
        image = tokens.sin().reshape(2, 4, 5, 6).permute(0, 3, 1, 2)
        return torch.sub(image, x, alpha=0.5) if subtract else image + x

    x = torch.randn(2, 6, 4, 5, generator=generator, dtype=torch.float64)
    vectors = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
    linearization = linearize(block, x, backend=backend)
    # Worst measured: 2e-16.
    assert relative_error(linearization.jvp(vectors), oracle_jvp(block, x, vectors)) <= 1e-14
    assert relative_error(linearization.vjp(vectors), oracle_vjp(block, x, vectors)) <= 1e-14
