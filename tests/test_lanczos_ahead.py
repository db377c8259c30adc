"""Solvers whose device takes several steps between two looks, on a device that is played by the CPU."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from emulated_cuda import build, in_place_of_the_gpu
from interpreted import needs_triton
from torch import Tensor

from sharpcore import Hessian, linearize
from sharpcore.backends import Backend, reference
from sharpcore.errors import InvalidInput, NonFiniteError
from sharpcore.krylov import arnoldi, block_lanczos, decomposition, device_steps
from sharpcore.krylov.decomposition import Ritz
from sharpcore.krylov.device_steps import DeviceSteps
from sharpcore.krylov.operator import BatchedOperator
from sharpcore.krylov.run import Progress
from sharpcore.krylov.solution import Result

block_lanczos_run: Any = sys.modules["sharpcore.krylov.block_lanczos"]._Lanczos


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
    # The first products are looked at one by one, and those near the end of a basis.
    assert max(steps) > 1
    assert steps[:3] == [1, 1, 1]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what a look calls: kernels of the device, and eigenvalue solvers of PyTorch."""
    counted: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            counted[name] += 1
            return function(*arguments, **keywords)

        return call

    own = cuda_kernels() if importlib.util.find_spec("triton") else {}
    kernels = {**reference.KERNELS, **own}
    play(
        monkeypatch,
        {name: counting(name, kernels[name]) for name in ("symmetric_eigen", "ritz_residuals")}
        | {name: kernel for name, kernel in own.items() if name not in ("symmetric_eigen", "ritz_residuals")},
    )
    monkeypatch.setattr(torch.linalg, "eigh", counting("eigh", torch.linalg.eigh))
    return counted


def cuda_kernels() -> Mapping[str, Any]:
    return importlib.import_module("sharpcore.backends.cuda").KERNELS


@needs_triton
@pytest.mark.parametrize("max_basis", [None, 14])
def test_the_cuda_sources_run_in_threads(looks: Counter[str], max_basis: int | None) -> None:
    """Steps and looks, with restarts and without, on samples that stand at different places: in the second
    one sequences close."""
    spectra = (torch.linspace(-3, 1, 20), torch.arange(5.0).repeat(4))
    a = torch.stack([symmetric(values, seed) for seed, values in enumerate(spectra)])
    seen: list[Progress] = []
    with in_place_of_the_gpu(build()):
        solution = block_lanczos(a, 2, "both", block=2, max_basis=max_basis, progress=seen.append)
    assert solution.results == (Result.converged, Result.converged)
    expected = torch.linalg.eigvalsh(a)[:, [0, 1, -2, -1]]
    torch.testing.assert_close(solution.values, expected, rtol=0, atol=1e-9)
    images = torch.einsum("bij,bkj->bki", a, solution.vectors)
    off = (images - solution.values[..., None] * solution.vectors).norm(dim=2)
    torch.testing.assert_close(solution.residuals, off, rtol=0, atol=1e-10)
    assert (solution.stats.restarts > 0) == (max_basis is not None)
    # One eigenproblem for all samples at each look (and restart), none of them on the CPU.
    assert looks["symmetric_eigen"] == looks["ritz_residuals"] >= len(seen)
    assert looks["eigh"] == 0


class Played:
    """As a CUDA graph: what is recorded does not run, and runs again at every launch."""

    launches: ClassVar[list[int]] = []

    def record(self, work: Callable[[], Any]) -> Any:
        state = DeviceSteps.last._state  # type: ignore[attr-defined]
        kept = [tensor.clone() for tensor in state]
        self.work, self.out = work, work()
        for tensor, before in zip(state, kept, strict=True):
            tensor.copy_(before)
        self.out.fill_(float("nan"))
        return self.out

    def launch(self) -> None:
        self.launches.append(len(self.out))
        self.out.copy_(self.work())


