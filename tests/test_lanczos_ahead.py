"""Solvers whose device takes several steps between two looks, on a device that is played by the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from emulated_cuda import build, in_place_of_the_gpu
from interpreted import needs_triton
from torch import Tensor

from sharpcore import Hessian, linearize
from sharpcore.backends import Backend, reference
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov import arnoldi, block_lanczos, decomposition
from sharpcore.krylov.operator import BatchedOperator
from sharpcore.krylov.solution import Result


def play(monkeypatch: pytest.MonkeyPatch, own: Mapping[str, Any]) -> list[int]:
    """Let solvers take the CPU for a GPU with these kernels; lists how many steps go by at a time."""
    taken: list[int] = []
    backend = Backend("cuda", {**reference.KERNELS, **own})
    monkeypatch.setattr(decomposition, "get_backend", lambda *_, **__: backend)
    go_ahead = decomposition.Decomposition.go_ahead

    def counted(self: Any, operator: Any, tolerance: float, count: int) -> None:
        taken.append(count)
        go_ahead(self, operator, tolerance, count)

    monkeypatch.setattr(decomposition.Decomposition, "go_ahead", counted)
    return taken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The device takes the reference's steps."""
    return play(monkeypatch, {})


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    d = len(values)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return (q * values.double()) @ q.mT


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("max_basis", [None, 24])
def test_pairs_are_those_of_single_steps(steps: list[int], block: int, max_basis: int | None) -> None:
    spectra = (torch.linspace(-3, 1, 60), torch.cat([torch.full((50,), -1.0), torch.arange(10.0)]))
    a = torch.stack([symmetric(values, seed) for seed, values in enumerate(spectra)])
    solution = block_lanczos(a, 2, "both", block=block, max_basis=max_basis)
    assert solution.results == (Result.converged, Result.converged)
    expected = torch.linalg.eigvalsh(a)
    torch.testing.assert_close(solution.values, expected[:, [0, 1, -2, -1]], rtol=0, atol=1e-9)
    assert max(steps) > 1
    assert all(count > 1 for count in steps)


@needs_triton
def test_the_cuda_sources_run_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharpcore.backends import cuda

    steps = play(monkeypatch, cuda.KERNELS)
    a = torch.stack([symmetric(torch.linspace(-3, 1, 20)), symmetric(torch.arange(5.0).repeat(4))])
    with in_place_of_the_gpu(build()):
        solution = block_lanczos(a, 2, "both", block=2)
    assert solution.results == (Result.converged, Result.converged)
    expected = torch.linalg.eigvalsh(a)[:, [0, 1, -2, -1]]
    torch.testing.assert_close(solution.values, expected, rtol=0, atol=1e-9)
    assert steps


def test_closed_sequences_wait_for_the_look(steps: list[int]) -> None:
    """Five eigenvalues, all multiple: every sequence closes after five steps, in the middle of a stretch."""
    a = symmetric(torch.arange(5.0).repeat(8))
    solution = block_lanczos(a, 9, "largest")
    assert solution.result is Result.converged
    expected = torch.tensor([3.0] + [4.0] * 8).double()
    torch.testing.assert_close(solution.values[0], expected, rtol=0, atol=1e-9)
    assert int(solution.stats.breakdowns) >= 8
    assert steps


def test_jacobians_that_are_not_symmetric(steps: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 40, 40, generator=generator, dtype=torch.float64)
    solution = arnoldi(a, 2, "largest")
    expected = torch.linalg.eigvals(a).real.sort(dim=1).values
    torch.testing.assert_close(solution.values.real[:, -1], expected[:, -1], rtol=0, atol=1e-8)
    assert steps


def test_a_product_that_is_not_finite_is_named_at_the_next_look(steps: list[int]) -> None:
    def after(number: int, factor: float) -> Callable[[Tensor], Tensor]:
        calls = [0]

        def multiply(block: Tensor) -> Tensor:
            calls[0] += 1
            out = block * torch.linspace(1, 2, 30, dtype=torch.float64)
            return torch.stack([out[:, 0], out[:, 1] * (factor if calls[0] > number else 1)], 1)

        return multiply

    def operator(number: int, factor: float) -> BatchedOperator:
        return BatchedOperator(after(number, factor), samples=2, dimension=30, dtype=torch.float64)

    with pytest.raises(NonFiniteError, match="in a product of sample 1"):
        block_lanczos(operator(6, float("nan")), 3)
    with pytest.raises(InvalidInput, match="between 1e-140 and 1e140"):
        block_lanczos(operator(6, 1e200), 3)
    assert steps


def test_the_hessian_of_a_network(steps: list[int]) -> None:
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hessian = Hessian(linearize(lambda x: torch.tanh(x @ (weight + weight.T)) @ (weight + weight.T), x))
    solution = block_lanczos(hessian, 2, "both")
    matrix = (hessian @ torch.eye(36, dtype=torch.float64).reshape(36, 3, 12)).reshape(36, 36)
    for i in range(3):
        part = matrix[12 * i : 12 * i + 12, 12 * i : 12 * i + 12]
        expected = torch.linalg.eigvalsh(part)[[0, 1, -2, -1]]
        torch.testing.assert_close(solution.values[i], expected, rtol=0, atol=1e-9)
    assert steps


def test_few_products_are_not_passed(steps: list[int]) -> None:
    a = symmetric(torch.linspace(-3, 1, 60))
    for most in (5, 9, 16):
        solution = block_lanczos(a, 3, "both", max_products=most)
        assert solution.stats.products <= most
        assert solution.result is Result.not_converged
