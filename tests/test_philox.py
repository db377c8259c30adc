"""Random probes: published answers, the same bits on every way to them, the distributions they promise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from kernel_checks import each_isa, for_threads, needs_extension, poisoned_memory, run_with_isa
from scipy import stats
from torch import Tensor

from sharpcore.backends import cpu, get_backend, reference
from sharpcore.backends.reference import philox
from sharpcore.errors import InvalidInput
from sharpcore.krylov.probes import probes

KINDS = philox.KINDS
DIMENSIONS = (1, 2, 7, 33, 127, 128, 129, 1025, 2047, 2048, 2049, 20001)
IDS = (0, 1, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1)
SEEDS = (0, 42, 2**32, 2**63 - 1)

each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("backend", [reference, pytest.param(cpu, marks=needs_extension)])

# Rows "philox4x32 10" of tests/kat_vectors in Random123: counter, key, what comes of them.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


def make(backend, kind: str, dimension: int, *, seed=42, ids=(0, 3), first=0, count=2, dtype=torch.float64):
    return backend.philox_probes(
        kind, seed, torch.tensor(ids), first, count, dimension, dtype=dtype, device="cpu"
    )


def block_of_words(kind: str, seed: int, sample: int, probe: int, block: int) -> list[int]:
    """Philox4x32-10 again, in integers without a bound."""
    low = 2**32 - 1
    c = [KINDS.index(kind) << 30 | block, probe, sample & low, sample >> 32]
    k = [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, answer: str) -> None:
    made = philox.philox(tuple(torch.tensor(word) for word in words(counter)), words(key))
    assert tuple(int(word) for word in made) == words(answer)


@each_backend
def test_known_answer_is_seen_in_the_signs(backend) -> None:
    """All is zero in the first block of the first probe."""
    signs = make(backend, "rademacher", 128, seed=0, ids=(0,), count=1).flatten()
    expected = [1 - 2 * (word >> i & 1) for word in words(KNOWN_ANSWERS[0][2]) for i in range(32)]
    assert signs.tolist() == expected


@each_backend
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 77, 2**32 - 2])
def test_elements_are_made_of_the_bits_that_are_said(backend, seed: int, first: int) -> None:
    signs = make(backend, "rademacher", 300, seed=seed, ids=IDS, first=first)
    normals = make(backend, "normal", 9, seed=seed, ids=IDS, first=first)
    for i in range(2):
        for j, sample in enumerate(IDS):
            for element in (0, 31, 32, 127, 128, 299):
                block = block_of_words("rademacher", seed, sample, first + i, element // 128)
                bit = block[element % 128 // 32] >> element % 32 & 1
                assert signs[i, j, element] == 1 - 2 * bit
            for element in (0, 1, 8):
                w = block_of_words("normal", seed, sample, first + i, element // 2)
                u = (((w[1] << 32 | w[0]) >> 12) + 0.5) / 2**52
                t = ((((w[3] << 32 | w[2]) >> 10) & 2**52 - 1) + 0.5) / 2**52 - 0.5
                radius = (-1) ** (w[3] >> 31) * math.sqrt(-2 * math.log(u))
                pair = radius * math.cos(math.pi * t / 2), radius * math.sin(math.pi * t / 2)
                expected = pair[(element + (w[3] >> 30 & 1)) % 2]
                # Worst measured: 3e-16 relative.
                assert float(normals[i, j, element]) == pytest.approx(expected, rel=2e-15)


@needs_extension
@each_kind
@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_kernel_equals_reference_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    for dimension in DIMENSIONS:
        for seed, first in ((0, 0), (2**63 - 1, 2**32 - 3)):
            expected = make(reference, kind, dimension, seed=seed, ids=IDS[1:], first=first, count=3)
            with poisoned_memory():
                result = make(cpu, kind, dimension, seed=seed, ids=IDS[1:], first=first, count=3, dtype=dtype)
            assert result.dtype == dtype
            assert result.is_contiguous()
            assert torch.equal(result, expected.to(dtype)), (dimension, seed)


ISA = f"""
import torch
ids = torch.tensor({IDS})
for kind in {KINDS}:
    for dimension in (1, 7, 33, 129, 1025, 5001):
        expected = reference.philox_probes(kind, 7, ids, 5, 2, dimension, dtype=torch.float64, device="cpu")
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for threads in (1, 2):
                torch.set_num_threads(threads)
                made = cpu.philox_probes(kind, 7, ids, 5, 2, dimension, dtype=dtype, device="cpu")
                assert torch.equal(made, expected.to(dtype)), (kind, dimension, dtype, threads)
