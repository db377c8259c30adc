"""The Triton kernels of GroupNorm and LayerNorm: interpreted against the float64 reference, compiled ahead
of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest

pytest.importorskip("triton")

import aot
import torch
import triton
from interpreted import DEVICE
from kernel_checks import embed, poisoned_memory, to_channels_last
from test_group_norm_silu_tangent import Shape, identify, make_arguments, plain_bfloat16, size_of_terms
from test_layer_norm_tangent import Shape as Rows
from test_layer_norm_tangent import identify as identify_rows
from test_layer_norm_tangent import make_arguments as make_row_arguments
from torch import Tensor
from traffic import counted

from sharpcore.backends import reference
from sharpcore.backends.cuda.group_norm_silu_forward import group_norm_silu_forward
from sharpcore.backends.cuda.group_norm_silu_tangent import group_norm_silu_adjoint, group_norm_silu_tangent
from sharpcore.backends.cuda.layer_norm_tangent import layer_norm_adjoint, layer_norm_tangent
from sharpcore.errors import InvalidInput
from sharpcore.kernels import group_norm_silu_forward as forward_kernels
from sharpcore.kernels import group_norm_silu_tangent as tangent_kernels
from sharpcore.kernels import layer_norm_tangent as row_kernels
from sharpcore.testing.tolerance import assert_error_at_most, relative_error

HALVES = (torch.bfloat16, torch.float16)
GROUP_KERNELS = (group_norm_silu_tangent, group_norm_silu_adjoint)
ROW_KERNELS = (layer_norm_tangent, layer_norm_adjoint)
NAN = float("nan")

# All positions in one program, looked at twice or held in registers, or tiles with partial sums.
REGIMES = ("whole", "held", "split")
SMALL_TILE = 512


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Cuts small images into several tiles, too, and chooses what becomes of them."""

    def choose(regime: str) -> None:
        for module in (tangent_kernels, forward_kernels):
            monkeypatch.setattr(module, "WHOLE", 0 if regime == "split" else 2**30)
        monkeypatch.setattr(tangent_kernels, "TILE", SMALL_TILE)
        monkeypatch.setattr(tangent_kernels, "CACHED", 1400)  # bytes: two small vectors of three at a time
        if regime == "held":
            held = [triton.Config({"HELD": True})]
            monkeypatch.setattr(tangent_kernels, "whole_configurations", lambda *_: held)

    return choose


def surround(parameter: Tensor | None) -> Tensor | None:
    """The same values, contiguous, with NaN around them."""
    if parameter is None:
        return None
    memory = torch.full((parameter.numel() + 16,), NAN, dtype=parameter.dtype, device=DEVICE)
    view = memory[8:-8].view(parameter.shape)
    return view.copy_(parameter)


def lay(tensor: Tensor, channel_dim: int, channels_last: bool) -> Tensor:
    """The same values, channels-first or channels-last, each sample followed by one of NaN."""
    if not channels_last:
        return embed(tensor.to(DEVICE), channel_dim - 1)
    return embed(tensor.to(DEVICE).movedim(channel_dim, -1), channel_dim - 1).movedim(-1, channel_dim)


def with_nan(arguments: Sequence[Tensor | None], channels_last: bool) -> list[Tensor | None]:
    """Vectors, x, statistics and parameters where reading too far reads NaN."""
    vectors, x, *parameters = arguments
    return [lay(vectors, 2, channels_last), lay(x, 1, channels_last), *map(surround, parameters)]


def untouched_around(out: Tensor) -> bool:
    """Whether all that `out` leaves of its memory is still NaN."""
    return int(out._base.isnan().sum()) == out._base.numel() - out.numel()


def in_double(arguments: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in arguments]


