"""Products in planned memory: the numbers of the first one, no allocations, nothing stale, thread-safe."""

from __future__ import annotations

import contextlib
import threading
import weakref

import pytest
import torch
from kernel_checks import NoAllocation, needs_extension
from oracles import oracle_jvp, oracle_vjp
from small_unet import prediction, vectors
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sharpcore import linearize
from sharpcore.errors import InvalidInput
from sharpcore.rules.linear import Convolution
from sharpcore.testing.tolerance import relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_repeated_products_give_the_first_ones_numbers(dtype: torch.dtype) -> None:
    f, x = prediction(dtype)
    linearization = linearize(f, x)
    first: dict[tuple[int, bool], Tensor] = {}
    for k in (1, 3, 1, 5, 3, 1, 5):
        for transposed in (False, True):
            product = linearization.vjp if transposed else linearization.jvp
            result = product(vectors(k, x))
            assert torch.equal(first.setdefault((k, transposed), result), result)
    # What was returned is the caller's own memory.
    kept = first[1, False].clone()
    linearization.jvp(7 * vectors(1, x))
    assert torch.equal(first[1, False], kept)
    f64, x64 = prediction(torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    given = vectors(5, x64)
    assert relative_error(first[5, False], oracle_jvp(f64, x64, given)) < tolerance
    assert relative_error(first[5, True], oracle_vjp(f64, x64, given)) < tolerance


def test_a_new_point_after_many_products() -> None:
    """What a plan remembers of the old point must not be used at the new one."""
    f, x = prediction()
    linearization = linearize(f, x)
    tangents = vectors(2, x)
    for point in (x, 2 * x, x + 1, x):
        linearization.relinearize(point)
        fresh = linearize(f, point)
        for _ in range(4):
            assert torch.equal(linearization.jvp(tangents), fresh.jvp(tangents))
            assert torch.equal(linearization.vjp(tangents), fresh.vjp(tangents))


def test_a_smaller_product_keeps_its_plan_when_a_larger_one_comes() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    expected = linearization.jvp(vectors(1, x))
    linearization.jvp(vectors(6, x))
    plan = linearization._workspace._plans[1, False]
    for _ in range(3):
        assert torch.equal(linearization.jvp(vectors(1, x)), expected)
    assert linearization._workspace._plans[1, False] is plan


@pytest.mark.parametrize("steps", [1, 4])
def test_a_weight_with_other_memory_is_noticed(steps: int) -> None:
    """`.data =`, `.to()` and the like change no version counter."""
    net = nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(4, 32), nn.SiLU(), nn.Conv2d(32, 4, 1))
    x = vectors(1, torch.zeros(1, 4, 9, 9))[0]
    linearization = linearize(net, x)
    for _ in range(steps):
        linearization.jvp(vectors(1, x))
    net[1].weight.data = net[1].weight.data.clone()
    for call in (
        lambda: linearization.jvp(vectors(1, x)),
        lambda: linearization.relinearize(2 * x),
    ):
        with pytest.raises(InvalidInput, match="other memory"):
            call()


def test_the_memory_of_an_old_point_is_given_back() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    for _ in range(4):
        linearization.jvp(vectors(1, x))
    old = [
        weakref.ref(instruction)
        for node, instruction in zip(linearization.program.nodes, linearization._residuals, strict=True)
        if instruction is not None and not node.fixed
    ]
    linearization.relinearize(2 * x)
    assert [reference for reference in old if reference() is not None] == []


CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise": {"kernel_size": 5, "groups": 16, "padding": 2},
    "uneven": {"kernel_size": (1, 4), "padding": (0, 2)},
    "over-padded": {"kernel_size": 2, "padding": 2},
    "unpadded": {"kernel_size": 4},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("geometry", list(CONVOLUTIONS))
