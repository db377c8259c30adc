"""bfloat16 products of a float32 network: their error, what they keep, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import oracle_jvp, oracle_vjp
from small_unet import prediction, vectors
from torch import Tensor, nn

from sharpcore import linearize
from sharpcore.errors import InvalidInput
from sharpcore.testing.tolerance import assert_error_at_most, relative_error


def test_error_is_at_most_twice_that_of_plain_bfloat16() -> None:
    """The rival: forward mode, and backward mode, through the network converted to bfloat16."""
    f, x = prediction()
    linearization = linearize(f, x, precision="bfloat16")
    exact, x64 = prediction(torch.float64)
    plain, x16 = prediction(torch.bfloat16)
    given = vectors(3, x16)
    for product, oracle in ((linearization.jvp, oracle_jvp), (linearization.vjp, oracle_vjp)):
        expected = oracle(exact, x64, given.double())
        ours = relative_error(product(given.float()), expected)
        theirs = relative_error(oracle(plain, x16, given), expected)
        # Measured: 0.7 of the plain error for jvp, 0.6 for vjp, which are 0.8 and 0.9 percent.
        assert_error_at_most(ours, theirs, factor=2.0)
        assert ours > 1e-4  # the products are not float32 in disguise


@pytest.mark.parametrize("gain", [1.0, 4.0, 8.0])
def test_error_with_peaked_attention(gain: float) -> None:
    """Logits far from zero: the statistics of a row have to be those of its rounded scores."""
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn((1, 2, 64, 16), generator=generator)

    def attend(x: Tensor) -> Tensor:
        k = keys.to(x.dtype)
        return F.scaled_dot_product_attention(gain * x, k + 0.5 * x, k - x)

    x = (keys + 0.1 * torch.randn(keys.shape, generator=generator)).bfloat16()
    given = vectors(2, x)
    ours = linearize(attend, x.float(), precision="bfloat16")
    for product, oracle in ((ours.jvp, oracle_jvp), (ours.vjp, oracle_vjp)):
        expected = oracle(attend, x.double(), given.double())
        error = relative_error(product(given.float()), expected)
        plain = relative_error(oracle(attend, x, given), expected)
        assert_error_at_most(error, plain, factor=2.0, floor=2**-8)


def test_a_part_in_another_precision() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        inner = nn.Linear(6, 6).to(dtype)
        x = vectors(1, torch.zeros(5, 6))[0]

        def f(x: Tensor, inner: nn.Module = inner, dtype: torch.dtype = dtype) -> Tensor:
            return inner(x.to(dtype)).float()

        exact, rounded = linearize(f, x), linearize(f, x, precision="bfloat16")
        for _ in range(2):
            assert relative_error(rounded.jvp(vectors(2, x)), exact.jvp(vectors(2, x))) < 2e-2
            assert relative_error(rounded.vjp(vectors(2, x)), exact.vjp(vectors(2, x))) < 2e-2


def test_the_value_is_that_of_float32() -> None:
    f, x = prediction()
    linearization = linearize(f, x, precision="bfloat16")
    assert relative_error(linearization.value, f(x).detach()) < 1e-5
    assert linearization.jvp(vectors(1, x)).dtype == torch.float32
    linearization.relinearize(2 * x)
    assert relative_error(linearization.value, f(2 * x).detach()) < 1e-5


def test_residuals_take_half_the_memory() -> None:
    f, x = prediction()
    assert linearize(f, x, precision="bfloat16").residual_bytes < 0.6 * linearize(f, x).residual_bytes


def test_one_vector_gives_the_numbers_that_it_gives_among_others() -> None:
    f, x = prediction()
    linearization = linearize(f, x, precision="bfloat16")
    given = vectors(4, x)
    assert relative_error(linearization.jvp(given[:1]), linearization.jvp(given)[:1]) < 1e-2


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.double().sin().float() * x,  # an island in another precision
        lambda x: torch.special.i0(x),  # a derivative by autograd
        lambda x: torch.linalg.svdvals(x),
        lambda x: x.flatten().cumsum(0).softmax(0),
        lambda x: (x @ x.T).tril().logsumexp(-1),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 4, 2)),
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Hardswish()),
    ],
)
def test_other_operations(f: object) -> None:
    """Operations without bfloat16 maps of their own take float32 and are right to a rounding."""
    x = vectors(1, torch.zeros(5, 6))[0]
    assert callable(f)
    exact, rounded = linearize(f, x), linearize(f, x, precision="bfloat16")
    for _ in range(2):
        expected = exact.jvp(vectors(2, x))
        # Measured at most 7e-3.
        assert relative_error(rounded.jvp(vectors(2, x)), expected) < 2e-2
        cotangents = vectors(2, exact.value)
        assert relative_error(rounded.vjp(cotangents), exact.vjp(cotangents)) < 2e-2


def test_what_is_refused() -> None:
    f, x = prediction()
    with pytest.raises(InvalidInput, match="precision: expected one of float32, bfloat16; got 'half'"):
        linearize(f, x, precision="half")
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(InvalidInput, match="float32 network"):
            linearize(lambda x: x.sin(), x.to(dtype), precision="bfloat16")