def to(arguments: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """Vectors and x of a dtype beside statistics and parameters in float32."""
    return [None if t is None else t.to(dtype if n < 2 else torch.float32) for n, t in enumerate(arguments)]


# The interpreter takes some milliseconds for a program: few of them.
SHAPES = {
    Shape(2, 12, 4, ()): 1,  # no positions at all
    Shape(1, 6, 6, (1,)): 2,  # groups of one element: the derivative is zero
    Shape(2, 12, 3, (7,)): 3,
    Shape(1, 9, 9, (5, 3)): 1,  # as many groups as channels
    Shape(1, 6, 1, (3, 2, 4)): 8,  # three spatial dimensions, one group
    Shape(1, 80, 8, (33,)): 1,
    Shape(1, 111, 3, (6, 5)): 2,  # from here on several tiles
    Shape(2, 40, 4, (77,)): 1,
    Shape(1, 4, 2, (1025,)): 2,
}
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=identify)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


def several(shape: Shape) -> bool:
    """Whether a group has several tiles."""
    return shape.group_size > SMALL_TILE


CASES = [
    pytest.param(n, *case, id=f"{identify(case[0])}-{case[1]}-{'last' if case[2] else 'first'}")
    for n, case in enumerate(product(SHAPES, REGIMES, (False, True)))
    if case[1] != "held" or several(case[0])
]


@pytest.mark.parametrize(("n", "shape", "regime", "last"), CASES)
def test_group_norm_equals_reference(
    n: int, shape: Shape, regime: str, last: bool, small_tiles: Callable[[str], None]
) -> None:
    """Kernels, SiLU, parameters and the memory of the result vary from case to case."""
    small_tiles(regime)
    kernel, silu, affine = GROUP_KERNELS[n % 2], n % 5 != 0, (n % 3 != 0, n % 4 != 1)
    made = make_arguments(shape, SHAPES[shape], affine=affine, by_sample=n % 7 < 3)
    arguments = to(made, torch.float32)
    exact = reference.KERNELS[kernel.__name__](*in_double(arguments), shape.groups, silu)
    plain = reference.KERNELS[kernel.__name__](*arguments, shape.groups, silu)
    given = with_nan(arguments, last)
    if n % 3 == 0:
        out = lay(torch.full_like(plain, NAN), 2, not last)
        result = kernel(*given, shape.groups, silu, out=out)
        assert result is out
        assert untouched_around(out)
    else:
        with poisoned_memory():
            result = kernel(*given, shape.groups, silu)
        assert result.dtype == torch.float32
        if 1 not in (shape.channels, *shape.spatial) and shape.spatial:
            assert (result.stride(2) == 1) == last
    # The reference's own error is nearly zero where a group has one or two elements.
    bound = max(2 * float((plain - exact).norm()), 2e-7 * size_of_terms(in_double(arguments)))
    assert (result.cpu() - exact).norm() <= bound


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@each_layout
def test_group_norm_in_sixteen_bits(
    dtype: torch.dtype, regime: str, last: bool, small_tiles: Callable[[str], None]
) -> None:
    small_tiles(regime)
    shape = Shape(1, 40, 2, (7, 5))
    arguments = to(make_arguments(shape, 1), dtype)
    given = with_nan(arguments, last)
    low = [t if t is None else t.to(dtype) for t in arguments]
    for kernel in GROUP_KERNELS:
        exact = reference.KERNELS[kernel.__name__](*in_double(arguments), shape.groups, True)
        result = kernel(*given, shape.groups, True)
        assert result.dtype == dtype
        plain = plain_bfloat16(kernel.__name__, low, shape.groups, True)
        error = relative_error(result, exact)
        assert_error_at_most(error, relative_error(plain, exact))
        # Rounded once.
        assert error <= torch.finfo(dtype).eps / 2
        if regime == "whole":
            # Parameters and statistics of 16 bits are widened.
            widened = [t if t is None else t.to(dtype) for t in given]
            expected = reference.KERNELS[kernel.__name__](*low, shape.groups, True)
            assert relative_error(kernel(*widened, shape.groups, True), expected) <= torch.finfo(dtype).eps


