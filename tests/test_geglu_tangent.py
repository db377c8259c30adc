"""GEGLU: the reference against torch.func.jvp, the C++ kernel against the reference, fusion in a trace."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from oracles import oracle_jvp
from torch import Tensor

from sharpcore import linearize
from sharpcore.backends import cpu, reference
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import relative_error

needs_extension = pytest.mark.skipif(cpu.extension() is None, reason="sharpcore._C is not built")

KERNELS = ("geglu_tangent", "geglu_adjoint")
COUNTS = (1, 2, 3, 8, 17)
# Leading axes and the number of columns C.
SHAPES = (
    ((), 7),
    ((3,), 1),
    ((2, 7), 33),
    ((2, 77), 77),
    ((1, 33), 64),
    ((2, 3, 5), 20),
    ((3,), 5000),  # a row is longer than a tile
    ((2, 65), 256),
)

each_shape = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{'x'.join(map(str, shape[0]))}-{shape[1]}"
)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_gelu = pytest.mark.parametrize("approximate", ["none", "tanh"])

Shape = tuple[tuple[int, ...], int]


def make_arguments(
    kernel: str, shape: Shape, count: int, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """vectors and projection; the gates reach from where gelu is nothing to where it is the identity."""
    leading, columns = shape
    generator = torch.Generator().manual_seed(1000 * count + columns)
    projection = 2 * torch.randn(*leading, 2 * columns, generator=generator, dtype=torch.float64)
    width = 2 * columns if kernel == "geglu_tangent" else columns
    vectors = torch.randn(count, *leading, width, generator=generator, dtype=torch.float64)
    return vectors.to(dtype), projection.to(dtype)


def forward(projection: Tensor, approximate: str) -> Tensor:
    hidden, gate = projection.chunk(2, -1)
    return hidden * F.gelu(gate, approximate=approximate)


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


@each_shape
@each_gelu
def test_reference_is_the_derivative(shape: Shape, approximate: str) -> None:
    tangents, projection = make_arguments("geglu_tangent", shape, 3)
    expected = oracle_jvp(lambda p: forward(p, approximate), projection, tangents)
    result = reference.geglu_tangent(tangents, projection, approximate)
    assert result.shape == expected.shape
    # Worst measured: 2e-16.
    assert relative_error(result, expected) <= 1e-14


@pytest.mark.parametrize(
    "backend", [reference, pytest.param(cpu, marks=needs_extension)], ids=["reference", "cpu"]
)
@each_shape
@each_gelu
def test_adjoint_is_the_transpose(backend: ModuleType, shape: Shape, approximate: str) -> None:
    tangents, projection = make_arguments("geglu_tangent", shape, 3)
    cotangents, _ = make_arguments("geglu_adjoint", shape, 3)
    pushed = backend.geglu_tangent(tangents, projection, approximate)
    pulled = backend.geglu_adjoint(cotangents, projection, approximate)
    pairing = (cotangents * pushed).flatten(1).sum(1), (pulled * tangents).flatten(1).sum(1)
    # Worst measured: 2e-16.
    assert (pairing[0] - pairing[1]).abs().max() <= 1e-14 * cotangents.norm() * pushed.norm()


@needs_extension
@each_kernel
@pytest.mark.parametrize("count", COUNTS)
@each_shape
@each_gelu
@pytest.mark.usefixtures("poisoned_memory")
def test_float64_equals_reference(kernel: str, count: int, shape: Shape, approximate: str) -> None:
    arguments = make_arguments(kernel, shape, count)
    expected = reference.KERNELS[kernel](*arguments, approximate)
    result = cpu.KERNELS[kernel](*arguments, approximate)
    assert result.shape == expected.shape
    assert result.dtype == torch.float64
    assert result.is_contiguous()
    # In units of what is added up, as PyTorch's gelu is inaccurate where it is small.
    # Worst measured: 2.2e-16.
    vectors, projection = arguments
    assert (result - expected).norm() <= 2e-15 * vectors.norm() * projection.abs().max().clamp(min=1)


@needs_extension
@each_kernel
@each_shape
@each_gelu
@pytest.mark.usefixtures("poisoned_memory")
def test_float32_error_is_at_most_twice_the_references(kernel: str, shape: Shape, approximate: str) -> None:
    vectors, projection = make_arguments(kernel, shape, 8, dtype=torch.float32)
    exact = reference.KERNELS[kernel](vectors.double(), projection.double(), approximate)
    plain = reference.KERNELS[kernel](vectors, projection, approximate)
    result = cpu.KERNELS[kernel](vectors, projection, approximate)
    assert result.dtype == torch.float32
    # Worst measured on AVX-512, AVX2 and portable: 1.4 times.
    assert (result - exact).norm() <= 2 * (plain - exact).norm()


def gelu_and_slope(gate: float, approximate: str) -> tuple[float, float]:
    """gelu(g) and gelu'(g) in double, from a formula that keeps its relative accuracy on the far left."""
    if approximate == "none":
        below = math.erfc(-gate / math.sqrt(2)) / 2
        slope = gate * math.exp(-gate * gate / 2) / math.sqrt(2 * math.pi)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        u = scale * (gate + 0.044715 * gate**3)
        below = 1 / (1 + math.exp(-u)) if abs(u) < 700 else float(u > 0)
        slope = gate * below / (1 + math.exp(min(u, 700))) * scale * (1 + 3 * 0.044715 * gate**2)
    return gate * below, below + slope


