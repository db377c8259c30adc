"""The CUDA kernels of Krylov bases, run by threads of the CPU, against their references; and what nvcc makes
of them."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_grow_basis as growth_tests
import torch
from emulated_cuda import build, in_place_of_the_gpu
from interpreted import needs_triton
from kernel_checks import bits_equal, poisoned_memory
from torch import Tensor

from sharpcore.backends import reference
from sharpcore.backends.reference.lanczos_step import NOT_FINITE, OUT_OF_RANGE, LanczosState
from sharpcore.backends.reference.symmetric_eigen import MOST_EIGEN_ROWS
from sharpcore.errors import InvalidInput
from sharpcore.krylov.decomposition import Decomposition
from sharpcore.krylov.operator import as_batched, closing_share, precision_defaults

pytestmark = needs_triton

if importlib.util.find_spec("triton") is not None:
    from sharpcore.backends.cuda import native
    from sharpcore.backends.cuda.grow_basis import grow_basis
    from sharpcore.backends.cuda.lanczos_step import lanczos_step
    from sharpcore.backends.cuda.philox import philox_probes
    from sharpcore.backends.cuda.symmetric_eigen import ritz_residuals, symmetric_eigen

normal = growth_tests.normal


@pytest.fixture(autouse=True, scope="module")
def emulated() -> Iterator[None]:
    """The wrappers take CPU tensors to the emulated kernels; the tests of growth find them as "cuda"."""
    with in_place_of_the_gpu(build()):
        growth_tests.KERNELS["cuda"] = grow_basis
        yield
        del growth_tests.KERNELS["cuda"]


# Philox


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sphere"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_probes_equal_the_reference_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    ids = torch.tensor([1, 2**32 - 1, 2**40 + 7, 2**63 - 1])
    # Sizes on both sides of a counter, of what a block of threads makes, and of some of those.
    for dimension in (1, 2, 7, 31, 32, 33, 128, 129, 1025, 4097):
        arguments = (kind, 2**63 - 1, ids, 2**32 - 3, 3, dimension)
        expected = reference.KERNELS["philox_probes"](*arguments, dtype=torch.float64, device="cpu")
        with poisoned_memory():
            made = philox_probes(*arguments, dtype=dtype, device="cpu")
        assert made.dtype == dtype
        assert torch.equal(made, expected.to(dtype)), dimension


def test_no_probes() -> None:
    assert philox_probes(
        "sphere", 0, torch.tensor([], dtype=torch.int64), 0, 2, 5, dtype=torch.float64, device="cpu"
    ).shape == (2, 0, 5)
    with pytest.raises(InvalidInput, match="sample_ids: expected"):
        philox_probes("sphere", 0, torch.tensor([-1]), 0, 2, 5, dtype=torch.float64, device="cpu")


# Growth of bases. More than eight vectors are two groups.


@growth_tests.each_shape
@growth_tests.each_dtype
def test_vectors_are_sums_of_orthonormal_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    growth_tests.test_vectors_are_sums_of_orthonormal_rows(shape, dtype, "cuda")


@growth_tests.each_shape
def test_growth_equals_the_reference(shape: tuple[int, ...]) -> None:
    basis, sizes, block = growth_tests.make_case(shape)
    expected_basis = basis.clone()
    growth = growth_tests.grow(basis, sizes, block, "cuda")
    expected = growth_tests.grow(expected_basis, sizes, block, "reference")
    assert torch.equal(growth.ranks, expected.ranks)
    assert torch.equal(basis.isnan(), expected_basis.isnan())
    # Rows of a basis of nearly the whole space are as badly conditioned as what is left of their vectors.
    assert ((basis - expected_basis).nan_to_num().abs() <= 1e-12).all()
    scale = 1 + block.norm(dim=2).amax().item() if block.numel() else 1
    for ours, theirs in zip(growth, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ((ours - theirs).abs() <= 1e-13 * scale).all()


@growth_tests.each_deflated
@pytest.mark.parametrize("dimension", [29, 300])
def test_deflation(make: Callable[[Tensor, Tensor], Tensor], rank: int, dimension: int) -> None:
    growth_tests.test_deflation(make, rank, dimension, "cuda")


@pytest.mark.parametrize(
    "name",
    [
        "test_empty_basis_takes_one_of_each_direction",
        "test_floor",
        "test_a_full_basis_takes_no_more",
        "test_a_basis_of_the_whole_space_takes_nothing",
        "test_steps_of_a_krylov_space_until_it_is_full",
        "test_frozen_problems_are_left_alone",
        "test_a_block_that_lies_in_the_basis",
        "test_wrong_arguments_are_refused",
    ],
)
def test_growth_as_every_backend(name: str) -> None:
    getattr(growth_tests, name)("cuda")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_stays_in_its_problem(value: str) -> None:
    growth_tests.test_what_is_not_finite_stays_in_its_problem(value, "cuda")


def test_a_block_of_many_that_lies_in_the_basis() -> None:
    basis, sizes, block = growth_tests.make_case((2, 20, 40, 5, 11))
    other = basis.clone()
    basis[:, 5:16] = other[:, 5:16] = block.transpose(0, 1)
    growth = growth_tests.grow(basis, sizes, basis[:, 5:16].transpose(0, 1), "cuda")
    expected = growth_tests.grow(other, sizes, block, "cuda")
    assert bits_equal(basis, other)
    assert all(torch.equal(part, same) for part, same in zip(growth, expected, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_batch_changes_no_bit(count: int) -> None:
    """Of samples of which one is regular, one column by column, one frozen, one without a basis."""
    basis, _, block = growth_tests.make_case((4, 20, 131, 7, count))
    sizes = torch.tensor([7, 7, -1, 0])
    block[-1, 1] = basis[1, 0] + 1e-9 * block[-1, 1]
    basis[3] = float("nan")
    whole = basis.clone()
    growth = growth_tests.grow(whole, sizes, block, "cuda")
    assert growth.ranks.tolist() == [count, count, 0, count]
    for i in range(4):
        single = basis[i : i + 1].clone()
        expected = growth_tests.grow(single, sizes[i : i + 1], block[:, i : i + 1], "cuda")
        assert bits_equal(whole[i : i + 1], single)
        assert all(torch.equal(part[i : i + 1], same) for part, same in zip(growth, expected, strict=True))


def test_vectors_of_zeros_in_a_regular_block() -> None:
    """Samples with fewer vectors than others have them: they give no row and change nothing."""
    basis, sizes, block = growth_tests.make_case((2, 20, 77, 6, 5))
    block[1], block[4] = 0, 0
    before, alone = basis.clone(), basis.clone()
    growth = growth_tests.grow(basis, sizes, block, "cuda")
    growth_tests.check(before, basis, sizes, block, growth)
    assert growth.ranks.tolist() == [3, 3]
    rest = growth_tests.grow(alone, sizes, block[[0, 2, 3]], "cuda")
    assert (basis[:, :9] - alone[:, :9]).abs().max() <= 1e-15
    assert (growth.triangle[:, :3, [0, 2, 3]] - rest.triangle).abs().max() <= 1e-14


def test_ill_conditioned_blocks_stay_orthonormal() -> None:
    """On both sides of where Cholesky QR is safe."""
    for exponent in range(16):
        basis, sizes, block = growth_tests.make_case((1, 20, 61, 6, 4))
        block[1:] = block[:1] + 10.0**-exponent * block[1:]
        before = basis.clone()
        growth = growth_tests.grow(basis, sizes, block, "cuda")
        growth_tests.check(before, basis, sizes, block, growth)


# Steps of Lanczos


def make_state(krylov: Decomposition) -> LanczosState:
    """What a step changes, as a decomposition has it."""
    return LanczosState(
        krylov.basis.clone(),
        krylov.projected.clone(),
        krylov.lost.clone(),
        krylov.norm.clone(),
        krylov.sizes.clone(),
        krylov.processed.clone(),
        krylov.multiplied.clone(),
        krylov.deflated.clone(),
        krylov.breakdowns.clone(),
        krylov.frozen.clone(),
        torch.zeros_like(krylov.sizes),
    )


def make_krylov(dimension: int, block: int, dtype: torch.dtype) -> tuple[Decomposition, Any]:
    """Four samples that begin: a regular one, one of low rank, a frozen one, one with fewer vectors."""
    matrices = normal(4, dimension, dimension, seed=3)
    matrices = matrices + matrices.mT
    low = normal(dimension, 4, seed=4)
    matrices[1] = low @ low.mT
    operator = as_batched(matrices.to(dtype))
    krylov = Decomposition(4, dimension, dimension, block, torch.device("cpu"))
    start = normal(block, 4, dimension, seed=5)
    start[1:, 3] = start[:1, 3]
    krylov.append(start, torch.arange(4))
    krylov.frozen[2] = True
    return krylov, operator


def assert_states_agree(ours: LanczosState, theirs: LanczosState, scale: float) -> None:
    for name, a, b in zip(LanczosState._fields, ours, theirs, strict=True):
        if a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan()), name
            # A row that is a remainder of little more than the floor shows rounding so many times magnified.
            unit = 1e3 if name == "basis" else scale
            assert ((a - b).nan_to_num().abs() <= 1e-11 * unit).all(), (name, (a - b).abs().max())
        else:
            assert torch.equal(a, b), (name, a, b)


@pytest.mark.parametrize(
    ("dimension", "block", "dtype"),
    [(37, 3, torch.float64), (37, 3, torch.float32), (19, 1, torch.float64), (45, 11, torch.float64)],
    ids=str,
)
def test_steps_equal_those_of_a_decomposition(dimension: int, block: int, dtype: torch.dtype) -> None:
    krylov, operator = make_krylov(dimension, block, dtype)
    tolerance, share = precision_defaults(operator.rounding)[0], closing_share(operator.rounding)
    ours, theirs = make_state(krylov), make_state(krylov)
    scale = float(
        torch.linalg.matrix_norm(operator.multiply(torch.eye(dimension)[:, None].repeat(1, 4, 1))).max()
    )
    for _ in range(4 if block > 1 else 8):
        active = krylov.active()
        vectors = active.new_zeros(block, 4, dimension)
        vectors[: len(active)] = active
        products = operator.multiply(vectors)
        krylov.extend(products, operator, tolerance)
        made = []
        for step, state in ((lanczos_step, ours), (reference.lanczos_step, theirs)):
            out = torch.full(products.shape, float("nan"), dtype=dtype)
            with poisoned_memory():
                made.append(
                    step(state, products, share=share, tolerance=tolerance, limit=krylov.limit, out=out)
                )
        assert_states_agree(theirs, make_state(krylov), scale)
        assert_states_agree(ours, theirs, scale)
        following = krylov.active().to(dtype)
        for block_of_rows in made:
            assert (block_of_rows[: len(following)] - following).abs().max() <= 1e-6
            assert not block_of_rows[len(following) :].any()
        assert not ours.faults.any()
    assert ours.breakdowns[1] > 0
    assert ours.multiplied[2] == 0


def test_products_that_are_not_finite_or_out_of_range_are_named() -> None:
    krylov, operator = make_krylov(23, 2, torch.float64)
    krylov.frozen[:] = torch.tensor([False, False, True, False])
    products = operator.multiply(krylov.active()).contiguous()
    faulty = products.clone()
    faulty[1, 0, 5], faulty[0, 1], faulty[:, 2, 3] = float("nan"), faulty[0, 1] * 1e141, float("nan")
    common = {"share": 1e-12, "tolerance": 1e-10, "limit": krylov.limit}
    for step in (lanczos_step, reference.lanczos_step):
        state, expected = make_state(krylov), make_state(krylov)
        reference.lanczos_step(expected, products, out=torch.empty_like(products), **common)
        out = torch.full_like(products, float("nan"))
        step(state, faulty, out=out, **common)
        # A frozen sample's products are not looked at.
        assert state.faults.tolist() == [NOT_FINITE, OUT_OF_RANGE, 0, 0]
        assert not out[:, :3].any()
        assert out[:, 3].any()
        before = make_state(krylov)
        for name, after, same, grown in zip(LanczosState._fields, state, before, expected, strict=True):
            if name != "faults":
                assert bits_equal(after[:3], same[:3]), name
                assert torch.allclose(after[3], grown[3], rtol=1e-10, atol=1e-10, equal_nan=True), name
        # Nothing is done for it any more, whatever comes.
        step(state, products, out=out, **common)
        assert state.faults.tolist() == [NOT_FINITE, OUT_OF_RANGE, 0, 0]
        assert bits_equal(state.basis[:3], before.basis[:3])
        tiny = make_state(krylov)
        step(tiny, products * 1e-145, out=out, **common)
        assert tiny.faults.tolist() == [OUT_OF_RANGE, OUT_OF_RANGE, 0, OUT_OF_RANGE]


def test_wrong_steps_are_refused() -> None:
    krylov, _ = make_krylov(9, 2, torch.float64)
    products = normal(2, 4, 9)
    good: dict[str, Any] = {"share": 1e-12, "tolerance": 1e-10, "limit": 9, "out": torch.empty_like(products)}
    state = make_state(krylov)
    wrong = [
        ("lost", (state._replace(lost=state.lost[:, 1:]), products), {}),
        ("frozen", (state._replace(frozen=state.sizes), products), {}),
        ("basis", (state._replace(basis=state.basis.mT), products), {}),
        ("products", (state, products[..., 1:]), {}),
        ("products", (state, products.bfloat16()), {}),
        ("products", (state, products[:0]), {"out": products[:0]}),
        ("out", (state, products), {"out": products.mT.contiguous().mT}),
        ("limit", (state, products), {"limit": 10}),
    ]
    for name, arguments, keywords in wrong:
        for step in (lanczos_step, reference.lanczos_step):
            with pytest.raises(InvalidInput, match=f"{name}: expected"):
                step(*arguments, **{**good, **keywords})


# Eigenproblems


def test_the_largest_matrices_are_as_the_solvers_know() -> None:
    assert native.extension().most_eigen_rows == MOST_EIGEN_ROWS


def check_pairs(matrices: Tensor, sizes: Tensor | None, unit: float = 1.0) -> None:
    with poisoned_memory():
        values, vectors = symmetric_eigen(matrices, sizes)
    expected = reference.symmetric_eigen(matrices, sizes)
    rows = matrices.shape[1]
    lengths = [rows] * len(matrices) if sizes is None else sizes.tolist()
    for g, n in enumerate(lengths):
        w = vectors[g, :n, :n]
        matrix = matrices[g, :n, :n].triu()
        matrix = matrix + matrix.triu(1).mT
        # Worst measured: 5e-15 of the largest entry times the rows.
        bound = 1e-14 * unit * max(n, 1)
        assert ((values[g, :n] - expected.values[g, :n]).abs() <= 4 * bound).all()
        assert ((matrix @ w - w * values[g, :n]).abs() <= 4 * bound).all()
        assert ((w.mT @ w - torch.eye(n, dtype=torch.float64)).abs() <= 1e-13).all()
        assert (values[g, n:] == float("inf")).all()
        assert not vectors[g, n:].any()
        assert not vectors[g, :, n:].any()


# The last is more than the shared memory of the emulation holds.
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 17, 40])
def test_eigenpairs(rows: int) -> None:
    matrices = normal(3, rows, rows, seed=rows)
    check_pairs(matrices, None)
    check_pairs(matrices, torch.tensor([rows, rows // 2, 0]))


def test_eigenpairs_of_special_matrices() -> None:
    rotation = torch.linalg.qr(normal(9, 9)).Q
    equal = (
        rotation @ torch.diag(torch.tensor([1, 1, 1, 1, -2, -2, 5, 5, 5], dtype=torch.float64)) @ rotation.mT
    )
    matrices = torch.stack(
        [
            equal,
            torch.zeros(9, 9, dtype=torch.float64),
            torch.eye(9, dtype=torch.float64),
            torch.ones(9, 9, dtype=torch.float64),
            torch.diag(torch.logspace(-200, 0, 9, dtype=torch.float64)).fliplr().flipud(),
        ]
    )
    check_pairs(matrices, None)
    check_pairs(1e-250 * matrices[:1], None, unit=1e-249)
    check_pairs(1e250 * matrices[:1], None, unit=1e251)


@pytest.mark.parametrize("eigen", ["kernel", "reference"])
def test_blocks_of_a_matrix_are_not_mixed(eigen: str) -> None:
    """Also where both have an eigenvalue: pairs before and after a breakdown."""
    block = normal(5, 5)
    block = block + block.mT
    rotation = torch.linalg.qr(normal(5, 5, seed=1)).Q
    matrices = torch.zeros(1, 10, 10, dtype=torch.float64)
    matrices[0, :5, :5], matrices[0, 5:, 5:] = block, rotation @ block @ rotation.mT
    compute = symmetric_eigen if eigen == "kernel" else reference.symmetric_eigen
    vectors = compute(matrices).vectors[0]
    first, second = vectors[:5].any(0), vectors[5:].any(0)
    assert (first ^ second).all()
    assert int(first.sum()) == 5


def test_matrices_that_are_not_finite_have_nan() -> None:
    matrices = normal(3, 7, 7)
    clean = symmetric_eigen(matrices)
    matrices[1, 2, 4] = float("nan")
    # Below the diagonal nothing is read.
    matrices[2, 4, 2] = float("inf")
    made, expected = symmetric_eigen(matrices), reference.symmetric_eigen(matrices)
    assert made.values[1].isnan().all()
    assert expected.values[1].isnan().all()
    for part, other in zip(made, clean, strict=True):
        assert torch.equal(part[::2], other[::2])


def test_residuals_of_ritz_pairs() -> None:
    """Against the reference, and against the products themselves."""
    dimension, block = 41, 3
    krylov, operator = make_krylov(dimension, block, torch.float64)
    krylov.frozen[:] = False
    for _ in range(5):
        krylov.extend(operator.multiply(krylov.active()), operator, 1e-10)
    count = int(krylov.processed.max()) + 2
    h = torch.zeros(4, count, count, dtype=torch.float64)
    h[:, : count - 2, : count - 2] = krylov.projected[:, : count - 2, : count - 2]
    values, weights = symmetric_eigen((h + h.mT) / 2, krylov.processed)
    krylov.lost += 1e-3
    given = (krylov.projected, krylov.lost, krylov.processed, krylov.sizes, values, weights)
    with poisoned_memory():
        made = ritz_residuals(*given)
    expected = reference.ritz_residuals(*given)
    for ours, theirs in zip(made, expected, strict=True):
        assert ((ours - theirs).abs() <= 1e-12).all()
    exact = ritz_residuals(krylov.projected, 0 * krylov.lost, *given[2:])
    residuals = exact.coupling.hypot(exact.noise)
    for i, p in enumerate(krylov.processed.tolist()):
        vectors = weights[i, :p, :p].mT @ krylov.basis[i, :p]
        images = operator.multiply(vectors[:, None].expand(-1, 4, -1))[:, i]
        true = (images - values[i, :p, None] * vectors).norm(dim=1)
        assert ((residuals[i, :p] - true).abs() <= 1e-10).all()
        assert not residuals[i, p:].any()


def test_wrong_eigenproblems_are_refused() -> None:
    matrices = normal(2, 4, 4)
    for compute in (symmetric_eigen, reference.symmetric_eigen):
        for wrong in (matrices.float(), matrices[:, 1:], matrices[0]):
            with pytest.raises(InvalidInput, match="matrices: expected"):
                compute(wrong)
        with pytest.raises(InvalidInput, match="sizes: expected"):
            compute(matrices, torch.tensor([4]))
    values = torch.zeros(2, 3, dtype=torch.float64)
    good = [matrices, matrices[0, :2], torch.tensor([1, 2]), torch.tensor([2, 3]), values, normal(2, 3, 3)]
    for place, name in enumerate(("projected", "lost", "processed", "sizes", "values", "weights")):
        for compute in (ritz_residuals, reference.ritz_residuals):
            wrong_one = list(good)
            wrong_one[place] = good[place][:1]
            with pytest.raises(InvalidInput, match="expected"):
                compute(*wrong_one)
        assert name


# The compiled module


def test_without_the_module_the_reference_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_extension", None)
    monkeypatch.setattr(native, "_import_error", "it is hidden")
    assert native.extension() is None
    assert "it is hidden" in native.why_missing()
    basis, sizes, block = growth_tests.make_case((2, 20, 33, 7, 5))
    other = basis.clone()
    growth = growth_tests.grow(basis, sizes, block, "cuda")
    expected = growth_tests.grow(other, sizes, block, "reference")
    assert bits_equal(basis, other)
    assert all(torch.equal(part, same) for part, same in zip(growth, expected, strict=True))
    ids, options = torch.tensor([3]), {"dtype": torch.float64, "device": "cpu"}
    assert torch.equal(
        philox_probes("normal", 1, ids, 0, 2, 9, **options),
        reference.KERNELS["philox_probes"]("normal", 1, ids, 0, 2, 9, **options),
    )
    matrices = normal(1, 5, 5)
    assert torch.equal(symmetric_eigen(matrices).values, reference.symmetric_eigen(matrices).values)


def compiled_module() -> Path:
    spec = importlib.util.find_spec("sharpcore._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("sharpcore._cuda is not built: nvcc was not found")
    return Path(spec.origin)


def test_the_module_imports_without_a_driver() -> None:
    compiled_module()
    module = importlib.import_module("sharpcore._cuda")
    assert module.device_type == "cuda"
    arguments = {"projected": 0, "lost": 0, "processed": 0, "sizes": 0, "values": 0, "weights": 0}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA: "):
            module.ritz_residuals(
                device=0, stream=0, coupling=0, noise=0, batch=1, rows=1, count=1, **arguments
            )


def test_kernels_spill_no_registers_on_any_gpu() -> None:
    library = compiled_module()
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    report = subprocess.run(
        [tool, "-res-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    architectures = {int(number) for number in re.findall(r"arch = sm_(\d+)", report)}
    assert architectures >= {80, 86, 89, 90, 100, 120}
    kernels = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    names = {name for name, *_ in kernels}
    for stem in ("multiply_kernel", "columns_kernel", "finish_kernel", "eigen_kernel", "normals_kernel"):
        assert any(stem in name for name in names), stem
    for name, registers, stack, shared, local in kernels:
        assert int(stack) == 0, name
        assert int(local) == 0, name
        assert int(registers) <= 128, name
        assert int(shared) <= 48 * 1024, name