def test_packed_convolutions(geometry: str, precision: str) -> None:
    settings = CONVOLUTIONS[geometry]
    net = nn.Sequential(nn.Conv2d(4, 16, 1), nn.Conv2d(16, 32, **settings), nn.GELU(), nn.Conv2d(32, 3, 1))
    x = vectors(1, torch.zeros(2, 4, 11, 9))[0]
    linearization = linearize(net, x, precision=precision)
    exact = net.double()
    tangents, cotangents = vectors(3, x), vectors(3, linearization.value)
    expected = oracle_jvp(exact, x.double(), tangents.double())
    pulled = oracle_vjp(exact, x.double(), cotangents.double())
    # Measured at most 3e-7 and 6e-3.
    tolerance = 2e-6 if precision == "float32" else 2e-2
    for parameter in net.float().parameters():
        assert parameter.dtype == torch.float32
    linearization = linearize(net, x, precision=precision)
    for _ in range(3):
        assert relative_error(linearization.jvp(tangents), expected) < tolerance
        assert relative_error(linearization.vjp(cotangents), pulled) < tolerance


def test_vectors_may_lie_in_memory_in_any_way() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    given = vectors(3, x)
    expected = linearization.jvp(given)
    for other in (
        given.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([given, given], 1)[:, 0],
        given.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2)),
    ):
        assert torch.equal(linearization.jvp(other), expected)
        assert torch.equal(linearize(f, x).jvp(other), expected)


def test_nothing_is_read_that_the_product_did_not_write() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    for product in (linearization.jvp, linearization.vjp):
        expected = product(vectors(2, x))
        memory = linearization._workspace._memory
        assert memory is not None
        memory.fill_(255)  # NaN in every floating dtype
        assert torch.equal(product(vectors(2, x)), expected)


@needs_extension
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_repeated_product_allocates_its_result_alone(k: int, precision: str) -> None:
    f, x = prediction()
    linearization = linearize(f, x, precision=precision)
    given = vectors(k, x)
    linearization.jvp(given)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        linearization.jvp(given)
    allocated = sum(
        event.self_cpu_memory_usage for event in profiled.events() if event.self_cpu_memory_usage > 0
    )
    # The result, the vectors in the dtype of the products, and twice what torch.isfinite takes; a tangent
    # of the network's first layer would be more.
    assert allocated <= 6 * given.nbytes < k * 2 * 32 * 16 * 16 * 4


@needs_extension
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_no_instruction_of_a_repeated_product_makes_a_tensor(transposed: bool, precision: str) -> None:
    f, x = prediction()
    linearization = linearize(f, x, precision=precision)
    for _ in range(3):
        (linearization.vjp if transposed else linearization.jvp)(vectors(2, x))
    plan = linearization._workspace._plans[2, transposed]
    assert plan is not None
    expected = plan.result.clone()
    strided = []
    with torch.no_grad():
        plan.start.copy_(vectors(2, x))
        for step in plan.instructions:
            if transposed and isinstance(step.of, Convolution) and set(step.of.geometry[0]) != {1}:
                strided.append(step)
            with contextlib.nullcontext() if step in strided else NoAllocation():
                for call in step.calls:
                    call()
    assert len(strided) == transposed  # PyTorch's own transposed convolution gives a tensor of its own
    assert torch.equal(plan.result, expected)


def test_repeated_products_are_prepared_calls() -> None:
    """Of both directions, until the point, the memory or the number of threads is another."""
    f, x = prediction()
    linearization = linearize(f, x)
    plans = linearization._workspace._plans
    for transposed, product in ((False, linearization.jvp), (True, linearization.vjp)):
        expected = product(vectors(1, x))
        for _ in range(3):
            product(vectors(1, x))
        plan = plans[1, transposed]
        assert plan is not None
        assert plan.calls
        plan.calls = plan.calls[:-1]  # the last one writes the product
        assert not torch.equal(product(vectors(1, x)), expected)
        linearization.relinearize(x)
        assert plan.calls == ()
        for _ in range(4):
            assert torch.equal(product(vectors(1, x)), expected)
        assert plan.calls
        product(vectors(20 if transposed else 10, x))  # moves all plans to a larger workspace
        assert plan.calls == ()
        for _ in range(3):
            assert torch.equal(product(vectors(1, x)), expected)
        assert plan.calls
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(before + 1)
            plan.prepare()
        finally:
            torch.set_num_threads(before)
        assert plan.calls == ()