@needs_extension
@each_gelu
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        # Of gelu relative to its value where |g| < 5, of gelu' absolute. Measured: 6.9e-7 and 1.2e-7 (2.3e-6
        # and 1.6e-7 with tanh) in float32, 1.3e-15 and 2.2e-16 (5.0e-15 and 2.2e-16) in float64.
        pytest.param(torch.float32, (4e-6, 4e-7), id="float32"),
        pytest.param(torch.float64, (1e-14, 1e-15), id="float64"),
    ],
)
def test_gelu_is_accurate_on_both_sides(
    approximate: str, dtype: torch.dtype, bound: tuple[float, float]
) -> None:
    gate = torch.cat([torch.linspace(-5, 5, 4001), torch.linspace(-41, 41, 821)]).to(dtype)
    projection = torch.cat([torch.ones_like(gate), gate])
    tangents = torch.eye(2, dtype=dtype).repeat_interleave(gate.numel(), 1)
    value, slope = cpu.geglu_tangent(tangents, projection, approximate).double()
    exact = torch.tensor([gelu_and_slope(g, approximate) for g in gate.tolist()], dtype=torch.float64)
    near = gate.abs() < 5
    assert ((value - exact[:, 0]).abs() <= bound[0] * exact[:, 0].abs())[near].all()
    assert torch.allclose(value, exact[:, 0], rtol=bound[0], atol=bound[1])
    assert (slope - exact[:, 1]).abs().max() <= bound[1]


@needs_extension
@each_gelu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out_on_both_sides(approximate: str, dtype: torch.dtype) -> None:
    """Where exp would overflow gelu is 0 or g, and its slope 0 or 1."""
    gate = torch.tensor([1e-30, 15.0, 50.0, 1e4, 1e30], dtype=dtype)
    gate = torch.cat([-gate, gate])
    projection = torch.cat([torch.ones_like(gate), gate])
    tangents = torch.eye(2, dtype=dtype).repeat_interleave(gate.numel(), 1)
    value, slope = cpu.geglu_tangent(tangents, projection, approximate)
    expected = torch.where(gate.abs() < 1, gate / 2, gate.clamp(min=0))
    assert torch.allclose(value, expected, rtol=1e-6, atol=1e-30)
    expected = torch.where(gate.abs() < 1, 0.5, (gate > 0).to(dtype))
    assert torch.allclose(slope, expected, rtol=1e-6, atol=1e-30)


