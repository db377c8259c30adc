"""Products with the Jacobian of a score network against every rival, in forward passes.

    pytest benchmarks/bench_linearize.py -s            # config "mid", minutes
    pytest benchmarks/bench_linearize.py -s -m sd14    # Stable Diffusion 1.4's size

The unit is one forward pass without gradients, through fused attention, of the same batch.
"""

from __future__ import annotations

import time
from typing import Any

import baselines
import configs
import pytest
import torch
from oracles import double_backward_jvp, oracle_vjp
from torch import Tensor

import sharpcore
from sharpcore.testing.tolerance import relative_error


def test_mid(table: Any, benchmark: Any) -> None:
    pair = configs.mid()
    f, x = pair.f, pair.x
    tangents = torch.randn((8, *x.shape), generator=torch.Generator().manual_seed(1))
    one, four = tangents[:1], tangents[:4]

    high = pair.to(torch.float64)
    with torch.no_grad():
        value = high.f(high.x)
    products = double_backward_jvp(high.f, high.x, tangents[:2].double())
    pulled = oracle_vjp(high.f, high.x, one.double())
    del high

    def product_error(result: Tensor) -> float:
        return relative_error(result[:2], products[: len(result)])

    def value_error(result: Tensor | sharpcore.Linearization) -> float:
        return relative_error(result if isinstance(result, Tensor) else result.value, value)

    def pulled_error(result: Tensor) -> float:
        return relative_error(result, pulled)

    linearization = sharpcore.linearize(f, x)
    start = time.perf_counter()
    torch_linear = baselines.torch_linearize(f, x)
    setup = time.perf_counter() - start

    add = table.add
    add("forward", lambda: baselines.no_grad_forward(f, x), error=value_error)
    add("linearize (trace)", lambda: sharpcore.linearize(f, x), error=value_error)
    add("relinearize", lambda: linearization.relinearize(x), error=value_error)
    add("product, K=1", lambda: linearization.jvp(one), error=product_error)
    add("product, K=8, per tangent", lambda: linearization.jvp(tangents), per=8, error=product_error)
    add("transposed product, K=1", lambda: linearization.vjp(one), error=pulled_error)
    add("central difference", lambda: baselines.central_difference(f, x, one), error=product_error)
    add("autograd vjp, with its forward", lambda: oracle_vjp(f, x, one), error=pulled_error, turns=2)
    add("torch.func.linearize, product", lambda: torch_linear(one), error=product_error, turns=2)
    add("torch.func.jvp", lambda: baselines.forward_mode_jvp(f, x, one), error=product_error, turns=2)
    add("double-backward jvp", lambda: double_backward_jvp(f, x, one), error=product_error, turns=2)
    add(
        "vmap(jvp), K=4, per tangent",
        lambda: baselines.vmap_jvp(f, x, four),
        per=4,
        error=product_error,
        turns=2,
    )
    benchmark.pedantic(table.measure, rounds=1)
    table.add_once("torch.func.linearize, set-up", setup)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})


@pytest.mark.sd14
def test_sd14(table: Any, benchmark: Any) -> None:
    """Stable Diffusion 1.4's UNet, guidance pair at 64x64; peak memory is that of the whole process."""
    resource = pytest.importorskip("resource")
    pair = configs.sd14()
    f, x = pair.f, pair.x
    tangents = torch.randn((4, *x.shape), generator=torch.Generator().manual_seed(1))
    baselines.no_grad_forward(f, x)
    forward_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    start = time.perf_counter()
    linearization = sharpcore.linearize(f, x)
    first_trace = time.perf_counter() - start
    linear_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    table.turns = min(table.turns, 3)
    table.add("forward", lambda: baselines.no_grad_forward(f, x))
    table.add("relinearize", lambda: linearization.relinearize(x))
    table.add("product, K=1", lambda: linearization.jvp(tangents[:1]))
    table.add("product, K=4, per tangent", lambda: linearization.jvp(tangents), per=4, turns=2)
    table.add("central difference", lambda: baselines.central_difference(f, x, tangents[:1]), turns=2)
    benchmark.pedantic(table.measure, rounds=1)
    table.add_once("linearize (first trace)", first_trace)
    beyond = first_trace - table.rows[0].quartiles()[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = {
        "trace beyond one forward, s": beyond,
        "peak after a forward, GiB": forward_peak,
        "peak after linearizing, GiB": linear_peak,
        "peak with K=4 products, GiB": peak,
        "kept for the derivative, GiB": linearization.nbytes / 2**30,
    }
    print("".join(f"\n{what}: {number:.2f}" for what, number in memory.items()))
    benchmark.extra_info.update(memory)
    benchmark.extra_info.update({record["what"]: record["ratio"] for record in table.records()})
