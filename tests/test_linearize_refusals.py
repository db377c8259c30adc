"""Operations that are easy to get silently wrong: complex factors, partial writes, training mode, ways around
ATen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_network import normal
from torch import Tensor, nn

from sharpcore import InvalidInput, UnsupportedOperation, linearize, program
from sharpcore.testing.tolerance import relative_error


@pytest.fixture
def x() -> Tensor:
    return normal(2, 3, 4)


def complex_constant() -> Tensor:
    return torch.complex(normal(4, seed=5), normal(4, seed=6))


COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "tensor": lambda x: (torch.fft.fft(x) * complex_constant()).real,
    "number": lambda x: (torch.fft.fft(x) * (1 + 2j)).imag,
    "division": lambda x: (torch.fft.fft(x) / complex_constant()).exp().real,
    "product of two": lambda x: (torch.fft.fft(x) * torch.fft.ifft(x * x).conj()).imag,
    "matrix": lambda x: (torch.fft.fft(x) @ complex_constant().reshape(4, 1)).real,
    "linear": lambda x: nn.functional.linear(torch.fft.fft(x), complex_constant().reshape(1, 4)).imag,
    "rotary": lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(2, 3, 2, 2)) * complex_constant()[:2]
    ),
    "real into complex": lambda x: (torch.zeros_like(x, dtype=torch.complex128).copy_(x) * 1j).imag * x,
}


@pytest.mark.parametrize("name", list(COMPLEX))
def test_complex_factors(x: Tensor, name: str) -> None:
    f = COMPLEX[name]
    linearization = linearize(f, x)
    tangents = normal(2, *x.shape, seed=7)
    expected = torch.stack([torch.func.jvp(f, (x,), (t,))[1] for t in tangents])
    assert relative_error(linearization.jvp(tangents), expected) < 1e-12
    cotangents = normal(2, *expected.shape[1:], seed=8)
    leaf = x.clone().requires_grad_()
    for u, pulled in zip(cotangents, linearization.vjp(cotangents), strict=True):
        (gradient,) = torch.autograd.grad(f(leaf), leaf, u)
        assert relative_error(pulled, gradient) < 1e-12


def test_pointwise_operations_keep_a_factor(x: Tensor) -> None:
    assert "Scale" in linearize(lambda x: nn.functional.mish(x.sin()), x).explain()
    assert "AutogradFallback" not in linearize(lambda x: nn.functional.mish(x.sin()), x).explain()


@pytest.mark.parametrize(
    "f", [lambda x: torch.cdist(x, x), lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1)]
)
def test_operations_that_pytorch_cannot_differentiate_twice_are_refused_at_once(x: Tensor, f: Any) -> None:
    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    with pytest.raises(UnsupportedOperation, match=r"cdist|zeta") as error:
        linearize(nn.Sequential(nn.Identity(), Inside()), x)
    assert "Sequential.1" in str(error.value)


def test_constant_tensor_written_into_part_of_an_active_one(x: Tensor) -> None:
    constant = normal(3, 4, seed=9)

    def f(x: Tensor) -> Tensor:
        y = x.clone()
        y[0] = constant
        return y * x

    tangents = normal(1, *x.shape, seed=7)
    expected = 2 * x * tangents
    expected[:, 0] = constant * tangents[:, 0]
    linearization = linearize(f, x)
    assert relative_error(linearization.jvp(tangents), expected) < 1e-14
    assert relative_error(linearization.vjp(tangents), expected) < 1e-14


def test_batch_norm(x: Tensor) -> None:
    norm = nn.BatchNorm1d(3).double().train()
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    with pytest.raises(UnsupportedOperation, match=r"batch_norm.*eval"):
        linearize(norm, x)
    assert torch.equal(norm.running_mean, mean)
    assert torch.equal(norm.running_var, variance)
    linearization = linearize(norm.eval(), x)
    tangents = normal(1, *x.shape, seed=7)
    assert relative_error(linearization.jvp(tangents), tangents / (1 + norm.eps) ** 0.5) < 1e-14


def test_weight_behind_a_parametrization_is_watched(x: Tensor) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).double())
    linearization = linearize(layer, x)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    with pytest.raises(InvalidInput, match="linearize it again"):
        linearization.relinearize(x)
    with pytest.raises(InvalidInput, match="linearize it again"):
        linearization.jvp(x[None])


def write_through(alias: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        alias(y).mul_(2)
        return y * x

    return f


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "detach": (write_through(lambda y: y.detach()), "detach"),
    "part of detach": (write_through(lambda y: y.detach()[0]), "detach"),
    "data": (write_through(lambda y: y.data), "detach"),
    "cond": (lambda x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)), "cond"),
    "sparse": (lambda x: x.to_sparse().to_dense(), "sparse"),
    "unsqueeze in place": (lambda x: x.clone().unsqueeze_(0) * 2, "unsqueeze_"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_by_name(x: Tensor, name: str) -> None:
    f, word = REFUSED[name]
    with pytest.raises(UnsupportedOperation, match=word):
        linearize(f, x)


def test_recovers_after_an_interrupted_relinearize(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    linearization = linearize(lambda x: x.sin() * x, x)
    tangents = normal(1, *x.shape, seed=7)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "build_map", interrupt)
        with pytest.raises(KeyboardInterrupt):
            linearization.relinearize(2 * x)
    with pytest.raises(InvalidInput, match="relinearize"):
        linearization.jvp(tangents)
    expected = tangents * (x.sin() + x * x.cos())
    assert relative_error(linearization.relinearize(x).jvp(tangents), expected) < 1e-14


def test_ordinary_tensors_only(x: Tensor) -> None:
    with pytest.raises(InvalidInput, match="layout"):
        linearize(lambda x: x, x.to_sparse())
    with pytest.raises(InvalidInput, match="layout"):
        linearize(lambda x: x, x).jvp(x[None].to_sparse())
