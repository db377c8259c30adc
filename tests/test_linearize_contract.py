"""What linearize promises about its tangents, its point and its function, and which errors it raises."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import oracle_jvp
from small_network import Small, normal, small_network
from torch import Tensor, nn

from sharpcore import InvalidInput, NonFiniteError, UnsupportedOperation, linearize
from sharpcore.testing.tolerance import relative_error

BAD_NUMBER = (InvalidInput, NonFiniteError)


@pytest.fixture
def net() -> Small:
    return small_network()


@pytest.fixture
def x() -> Tensor:
    return normal(2, 3, 5, 4)


@pytest.fixture
def tangents() -> Tensor:
    return normal(3, 2, 3, 5, 4, seed=2)


# Tangents and cotangents.


@pytest.mark.parametrize(
    "bad",
    [
        normal(2, 3, 5, 4),
        normal(3, 2, 3, 5, 5),
        normal(3, 2, 3, 20),
        normal(3, 1, 3, 5, 4),
        normal(3, 2, 3, 5, 4).float(),
        normal(3, 2, 3, 5, 4).to(torch.complex128),
        torch.ones(3, 2, 3, 5, 4, dtype=torch.long),
        normal(3, 2, 3, 5, 4).to("meta"),
        normal(0, 2, 3, 5, 4),
        None,
        [1.0, 2.0],
    ],
    ids=["no K", "shape", "flat", "batch", "float32", "complex", "integer", "meta", "K = 0", "None", "list"],
)
@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_bad_vectors_are_refused(net: Small, x: Tensor, bad: Any, product: str) -> None:
    linearization = linearize(net, x)
    with pytest.raises(InvalidInput) as error:
        getattr(linearization, product)(bad)
    assert ("tangents" if product == "jvp" else "cotangents") in str(error.value)
    if isinstance(bad, Tensor) and bad.shape[1:] != x.shape:
        assert "2, 3, 5, 4" in str(error.value), "the message says which shape was expected"
    assert relative_error(linearization.jvp(x[None]), oracle_jvp(net, x, x[None])) < 1e-12


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_vectors_that_are_not_finite(
    net: Small, x: Tensor, tangents: Tensor, number: float, product: str
) -> None:
    tangents[1, 0, 2, 3, 1] = number
    with pytest.raises(BAD_NUMBER):
        getattr(linearize(net, x), product)(tangents)


def test_layout_and_grad_flag_of_tangents_do_not_matter(net: Small, x: Tensor, tangents: Tensor) -> None:
    linearization = linearize(net, x)
    expected = linearization.jvp(tangents)
    strided = normal(4, 5, 3, 2, 6, seed=2).permute(4, 3, 2, 1, 0)[::2]
    strided.copy_(tangents)
    assert not strided.is_contiguous()
    assert relative_error(linearization.jvp(strided), expected) < 1e-13
    assert relative_error(linearization.vjp(strided), linearization.vjp(tangents)) < 1e-13
    expanded = tangents[:1].expand(3, -1, -1, -1, -1)
    assert relative_error(linearization.jvp(expanded), expected[:1].expand(3, -1, -1, -1, -1)) < 1e-13
    differentiable = tangents.clone().requires_grad_()
    result = linearization.jvp(differentiable)
    assert not result.requires_grad
    assert differentiable.grad is None
    assert relative_error(result, expected) < 1e-13


def test_products_own_their_memory(net: Small, x: Tensor, tangents: Tensor) -> None:
    for f in (net, lambda x: x, lambda x: x[:, 1:]):
        linearization = linearize(f, x)
        kept = tangents.clone()
        first = linearization.jvp(tangents)
        expected = first.clone()
        linearization.jvp(normal(3, 2, 3, 5, 4, seed=9))
        linearization.vjp(torch.ones(1, *linearization.value.shape, dtype=x.dtype))
        assert torch.equal(first, expected), "a later product overwrote an earlier result"
        first.fill_(7.0)
        assert torch.equal(tangents, kept), "a result shares memory with the tangents"
        assert torch.equal(linearization.jvp(tangents), expected)


def test_value_owns_its_memory(x: Tensor) -> None:
    kept = x.clone()
    linearize(lambda x: x, x).value.fill_(5.0)
    assert torch.equal(x, kept)


# The point.


def test_bad_points_are_refused(net: Small, x: Tensor) -> None:
    for bad in (x.long(), x.to(torch.complex128), x.to("meta"), x[:0], None, [1.0]):
        with pytest.raises(InvalidInput):
            linearize(net, bad)
    for number in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 2, 0, 3] = number
        with pytest.raises(BAD_NUMBER):
            linearize(net, bad)
        with pytest.raises(BAD_NUMBER):
            linearize(net, x).relinearize(bad)


def test_relinearize_checks_its_point(net: Small, x: Tensor, tangents: Tensor) -> None:
    linearization = linearize(net, x)
    expected = linearization.jvp(tangents)
    for bad in (normal(2, 3, 4, 5), normal(1, 3, 5, 4), x.float(), x.to("meta"), None):
        with pytest.raises(InvalidInput):
            linearization.relinearize(bad)
    assert torch.equal(linearization.jvp(tangents), expected), (
        "a refused point leaves the linearization usable"
    )
    assert linearization.relinearize(2 * x) is linearization


def test_unknown_backend(net: Small, x: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"backend.*reference"):
        linearize(net, x, backend="abacus")


def test_later_changes_of_the_point_do_not_matter(net: Small, x: Tensor, tangents: Tensor) -> None:
    for f in (net, lambda x: x * x, lambda x: x.flatten(2).square()):
        expected = oracle_jvp(f, x, tangents)
        point = x.clone()
        linearization = linearize(f, point)
        point.mul_(-3).add_(1)
        assert relative_error(linearization.jvp(tangents), expected) < 1e-12
        point = (2 * x).clone()
        expected = oracle_jvp(f, point, tangents)
        linearization.relinearize(point)
        point.zero_()
        assert relative_error(linearization.jvp(tangents), expected) < 1e-12


def test_point_may_require_grad(net: Small, x: Tensor, tangents: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    linearization = linearize(net, leaf)
    assert relative_error(linearization.jvp(tangents), oracle_jvp(net, x, tangents)) < 1e-12
    assert not linearization.value.requires_grad
    assert leaf.grad is None


def test_non_contiguous_point(net: Small, x: Tensor, tangents: Tensor) -> None:
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    linearization = linearize(net, strided)
    assert relative_error(linearization.jvp(tangents), oracle_jvp(net, x, tangents)) < 1e-12


# The function.


@pytest.mark.parametrize("result", [None, 3.0, "text", (1.0,), {"sample": 2}], ids=type)
def test_function_must_return_a_tensor(x: Tensor, result: Any) -> None:
    with pytest.raises(InvalidInput, match=type(result).__name__):
        linearize(lambda x: result, x)


def test_function_must_return_floating_point(x: Tensor) -> None:
    with pytest.raises(InvalidInput, match=r"bool|int"):
        linearize(lambda x: x > 0, x)
    with pytest.raises(InvalidInput, match="callable"):
        linearize("not a function", x)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_error_of_the_function_passes_through(net: Small, x: Tensor, grad_enabled: bool) -> None:
    def f(x: Tensor) -> Tensor:
        net(x)
        raise KeyError("from inside")

    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(KeyError, match="from inside"):
            linearize(f, x)
        assert torch.is_grad_enabled() is grad_enabled
        # Nothing of the failed trace is left behind.
        assert relative_error(linearize(net, x).value, net(x).detach()) < 1e-13
        assert (net(x).requires_grad) is grad_enabled


def test_function_that_ignores_its_argument(x: Tensor, tangents: Tensor) -> None:
    linearization = linearize(lambda x: torch.ones(2, 7, dtype=x.dtype), x)
    assert torch.equal(linearization.jvp(tangents), torch.zeros(3, 2, 7, dtype=x.dtype))
    assert torch.equal(linearization.vjp(normal(4, 2, 7)), torch.zeros(4, *x.shape, dtype=x.dtype))


def test_function_that_writes_into_its_argument(x: Tensor, tangents: Tensor) -> None:
    kept = x.clone()
    linearization = linearize(lambda x: x.mul_(2) + x.sin(), x)
    for point in (x, -kept):
        linearization.relinearize(point)
        expected = tangents * (2 + 2 * (2 * point).cos())
        assert relative_error(linearization.jvp(tangents), expected) < 1e-13
    assert torch.equal(x, kept)


def test_autograd_function(x: Tensor, tangents: Tensor) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x**3

    assert relative_error(linearize(Cube.apply, x).jvp(tangents), 3 * x.square() * tangents) < 1e-13


class Plain(Tensor):
    """A tensor subclass that changes nothing."""


def with_data(x: Tensor) -> Tensor:
    result = torch.empty_like(x)
    result.data = x
    return result


ESCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": lambda x: x * torch.from_numpy(x.sin().numpy()),
    "detached numpy": lambda x: x * torch.from_numpy(x.sin().detach().numpy()),
    "tolist": lambda x: x * torch.tensor(x.sin().tolist(), dtype=x.dtype),
    "dlpack": lambda x: x * torch.from_dlpack(x.sin()),
    "deepcopy": lambda x: x * copy.deepcopy(x.sin()),
    "pickle": lambda x: x * pickle.loads(pickle.dumps(x.sin())),
    "parameter": lambda x: x * nn.Parameter(x.sin()),
    "subclass": lambda x: (x * x.sin().as_subclass(Plain)).as_subclass(Tensor),
    "storage": lambda x: x * torch.empty_like(x).set_(x.sin().untyped_storage(), 0, x.shape, x.stride()),
    "reinterpreted": lambda x: x * x.sin().view(torch.int64).view(x.dtype),
    "data": lambda x: x * with_data(x.sin()),
}


@pytest.mark.parametrize("name", list(ESCAPES))
def test_values_that_leave_torch_are_not_lost(x: Tensor, tangents: Tensor, name: str) -> None:
    """A factor that takes a way around torch is differentiated or refused, never taken for a constant."""
    try:
        product = linearize(ESCAPES[name], x).jvp(tangents)
    except UnsupportedOperation:
        return
    assert relative_error(product, tangents * (x.sin() + x * x.cos())) < 1e-13


def test_another_layout_of_the_point(net: Small, x: Tensor, tangents: Tensor) -> None:
    """The recorded operations were chosen for the strides of the first point."""
    by_channel = x.contiguous(memory_format=torch.channels_last)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    functions = [net, lambda x: x.view(2, -1).sin(), lambda x: x.reshape(2, 4, 15) * x.sum()]
    functions += [lambda x: x.contiguous().as_strided((2, 6, 5), (60, 5, 1)).sin()]
    for f in functions:
        expected = oracle_jvp(f, x, tangents)
        linearization = linearize(f, x)
        for point in (by_channel, transposed, x[:].clone()):
            linearization.relinearize(point)
            assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    for f in (net, lambda x: x.reshape(2, 4, 15) * x.sum()):
        linearization = linearize(f, by_channel)
        for point in (x, transposed):
            linearization.relinearize(point)
            assert relative_error(linearization.jvp(tangents), oracle_jvp(f, x, tangents)) < 1e-12


def test_number_read_from_a_differentiable_tensor(net: Small, x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        hidden = net.stem(x)
        return net.head(hidden) * hidden.mean().item()

    with pytest.raises(UnsupportedOperation, match=r"item|local_scalar"):
        linearize(f, x)


def test_branch_on_a_differentiable_tensor(net: Small, x: Tensor, tangents: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        hidden = net.stem(x)
        return net.head(hidden.sin() if x.sum() > 0 else hidden * hidden)

    up, down = x + 1, x - 1
    linearization = linearize(f, up)
    for point in (up, down, up):
        linearization.relinearize(point)
        assert relative_error(linearization.jvp(tangents), oracle_jvp(f, point, tangents)) < 1e-12


def test_bound_arguments(net: Small, x: Tensor, tangents: Tensor) -> None:
    def f(x: Tensor, shift: Tensor, gain: Tensor) -> Tensor:
        return net(x * gain + shift)

    shift, other = normal(2, 3, 1, 1, seed=5), normal(2, 3, 1, 1, seed=6)
    gain, stronger = (
        torch.tensor([0.5, 2.0]).view(2, 1, 1, 1).double(),
        torch.full((2, 1, 1, 1), 0.7).double(),
    )
    linearization = linearize(f, x, shift, gain)
    expected = oracle_jvp(lambda x: f(x, shift, gain), x, tangents)
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    linearization.relinearize(2 * x, other, stronger)
    expected = oracle_jvp(lambda x: f(x, other, stronger), 2 * x, tangents)
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    # Without bound arguments those in use are kept.
    expected = oracle_jvp(lambda x: f(x, other, stronger), x, tangents)
    assert relative_error(linearization.relinearize(x).jvp(tangents), expected) < 1e-12
    for bad in [(shift,), (shift, gain[:1]), (shift.float(), gain), (shift, 0.5), (shift, None)]:
        with pytest.raises(InvalidInput, match="bound"):
            linearization.relinearize(x, *bad)
    with pytest.raises(InvalidInput, match="bound"):
        linearize(f, x, shift, 0.5)  # type: ignore[arg-type]


@pytest.fixture
def custom_cube() -> Iterator[Callable[[Tensor], Tensor]]:
    with torch.library._scoped_library("sharpcore_tests", "DEF") as library:
        library.define("cube(Tensor x) -> Tensor")
        library.impl("cube", lambda x: x**3, "CPU")
        yield lambda x: torch.ops.sharpcore_tests.cube(x)


def test_custom_operation_is_named(net: Small, x: Tensor, custom_cube: Callable[[Tensor], Tensor]) -> None:
    class Cube(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return custom_cube(x)

    net.stem.norm = nn.Sequential(net.stem.norm, Cube())
    with pytest.raises(UnsupportedOperation) as error:
        linearize(net, x)
    assert "sharpcore_tests" in str(error.value)
    assert "cube" in str(error.value)
    assert "stem.norm.1" in str(error.value)