"""


@needs_extension
@each_isa
def test_every_instruction_set(isa: str) -> None:
    run_with_isa(isa, ISA)


@needs_extension
@each_kind
def test_number_of_threads_changes_no_bit(kind: str) -> None:
    one, *others = for_threads(lambda: make(cpu, kind, 40001, ids=range(3), count=3))
    assert all(torch.equal(one, other) for other in others)


@each_backend
@each_kind
@pytest.mark.parametrize("dimension", [1, 7, 33, 1025])
def test_splits_change_no_bit(backend, kind: str, dimension: int) -> None:
    whole = make(backend, kind, dimension, ids=IDS, count=5)
    for i in range(5):
        for j, sample in enumerate(IDS):
            one = make(backend, kind, dimension, ids=(sample,), first=i, count=1)
            assert torch.equal(one, whole[i : i + 1, j : j + 1])
    assert torch.equal(
        make(backend, kind, dimension, ids=IDS[::-2], first=2, count=3), whole[2:].flip(1)[:, ::2]
    )
    assert make(backend, kind, dimension, ids=IDS, count=0).shape == (0, len(IDS), dimension)
    if kind != "sphere":
        for fewer in {1, dimension // 2, dimension} - {0}:
            assert torch.equal(make(backend, kind, fewer, ids=IDS, count=5), whole[..., :fewer])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@each_kind
def test_a_gpu_makes_the_same_bits(kind: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for dimension in DIMENSIONS:
            arguments = {"samples": IDS, "count": 3, "dimension": dimension, "dtype": dtype}
            made = probes(kind, 9, **arguments, device="cuda")
            assert made.is_cuda
            assert torch.equal(made.cpu(), probes(kind, 9, **arguments))


def units_off(result: Tensor, exact: np.ndarray) -> float:
    """The largest error, in units in the last place."""
    made = result.numpy()
    return float(np.max(np.abs(made - exact) / np.spacing(np.abs(made))))


def test_logarithm_and_trigonometry_are_accurate() -> None:
    """Against NumPy in extended precision, where the machine has one. Measured: 0.9, 1.6 and 1.3 units."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(400_000, generator=generator, dtype=torch.float64).clamp(min=2**-53)
    u = torch.cat([u, 1 - u[:100_000] / 1000, u[:100_000] ** 20 + 2**-53, torch.tensor([2**-53, 1 - 2**-53])])
    assert units_off(philox.log(u), np.log(u.numpy().astype(np.longdouble))) <= 2
    t = torch.rand(400_000, generator=generator, dtype=torch.float64) - 0.5
    t = torch.cat([t, t[:100_000] / 1000, t[:100_000] ** 9, torch.tensor([0.5, -0.5, 2**-53, 0.0])])
    angle = t.numpy().astype(np.longdouble) * (2 * np.arctan(np.longdouble(1)))
    sine, cosine = philox.sincos(t)
    assert units_off(sine, np.sin(angle)) <= 2
    assert units_off(cosine, np.cos(angle)) <= 2


def test_extreme_words_give_finite_numbers_that_are_not_zero() -> None:
    edges = torch.tensor([0, 1, 2**12, 2**29 - 1, 2**29, 2**31 - 1, 2**31, 2**32 - 1])
    pair = torch.stack(philox.box_muller(tuple(torch.cartesian_prod(edges, edges, edges, edges).T)))
    assert pair.isfinite().all()
    assert (pair != 0).all()
    assert float(pair.norm(dim=0).max()) == pytest.approx(math.sqrt(2 * 53 * math.log(2)))
    assert 8.57 < pair.abs().max() < 8.58