@pytest.mark.parametrize("block", [1, 3])
def test_steps_are_recorded(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The first step of each width runs as it is; the numbers are those of steps that are not recorded."""
    play(monkeypatch, {})
    a = torch.stack([symmetric(torch.linspace(-3, 1, 60)), symmetric(torch.arange(5.0).repeat(12))])
    expected = block_lanczos(a, 2, "both", block=block, max_basis=24)
    made, init = [], DeviceSteps.__init__

    def noted(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)
        monkeypatch.setattr(DeviceSteps, "last", self, raising=False)

    monkeypatch.setattr(DeviceSteps, "__init__", noted)
    monkeypatch.setattr(device_steps, "graph_maker", lambda device: Played)
    monkeypatch.setattr(Played, "launches", [])
    recorded = block_lanczos(a, 2, "both", block=block, max_basis=24)
    assert torch.equal(recorded.values, expected.values)
    assert torch.equal(recorded.residuals, expected.residuals)
    assert not made[0].refused
    # Every call of the operator but the first of each width (a random vector may join the block at the end).
    assert {block} <= set(Played.launches) <= {block, block + 1}
    assert len(Played.launches) >= recorded.stats.steps - 2 - int(recorded.stats.breakdowns.sum())


def test_looks_of_the_device_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples that stand at different places of the recursion, and after a breakdown."""
    spectra = (torch.linspace(-3, 1, 40), torch.arange(5.0).repeat(8), torch.zeros(40))
    a = torch.stack([symmetric(values, seed) for seed, values in enumerate(spectra)])
    pairs, compared = block_lanczos_run.pairs, []

    def both(self: Any, samples: Tensor) -> Iterator[Ritz]:
        for ours in pairs(self, samples):
            group, processed = ours.samples, ours.values.shape[1]
            start, size = int(self.krylov.start[group[0]]), int(self.krylov.sizes[group[0]])
            other = self._pairs(group, start, processed, size)
            scale = 1 + float(other.norm.max())
            for name in ("values", "noise", "residuals", "norm"):
                assert ((getattr(ours, name) - getattr(other, name)).abs() <= 1e-12 * scale).all(), name
            # Equal values are ordered as they come.
            assert torch.equal(ours.fresh.sum(1), other.fresh.sum(1))
            images = self.krylov.projected[group, :processed, :processed] @ ours.weights
            off = (images - ours.weights * ours.values[:, None]).norm(dim=1)
            assert (off <= ours.noise + 1e-12 * scale).all()
            compared.append((start, processed))
            yield ours

    monkeypatch.setattr(block_lanczos_run, "pairs", both)
    play(monkeypatch, {})
    block_lanczos(a, 4, "both", block=2)
    assert any(start > 0 for start, _ in compared)
    assert len({processed for _, processed in compared}) > 1


def test_bases_beyond_the_eigenproblems_of_the_device(
    looks: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["sharpcore.krylov.block_lanczos"], "MOST_EIGEN_ROWS", 12)
    a = symmetric(torch.linspace(-3, 1, 60))
    solution = block_lanczos(a, 2, "both", block=2)
    expected = torch.linalg.eigvalsh(a)[None, [0, 1, -2, -1]]
    torch.testing.assert_close(solution.values, expected, rtol=0, atol=1e-9)
    assert looks["symmetric_eigen"] > 0
    assert looks["eigh"] > 0


def test_a_failed_stretch_leaves_the_run_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Saved and resumed, to the numbers of a run that was never interrupted."""
    taken = play(monkeypatch, {})
    a = symmetric(torch.linspace(-3, 1, 60))
    fails = [False]

    def multiply(block: Tensor) -> Tensor:
        if fails[0]:
            raise torch.OutOfMemoryError("CUDA out of memory (played)")
        fails[0] = len(taken) == 6 and taken[-1] > 1
        return block @ a

    operator = BatchedOperator(multiply, samples=1, dimension=60, dtype=torch.float64)
    path = tmp_path / "run.pt"
    with pytest.raises(torch.OutOfMemoryError):
        block_lanczos(operator, 2, "both", checkpoint=path)
    assert path.exists()
    fails[0], taken[:] = False, [0] * 100
    resumed = block_lanczos(operator, 2, "both", checkpoint=path)
    whole = block_lanczos(operator, 2, "both")
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.residuals, whole.residuals)


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
