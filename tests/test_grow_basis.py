"""Growth of orthonormal bases by blocks: what is taken apart makes the whole again, whatever comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import (
    bits_equal,
    each_isa,
    embed,
    for_threads,
    needs_extension,
    poisoned_memory,
    run_with_isa,
)
from torch import Tensor

from sharpcore.backends import cpu, reference
from sharpcore.backends.reference.grow_basis import Growth
from sharpcore.errors import InvalidInput

KERNELS = {"reference": reference.KERNELS["grow_basis"], "cpu": cpu.KERNELS["grow_basis"]}
each_backend = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# B, M, d, n, K: sizes on both sides of a vector, a tile and a chunk; bases that become full; nothing at all.
SHAPES = (
    (1, 1, 1, 0, 1),
    (2, 1, 1, 1, 2),
    (3, 7, 7, 3, 2),
    (2, 20, 33, 7, 5),
    (3, 40, 1025, 16, 4),
    (2, 40, 257, 9, 16),
    (1, 40, 515, 30, 3),
    (2, 30, 2304, 13, 1),
    (1, 40, 1536, 0, 17),
    (2, 16, 255, 5, 8),
    (2, 8, 8, 3, 12),
    (0, 3, 5, 0, 2),
    (2, 5, 5, 2, 0),
)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_basis(samples: int, rows: int, dimension: int, size: int, seed: int = 0) -> Tensor:
    """Orthonormal rows, and NaN where there are none yet."""
    basis = torch.full((samples, rows, dimension), float("nan"), dtype=torch.float64)
    basis[:, :size] = torch.linalg.qr(normal(samples, dimension, size, seed=seed)).Q.mT
    return basis


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    samples, rows, dimension, size, count = shape
    sizes = torch.full((samples,), size)
    block = normal(count, samples, dimension, seed=sum(shape))
    return make_basis(samples, rows, dimension, size), sizes, block.to(dtype)


def grow(
    basis: Tensor,
    sizes: Tensor,
    block: Tensor,
    backend: str = "cpu",
    floor: float = 0,
    limit: int | None = None,
) -> Growth:
    least = torch.full(sizes.shape, float(floor), dtype=torch.float64)
    limit = min(basis.shape[1:]) if limit is None else limit
    with poisoned_memory():
        return KERNELS[backend](basis, sizes, block, floor=least, limit=limit)


def check(before: Tensor, basis: Tensor, sizes: Tensor, block: Tensor, growth: Growth) -> None:
    """Everything that is promised of each problem."""
    coefficients, triangle, ranks, dropped = growth
    for i, (n, rank) in enumerate(zip(sizes.tolist(), ranks.tolist(), strict=True)):
        w, size = block[:, i].double(), n + rank
        rows = basis[i, :size]
        assert torch.equal(basis[i, :n], before[i, :n])
        assert bits_equal(basis[i, size:], before[i, size:])
        # Worst measured: 2.3e-15.
        assert ((rows @ rows.mT - torch.eye(size, dtype=torch.float64)).abs() <= 1e-14).all()
        assert not coefficients[i, n:].any()
        assert not triangle[i, rank:].any()
        remainder = w - coefficients[i, :n].mT @ rows[:n] - triangle[i, :rank].mT @ rows[n:]
        lengths = w.norm(dim=1)
        # Worst measured: 9e-16 of the vector.
        assert ((remainder.norm(dim=1) - dropped[i]).abs() <= 1e-14 * lengths).all()
        new = torch.zeros(block.shape[0], dtype=torch.bool)
        for j in range(block.shape[0]):
            q = int(new.sum())
            new[j] = q < rank and bool(triangle[i, q, j] > 0)
            assert not triangle[i, q + int(new[j]) :, j].any()
        assert int(new.sum()) == rank
        assert not dropped[i, new].any()


@each_backend
@each_shape
@each_dtype
def test_vectors_are_sums_of_orthonormal_rows(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    basis, sizes, block = make_case(shape, dtype)
    before = basis.clone()
    growth = grow(basis, sizes, block, backend)
    check(before, basis, sizes, block, growth)
    _, rows, dimension, size, count = shape
    assert (growth.ranks == min(count, min(rows, dimension) - size)).all()


@needs_extension
@each_shape
@each_dtype
def test_kernel_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    basis, sizes, block = make_case(shape, dtype)
    expected_basis = basis.clone()
    growth, expected = grow(basis, sizes, block), grow(expected_basis, sizes, block, "reference")
    assert torch.equal(growth.ranks, expected.ranks)
    assert torch.equal(basis.isnan(), expected_basis.isnan())
    scale = 1 + block.double().norm(dim=2).amax().item() if block.numel() else 1
    # Worst measured: 9e-16 of the longest vector, and in the rows.
    pairs = [
        (basis.nan_to_num(), expected_basis.nan_to_num(), 1),
        *((*both, scale) for both in zip(growth, expected, strict=True)),
    ]
    for ours, theirs, unit in pairs:
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() <= 1e-14 * unit).all()


def in_span(basis: Tensor, count: int, seed: int) -> Tensor:
    """Vectors that the first 6 rows make."""
    return (normal(count, basis.shape[0], 6, seed=seed).unsqueeze(2) @ basis[:, :6]).squeeze(2)


def duplicates(basis: Tensor, w: Tensor) -> Tensor:
    return torch.stack([w[0], w[0], w[1], -3 * w[0], w[0] + w[1]])


def spanned(basis: Tensor, w: Tensor) -> Tensor:
    return torch.cat([w[:1], in_span(basis, 3, 5)])


def zeros(basis: Tensor, w: Tensor) -> Tensor:
    return torch.stack([0 * w[0], w[0], 0 * w[0], w[1]])


def tiny(basis: Tensor, w: Tensor) -> Tensor:
    return w * torch.tensor([1e-120, 1e120, 1e-12, 1], dtype=w.dtype).view(4, 1, 1)


def nearly_dependent(basis: Tensor, w: Tensor) -> Tensor:
    return torch.stack([w[0], w[0] + 1e-9 * w[1], w[0] + 1e-5 * w[2], w[0] - 1e-12 * w[3]])


def nearly_spanned(basis: Tensor, w: Tensor) -> Tensor:
    return in_span(basis, 4, 6) + torch.tensor([1e-9, 1e-6, 1e-3, 1e-12], dtype=w.dtype).view(4, 1, 1) * w


def in_both(basis: Tensor, w: Tensor) -> Tensor:
    """Sums of rows and of columns before: only what is left after both have gone shows it."""
    return torch.stack([w[0], w[1], in_span(basis, 1, 7)[0] + w[0] - 2 * w[1], w[2]])


def rounding(basis: Tensor, w: Tensor) -> Tensor:
    """Remainders of the size of the rounding of what is taken off."""
    return in_span(basis, 4, 8) + 1e-15 * w


DEFLATED = (
    (duplicates, 2),
    (spanned, 1),
    (zeros, 2),
    (tiny, 4),
    (nearly_dependent, 4),
    (nearly_spanned, 4),
    (in_both, 3),
    (rounding, 0),
)
each_deflated = pytest.mark.parametrize(
    ("make", "rank"), DEFLATED, ids=[make.__name__ for make, _ in DEFLATED]
)


@each_backend
@each_deflated
@pytest.mark.parametrize("dimension", [29, 300])
def test_deflation(make: Callable[[Tensor, Tensor], Tensor], rank: int, dimension: int, backend: str) -> None:
    basis, sizes = make_basis(2, 20, dimension, 6), torch.tensor([6, 6])
    before = basis.clone()
    block = make(basis, normal(4, 2, dimension, seed=1))
    growth = grow(basis, sizes, block, backend)
    assert growth.ranks.tolist() == [rank, rank]
    check(before, basis, sizes, block, growth)


@each_backend
def test_empty_basis_takes_one_of_each_direction(backend: str) -> None:
    basis, sizes = make_basis(1, 20, 29, 0), torch.tensor([0])
    before = basis.clone()
    block = duplicates(basis, normal(4, 1, 29))
    growth = grow(basis, sizes, block, backend)
    assert growth.ranks.tolist() == [2]
    check(before, basis, sizes, block, growth)


@each_backend
def test_floor(backend: str) -> None:
    """A remainder of just the floor gives no row, one above it does; each problem has its own floor."""
    basis, sizes = make_basis(3, 9, 40, 4), torch.tensor([4, 4, 4])
    new = torch.linalg.qr(torch.cat([basis[:, :4], normal(3, 2, 40)], 1).mT).Q.mT[:, 4:].movedim(1, 0)
    block = torch.stack([basis[:, 0] + 1e-3 * new[0], 2 * new[1]])
    floor = torch.tensor([1e-4, 1.1e-3, 3], dtype=torch.float64)
    before = basis.clone()
    growth = KERNELS[backend](basis, sizes, block, floor=floor, limit=9)
    assert growth.ranks.tolist() == [2, 1, 0]
    check(before, basis, sizes, block, growth)
    assert growth.dropped[1:].tolist() == [
        pytest.approx([1e-3, 0], rel=1e-12),
        pytest.approx([1e-3, 2], rel=1e-12),
    ]
    unit = torch.zeros(1, 2, 5, dtype=torch.float64)
    unit[:, :, 0] = 0.5
    at_floor = torch.tensor([0.5, 0.5 - 2**-53], dtype=torch.float64)
    growth = KERNELS[backend](make_basis(2, 3, 5, 0), torch.tensor([0, 0]), unit, floor=at_floor, limit=3)
    assert growth.ranks.tolist() == [0, 1]


@each_backend
def test_a_full_basis_takes_no_more(backend: str) -> None:
    for limit in (4, 5, 6, 9):
        basis, sizes = make_basis(2, 12, 40, 4), torch.tensor([4, 2])
        before = basis.clone()
        basis[1, 2:] = before[1, 2:] = float("nan")
        block = normal(3, 2, 40, seed=limit)
        growth = grow(basis, sizes, block, backend, limit=limit)
        assert growth.ranks.tolist() == [min(3, limit - 4), min(3, limit - 2)]
        check(before, basis, sizes, block, growth)


@each_backend
def test_a_basis_of_the_whole_space_takes_nothing(backend: str) -> None:
    basis, sizes = make_basis(1, 12, 12, 12), torch.tensor([12])
    before = basis.clone()
    block = normal(3, 1, 12)
    growth = grow(basis, sizes, block, backend)
    assert growth.ranks.tolist() == [0]
    assert (growth.dropped <= 1e-14).all()
    check(before, basis, sizes, block, growth)


@each_backend
def test_steps_of_a_krylov_space_until_it_is_full(backend: str) -> None:
    """Blocks that lean on the basis as those of Lanczos do; the last one has less than it asks for."""
    dimension, count = 61, 4
    spectrum = torch.linspace(-3, 5, dimension, dtype=torch.float64) ** 3
    basis, sizes = make_basis(2, dimension, dimension, 0), torch.tensor([0, 0])
    block = normal(count, 2, dimension)
    while int(sizes[0]) < dimension:
        before = basis.clone()
        growth = grow(basis, sizes, block, backend)
        check(before, basis, sizes, block, growth)
        assert growth.ranks.tolist() == [min(count, dimension - int(sizes[0]))] * 2
        block = (basis[:, sizes[0] : sizes[0] + growth.ranks[0]] * spectrum).movedim(1, 0)
        sizes = sizes + growth.ranks


@each_backend
def test_frozen_problems_are_left_alone(backend: str) -> None:
    basis, sizes = make_basis(3, 9, 40, 4), torch.tensor([4, -1, 4])
    block = normal(3, 3, 40)
    block[:, 1] = float("nan")
    before = basis.clone()
    growth = grow(basis, sizes, block, backend)
    assert growth.ranks.tolist() == [3, 0, 3]
    assert bits_equal(basis[1], before[1])
    assert not any(part[1].any() for part in growth)
    alone = before[::2].contiguous()
    expected = grow(alone, sizes[::2], block[:, ::2], backend)
    assert all(torch.equal(part[::2], other) for part, other in zip(growth, expected, strict=True))
    assert bits_equal(basis[::2], alone)


@each_backend
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_stays_in_its_problem(value: str, backend: str) -> None:
    basis, sizes, block = make_case((3, 20, 300, 7, 4))
    clean = basis.clone()
    expected = grow(clean, sizes, block, backend)
    block[2, 1, 123] = float(value)
    growth = grow(basis, sizes, block, backend)
    for part, other in zip((basis, *growth), (clean, *expected), strict=True):
        assert bits_equal(part[::2], other[::2])
    bad = torch.cat([growth.coefficients[1].flatten(), growth.triangle[1].flatten(), growth.dropped[1]])
    assert not bad.isfinite().all()


@needs_extension
@each_shape
def test_float32_is_widened(shape: tuple[int, ...]) -> None:
    basis, sizes, block = make_case(shape, torch.float32)
    other = basis.clone()
    growth, expected = grow(basis, sizes, block), grow(other, sizes, block.double())
    assert bits_equal(basis, other)
    assert all(torch.equal(part, same) for part, same in zip(growth, expected, strict=True))


@needs_extension
@each_dtype
def test_strides_of_the_block(dtype: torch.dtype) -> None:
    basis, sizes, block = make_case((3, 20, 131, 7, 4), dtype)
    turned = block.transpose(0, 1).contiguous().transpose(0, 1)
    shared = block[:1].expand_as(block)
    blocks: list[tuple[Tensor, Tensor]] = [(embed(block, dim), block) for dim in range(3)]
    blocks += [(turned, block), (block.movedim(2, 0).contiguous().movedim(0, 2), block)]
    blocks += [(shared, shared.contiguous()), (block[:, :1].expand_as(block), block[:, :1].repeat(1, 3, 1))]
    for given, plain in blocks:
        bases = basis.clone(), basis.clone()
        growth, expected = grow(bases[0], sizes, given), grow(bases[1], sizes, plain)
        assert bits_equal(*bases)
        assert all(torch.equal(part, same) for part, same in zip(growth, expected, strict=True))


@each_backend
def test_a_block_that_lies_in_the_basis(backend: str) -> None:
    basis, sizes, block = make_case((2, 20, 300, 7, 4))
    other = basis.clone()
    basis[:, 7:11] = other[:, 7:11] = block.transpose(0, 1)
    growth = grow(basis, sizes, basis[:, 7:11].transpose(0, 1), backend)
    expected = grow(other, sizes, block, backend)
    assert bits_equal(basis, other)
    assert all(torch.equal(part, same) for part, same in zip(growth, expected, strict=True))


# The second and third have one problem that is large enough for threads to share it.
SHARED = ((5, 30, 515, 20, 4), (1, 80, 5001, 60, 4), (2, 40, 9000, 30, 5))


@needs_extension
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_number_of_threads_changes_no_bit(shape: tuple[int, ...]) -> None:
    basis, sizes, block = make_case(shape)
    # Close enough to the basis and to each other for every kind of pass.
    block[1] = block[0] + 1e-9 * block[1]
    block[-1] = basis[:, 0] + 1e-9 * block[-1]

    def run() -> Tensor:
        grown = basis.clone()
        growth = grow(grown, sizes, block)
        return torch.cat([part.double().flatten() for part in (grown, *growth)])

    one, *others = for_threads(run, (1, 2, 5))
    assert all(bits_equal(one, other) for other in others)


@needs_extension
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_batch_changes_no_bit(shape: tuple[int, ...]) -> None:
    basis, sizes, block = make_case(shape)
    whole = basis.clone()
    growth = grow(whole, sizes, block)
    for i in range(shape[0]):
        single = basis[i : i + 1].clone()
        expected = grow(single, sizes[i : i + 1], block[:, i : i + 1])
        assert bits_equal(whole[i : i + 1], single)
        assert all(torch.equal(part[i : i + 1], same) for part, same in zip(growth, expected, strict=True))


@needs_extension
def test_each_problem_has_its_own_size() -> None:
    basis, sizes, block = make_case((4, 20, 131, 8, 3))
    sizes = torch.tensor([8, 0, 3, -1])
    for i, n in enumerate(sizes.tolist()):
        basis[i, max(n, 0) :] = float("nan")
    before = basis.clone()
    growth = grow(basis, sizes, block)
    assert growth.ranks.tolist() == [3, 3, 3, 0]
    thawed = sizes >= 0
    check(
        before[thawed], basis[thawed], sizes[thawed], block[:, thawed], Growth(*(p[thawed] for p in growth))
    )


@each_backend
def test_wrong_arguments_are_refused(backend: str) -> None:
    basis, sizes, block = make_case((2, 6, 9, 3, 2))
    floor = torch.zeros(2, dtype=torch.float64)
    good: dict[str, Any] = {"basis": basis, "sizes": sizes, "block": block, "floor": floor, "limit": 6}
    wrong: dict[str, list[Any]] = {
        "basis": [basis.float(), basis[0], basis.mT.contiguous().mT, basis[:, :, :-1]],
        "sizes": [sizes[:1], sizes.int(), sizes + 5],
        "block": [block[:, :1], block[0], block[..., :-1], block.bfloat16(), block.long()],
        "floor": [floor[:1], floor.float()],
        "limit": [7, -1],
    }
    before = basis.clone()
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InvalidInput, match=f"{name}: expected"):
                KERNELS[backend](**{**good, name: value})
    assert bits_equal(basis, before)


ISA = """
import torch
generator = torch.Generator().manual_seed(0)
def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
kernel, plain = (backend.KERNELS["grow_basis"] for backend in (cpu, reference))
for samples, rows, dimension, size, count in (
    (1, 1, 1, 0, 1), (2, 20, 33, 7, 5), (3, 40, 1025, 17, 4), (1, 30, 300, 6, 16), (2, 30, 77, 9, 2),
    (1, 80, 5001, 60, 3), (2, 8, 8, 3, 12),
):
    basis = torch.full((samples, rows, dimension), float("nan"), dtype=torch.float64)
    basis[:, :size] = torch.linalg.qr(normal(samples, dimension, size)).Q.mT
    block = normal(count, samples, dimension)
    if count > 2:
        block[2] = block[0] - block[1]
        block[1] = block[0] + 1e-6 * block[1]
    other, sizes = basis.clone(), torch.full((samples,), size)
    keywords = {"floor": torch.zeros(samples, dtype=torch.float64), "limit": min(rows, dimension)}
    for dtype in (torch.float32, torch.float64):
        ours, theirs = basis.clone(), basis.clone()
        growth = kernel(ours, sizes, block.to(dtype), **keywords)
        expected = plain(theirs, sizes, block.to(dtype), **keywords)
        assert torch.equal(growth.ranks, expected.ranks)
        assert torch.equal(ours.isnan(), theirs.isnan())
        for i, rank in enumerate(growth.ranks.tolist()):
            grown = ours[i, : size + rank]
            unit = torch.eye(size + rank, dtype=torch.float64)
            assert (grown @ grown.mT - unit).abs().max() <= 1e-14
            parts = growth.coefficients[i, :size], growth.triangle[i, :rank]
            w = block[:, i].to(dtype).double()
            rest = (w - torch.cat(parts).mT @ grown).norm(dim=1)
            assert ((rest - growth.dropped[i]).abs() <= 1e-14 * w.norm(dim=1)).all()
        torch.set_num_threads(1)
        single = basis.clone()
        kernel(single, sizes, block.to(dtype), **keywords)
        torch.set_num_threads(2)
        assert torch.equal(single.nan_to_num(), ours.nan_to_num())
"""


@needs_extension
@each_isa
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(isa, ISA)