def test_normal_numbers_are_normal() -> None:
    z = probes("normal", 1, samples=range(8), count=16, dimension=3125)
    z = z.flatten()  # 400,000
    for part in (z, z[0::2], z[1::2]):
        assert stats.kstest(part.numpy(), "norm").pvalue > 0.01
    # The middle on its own, where radii are of logarithms near zero.
    assert stats.kstest(z[z.abs() < 0.1].numpy(), stats.truncnorm(-0.1, 0.1).cdf).pvalue > 0.01
    # Standard deviations of the moments of 400,000 numbers: sqrt((E z^2k - (E z^k)^2) / n).
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / z.numel())


def test_tails_reach_beyond_five_sigma() -> None:
    z = probes("normal", 2, samples=range(32), count=8, dimension=32768, dtype=torch.float32).abs()
    assert z.isfinite().all()
    for sigma in (3, 4, 5):
        expected = 2 * stats.norm.sf(sigma) * z.numel()
        assert stats.poisson.sf(int((z > sigma).sum()) - 1, expected) > 1e-3, sigma
        assert stats.poisson.cdf(int((z > sigma).sum()), expected) > 1e-3, sigma
    assert z.max() > 5


def test_signs_are_balanced() -> None:
    z = probes("rademacher", 3, samples=range(16), count=64, dimension=1280)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    # Sums over probes and samples, one for each element: each bit of a block on its own.
    sums = z.sum((0, 1)) / math.sqrt(16 * 64)
    assert stats.kstest(sums.numpy(), "norm").pvalue > 0.01
    assert abs(float(z.sum())) < 4 * math.sqrt(z.numel())
    # Runs of equal signs along elements.
    assert abs(float((z[..., 1:] * z[..., :-1]).sum())) < 4 * math.sqrt(z.numel())


def test_sphere_is_the_sphere_of_radius_root_d() -> None:
    for dimension in (1, 2, 3, 100, 2049):
        z = probes("sphere", 4, samples=range(50), count=40, dimension=dimension)
        # Worst measured: 7e-16.
        assert ((z * z).sum(-1) / dimension - 1).abs().max() < 1e-14
    z = probes("sphere", 4, samples=range(50), count=40, dimension=3)
    # Archimedes: coordinates on the sphere in three dimensions are uniform.
    for axis in range(3):
        assert stats.kstest(z[..., axis].flatten().numpy() / math.sqrt(3), "uniform", (-1, 2)).pvalue > 0.01
    z = probes("sphere", 4, samples=range(50), count=40, dimension=10).flatten(0, 1)
    assert stats.kstest((z[:, 0] ** 2 / 10).numpy(), "beta", (0.5, 4.5)).pvalue > 0.01


@each_kind
def test_probes_samples_elements_seeds_and_kinds_are_independent(kind: str) -> None:
    """Correlations of rows of 20,000 numbers: the largest of some 2,000 is below 5 standard deviations."""
    rows = probes(kind, 5, samples=(0, 1, 2, 2**32, 2**33), count=6, dimension=20_000).flatten(0, 1)
    rows = torch.cat(
        [
            rows,
            *(probes(kind, seed, samples=(0, 1), count=2, dimension=20_000)[:, 0] for seed in (6, 5 + 2**32)),
            *(
                probes(kind, 5, samples=(1,), first=2**k, count=1, dimension=20_000)[:, 0]
                for k in (8, 16, 31)
            ),
            *(
                probes(other, 5, samples=(0,), count=2, dimension=20_000)[:, 0]
                for other in KINDS
                if other != kind
            ),
            rows[:3].roll(1, 1),
            rows[:3].roll(2, 1),
            rows[:3].roll(128, 1),
        ]
    )
    for numbers in (rows, rows.abs() - rows.abs().mean(1, keepdim=True)):
        if numbers.norm() == 0:
            continue
        numbers = numbers[numbers.norm(dim=1) > 0]
        correlations = numbers @ numbers.T / 20_000
        scale = correlations.diagonal().sqrt()
        correlations = (correlations / scale / scale[:, None]).fill_diagonal_(0)
        assert correlations.abs().max() < 5 / math.sqrt(20_000)


def test_second_moment_is_the_identity() -> None:
    for kind in KINDS:
        z = probes(kind, 6, samples=range(100), count=100, dimension=12).flatten(0, 1)
        assert (z.T @ z / len(z) - torch.eye(12)).abs().max() < 5 * math.sqrt(2 / len(z))


