"""GroupNorm + SiLU: the reference against torch.func.jvp, the C++ kernel against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from group_norm_cases import (
    COUNTS,
    SHAPES,
    WELL_CONDITIONED,
    Shape,
    each_affine,
    each_by_sample,
    each_kernel,
    each_shape,
    each_silu,
    identify,
    in_double,
    make_arguments,
    size_of_terms,
)
from kernel_checks import available_isas, each_layout, needs_extension, poisoned_memory
from torch import Tensor

from sharpcore.backends import cpu, reference


@pytest.fixture
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


@each_shape
@each_silu
@each_affine
@each_by_sample
def test_reference_is_the_derivative(
    shape: Shape, silu: bool, affine: tuple[bool, bool], by_sample: bool
) -> None:
    arguments = make_arguments(shape, 3, affine=affine, by_sample=by_sample)
    tangents, x, _, _, weight, bias = arguments
    spread = (-1, shape.channels, *(1,) * len(shape.spatial))

    def forward(x: Tensor) -> Tensor:
        # F.group_norm refuses groups of one element, which the operator itself takes.
        y = torch.group_norm(x, shape.groups, None, None, 1e-5)
        y = y if weight is None else y * weight.view(spread)
        y = y if bias is None else y + bias.view(spread)
        return F.silu(y) if silu else y

    expected = torch.stack([torch.func.jvp(forward, (x,), (tangent,))[1] for tangent in tangents])
    result = reference.group_norm_silu_tangent(*arguments, shape.groups, silu)
    assert result.shape == tangents.shape
    # Worst measured: 2e-16.
    assert (result - expected).norm() <= 1e-14 * size_of_terms(arguments)


@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_shape
@each_silu
@pytest.mark.parametrize("affine", [(True, True), (False, False)], ids=["wb", "none"])
@each_layout
def test_adjoint_is_the_transpose(
    backend: object, shape: Shape, silu: bool, affine: tuple[bool, bool], channels_last: bool
) -> None:
    arguments = make_arguments(shape, 3, affine=affine, channels_last=channels_last)
    tangents = arguments[0]
    cotangents = torch.randn(tangents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pushed = backend.KERNELS["group_norm_silu_tangent"](*arguments, shape.groups, silu)
    pulled = backend.KERNELS["group_norm_silu_adjoint"](cotangents, *arguments[1:], shape.groups, silu)
    pairing = (cotangents * pushed).flatten(1).sum(1), (pulled * tangents).flatten(1).sum(1)
    # Worst measured: 3e-16.
    assert (pairing[0] - pairing[1]).abs().max() <= 1e-14 * size_of_terms(arguments) * cotangents.norm()


@needs_extension
@each_kernel
@pytest.mark.parametrize("count", COUNTS)
@each_shape
@each_silu
@each_layout
@pytest.mark.usefixtures("poisoned")
def test_float64_equals_reference(
    kernel: str, count: int, shape: Shape, silu: bool, channels_last: bool
) -> None:
    arguments = make_arguments(shape, count, channels_last=channels_last, by_sample=count % 2 == 0)
    expected = reference.KERNELS[kernel](*arguments, shape.groups, silu)
    result = cpu.KERNELS[kernel](*arguments, shape.groups, silu)
    assert result.shape == expected.shape
    assert result.dtype == torch.float64
    # Worst measured: 2e-16.
    assert (result - expected).norm() <= 2e-15 * size_of_terms(arguments)
    if 1 not in (*shape.spatial, shape.channels):
        assert result.stride() == arguments[0].stride()


@needs_extension
@each_kernel
@each_affine
@each_silu
@each_layout
@pytest.mark.parametrize("shape", WELL_CONDITIONED, ids=identify)
@pytest.mark.usefixtures("poisoned")
def test_float32_error_is_at_most_twice_the_references(
    kernel: str, affine: tuple[bool, bool], silu: bool, channels_last: bool, shape: Shape
) -> None:
    arguments = make_arguments(shape, 8, affine=affine, channels_last=channels_last, dtype=torch.float32)
    exact = reference.KERNELS[kernel](*in_double(arguments), shape.groups, silu)
    plain = reference.KERNELS[kernel](*arguments, shape.groups, silu)
    result = cpu.KERNELS[kernel](*arguments, shape.groups, silu)
    assert result.dtype == torch.float32
    # Worst measured on AVX-512, AVX2 and portable: 1.3 times.
    assert (result - exact).norm() <= 2 * (plain - exact).norm()


@needs_extension
@each_kernel
@each_silu
@each_layout
@each_by_sample
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
@pytest.mark.usefixtures("poisoned")
def test_bfloat16_is_rounded_once(
    kernel: str, silu: bool, channels_last: bool, by_sample: bool, shape: Shape
) -> None:
    arguments = make_arguments(
        shape, 3, channels_last=channels_last, by_sample=by_sample, dtype=torch.bfloat16
    )
    vectors, x, mean, rstd, weight, bias = arguments
    exact = reference.KERNELS[kernel](*in_double(arguments), shape.groups, silu)
    result = cpu.KERNELS[kernel](*arguments, shape.groups, silu)
    assert result.dtype == torch.bfloat16
    # Half a unit in the last place of what is stored, and what float32 makes of terms that cancel.
    bound = exact.abs() * 2**-8 + 1e-6 * size_of_terms(in_double(arguments)) + 1e-30
    assert ((result - exact).abs() <= bound).all()
    # Operations of PyTorch in bfloat16, as autograd runs them.
    if shape.group_size > 2:
        rounded = [None if t is None else t.bfloat16() for t in arguments]
        plain = plain_bfloat16(kernel, rounded, shape.groups, silu)
        assert (result - exact).norm() <= 2 * (plain - exact).norm()
    # Parameters and statistics that come in bfloat16 are widened.
    parameters = [None if t is None else t.bfloat16() for t in (weight, bias)]
    expected = reference.KERNELS[kernel](vectors, x, mean, rstd, *parameters, shape.groups, silu)
    result = cpu.KERNELS[kernel](vectors, x, mean, rstd, *parameters, shape.groups, silu)
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-5)


def plain_bfloat16(kernel: str, arguments: list[Tensor | None], groups: int, silu: bool) -> Tensor:
    """The reference's formula with every intermediate result in bfloat16."""
    vectors, x, mean, rstd, weight, bias = arguments
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, groups, channels // groups, -1)
    given = vectors.reshape(-1, *grouped.shape)
    xhat = (grouped - mean[:, :, None, None]) * rstd[:, :, None, None]
    gain, shift = (t.reshape(-1, groups, channels // groups, 1) for t in (weight, bias))
    scale = gain * rstd[:, :, None, None]
    if silu:
        u = gain * xhat + shift
        scale = scale * (torch.sigmoid(u) * (1 + u * torch.sigmoid(-u)))
    if kernel == "group_norm_silu_adjoint":
        given = given * scale
    slope = (xhat * given).mean((-2, -1), keepdim=True)
    projected = given - given.mean((-2, -1), keepdim=True) - xhat * slope
    result = projected if kernel == "group_norm_silu_adjoint" else scale * projected
    return result.reshape(vectors.shape)


@needs_extension
@each_kernel
@each_layout
def test_a_vector_does_not_depend_on_its_neighbours(kernel: str, channels_last: bool) -> None:
    """K products at once are, to the bit, K single ones."""
    for shape in (Shape(2, 320, 32, (8, 8)), Shape(1, 64, 8, (1025,)), Shape(1, 12, 3, (5, 3))):
        arguments = make_arguments(shape, 3, channels_last=channels_last, dtype=torch.float32)
        together = cpu.KERNELS[kernel](*arguments, shape.groups, True)
        for k in range(3):
            alone = cpu.KERNELS[kernel](arguments[0][k : k + 1], *arguments[1:], shape.groups, True)
            assert torch.equal(alone[0], together[k])


@needs_extension
@each_kernel
@each_layout
@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e30])
def test_tiny_and_huge_vectors(kernel: str, channels_last: bool, factor: float) -> None:
    """The maps are linear: also denormal numbers and those near the end of the range are only scaled."""
    shape = Shape(2, 12, 3, (7, 5))
    arguments = make_arguments(shape, 2, channels_last=channels_last, dtype=torch.float32)
    arguments[0] = arguments[0] * factor
    exact = reference.KERNELS[kernel](*in_double(arguments), shape.groups, True)
    result = cpu.KERNELS[kernel](*arguments, shape.groups, True)
    # 1.4e-45 is the smallest denormal number; a result is the sum of a few rounded to it.
    assert (result - exact).abs().max() <= 1e-6 * exact.abs().max() + 2e-44