@each_layout
def test_group_norm_out_of_any_strides(last: bool) -> None:
    shape = Shape(1, 6, 2, (4, 6))
    arguments = with_nan(to(make_arguments(shape, 3), torch.float32), last)
    # One operand turned: a layer's x need not lie as the tangents do.
    turned = [arguments[0], lay(arguments[1], 1, not last), *arguments[2:]]
    for kernel in GROUP_KERNELS:
        expected = kernel(*arguments, shape.groups, True)
        assert relative_error(kernel(*turned, shape.groups, True), expected) <= 1e-6
        size = expected.shape
        for out in (
            torch.empty(size, device=DEVICE),
            torch.empty(*size[:-1], 2 * size[-1], device=DEVICE)[..., ::2],
            torch.empty(size[::-1], device=DEVICE).permute(4, 3, 2, 1, 0),
        ):
            out.fill_(NAN)
            assert kernel(*arguments, shape.groups, True, out=out) is out
            assert torch.equal(out, expected)
        repeated = arguments[0][:1].expand(3, *size[1:])
        assert torch.equal(kernel(repeated, *arguments[1:], shape.groups, True)[2], expected[0])
        empty = torch.empty(0, *size[1:], device=DEVICE)
        assert kernel(empty, *arguments[1:], shape.groups, True).shape == empty.shape
        with pytest.raises(InvalidInput, match="tangent: expected"):
            kernel(arguments[0][:, :, :4], *arguments[1:], shape.groups, True)
        with pytest.raises(InvalidInput, match="mean: expected"):
            kernel(*arguments[:2], arguments[2][:, :1], *arguments[3:], shape.groups, True)
        with pytest.raises(InvalidInput, match="out: expected"):
            kernel(*arguments, shape.groups, True, out=torch.empty(size[1:], device=DEVICE))


@pytest.mark.parametrize("kernels", [GROUP_KERNELS, ROW_KERNELS], ids=["group", "layer"])
@each_layout
def test_adjoint_is_the_transpose(
    kernels: Sequence[Any], last: bool, small_tiles: Callable[[str], None]
) -> None:
    """<u, J v> = <J^T u, v>, with J v and J^T u in float32."""
    tangent, adjoint = kernels
    if kernels is GROUP_KERNELS:
        small_tiles("split")
        arguments = with_nan(to(make_arguments(Shape(1, 30, 3, (11, 3)), 2), torch.float32), last)
        options: tuple[Any, ...] = (3, True)
    else:
        arguments = [t.to(DEVICE) for t in to(make_row_arguments(Rows((2, 7), (77,)), 2), torch.float32)]
        arguments[0] = arguments[0].mT.contiguous().mT if last else arguments[0]
        options = (1,)
    vectors = arguments[0]
    generator = torch.Generator().manual_seed(1)
    covectors = torch.randn(vectors.shape, generator=generator).to(DEVICE)
    pushed = tangent(*arguments, *options).double()
    pulled = adjoint(covectors, *arguments[1:], *options).double()
    pairing = (covectors * pushed).flatten(1).sum(1), (pulled * vectors).flatten(1).sum(1)
    # Worst measured: 2e-9.
    bound = 1e-7 * covectors.norm() * pushed.norm()
    assert (pairing[0] - pairing[1]).abs().max() <= bound