def test_public_function_takes_what_counts_as_integers() -> None:
    expected = make(get_backend("auto", device="cpu", dtype=torch.float64), "normal", 5, ids=(0, 3, 2**40))
    arguments = {"count": np.int64(2), "dimension": np.int32(5)}
    for samples in (
        (0, 3, 2**40),
        [0, np.int64(3), 2**40],
        torch.tensor([0, 3, 2**40]),
        np.array([0, 3, 2**40]),
    ):
        made = probes("normal", np.int64(42), samples=samples, **arguments)
        assert torch.equal(made, expected)
    assert torch.equal(
        probes("normal", 42, samples=torch.tensor([3], dtype=torch.int32), first=1, **arguments)[:1],
        expected[1:, 1:2],
    )
    assert probes("normal", 42, samples=[], **arguments).shape == (2, 0, 5)
    half = probes("normal", 42, samples=(0, 3, 2**40), dtype=torch.float16, **arguments)
    assert torch.equal(half, expected.to(torch.float16))


def test_wrong_arguments_are_refused() -> None:
    right = {"samples": (0,), "count": 1, "dimension": 4}
    wrong = (
        ("kind", {"kind": "gaussian"}, "rademacher, normal, sphere, got 'gaussian'"),
        ("seed", {"seed": -1}, "2\\^63 - 1, got -1"),
        ("seed", {"seed": 2**63}, "2\\^63 - 1, got 9223372036854775808"),
        ("seed", {"seed": 0.5}, "an integer, got 0.5"),
        ("samples", {"samples": (0, -1)}, "got -1"),
        ("samples", {"samples": (2**63,)}, "got 9223372036854775808"),
        ("samples", {"samples": (0, 1.5)}, "integers, got"),
        ("samples", {"samples": "12"}, "integers, got '12'"),
        ("samples", {"samples": 3}, "integers, got 3"),
        ("samples", {"samples": torch.zeros(2)}, "float32"),
        ("samples", {"samples": torch.zeros(2, dtype=torch.bool)}, "bool"),
        ("samples", {"samples": torch.zeros(2, 2, dtype=torch.int64)}, "\\[2, 2\\]"),
        ("first, count", {"first": -1}, "got -1 and 1"),
        ("first, count", {"count": -1}, "got 0 and -1"),
        ("first, count", {"first": 2**32}, "got 4294967296 and 1"),
        ("count", {"count": "3"}, "an integer, got '3'"),
        ("dimension", {"dimension": 0}, "got 0"),
        ("dimension", {"dimension": 2**31 + 1}, "got 2147483649"),
        ("dimension", {"dimension": 4.0}, "an integer, got 4.0"),
        ("dtype", {"dtype": torch.int64}, "got torch.int64"),
        ("dtype", {"dtype": "float32"}, "got 'float32'"),
        ("device", {"device": "abacus"}, "got 'abacus'"),
    )
    for name, change, got in wrong:
        arguments = {"kind": "normal", "seed": 0, **right, **change}
        with pytest.raises(InvalidInput, match=f"{name}: expected .*{got}"):
            probes(arguments.pop("kind"), arguments.pop("seed"), **arguments)


@each_backend
def test_kernels_check_what_is_theirs(backend) -> None:
    for ids in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([3, -4])):
        with pytest.raises(InvalidInput, match="sample_ids: expected"):
            backend.philox_probes("normal", 0, ids, 0, 1, 3, dtype=torch.float64, device="cpu")
    with pytest.raises(InvalidInput, match="dtype: expected"):
        backend.philox_probes("normal", 0, torch.tensor([0]), 0, 1, 3, dtype=torch.int32, device="cpu")


def test_generators_of_the_process_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    made = [probes(kind, 0, samples=(0,), count=1, dimension=100) for kind in KINDS]
    torch.manual_seed(int(torch.randint(100, (), generator=torch.Generator().manual_seed(1))))
    again = [probes(kind, 0, samples=(0,), count=1, dimension=100) for kind in KINDS]
    torch.set_rng_state(before[0])
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