def test_first_products_are_timed_and_later_ones_on_demand() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    assert " ms " not in linearization.program.explain()
    for _ in range(4):
        linearization.jvp(vectors(2, x))
        assert "ms for K = 2, in the last product" in linearization.program.explain()
    timing = linearization.program.timing
    linearization.jvp(vectors(2, x))
    assert linearization.program.timing is timing
    linearization.explain(2)
    assert linearization.program.timing is not timing
    assert "ms for K = 2" in linearization.program.explain()
    linearization.vjp(vectors(2, x))
    assert "in the last transposed product" in linearization.program.explain()


def test_the_workspace_holds_what_is_alive_together() -> None:
    layers = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(20)))
    x = vectors(1, torch.zeros(1, 8, 16, 16))[0]
    linearization = linearize(layers, x)
    linearization.jvp(vectors(4, x))
    # Two tangents at a time, of the 21 that there are.
    assert linearization._workspace.nbytes <= 2 * 4 * x.nbytes + 256


def test_several_threads_share_a_linearization() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    given = [vectors(2, x, seed) for seed in range(6)]
    expected = [linearization.jvp(g) for g in given]
    wrong: list[int] = []

    def multiply(number: int) -> None:
        wrong.extend(
            number for _ in range(4) if not torch.equal(linearization.jvp(given[number]), expected[number])
        )

    threads = [threading.Thread(target=multiply, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_product_does_not_wait_for_another_one() -> None:
    f, x = prediction()
    linearization = linearize(f, x)
    expected = linearization.jvp(vectors(1, x))
    with linearization._workspace._lock:
        assert torch.equal(linearization.jvp(vectors(1, x)), expected)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.expand(3, -1) + x.sin(),  # a view with strides of zero that another instruction reads
        lambda x: x.sum() + x,  # a broadcast sum
        lambda x: torch.stack([x, x.cos(), x])[::2].transpose(0, 1) @ x[0, :3],
        lambda x: x + x + x,
        lambda x: (x * 2).T + (x * 2).T.contiguous(),
        lambda x: x,
        lambda x: x[:, 1:3],
        lambda x: torch.cat([x.sin(), x[:, :0]], 1),
        lambda x: torch.cat([x.sin(), x[:, :1].cos(), x], 1) - x.sin()[:, :1],
        lambda x: torch.cat([x[None, None], x.sin()[None, None]], 1).square().flatten(1),
        lambda x: x * x.sin() - x.cos() * x.mean(),  # sums of scales, some broadcast
        lambda x: (-x.exp()).T.reshape(9) * x.flatten(),  # a reshape that copies
        lambda x: torch.cat(x.sin().unbind(0)[::-1]) * 3,
        lambda x: x.exp()[::2] + x.exp()[1:],
        lambda x: x.to(torch.complex128).real * 2 + (x * 1j).imag,
    ],
)
def test_views_and_sums(f: object) -> None:
    x = vectors(1, torch.zeros(3, 3, dtype=torch.float64))[0]
    assert callable(f)
    linearization = linearize(f, x)
    tangents = vectors(4, x)
    expected = oracle_jvp(f, x, tangents)
    cotangents = vectors(4, expected[0])
    pulled = oracle_vjp(f, x, cotangents)
    for _ in range(5):
        assert relative_error(linearization.jvp(tangents), expected) < 1e-14
        assert relative_error(linearization.vjp(cotangents), pulled) < 1e-14