@pytest.mark.parametrize("regime", ["whole", "split"])
@each_layout
@each_shape
def test_forward(shape: Shape, last: bool, regime: str, small_tiles: Callable[[str], None]) -> None:
    small_tiles(regime)
    n = list(SHAPES).index(shape)
    affine, silu = (n % 3 != 0, n % 4 != 1), n % 2 == 0
    made = make_arguments(shape, 1, affine=affine, by_sample=n % 2 == 1)
    # A mean of 200 deviations: variances that come from mean squares are lost.
    x, *parameters = to([made[1] + 300 * (n % 2), None, made[4], made[5]], torch.float32)
    weight, bias = parameters[1:]
    exact = reference.group_norm_silu_forward(*in_double([x, weight, bias]), shape.groups, 1e-5, silu)
    plain = reference.group_norm_silu_forward(x, weight, bias, shape.groups, 1e-5, silu)
    given = (lay(x, 1, last), surround(weight), surround(bias), shape.groups, 1e-5, silu)
    if last:
        out = lay(torch.full_like(x, NAN), 1, False)
        results = group_norm_silu_forward(*given, out=out)
        assert results[0] is out
        assert untouched_around(out)
    else:
        with poisoned_memory():
            results = group_norm_silu_forward(*given)
    # What a mean that is rounded once moves each element by.
    rounding = 2**-24 * float((exact[1].abs() * exact[2]).max()) * x.numel() ** 0.5
    for result, other, wanted in zip(results, plain, exact, strict=True):
        assert result.dtype == torch.float32
        assert result.shape == wanted.shape
        if shape.group_size > 2:
            bound = max(2 * float((other - wanted).norm()), 2e-7 * float(wanted.norm()) + rounding)
            assert (result.cpu() - wanted).norm() <= bound
    torch.testing.assert_close(results[1].cpu().double(), exact[1], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="accesses are counted in the interpreter")