@needs_extension
@each_kernel
@each_gelu
@pytest.mark.parametrize("where", ["vectors", "hidden", "gate"])
def test_nan_goes_to_its_element_and_no_further(kernel: str, approximate: str, where: str) -> None:
    vectors, projection = make_arguments(kernel, ((2, 9), 37), 2, dtype=torch.float32)
    if where == "vectors":
        vectors[1, 0, 3, 2] = float("nan")
    else:
        projection[0, 3, 2 if where == "hidden" else 39] = float("nan")
    bad = cpu.KERNELS[kernel](vectors, projection, approximate).isnan()
    expected = reference.KERNELS[kernel](vectors, projection, approximate).isnan()
    assert bad.any()
    assert torch.equal(bad, expected)


@needs_extension
@each_kernel
@pytest.mark.usefixtures("set_threads")
def test_number_of_threads_changes_no_bit(kernel: str) -> None:
    for shape in (((), 999), ((2, 77), 320), ((3,), 5000)):
        arguments = make_arguments(kernel, shape, 17, dtype=torch.float32)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.KERNELS[kernel](*arguments, "none"))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def embed(tensor: Tensor, dim: int) -> Tensor:
    """The same values as every second slice along `dim` of a tensor of NaN."""
    size = list(tensor.shape)
    size[dim] *= 2
    view = torch.full(size, float("nan"), dtype=tensor.dtype)
    index = tuple(slice(None, None, 2) if d == dim else slice(None) for d in range(tensor.ndim))
    view[index] = tensor
    return view[index]


@needs_extension
@each_kernel
@pytest.mark.usefixtures("poisoned_memory")
def test_strides(kernel: str) -> None:
    """Views of every kind give, to the bit, what their contiguous copies give."""
    vectors, projection = make_arguments(kernel, ((2, 9), 33), 4, dtype=torch.float32)
    expected = cpu.KERNELS[kernel](vectors, projection, "none")
    for dim in range(4):
        assert torch.equal(cpu.KERNELS[kernel](embed(vectors, dim), projection, "none"), expected), dim
    for dim in range(3):
        assert torch.equal(cpu.KERNELS[kernel](vectors, embed(projection, dim), "none"), expected), dim
    transposed = vectors.mT.contiguous().mT, projection.mT.contiguous().mT
    assert torch.equal(cpu.KERNELS[kernel](*transposed, "none"), expected)
    repeated = vectors[:1].expand(4, *vectors.shape[1:])
    assert torch.equal(cpu.KERNELS[kernel](repeated, projection, "none")[3], expected[0])


@needs_extension
@each_kernel
@pytest.mark.parametrize("shape", [((0, 3), 4), ((2, 3), 0)], ids=["rows", "columns"])
@pytest.mark.parametrize("count", [0, 3])
def test_empty(kernel: str, shape: Shape, count: int) -> None:
    vectors, projection = make_arguments(kernel, shape, count)
    width = shape[1] if kernel == "geglu_tangent" else 2 * shape[1]
    for backend in (reference, cpu):
        assert backend.KERNELS[kernel](vectors, projection, "none").shape == (count, *shape[0], width)


@needs_extension
@each_kernel
def test_what_the_kernel_cannot_do_is_left_to_the_reference(kernel: str) -> None:
    half = make_arguments(kernel, ((2, 5), 8), 2, dtype=torch.bfloat16)
    result = cpu.KERNELS[kernel](*half, "none")
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, reference.KERNELS[kernel](*half, "none"))
    vectors, projection = make_arguments(kernel, ((2, 5), 8), 2)
    assert cpu.KERNELS[kernel](vectors.requires_grad_(), projection, "none").requires_grad