@needs_extension
@each_kernel
@each_layout
def test_far_out_on_both_sides(kernel: str, channels_last: bool) -> None:
    """SiLU' where exp would overflow, at its limits 0 and 1, and near its zero at u = -1.278."""
    shape = Shape(1, 10, 1, (7, 5))
    arguments = make_arguments(shape, 2, channels_last=channels_last, dtype=torch.float32)
    arguments[5] = torch.tensor([-1e30, -1000.0, -104.0, -88.0, -1.2784645, 0.0, 20.0, 88.0, 1000.0, 1e30])
    exact = reference.KERNELS[kernel](*in_double(arguments), shape.groups, True)
    result = cpu.KERNELS[kernel](*arguments, shape.groups, True)
    assert result.isfinite().all()
    # Worst measured: 6e-8.
    assert (result - exact).abs().max() <= 5e-7 * exact.abs().max()
    if kernel == "group_norm_silu_tangent":
        assert result[:, :, :4].abs().max() < 1e-30


@needs_extension
@each_kernel
@each_layout
def test_nan_goes_to_the_whole_group_and_no_further(kernel: str, channels_last: bool) -> None:
    shape = Shape(2, 40, 4, (5, 7))
    arguments = make_arguments(shape, 2, channels_last=channels_last, dtype=torch.float32)
    arguments[0][1, 0, 3, 2, 2] = float("nan")
    result = cpu.KERNELS[kernel](*arguments, shape.groups, True)
    bad = result.isnan()
    assert bad[1, 0, :10].all()
    assert bad.sum() == 10 * 35