@pytest.mark.parametrize(("regime", "reads"), [("held", 1), ("whole", 2), ("split", 2)])
@each_layout
def test_bytes_that_move(
    regime: str, reads: int, last: bool, small_tiles: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result is written once. Between two looks at a vector or at x lies at most what a cache keeps, so
    that from the memory behind it each is read once; x by all tangents of a program together, where tiles
    have partial sums."""
    small_tiles(regime)
    shape, count, tangents = Shape(3, 20, 2, (66,)), 5, 4
    arguments = [None if t is None else t.float() for t in make_arguments(shape, count)]
    vectors, x = (to_channels_last(t, dim) if last else t for t, dim in zip(arguments, (2, 1), strict=False))
    out = torch.empty_like(vectors)
    each = x[0].nbytes
    monkeypatch.setattr(tangent_kernels, "CACHED", 2 * (1 + count) * each)
    swept: list[int] = []

    def noted(kernel: Any, grid: Any, arguments: Any, *rest: Any) -> None:
        if kernel is tangent_kernels.group_norm_silu_sums_kernel:
            swept.append(arguments["vectors"].nbytes + arguments["x"].nbytes)
        run(kernel, grid, arguments, *rest)

    run = tangent_kernels.run
    monkeypatch.setattr(tangent_kernels, "run", noted)
    with counted({"vectors": vectors, "x": x, "out": out}) as traffic:
        group_norm_silu_tangent(vectors, x, *arguments[2:], shape.groups, True, out=out)
    assert traffic["vectors"].reads == reads
    assert traffic["out"].writes == 1
    assert traffic["out"].reads == traffic["vectors"].writes == 0
    if regime == "split":
        assert traffic["x"].reads == 2 * -(-count // tangents)
        assert len(swept) == 2
        assert max(swept) <= tangent_kernels.CACHED
    else:
        assert traffic["x"].reads == 2 * count
    x_out = torch.empty_like(x)
    with counted({"x": x, "out": x_out}) as traffic:
        group_norm_silu_forward(x, arguments[4], arguments[5], shape.groups, 1e-5, True, out=x_out)
    assert (traffic["x"].reads, traffic["out"].writes, traffic["out"].reads) == (2, 1, 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="accesses are counted in the interpreter")
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_bytes_that_layer_norm_moves(kernel: Any) -> None:
    """Each vector once in and once out; x once for four of them."""
    vectors, x, *rest = (t.float() for t in make_row_arguments(Rows((2, 9), (77,)), 8))
    out = torch.empty_like(vectors)
    with counted({"vectors": vectors, "x": x, "out": out}) as traffic:
        kernel(vectors, x, *rest, 1, out=out)
    assert (traffic["vectors"].reads, traffic["out"].writes, traffic["x"].reads) == (1, 1, 2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_forward_in_sixteen_bits(dtype: torch.dtype) -> None:
    shape = Shape(2, 40, 4, (7, 5))
    _, x, _, _, weight, bias = to(make_arguments(shape, 1), dtype)
    exact = reference.group_norm_silu_forward(*in_double([x, weight, bias]), 4, 1e-5, True)
    plain = torch.nn.functional.silu(torch.group_norm(x, 4, weight.to(dtype), bias.to(dtype), 1e-5))
    y, mean, rstd = group_norm_silu_forward(lay(x, 1, True), surround(weight), surround(bias), 4, 1e-5, True)
    assert (y.dtype, mean.dtype, rstd.dtype) == (dtype, torch.float32, torch.float32)
    assert_error_at_most(relative_error(y, exact[0]), relative_error(plain, exact[0]))
    assert relative_error(mean, exact[1]) <= 1e-6
    assert relative_error(rstd, exact[2]) <= 1e-6


ROW_SHAPES = (
    Rows((), (7,)),  # one row, no leading axis
    Rows((3,), (1,)),  # rows of one element: the derivative is zero
    Rows((2, 7), (33,)),
    Rows((2, 3, 5), (20,)),
    Rows((2,), (3, 7, 5)),  # several normalized axes
    Rows((2,), (9000,)),  # longer than what one tile holds
    Rows((2, 33), (77,)),
)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("shape", ROW_SHAPES, ids=identify_rows)
def test_layer_norm_equals_reference(kernel: Any, shape: Rows) -> None:
    axes, n = len(shape.normalized), ROW_SHAPES.index(shape)
    for by_sample, count in ((False, (1, 3, 8)[n % 3]), (True, 2)):
        made = make_row_arguments(shape, count, weighted=n % 3 != 1, by_sample=by_sample)
        arguments = to(made, torch.float32)
        exact = reference.KERNELS[kernel.__name__](*in_double(arguments), axes)
        plain = reference.KERNELS[kernel.__name__](*arguments, axes)
        vectors, x, *parameters = arguments
        x, *parameters = map(surround, (x, *parameters))
        bound = max(2 * float((plain - exact).norm()), 2e-7 * float(vectors.norm() * arguments[3].max()))
        layouts = [embed(vectors.to(DEVICE), 0)]
        if vectors.ndim == 4 and axes == 1:  # tokens that were an image a moment ago
            layouts.append(embed(vectors.mT.to(DEVICE), 0).mT)
        for given in layouts:
            with poisoned_memory():
                result = kernel(given, x, *parameters, axes)
            assert result.is_contiguous()
            assert (result.cpu() - exact).norm() <= bound
            for dim in range(vectors.ndim):
                out = embed(torch.full_like(result, NAN), dim)
                assert kernel(given, x, *parameters, axes, out=out) is out
                assert torch.equal(out, result)
                assert untouched_around(out)


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layer_norm_in_sixteen_bits(kernel: Any, dtype: torch.dtype) -> None:
    arguments = to(make_row_arguments(Rows((2, 9), (77,)), 3), dtype)
    exact = reference.KERNELS[kernel.__name__](*in_double(arguments), 1)
    vectors, x, mean, rstd, weight = arguments
    low = [t.to(dtype) for t in arguments]
    xhat = (low[1] - low[2]) * low[3]
    plain = low[0] * low[4] if kernel is layer_norm_adjoint else low[0]
    plain = plain - plain.mean(-1, keepdim=True) - xhat * (xhat * plain).mean(-1, keepdim=True)
    plain = plain * low[3] * (1 if kernel is layer_norm_adjoint else low[4])
    for given in (embed(vectors.to(DEVICE), 0), embed(vectors.mT.to(DEVICE), 0).mT):
        result = kernel(given, *map(surround, (x, mean, rstd, weight)), 1)
        assert result.dtype == dtype
        assert_error_at_most(relative_error(result, exact), relative_error(plain, exact))
        assert relative_error(result, exact) <= torch.finfo(dtype).eps / 2


def test_what_the_kernels_do_not_take_is_the_references() -> None:
    shape = Shape(1, 6, 3, (5,))
    arguments = [t.to(DEVICE) for t in make_arguments(shape, 2)]
    for kernel in GROUP_KERNELS:
        expected = reference.KERNELS[kernel.__name__](*arguments, 3, True)
        assert torch.equal(kernel(*arguments, 3, True), expected)
        single = [t.float() for t in arguments]
        assert kernel(single[0].requires_grad_(), *single[1:], 3, True).requires_grad


def image(count: int, channels: int, positions: int, dtype: torch.dtype, last: bool) -> Tensor:
    """[K, B, C, P] without values."""
    made = torch.empty((count, 2, channels, positions), dtype=dtype, device="meta")
    return to_channels_last(made, 2) if last else made


def group_norm_requests(
    channels: int,
    positions: int,
    dtype: torch.dtype,
    last: bool,
    architecture: int,
    configuration: int,
    adjoint: bool,
) -> list[aot.Request]:
    vectors = image(8, channels, positions, dtype, last)
    statistics = torch.empty((2, 32), device="meta")
    parameter = torch.empty(channels, dtype=dtype, device="meta")
    operands = (vectors, vectors, vectors[0], statistics, statistics, parameter, parameter, 32)
    return aot.recorded(
        tangent_kernels,
        lambda: tangent_kernels.group_norm_silu(*operands, silu=True, adjoint=adjoint),
        architecture,
        configuration=configuration,
    )


def forward_requests(
    channels: int, positions: int, dtype: torch.dtype, last: bool, architecture: int
) -> list[aot.Request]:
    x = image(1, channels, positions, dtype, last)[0]
    statistics = torch.empty((2, 32), device="meta")
    parameter = torch.empty(channels, dtype=dtype, device="meta")
    operands = (x, statistics, statistics, x, parameter, parameter, 32, 1e-5)
    return aot.recorded(
        forward_kernels,
        lambda: forward_kernels.group_norm_silu_forward(*operands, silu=True),
        architecture,
    )


def layer_norm_requests(
    rows: int, size: int, dtype: torch.dtype, last: bool, architecture: int, configuration: int, adjoint: bool
) -> list[aot.Request]:
    vectors = torch.empty((8, 2, rows, size), dtype=dtype, device="meta")
    given = torch.empty((8, 2, size, rows), dtype=dtype, device="meta").mT if last else vectors
    statistics = torch.empty((2, rows), device="meta")
    operands = (
        vectors,
        given,
        vectors[0],
        statistics,
        statistics,
        torch.empty(size, dtype=dtype, device="meta"),
    )
    return aot.recorded(
        row_kernels,
        lambda: row_kernels.layer_norm(*operands, adjoint=adjoint),
        architecture,
        configuration=configuration,
    )


def test_compiled_ahead_of_time() -> None:
    """Layers of Stable Diffusion 1.x on data-centre cards: no spills, shared memory that every card has."""
    half, single = torch.bfloat16, torch.float32
    requests = [
        *group_norm_requests(320, 4096, half, False, 90, 0, False),
        *group_norm_requests(640, 1024, half, False, 80, 3, False),  # held in registers
        *group_norm_requests(1280, 256, single, False, 90, 3, True),
        *group_norm_requests(1280, 64, single, True, 80, 0, True),
        *group_norm_requests(960, 4096, half, False, 80, 0, True),
        *group_norm_requests(320, 4096, half, True, 90, 0, False),
        *group_norm_requests(320, 4096, single, True, 80, 0, True),
        *forward_requests(320, 4096, half, False, 80),
        *forward_requests(640, 4096, half, True, 90),
        *layer_norm_requests(4096, 320, half, False, 90, 0, False),
        *layer_norm_requests(4096, 320, half, True, 80, 0, True),
        *layer_norm_requests(256, 1280, single, False, 80, 0, True),
    ]
    for request, compiled in zip(requests, aot.compile_all(requests), strict=True):
        compiled.assert_fits(request.architecture)
        assert compiled.shared <= aot.SHARED_LIMITS[86], request
