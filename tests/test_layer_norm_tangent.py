"""LayerNorm: the reference against torch.func.jvp, the C++ kernel against the reference, and in a trace."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import each_isa, embed, needs_extension, run_with_isa
from oracles import oracle_jvp, oracle_vjp
from torch import Tensor

from sharpcore import linearize
from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error

KERNELS = ("layer_norm_tangent", "layer_norm_adjoint")
COUNTS = (1, 2, 3, 8, 17)


@dataclass(frozen=True)
class Shape:
    leading: tuple[int, ...]
    normalized: tuple[int, ...]

    @property
    def size(self) -> int:
        return torch.Size(self.normalized).numel()


SHAPES = (
    Shape((), (7,)),  # one row, no leading axis
    Shape((3,), (1,)),  # rows of one element: the derivative is zero
    Shape((1, 1), (2,)),
    Shape((2, 7), (33,)),
    Shape((2, 77), (77,)),
    Shape((1, 33), (64,)),
    Shape((2, 3, 5), (20,)),
    Shape((2,), (3, 7, 5)),  # several normalized axes
    Shape((), (7, 11)),
    Shape((3,), (5000,)),  # longer than what is added up in one type
    Shape((2, 65), (320,)),  # a layer of Stable Diffusion 1.x
    Shape((1, 1025), (8,)),
    Shape((2, 144), (59,)),
    Shape((1, 33), (111,)),
    Shape((144,), (40,)),
    Shape((33,), (80,)),
    Shape((7, 11), (160,)),
)
WELL_CONDITIONED = tuple(shape for shape in SHAPES if shape.size > 2)


def identify(shape: Shape) -> str:
    return f"{'x'.join(map(str, shape.leading))}-{'x'.join(map(str, shape.normalized))}"


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=identify)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_by_sample = pytest.mark.parametrize("by_sample", [False, True], ids=["shared", "by sample"])
each_weighted = pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])


def make_arguments(
    shape: Shape,
    count: int,
    *,
    weighted: bool = True,
    by_sample: bool = False,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """vectors, x, mean, rstd, weight; x has a mean well away from zero. Beside bfloat16 the last three are
    float32."""
    generator = torch.Generator().manual_seed(1000 * count + shape.size)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x = draw(*shape.leading, *shape.normalized) * 1.5 + 3
    dims = tuple(range(-len(shape.normalized), 0))
    mean = x.mean(dims, keepdim=True)
    rstd = (x.var(dims, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    each = (*shape.leading[:1], *(1,) * len(shape.leading[1:])) if by_sample else ()
    weight = draw(*each, *shape.normalized) if weighted else None
    statistics_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    return [
        draw(count, *x.shape).to(dtype),
        x.to(dtype),
        *(None if t is None else t.to(statistics_dtype) for t in (mean, rstd, weight)),
    ]


def in_double(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in arguments]


def size_of_terms(arguments: list[Tensor | None]) -> float:
    """Norm of what the kernel adds up: the unit for errors where the terms cancel."""
    vectors, _, _, rstd, weight = arguments
    gain = 1.0 if weight is None else float(weight.abs().max())
    return gain * float(rstd.max()) * float(vectors.norm())


@each_shape
@each_weighted
@each_by_sample
def test_reference_is_the_derivative(shape: Shape, weighted: bool, by_sample: bool) -> None:
    arguments = make_arguments(shape, 3, weighted=weighted, by_sample=by_sample)
    tangents, x, _, _, weight = arguments

    def forward(x: Tensor) -> Tensor:
        normalized = F.layer_norm(x, shape.normalized, None, None, 1e-5)
        return normalized if weight is None else normalized * weight

    expected = torch.stack([torch.func.jvp(forward, (x,), (tangent,))[1] for tangent in tangents])
    result = reference.layer_norm_tangent(*arguments, len(shape.normalized))
    assert result.shape == tangents.shape
    # Worst measured: 2e-16.
    assert (result - expected).norm() <= 1e-14 * size_of_terms(arguments)


@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_shape
@each_weighted
@each_by_sample
def test_adjoint_is_the_transpose(backend: ModuleType, shape: Shape, weighted: bool, by_sample: bool) -> None:
    arguments = make_arguments(shape, 3, weighted=weighted, by_sample=by_sample)
    tangents, axes = arguments[0], len(shape.normalized)
    cotangents = torch.randn(tangents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pushed = backend.layer_norm_tangent(*arguments, axes)
    pulled = backend.layer_norm_adjoint(cotangents, *arguments[1:], axes)
    pairing = (cotangents * pushed).flatten(1).sum(1), (pulled * tangents).flatten(1).sum(1)
    # Worst measured: 2e-16.
    assert (pairing[0] - pairing[1]).abs().max() <= 1e-14 * size_of_terms(arguments) * cotangents.norm()


@needs_extension
@each_kernel
@pytest.mark.parametrize("count", COUNTS)
@each_shape
@each_weighted
@pytest.mark.usefixtures("poisoned")
def test_float64_equals_reference(kernel: str, count: int, shape: Shape, weighted: bool) -> None:
    arguments = make_arguments(shape, count, weighted=weighted, by_sample=count % 2 == 0)
    expected = reference.KERNELS[kernel](*arguments, len(shape.normalized))
    result = cpu.KERNELS[kernel](*arguments, len(shape.normalized))
    assert result.shape == expected.shape
    assert result.dtype == torch.float64
    assert result.is_contiguous()
    # Worst measured: 1.5e-16.
    assert (result - expected).norm() <= 2e-15 * size_of_terms(arguments)


@needs_extension
@each_kernel
@each_weighted
@pytest.mark.parametrize("shape", WELL_CONDITIONED, ids=identify)
@pytest.mark.usefixtures("poisoned")
def test_float32_error_is_at_most_twice_the_references(kernel: str, weighted: bool, shape: Shape) -> None:
    arguments = make_arguments(shape, 8, weighted=weighted, dtype=torch.float32)
    axes = len(shape.normalized)
    exact = reference.KERNELS[kernel](*in_double(arguments), axes)
    plain = reference.KERNELS[kernel](*arguments, axes)
    result = cpu.KERNELS[kernel](*arguments, axes)
    assert result.dtype == torch.float32
    # Worst measured on AVX-512, AVX2 and portable: 1.1 times.
    assert (result - exact).norm() <= 2 * (plain - exact).norm()


@needs_extension
@each_kernel
@each_weighted
@each_by_sample
@pytest.mark.parametrize("shape", SHAPES, ids=identify)
@pytest.mark.usefixtures("poisoned")
def test_bfloat16_is_rounded_once(kernel: str, weighted: bool, by_sample: bool, shape: Shape) -> None:
    arguments = make_arguments(shape, 3, weighted=weighted, by_sample=by_sample, dtype=torch.bfloat16)
    vectors, x, mean, rstd, weight = arguments
    axes = len(shape.normalized)
    exact = reference.KERNELS[kernel](*in_double(arguments), axes)
    result = cpu.KERNELS[kernel](*arguments, axes)
    assert result.dtype == torch.bfloat16
    # Half a unit in the last place of what is stored, and what float32 makes of terms that cancel.
    bound = exact.abs() * 2**-8 + 1e-6 * size_of_terms(in_double(arguments)) + 1e-30
    assert ((result - exact).abs() <= bound).all()
    if shape.size > 2:
        # The reference's formula with every intermediate result in bfloat16.
        gain = None if weight is None else weight.bfloat16()
        xhat = (x - mean.bfloat16()) * rstd.bfloat16()
        given = vectors * gain if gain is not None and kernel == "layer_norm_adjoint" else vectors
        dims = tuple(range(-axes, 0))
        plain = given - given.mean(dims, keepdim=True) - xhat * (xhat * given).mean(dims, keepdim=True)
        plain = plain * rstd.bfloat16()
        plain = plain * gain if gain is not None and kernel == "layer_norm_tangent" else plain
        assert (result - exact).norm() <= 2 * (plain - exact).norm()
    # Parameters and statistics that come in bfloat16 are widened.
    rounded = None if weight is None else weight.bfloat16()
    expected = reference.KERNELS[kernel](vectors, x, mean, rstd, rounded, axes)
    result = cpu.KERNELS[kernel](vectors, x, mean, rstd, rounded, axes)
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=1e-5)


@needs_extension
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
@pytest.mark.parametrize("by_sample", [False, True])
def test_out_is_written_without_new_memory(
    kernel: str, dtype: torch.dtype, image: bool, by_sample: bool
) -> None:
    arguments = make_arguments(Shape((2, 65), (320,)), 3, by_sample=by_sample, dtype=dtype)
    if image:
        arguments[0] = arguments[0].mT.contiguous().mT
    expected = cpu.KERNELS[kernel](*arguments, 1)
    out = torch.full(expected.shape, float("nan"), dtype=dtype)
    wide = torch.full((6, *expected.shape[1:]), float("nan"), dtype=dtype)
    apart = wide[::2]
    with torch.profiler.profile(profile_memory=True) as profile:
        assert cpu.KERNELS[kernel](*arguments, 1, out=out) is out
        assert cpu.KERNELS[kernel](*arguments, 1, out=apart) is apart
    assert not [event for event in profile.events() if event.cpu_memory_usage > 0]
    assert torch.equal(out, expected)
    assert torch.equal(apart, expected)
    assert wide[1::2].isnan().all()


@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_kernel
def test_out_of_any_strides(backend: ModuleType, kernel: str) -> None:
    arguments = make_arguments(Shape((2, 9), (37,)), 3, dtype=torch.float32)
    expected = backend.KERNELS[kernel](*arguments, 1)
    size = expected.shape
    for out in (
        torch.empty(size).mT.contiguous().mT,
        torch.empty(*size[:-1], 2 * size[-1])[..., ::2],
        torch.empty(size[::-1]).permute(3, 2, 1, 0),
        torch.empty(size[1], size[0], *size[2:]).transpose(0, 1),
    ):
        out.fill_(float("nan"))
        assert backend.KERNELS[kernel](*arguments, 1, out=out) is out
        assert torch.equal(out, expected)
    for wrong in (torch.empty(2, *size[1:]), torch.empty(size, dtype=torch.float64)):
        with pytest.raises(InvalidInput, match="out"):
            backend.KERNELS[kernel](*arguments, 1, out=wrong)


@needs_extension
@each_kernel
@pytest.mark.parametrize("factor", [1e-41, 1e-30, 1e30])
def test_tiny_and_huge_vectors(kernel: str, factor: float) -> None:
    """The maps are linear: also denormal numbers and those near the end of the range are only scaled."""
    arguments = make_arguments(Shape((2, 9), (37,)), 2, dtype=torch.float32)
    arguments[0] = arguments[0] * factor
    exact = reference.KERNELS[kernel](*in_double(arguments), 1)
    result = cpu.KERNELS[kernel](*arguments, 1)
    # 1.4e-45 is the smallest denormal number; a result is the sum of a few rounded to it.
    assert (result - exact).abs().max() <= 1e-6 * exact.abs().max() + 2e-44


@needs_extension
@each_kernel
def test_nan_goes_to_its_row_and_no_further(kernel: str) -> None:
    arguments = make_arguments(Shape((2, 9), (37,)), 2, dtype=torch.float32)
    arguments[0][1, 0, 3, 36] = float("nan")
    bad = cpu.KERNELS[kernel](*arguments, 1).isnan()
    assert bad[1, 0, 3].all()
    assert bad.sum() == 37


@needs_extension
@each_kernel
@pytest.mark.usefixtures("set_threads")
def test_number_of_threads_changes_no_bit(kernel: str) -> None:
    for shape in (Shape((), (999,)), Shape((2, 77), (320,))):
        arguments = make_arguments(shape, 17, dtype=torch.float32)
        as_columns = [arguments[0].mT.contiguous().mT, *arguments[1:]] if shape.leading else arguments
        for given in (arguments, as_columns):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append(cpu.KERNELS[kernel](*given, 1))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


@needs_extension
@each_kernel
@pytest.mark.parametrize(
    "shape", [Shape((2, 70), (33,)), Shape((2, 5), (48,)), Shape((3, 1), (20,))], ids=identify
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("poisoned")
def test_strides(kernel: str, shape: Shape, dtype: torch.dtype) -> None:
    """Views of every kind give, to the bit, what their contiguous copies give."""
    vectors, x, mean, rstd, weight = make_arguments(shape, 4, dtype=dtype)
    expected = cpu.KERNELS[kernel](vectors, x, mean, rstd, weight, 1)
    columns = vectors.mT.contiguous().mT
    variants = {
        "every second tangent": embed(vectors, 0),
        "every second sample": embed(vectors, 1),
        "every second row": embed(vectors, 2),
        "every second channel": embed(vectors, 3),
        "an image seen as tokens": columns,
        "every second tangent of an image": embed(columns.mT, 0).mT,
        "every second sample of an image": embed(columns.mT, 1).mT,
        "tangents innermost": vectors.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    for name, variant in variants.items():
        assert torch.equal(variant, vectors)
        assert torch.equal(cpu.KERNELS[kernel](variant, x, mean, rstd, weight, 1), expected), name
    others = (x.mT.contiguous().mT, embed(mean, 1), embed(rstd, 0), embed(weight, 0))
    assert torch.equal(cpu.KERNELS[kernel](vectors, *others, 1), expected)
    repeated = vectors[:1].expand(4, *vectors.shape[1:])
    assert torch.equal(cpu.KERNELS[kernel](repeated, x, mean, rstd, weight, 1)[3], expected[0])


@needs_extension
@each_kernel
@pytest.mark.parametrize("leading", [(0, 3), (2, 0)])
@pytest.mark.parametrize("count", [0, 3])
def test_empty(kernel: str, leading: tuple[int, int], count: int) -> None:
    x, statistic = torch.ones(*leading, 8), torch.ones(*leading, 1)
    for backend in (reference, cpu):
        result = backend.KERNELS[kernel](torch.ones(count, *x.shape), x, statistic, statistic, None, 1)
        assert result.shape == (count, *x.shape)


@needs_extension
def test_what_the_kernel_cannot_do_is_left_to_the_reference() -> None:
    shape = Shape((2, 5), (8,))
    half = make_arguments(shape, 2, dtype=torch.float16)
    result = cpu.layer_norm_tangent(*half, 1)
    assert result.dtype == torch.float16
    assert torch.equal(result, reference.layer_norm_tangent(*half, 1))
    recorded = make_arguments(shape, 2)
    recorded[0].requires_grad_()
    assert cpu.layer_norm_tangent(*recorded, 1).requires_grad
    mixed = make_arguments(shape, 2, dtype=torch.bfloat16)
    mixed[2:] = in_double(mixed[2:])
    assert cpu.layer_norm_adjoint(*mixed, 1).dtype == torch.bfloat16


@needs_extension
@each_kernel
@pytest.mark.parametrize(
    ("position", "wrong", "named"),
    [
        (0, (2, 2, 5, 6), "tangent"),
        (1, (2, 5, 4), "tangent"),
        (2, (2, 5), "mean"),
        (3, (2, 1, 1), "rstd"),
        (4, (7,), "weight"),
        (4, (2, 8), "weight"),
        (4, (1, 1, 8), "weight"),
    ],
)
def test_wrong_shapes_are_refused(kernel: str, position: int, wrong: tuple[int, ...], named: str) -> None:
    arguments = make_arguments(Shape((2, 5), (8,)), 2)
    arguments[position] = torch.ones(wrong, dtype=torch.float64)
    with pytest.raises(InvalidInput, match=named):
        cpu.KERNELS[kernel](*arguments, 1)
    for axes in (0, 4):
        with pytest.raises(InvalidInput, match="axes"):
            cpu.KERNELS[kernel](*make_arguments(Shape((2, 5), (8,)), 2), axes)


ISA = """
import torch
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 5e-7), (torch.float64, 1e-15), (torch.bfloat16, 3e-3)):
    for size in ((2, 65, 320), (1, 7, 33), (3, 5, 4)):
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        vectors = torch.randn(3, *size, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(size[0], 1, size[-1], generator=generator, dtype=torch.float64).to(dtype)
        statistic = torch.full((*size[:2], 1), 0.5, dtype=dtype)
        for given in (vectors, vectors.mT.contiguous().mT):
            for kernel in ("layer_norm_tangent", "layer_norm_adjoint"):
                arguments = (given, x, statistic, statistic, weight)
                expected = reference.KERNELS[kernel](*(t.double() for t in arguments), 1)
                error = (cpu.KERNELS[kernel](*arguments, 1) - expected).norm() / expected.norm()
                assert error < bound, (dtype, size, kernel, float(error))
"""


@needs_extension
@each_isa
def test_every_instruction_set(isa: str) -> None:
    """Worst measured on each: 5.7e-8 in float32, 1e-16 in float64, 1.7e-3 in bfloat16."""
    run_with_isa(isa, ISA)


def as_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H W, C], a view, as transformer blocks of a UNet make it."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("image", [False, True], ids=["rows", "image"])
def test_in_a_network(backend: str, image: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, bias, mixing = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 6, 36))

    def network(x: Tensor) -> Tensor:
        tokens = as_tokens(x) if image else x.flatten(2).mT.contiguous()
        tokens = F.layer_norm(tokens, (6,), weight, bias) @ mixing.view(6, 6)
        return F.layer_norm(tokens.sin(), tokens.shape[1:])

    x, other = (torch.randn(2, 6, 5, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    vectors = torch.randn(3, 2, 15, 6, generator=generator, dtype=torch.float64)
    tangents = vectors.reshape(3, *x.shape)
    linearization = linearize(network, x, backend=backend)
    operations = [line.split()[1] for line in linearization.program.explain().splitlines()[1:-1]]
    assert operations.count("native_layer_norm") == 2
    for point in (x, other):
        linearization.relinearize(point)
        # Worst measured: 5e-16.
        assert relative_error(linearization.jvp(tangents), oracle_jvp(network, point, tangents)) < 1e-13
        assert relative_error(linearization.vjp(vectors), oracle_vjp(network, point, vectors)) < 1e-13