@needs_extension
@each_kernel
def test_wrong_arguments_are_refused(kernel: str) -> None:
    vectors, projection = make_arguments(kernel, ((2, 5), 8), 2)
    named = "cotangent" if kernel == "geglu_adjoint" else "tangent"
    for wrong in (vectors[..., :-1], vectors[0], vectors[:, :1], torch.tensor(1.0, dtype=torch.float64)):
        with pytest.raises(InvalidInput, match=f"^{named}: expected"):
            cpu.KERNELS[kernel](wrong, projection, "none")
    with pytest.raises(InvalidInput, match="projection: expected"):
        cpu.KERNELS[kernel](vectors, projection[..., :-1], "none")
    with pytest.raises(InvalidInput, match="approximate: expected"):
        cpu.KERNELS[kernel](vectors, projection, "sigmoid")


ISA = """
import sys, torch
from sharpcore.backends import cpu, reference
assert cpu.extension().isa() == sys.argv[1]
generator = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float32, 5e-7), (torch.float64, 1e-15)):
    for columns in (320, 33, 3):
        projection = 3 * torch.randn(2, 7, 2 * columns, generator=generator, dtype=dtype)
        for kernel, width in (("geglu_tangent", 2 * columns), ("geglu_adjoint", columns)):
            vectors = torch.randn(3, 2, 7, width, generator=generator, dtype=dtype)
            for approximate in ("none", "tanh"):
                expected = reference.KERNELS[kernel](vectors.double(), projection.double(), approximate)
                error = (cpu.KERNELS[kernel](vectors, projection, approximate) - expected).norm()
                assert error < bound * expected.norm(), (dtype, columns, kernel, float(error))
"""


def available_isas() -> list[str]:
    native = cpu.extension()
    features = {} if native is None else native.cpu_features()
    return ["portable", *(isa for isa in ("avx2", "avx512") if features.get(isa) and features.get("fma"))]


@needs_extension
@pytest.mark.parametrize("isa", available_isas())
def test_every_instruction_set(isa: str) -> None:
    """Worst measured on each: 7.4e-8 in float32, 3.8e-16 in float64."""
    subprocess.run(
        [sys.executable, "-c", ISA, isa],
        env={**os.environ, "SHARPCORE_CPU_ISA": isa, "OMP_NUM_THREADS": "2"},
        check=True,
        timeout=300,
    )


# -- in a trace: functions of x [2, 3, 8] ------------------------------------------------------------


