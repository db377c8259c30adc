"""Numbers that are not finite, changed weights, and everything that linearize must leave alone."""

from __future__ import annotations

import copy
import re
import threading
from typing import Any

import networks
import pytest
import torch
import torch.nn.functional as F
from oracles import forward_mode_jvp, oracle_jvp, oracle_vjp
from small_network import Small, normal, small_network
from torch import Tensor, nn

import sharpcore
from sharpcore import InvalidInput, NonFiniteError, SharpcoreError, linearize
from sharpcore.testing.tolerance import assert_error_at_most, relative_error


@pytest.fixture
def net() -> Small:
    return small_network()


@pytest.fixture
def x() -> Tensor:
    return normal(2, 3, 5, 4)


@pytest.fixture
def tangents() -> Tensor:
    return normal(3, 2, 3, 5, 4, seed=2)


# Numbers that are not finite.


def test_weights_that_are_not_finite(net: Small, x: Tensor) -> None:
    with torch.no_grad():
        net.qkv.weight[3, 2] = float("nan")
    with pytest.raises(NonFiniteError) as error:
        linearize(net, x)
    assert "qkv" in str(error.value)


def test_overflow_is_named(net: Small, x: Tensor) -> None:
    with pytest.raises(NonFiniteError, match="exp"):
        linearize(lambda x: net((1000 * x.abs() + 1000).exp()), x)


def test_nothing_is_multiplied_at_a_point_that_was_not_reached(x: Tensor, tangents: Tensor) -> None:
    linearization = linearize(lambda x: x.exp() * x, x)
    with pytest.raises(NonFiniteError, match="exp"):
        linearization.relinearize(1e4 * x.abs())
    with pytest.raises(SharpcoreError):
        linearization.jvp(tangents)
    assert relative_error(linearization.relinearize(x).jvp(tangents), tangents * x.exp() * (1 + x)) < 1e-13


def test_products_that_are_not_finite(x: Tensor, tangents: Tensor) -> None:
    """Finite values may have an infinite derivative (the square root at zero), or a product may overflow."""
    with pytest.raises(NonFiniteError):
        linearize(lambda x: x.relu().sqrt(), x).jvp(tangents)
    with pytest.raises(NonFiniteError):
        linearize(lambda x: 1e300 * x, x).jvp(1e300 * tangents)
    with pytest.raises(NonFiniteError):
        linearize(lambda x: 1e300 * x, x).vjp(1e300 * tangents)


def test_uninitialized_memory_is_not_an_error() -> None:
    """Classic attention multiplies an empty tensor by beta = 0; deterministic mode fills it with NaN."""
    case = networks.NETWORKS["classic_attention"].build(torch.float64)
    tangents = normal(2, *case.x.shape)
    expected = oracle_jvp(case.f, case.x, tangents)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        products = linearize(case.f, case.x).jvp(tangents)
    finally:
        torch.use_deterministic_algorithms(before)
    assert relative_error(products, expected) < 1e-12


# Weights.


def test_weights_changed_in_place(net: Small, x: Tensor, tangents: Tensor) -> None:
    """Products that mix old and new weights would be wrong, so nothing runs before linearizing again."""
    old = linearize(net, x)
    before = old.jvp(tangents)
    with torch.no_grad():
        net.stem.conv.weight.mul_(1.3)
    for use in (old.jvp, old.vjp, lambda t: old.relinearize(t[0])):
        with pytest.raises(InvalidInput, match=r"weight.*changed in place"):
            use(tangents)
    new = oracle_jvp(net, x, tangents)
    assert relative_error(new, before) > 1e-2
    assert relative_error(linearize(net, x).jvp(tangents), new) < 1e-12


def test_weights_replaced(net: Small, x: Tensor, tangents: Tensor) -> None:
    """A module that is given other parameter objects is not seen: the products stay those of the trace."""
    linearization = linearize(net, x)
    before = linearization.jvp(tangents)
    net.head.weight = nn.Parameter(2 * net.head.weight.detach())
    assert torch.equal(linearization.jvp(tangents), before)


def test_network_made_in_inference_mode(x: Tensor, tangents: Tensor) -> None:
    with torch.inference_mode():
        frozen = small_network()
    plain = small_network()
    linearization = linearize(lambda x: frozen(F.hardswish(x).cumsum(1)), x)
    expected = oracle_jvp(lambda x: plain(F.hardswish(x).cumsum(1)), x, tangents)
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12


def test_linearization_outlives_the_module(x: Tensor, tangents: Tensor) -> None:
    net = small_network()
    expected = oracle_jvp(net, x, tangents)
    linearization = linearize(lambda x, net=net: net(x), x)
    del net
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12


# Surroundings.


