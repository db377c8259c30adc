"""A step of block Lanczos on a GPU, from the products to the next block: kernels, a loop of torch operations.

    pytest benchmarks/bench_lanczos_step.py -s

The unit is a copy of the bases. The last row is the bandwidth of the step, which counts what it must move at
least (three readings of the bases, and the blocks), beside that of the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sharpcore.backends.reference.lanczos_step import LanczosState
from sharpcore.backends.reference.lanczos_step import lanczos_step as loop_of_torch_operations

REPEATS = 20


def needs_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    pytest.importorskip("triton")
    from sharpcore.backends.cuda.native import extension, why_missing

    if extension() is None:
        pytest.skip(why_missing())


def make_step(samples: int, dimension: int, size: int, block: int) -> tuple[LanczosState, Tensor, Tensor]:
    """A state with `size` rows of which `block` are to be multiplied, its counters, and their products."""
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float64}
    rows = size + block
    basis = torch.zeros(samples, rows, dimension, **options)
    random = torch.randn(samples, dimension, size, generator=generator, **options)
    basis[:, :size] = torch.linalg.qr(random).Q.mT
    counters = torch.zeros(6, samples, dtype=torch.int64, device="cuda")
    counters[0], counters[1] = size, size - block
    state = LanczosState(
        basis,
        torch.zeros(samples, rows, rows, **options),
        torch.zeros(samples, rows, **options),
        torch.zeros(samples, **options),
        *counters[:5],
        torch.zeros(samples, dtype=torch.bool, device="cuda"),
        counters[5],
    )
    products = torch.randn(block, samples, dimension, generator=generator, device="cuda")
    return state, counters, products


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """REPEATS replays of a CUDA graph of `run`, to their end."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        for _ in range(REPEATS):
            graph.replay()
        torch.cuda.synchronize()

    return replay


@pytest.mark.parametrize(
    ("samples", "dimension", "size", "block"),
    [pytest.param(8, 16384, 64, 8, id="sd"), pytest.param(1, 65536, 256, 4, id="wide")],
)
def test_lanczos_step(
    table: Any, benchmark: Any, samples: int, dimension: int, size: int, block: int
) -> None:
    needs_gpu()
    from sharpcore.backends.cuda.lanczos_step import lanczos_step

    state, counters, products = make_step(samples, dimension, size, block)
    before, out = counters.clone(), torch.empty_like(products)
    options: dict[str, Any] = {"share": 1e-5, "tolerance": 1e-5, "limit": size + block, "out": out}
    source, target = state.basis[:, :size].clone(), torch.empty_like(state.basis[:, :size])
    identity = torch.eye(size + block, dtype=torch.float64, device="cuda")

    def kernels() -> None:
        counters.copy_(before)
        lanczos_step(state, products, **options)

    def loop() -> None:
        counters.copy_(before)
        loop_of_torch_operations(state, products, **options)
        torch.cuda.synchronize()

    def error(_: Any) -> float:
        """Of the rows that were grown last, in place."""
        return float((state.basis @ state.basis.mT - identity).abs().max())

    table.add("copy", captured(lambda: target.copy_(source)), per=REPEATS)
    step = table.add("kernels, one CUDA graph", captured(kernels), per=REPEATS, error=error)
    table.add("loop of torch operations", loop, error=error)
    benchmark.pedantic(table.measure, rounds=1)
    blocks = block * samples * dimension
    # Products read three times, remainders written and read, rows written and read, the next block written.
    least = 3 * source.nbytes + blocks * (3 * 4 + 2 * 8 + 2 * 8 + 4)
    ratio = step.record()["ratio"]
    share = None if ratio is None else least / (2 * source.nbytes) / ratio
    table.add_row("share of the copy's bandwidth", derived=share)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