def project(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return F.linear(x, torch.randn(8, 8, generator=generator, dtype=torch.float64).to(x.dtype))


def feed_forward(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def gate_first_in_product(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=2)
    return F.gelu(gate, approximate="tanh") * hidden


def split_by_sizes(x: Tensor) -> Tensor:
    hidden, gate = project(x).split([4, 4], dim=-1)
    return hidden * F.gelu(gate)


def of_a_vector(x: Tensor) -> Tensor:
    hidden, gate = project(x)[0, 1].chunk(2)
    return hidden * F.gelu(gate)


def two_of_them(x: Tensor) -> Tensor:
    return feed_forward(torch.cat([feed_forward(x), feed_forward(x.sin())], -1))


def everything_used_elsewhere(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    activated = F.gelu(gate)
    return hidden * activated + activated.sin() + gate * hidden + projection.sum(-1, keepdim=True)


def product_written_into_gelu(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return F.gelu(gate).mul_(hidden)


def projection_overwritten_afterwards(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    product = hidden * F.gelu(gate)
    projection.mul_(3).add_(x)
    return product + projection[..., :4]


FUSED: dict[Callable[[Tensor], Tensor], int] = {
    feed_forward: 1,
    gate_first_in_product: 1,
    split_by_sizes: 1,
    of_a_vector: 1,
    two_of_them: 3,
    everything_used_elsewhere: 1,
    product_written_into_gelu: 1,
    projection_overwritten_afterwards: 1,
}


def another_axis(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=0)
    return hidden * F.gelu(gate)


def unequal_pieces(x: Tensor) -> Tensor:
    hidden, gate = project(x).split([5, 3], dim=-1)
    return hidden[..., :3] * F.gelu(gate)


def three_pieces(x: Tensor) -> Tensor:
    hidden, gate, _ = project(x)[..., :6].chunk(3, dim=-1)
    return hidden * F.gelu(gate)


def one_column_broadcast(x: Tensor) -> Tensor:
    hidden, gate = project(x)[..., 3:6].chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def first_half_is_the_gate(x: Tensor) -> Tensor:
    gate, hidden = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def halves_of_two_projections(x: Tensor) -> Tensor:
    hidden, _ = project(x).chunk(2, dim=-1)
    _, gate = project(x.sin()).chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def hidden_transposed(x: Tensor) -> Tensor:
    hidden, gate = project(x)[..., :6].chunk(2, dim=-1)
    return hidden.mT * F.gelu(gate)


def silu_gate(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.silu(gate)


def gate_changed_before(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate + 1)


def gate_overwritten_before_the_product(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    activated = F.gelu(gate)
    gate.mul_(7)
    return hidden * activated + gate


def gate_filled_before_the_product(x: Tensor) -> Tensor:
    projection = project(x)
    hidden, gate = projection.chunk(2, dim=-1)
    activated = F.gelu(gate)
    projection[..., 4:].zero_()
    return hidden * activated + gate


def product_written_into_the_projection(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    hidden.mul_(F.gelu(gate))
    return hidden + gate


def halves_without_a_tangent(x: Tensor) -> Tensor:
    hidden, gate = project(x).detach().chunk(2, dim=-1)
    return hidden * F.gelu(gate) * x[..., :4]


def gate_without_a_tangent(x: Tensor) -> Tensor:
    hidden, gate = project(x).chunk(2, dim=-1)
    return hidden * F.gelu(gate.detach())


NOT_FUSED = (
    another_axis,
    unequal_pieces,
    three_pieces,
    one_column_broadcast,
    first_half_is_the_gate,
    halves_of_two_projections,
    hidden_transposed,
    silu_gate,
    gate_changed_before,
    gate_overwritten_before_the_product,
    gate_filled_before_the_product,
    product_written_into_the_projection,
    halves_without_a_tangent,
    gate_without_a_tangent,
)
CASES = [*FUSED.items(), *((f, 0) for f in NOT_FUSED)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("f", "fused"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_fusion_is_seen_and_exact(f: Callable[[Tensor], Tensor], fused: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x, other = (torch.randn(2, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    tangents = torch.randn(3, *x.shape, generator=generator, dtype=torch.float64)
    linearization = linearize(f, x, backend=backend)
    cotangents = torch.randn(3, *linearization.value.shape, generator=generator, dtype=torch.float64)
    operations = [line.split()[1] for line in linearization.program.explain().splitlines()[1:-1]]
    assert operations.count("geglu") == fused
    for point in (None, other, x):
        if point is not None:
            linearization.relinearize(point)
        at = x if point is None else point
        # Worst measured: 1.2e-14 of a product.
        assert relative_error(linearization.value, f(at)) <= 1e-14
        products, pulled = linearization.jvp(tangents), linearization.vjp(cotangents)
        assert relative_error(products, oracle_jvp(f, at, tangents)) <= 1e-13
        # Autograd refuses some of the writes in place, so that the transpose is compared with the product.
        pairing = (cotangents * products).sum(), (pulled * tangents).sum()
        assert (pairing[0] - pairing[1]).abs() <= 1e-13 * cotangents.norm() * products.norm()


def test_fused_operation_replaces_its_parts() -> None:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    linearization = linearize(feed_forward, x)
    operations = [line.split()[1] for line in linearization.program.explain().splitlines()[1:-1]]
    assert operations == ["linear", "geglu"]
    # The weight of the projection, and the projection.
    assert linearization.nbytes == (8 * 8 + x.numel()) * 8