def test_global_state_is_left_alone(net: Small, x: Tensor, tangents: Tensor) -> None:
    def state() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_num_interop_threads(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.mkldnn.enabled,
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
            len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
            len(torch.overrides._get_current_function_mode_stack()),
            len(nn.modules.module._global_forward_hooks),
            len(nn.modules.module._global_forward_pre_hooks),
            F.scaled_dot_product_attention,
            nn.Module.__call__,
            nn.Module.forward,
        )

    before, random = state(), torch.random.get_rng_state()
    linearization = linearize(net, x)
    linearization.jvp(tangents)
    linearization.vjp(tangents)
    linearization.relinearize(2 * x)
    assert state() == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_two_threads_linearize_one_network() -> None:
    case = networks.NETWORKS["sd1"].build(torch.float64)
    assert case.module is not None
    points = [case.x, case.x2]
    tangents = normal(2, *case.x.shape)
    alone = [linearize(case.f, point) for point in points]
    expected = [(lin.value, lin.jvp(tangents), lin.vjp(tangents)) for lin in alone]
    start = threading.Barrier(2)
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            start.wait()
            for _ in range(4):
                lin = linearize(case.f, points[index])
                for got, want in zip(
                    (lin.value, lin.jvp(tangents), lin.vjp(tangents)), expected[index], strict=True
                ):
                    assert torch.equal(got, want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_another_thread_runs_the_network_meanwhile(net: Small, x: Tensor, tangents: Tensor) -> None:
    """A plain forward pass and a backward pass elsewhere neither see the trace nor appear in it."""
    expected_value, expected_product = net(x).detach(), oracle_jvp(net, x, tangents)
    inside, leave = threading.Event(), threading.Event()

    def f(x: Tensor) -> Tensor:
        hidden = net.stem(x)
        inside.set()
        leave.wait(30)
        return net.head(hidden)

    seen: dict[str, Any] = {}

    def elsewhere() -> None:
        inside.wait(30)
        try:
            leaf = x.clone().requires_grad_()
            value = net(leaf)
            value.sum().backward()
            seen["value"], seen["grad"] = value.detach(), leaf.grad
        finally:
            leave.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    linearization = linearize(f, x)
    thread.join()
    net.zero_grad()
    assert torch.equal(seen["value"], expected_value)
    assert seen["grad"] is not None
    expected = oracle_jvp(lambda x: net.head(net.stem(x)), x, tangents)
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    assert relative_error(expected, expected_product) > 1e-3


def test_repeats_are_bitwise_equal(net: Small, x: Tensor, tangents: Tensor) -> None:
    first, second = linearize(net, x), linearize(net, x)
    assert torch.equal(first.value, second.value)
    for _ in range(2):
        assert torch.equal(first.jvp(tangents), second.jvp(tangents))
        assert torch.equal(first.vjp(tangents), second.vjp(tangents))
    product = first.jvp(tangents)
    assert torch.equal(first.relinearize(x).jvp(tangents), product)


def test_inference_mode(net: Small, x: Tensor, tangents: Tensor) -> None:
    expected = oracle_jvp(net, x, tangents)
    pulled, further = oracle_vjp(net, x, tangents), oracle_jvp(net, 2 * x, tangents)
    with torch.inference_mode():
        linearization = linearize(net, x)
        assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    assert relative_error(linearization.vjp(tangents), pulled) < 1e-12
    outside = linearize(net, x)
    with torch.inference_mode():
        assert relative_error(outside.jvp(tangents), expected) < 1e-12
        assert relative_error(outside.relinearize(2 * x).jvp(tangents), further) < 1e-12


def test_autocast_around(net: Small, x: Tensor, tangents: Tensor) -> None:
    """A user's autocast region changes the precision at most; torch.func.jvp raises there (mixed dtypes)."""
    exact = oracle_jvp(net, x, tangents)
    low, point, vectors = net.float(), x.float(), tangents.float()
    with torch.autocast("cpu", torch.bfloat16):
        linearization = linearize(low, point)
        results = [linearization.jvp(vectors)]
    results.append(linearization.jvp(vectors))
    results.append(linearization.relinearize(point).jvp(vectors))
    for ours in results:
        assert relative_error(ours, exact) < 4 * 2**-8


def test_autocast_inside(net: Small, x: Tensor, tangents: Tensor) -> None:
    """The function's own autocast region is part of it: its dtypes stay, also when it is replayed."""
    exact = oracle_jvp(net, x, tangents)
    low, point, vectors = net.float(), x.float(), tangents.float()

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return low(x)

    linearization = linearize(f, point)
    for _ in range(2):
        assert linearization.value.dtype == torch.bfloat16
        assert relative_error(linearization.value, f(point)) <= 2**-8
        assert relative_error(linearization.jvp(vectors), exact) < 4 * 2**-8
        linearization.relinearize(point)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(net: Small, x: Tensor, tangents: Tensor, dtype: torch.dtype) -> None:
    low, point, low_tangents = net.to(dtype), x.to(dtype), tangents.to(dtype)
    exact = oracle_jvp(copy.deepcopy(low).double(), point.double(), low_tangents.double())
    plain = forward_mode_jvp(low, point, low_tangents)
    ours = linearize(low, point).jvp(low_tangents)
    assert ours.dtype == dtype
    assert_error_at_most(
        relative_error(ours, exact), relative_error(plain, exact), floor=4 * torch.finfo(dtype).eps
    )


def test_training_mode_dropout_is_one_fixed_mask_or_refused(x: Tensor) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        try:
            linearization = linearize(lambda x: F.dropout(x, 0.5, training=True), x)
        except SharpcoreError as error:
            if not re.search("dropout|bernoulli", str(error)):
                raise
            return
    assert torch.equal(linearization.jvp(x[None])[0], linearization.value)


def test_shape_explanation_and_size(net: Small, x: Tensor) -> None:
    linearization = linearize(net, x)
    text = linearization.explain()
    assert "convolution" in text
    assert "attention" in text
    assert linearization.nbytes > 0
    assert sharpcore.linearize(lambda x: 2 * x, x).nbytes <= x.nbytes


def test_explanation_with_times(net: Small, x: Tensor) -> None:
    linearization = linearize(net, x)
    plain, timed = linearization.explain(), linearization.explain(3)
    assert " ms " not in plain.splitlines()[0]
    assert "ms for K = 3" in timed
    kinds = [line for line in timed.splitlines() if line.startswith("  ") and line.endswith("%")]
    shares = [float(line.split()[-1].rstrip("%")) for line in kinds]
    assert abs(sum(shares) - 100) < 0.1 * len(shares)
    for bad in (0, -1, True, 1.5, "3"):
        with pytest.raises(InvalidInput, match="k"):
            linearization.explain(bad)  # type: ignore[arg-type]