ISA = """
import sys, torch
from sharpcore.backends import cpu, reference
assert cpu.extension().isa() == sys.argv[1]
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 5e-7), (torch.float64, 1e-15), (torch.bfloat16, 3e-3)):
    for size in ((2, 320, 8, 8), (1, 32, 5, 7), (3, 32, 1, 1), (1, 64, 41, 25)):
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        vectors = torch.randn(3, *size, generator=generator, dtype=torch.float64).to(dtype)
        statistic = torch.full((size[0], 4), 0.5, dtype=dtype)
        weight = torch.randn(size[:2], generator=generator, dtype=torch.float64).to(dtype)
        rest = (statistic, statistic, weight, weight, 4, True)
        for last in (False, True):
            if last:
                x = x.movedim(1, -1).contiguous().movedim(-1, 1)
                vectors = vectors.movedim(2, -1).contiguous().movedim(-1, 2)
            for kernel in cpu.KERNELS:
                if not kernel.startswith("group_norm") or kernel.endswith("forward"):
                    continue
                expected = reference.KERNELS[kernel](vectors.double(), x.double(), *(
                    t.double() if isinstance(t, torch.Tensor) else t for t in rest))
                error = (cpu.KERNELS[kernel](vectors, x, *rest) - expected).norm() / expected.norm()
                assert error < bound, (dtype, size, last, kernel, float(error))
"""


@needs_extension
@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set(isa: str) -> None:
    """Worst measured on each: 1.2e-7 in float32, 2.1e-16 in float64, 1.7e-3 in bfloat16."""
    subprocess.run(
        [sys.executable, "-c", ISA, isa],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )
